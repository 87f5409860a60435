"""The Trainer's door: a thin callback around `Cuttlefish`. Events in, calls out."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from . import trainer
from .config import CuttlefishConfig
from .cuttlefish import Cuttlefish
from .decide.plan import RankPlan
from .engines.find import will_fix_structure
from .patch.report import FactorizationReport
from .saving.companions import remember
from .saving.following import follow_checkpoints

logger = logging.getLogger(__name__)


class CuttlefishCallback(TrainerCallback, ExportableState):
    """Watch the stable ranks, switch in the middle of the run, train on low rank: `Trainer(callbacks=[CuttlefishCallback()])`.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[CuttlefishCallback()])
        trainer.train()

    Args:
        config: a CuttlefishConfig (or its dictionary); None for the defaults.

    Attributes:
        plan, switch_step, history, report, reason: as of `Cuttlefish`; they can be read during and after training.
        restart_from: with switch="restart", the checkpoint folder from which a new Trainer goes on; None once it has.

    Raises:
        TypeError: config is something else. At the start of training: as `Cuttlefish`.
    """

    def __init__(self, config: CuttlefishConfig | dict[str, Any] | None = None) -> None:
        self.config = CuttlefishConfig.coerce(config)
        self.cuttlefish: Cuttlefish | None = None
        self.restart_from: str | None = None
        self._saved: dict[str, Any] | None = None
        self._trainer: tuple[TrainingArguments, TrainerState] | None = None
        self._full_rank: dict[str, Any] | None = None
        self._is_due = False

    @property
    def plan(self) -> RankPlan | None:
        return self.cuttlefish.plan if self.cuttlefish else None

    @property
    def switch_step(self) -> int | None:
        return self.cuttlefish.switch_step if self.cuttlefish else None

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.cuttlefish.history if self.cuttlefish else []

    @property
    def report(self) -> FactorizationReport | None:
        return self.cuttlefish.report if self.cuttlefish else None

    @property
    def reason(self) -> str | None:
        return self.cuttlefish.reason if self.cuttlefish else None

    # --- Trainer's events: (args, state, control, **what it has) ---

    def on_init_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Between here and the loading of a checkpoint's weights there is no event: let the weights choose the structure."""
        if model is not None:
            remember(model, processing_class=kwargs.get("processing_class"))
            follow_checkpoints(model, kwargs.get("optimizer"))
            if will_fix_structure(args):
                trainer.shape_like_checkpoint(model, args, type(self).__name__)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Make the `Cuttlefish` of this run, where a checkpoint was resumed from its saved state.

        Raises:
            TypeError, ValueError: as `Cuttlefish`; a state that does not fit the model.
        """
        if model is None:
            raise ValueError("the Trainer gives its callbacks no model")
        trainer.check_arguments(args, self.config)
        self.restart_from, self._full_rank, self._is_due = None, None, False
        trainer.move_to_front(self)
        follow_checkpoints(model)
        name, optimizer = type(self).__name__, kwargs.get("optimizer")
        saved = self._saved or trainer.callback_state(state, name) if state.global_step else None
        self._saved = None
        previous, self.cuttlefish = self.cuttlefish, None
        if previous is not None:
            previous.close()  # an exception or Ctrl-C may have left its hooks
        self.cuttlefish = run = Cuttlefish(
            model,
            optimizer,
            self.config,
            total_steps=state.max_steps,
            scheduler=kwargs.get("lr_scheduler"),
            loss_factor=trainer.loss_factor(args, model),
            can_restart=True,
        )
        run.engine.check_saving(args)
        # Go on where the checkpoint was taken, or join the run where it is.
        if state.global_step and optimizer is not None:
            run.engine.after_loading_optimizer(optimizer)
        if saved:
            run.load_state_dict(saved, trainer.load_statistics(args, state) if state.is_world_process_zero else None)
        else:
            run.start_at(state.global_step)
            if previous is not None:
                run.keep_results(previous)
        # A checkpoint of a run without this callback has no place for its state, and Trainer would fail to save it.
        if isinstance(state.stateful_callbacks, dict):
            state.stateful_callbacks.setdefault(name, self.state())
        self._trainer = args, state

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.cuttlefish is not None and self.cuttlefish.step():
            control.should_log = True
            if self.cuttlefish.restarts:
                control.should_save = self._is_due = True  # on_save carries it out
            elif self.config.switch == "restart":
                control.should_save = True
                self._stop_to_restart(args, state, control)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to the Trainer's log: mean stable rank of each kind of projection, parameters, step of the switch."""
        if self.cuttlefish is None or logs is None or "loss" not in logs:
            return
        extra = self.cuttlefish.logs()
        logs.update(extra)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(extra)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each checkpoint: statistics and model card beside it, and the switch in it if one is due by restart."""
        run, folder = self.cuttlefish, trainer.checkpoint_folder(args, state)
        if run is None:
            return
        run.note_save()
        if kwargs.get("optimizer") is not None:
            run.engine.after_saving(folder, kwargs["optimizer"])
        if run.processes.size > 1:  # only here do all of them come by, and their sums are needed
            trainer.save_statistics(args, state, run.statistics_state())
        model: nn.Module | None = run.model
        if self._is_due:
            # The engine cannot be edited: the checkpoint just saved takes the switch, and the run stops to be resumed from it.
            full_rank = self._full_rank or run.state_dict()
            self._is_due = run.switch_in_checkpoint(folder)
            if self._is_due:
                self._full_rank = full_rank  # the model here stays as it was, and so does what is saved with it
                if state.is_world_process_zero:
                    trainer.write_low_rank_state(folder, type(self).__name__, self._entry(run.state_dict()))
                self._stop_to_restart(args, state, control)
            model = run.switched_model
        trainer.write_card(folder, model, state, self.report)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """For the cards of what is saved from here on."""
        if kwargs.get("model") is not None:
            remember(kwargs["model"], metrics=metrics, report=self.report)

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Before an upload of the output folder: modelling file and card lie in it, too."""
        trainer.prepare_push(args, kwargs.get("model"), state, self.report)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cuttlefish is not None:
            self.cuttlefish.end()
            remember(self.cuttlefish.model, report=self.report)

    def _stop_to_restart(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        folder = trainer.checkpoint_folder(args, state)
        control.should_training_stop = True
        if state.is_world_process_zero and self.restart_from != str(folder):
            logger.info(
                "Cuttlefish: training stops here, after the switch (by restart). %s holds the factorized model and the state "
                "of the run; the same command with --resume_from_checkpoint %s goes on low rank.",
                folder,
                folder,
            )
        self.restart_from = str(folder)

    # --- ExportableState: what Trainer writes into trainer_state.json ---

    def state(self) -> dict[str, Any]:
        """{"args": constructor arguments, "attributes": what is set afterwards}, JSON only.

        Trainer asks before it writes trainer_state.json, the last of a checkpoint's files, and before it deletes older
        checkpoints: the time to write the statistics, so that no whole checkpoint is without them.
        """
        run = self.cuttlefish
        if self._trainer is not None and run is not None and run.processes.size == 1:
            trainer.save_statistics(*self._trainer, run.statistics_state())
        return self._entry(self._full_rank or (run.state_dict() if run is not None else self._saved))

    def _entry(self, run: dict[str, Any] | None) -> dict[str, Any]:
        return {"args": {"config": self.config.to_dict()}, "attributes": {"_saved": run}}
