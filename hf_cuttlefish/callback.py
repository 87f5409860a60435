"""The Trainer's door: a thin callback around `Cuttlefish`. Events in, calls out."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .config import CuttlefishConfig
from .cuttlefish import Cuttlefish
from .decide.plan import RankPlan
from .patch.report import FactorizationReport
from .saving.companions import remember
from .trainer import known as trainer
from .trainer.graphs import GraphedTrainer, stop_graphs_of


def _of_run(name: str, otherwise: Any = None) -> Any:
    """A property that is the run's; `otherwise` before there is one."""
    return property(lambda self: otherwise if self.cuttlefish is None else getattr(self.cuttlefish, name))


class CuttlefishCallback(TrainerCallback, ExportableState):
    """Watch the stable ranks, switch in the middle of the run, train on low rank.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[CuttlefishCallback()])
        trainer.train()

    Args:
        config: a CuttlefishConfig (or its dictionary); None for the defaults.
        cuda_graphs: whether forward, backward and clipping of each step run as one CUDA graph for each shape of batch, before the switch
            and after it: on one GPU the host then launches once and not a thousand times (docs/fast-on-a-gpu.md). None: only after the
            switch, and only where nothing but transformers' own code runs in a step.

    Attributes:
        plan, switch_step, history, report, reason: as of `Cuttlefish`; they can be read during and after training.
        restart_from: where the switch is made in a checkpoint (by the engine, or switch="restart"), the folder from which a new
            Trainer goes on; None once it has.

    Raises:
        TypeError: config or cuda_graphs is something else. At the start of training: as `Cuttlefish`, and as `GraphedTrainer`.
    """

    def __init__(
        self, config: CuttlefishConfig | dict[str, Any] | None = None, *, cuda_graphs: bool | None = None
    ) -> None:
        if not isinstance(cuda_graphs, bool | None):
            raise TypeError(f"cuda_graphs must be True, False or None, got {cuda_graphs!r:.80}")
        self.config, self.cuda_graphs = CuttlefishConfig.coerce(config), cuda_graphs
        self.cuttlefish: Cuttlefish | None = None
        self.restart_from: str | None = None
        self._saved: dict[str, Any] | None = None
        self._full_rank: dict[str, Any] | None = None
        self._trainer: tuple[TrainingArguments, TrainerState] | None = None
        self._is_due = self._follows = self._was_asked = False
        self._graphs: GraphedTrainer | None = None

    plan: RankPlan | None = _of_run("plan")
    switch_step: int | None = _of_run("switch_step")
    history: list[dict[str, Any]] = _of_run("history", [])
    reason: str | None = _of_run("reason")

    @property
    def report(self) -> FactorizationReport | None:
        """Of the switch, or None. `report.to_html(path)` tells the run up to now."""
        run = self.cuttlefish
        if run is None or run.report is None:
            return None
        run.report.known = trainer.known_of(run, None if self._trainer is None else self._trainer[1])
        return run.report

    # --- Trainer's events: (args, state, control, **what it has) ---

    def on_init_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Between here and the loading of a checkpoint's weights there is no event: let the weights choose the structure."""
        args, model = trainer.trained(args, model, kwargs)
        self._follows = isinstance(model, nn.Module)
        if isinstance(model, nn.Module):
            remember(model, processing_class=kwargs.get("processing_class"))
            trainer.complete_cards_of_caller()
            trainer.follow(model, args, type(self).__name__, kwargs.get("optimizer"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Make the `Cuttlefish` of this run, which raises what it raises; from a checkpoint, where its saved state was."""
        args, model = trainer.trained(args, model, kwargs)
        self.restart_from, self._full_rank, self._is_due = None, None, False
        self._was_asked = self.cuda_graphs is not None
        trainer.move_to_front(self)
        name = type(self).__name__
        self._stop_graphs()
        stop_graphs_of(model)
        # What is refused is refused before anything is forgotten.
        graphs = trainer.graphed_trainer(self.config) if self.cuda_graphs else None
        saved = self._saved or trainer.callback_state(state, name) if state.global_step else None
        previous, self.cuttlefish, self._saved = self.cuttlefish, None, None
        if previous is not None:
            previous.close()  # an exception or Ctrl-C may have left its hooks
        run = trainer.begin(model, args, state, self.config, **kwargs)
        try:
            trainer.check_again(previous, run)
        except ValueError:
            run.close()
            self.cuttlefish = previous  # to be asked again
            raise
        self.cuttlefish = run
        # Go on where the checkpoint was taken, or join the run where it is.
        if saved:
            run.load_state_dict(saved, trainer.load_statistics(args, state) if state.is_world_process_zero else None)
        else:
            run.start_at(state.global_step)
            if previous is not None:
                run.keep_results(previous)
        if isinstance(state.stateful_callbacks, dict):  # a run without this callback has left no place for its state
            state.stateful_callbacks.setdefault(name, self.state())
        self._trainer = args, state
        if graphs is not None:
            self._graphs = graphs
            graphs.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches are there: the loader's time is not the step's."""
        if self.cuttlefish is not None:
            self.cuttlefish.watch.pace.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        args, _ = trainer.trained(args, kwargs.get("model"), kwargs)
        self._ask_for_graphs()  # of a run that goes on after its switch, before a form of running is tried
        if self.cuttlefish is not None and self.cuttlefish.step():
            self._is_due = self.cuttlefish.restarts  # on_save carries it out
            control.should_log = True
            control.should_save |= self._is_due or self.config.switch == "restart"
            if not self._is_due and self.config.switch == "restart":
                self._stop_to_restart(args, state, control)
        self._ask_for_graphs()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to the Trainer's log: mean stable rank of the target layers, parameters, step of the switch."""
        if self.cuttlefish is not None and logs is not None and "loss" in logs:
            trainer.add_to_logs(logs, state, self.cuttlefish.logs())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each checkpoint: statistics and model card beside it, and the switch in it if one is due by restart."""
        if (run := self.cuttlefish) is None:
            return
        args, _ = trainer.trained(args, kwargs.get("model"), kwargs)
        folder = trainer.checkpoint_folder(args, state)
        run.note_save()
        if kwargs.get("optimizer") is not None:
            run.engine.after_saving(folder, kwargs["optimizer"])
        if run.processes.size > 1:  # only here do all of them come by, and their sums are needed
            trainer.save_statistics(args, state, run.statistics_state())
        model: nn.Module | None = run.model
        if self._is_due:
            full_rank = self._full_rank or run.state_dict()
            self._is_due = run.switch_in_checkpoint(folder)  # the engine cannot be edited: the run goes on from there
            if self._is_due:
                self._full_rank = full_rank  # the model here stays as it was, and so does what is saved with it
                if state.is_world_process_zero:
                    trainer.write_low_rank_state(folder, type(self).__name__, self._entry(run.state_dict()))
                self._stop_to_restart(args, state, control)
            model = run.switched_model
        trainer.write_card(folder, model, state, self.report)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.cuttlefish is not None:
            self.cuttlefish.watch.pace.pause()
        if kwargs.get("model") is not None:
            remember(kwargs["model"], metrics=metrics, report=self.report)

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trainer.prepare_push(args, kwargs.get("model"), state, self.report)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cuttlefish is not None:
            self.cuttlefish.end()
            remember(self.cuttlefish.model, report=self.report)
        self._stop_graphs()

    def _ask_for_graphs(self) -> None:
        """Once, after the switch: steps may be recorded unasked."""
        if not self._was_asked and self.switch_step is not None:
            self._was_asked = True
            self._graphs = trainer.graphs_after_switch(self.config)

    def __getstate__(self) -> dict[str, Any]:
        """Copied without graphs, which hold the Trainer and the device's memory."""
        return {**self.__dict__, "_graphs": None}

    def _stop_graphs(self) -> None:
        if self._graphs is not None:
            self._graphs.stop()
            self._graphs = None

    def _stop_to_restart(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        control.should_training_stop = True
        self.restart_from = trainer.say_restart(args, state, self.restart_from)

    # --- ExportableState: what Trainer writes into trainer_state.json ---

    def state(self) -> dict[str, Any]:
        """{"args": constructor arguments, "attributes": what is set afterwards}, JSON only.

        Trainer asks before it writes trainer_state.json, the last of a checkpoint's files, and before it deletes older
        checkpoints: the time to write the statistics, so that no whole checkpoint is without them.
        """
        if not self._follows:
            self._follows = trainer.follow_late(self)
        run = self.cuttlefish
        if self._trainer is not None and run is not None and run.processes.size == 1:
            trainer.save_statistics(*self._trainer, run.statistics_state())
        return self._entry(self._full_rank or (run.state_dict() if run is not None else self._saved))

    def _entry(self, run: dict[str, Any] | None) -> dict[str, Any]:
        args = {
            "config": self.config.to_dict(),
            **({} if self.cuda_graphs is None else {"cuda_graphs": self.cuda_graphs}),
        }
        return {"args": args, "attributes": {"_saved": run}}
