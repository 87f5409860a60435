"""The Trainer's door: a thin callback around `Cuttlefish`. The one place that knows Trainer."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, cast

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .checkpoints import STATISTICS_FILE
from .config import CuttlefishConfig
from .controller import Cuttlefish
from .flattened import FlattenedModel, check_saved_form
from .model_card import write_model_card
from .patching import low_rank_layers, restructure
from .plan import RankPlan
from .report import FactorizationReport
from .restart import FULL_RANK_STATE
from .saving import follow_checkpoints
from .tensor_parallel import save_whole_state
from .tensor_plan import cut_state

logger = logging.getLogger(__name__)


class CuttlefishCallback(TrainerCallback, ExportableState):
    """Watch the stable ranks, switch in the middle of the run, train on low rank: `Trainer(callbacks=[CuttlefishCallback()])`.

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
        self._saved: dict[str, Any] | None = None
        self.restart_from: str | None = None
        self._trainer: tuple[TrainingArguments, TrainerState] | None = None
        self._full_rank: dict[str, Any] | None = None
        self._is_due = False

    # --- what can be read ---

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

    # --- Trainer's events ---

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Between here and the loading of a checkpoint's weights there is no event: let the weights choose the structure."""
        if model is not None:
            follow_checkpoints(model, kwargs.get("optimizer"))
            if _is_to_be_parted(args):
                _shape_like_checkpoint(model, args, type(self).__name__)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the `Cuttlefish` of this run, where a checkpoint was resumed from its saved state.

        Raises:
            TypeError, ValueError: as `Cuttlefish`; a state that does not fit the model.
        """
        if model is None:
            raise ValueError("the Trainer gives its callbacks no model")
        if _is_to_be_parted(args) and args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end could not go back to a checkpoint from before the switch under FSDP or DeepSpeed, whose "
                "parts are fixed by then: set it to False, and load the best checkpoint with from_pretrained after the run"
            )
        if self.config.switch == "restart" and args.save_strategy == "best":
            raise ValueError(
                "save_strategy is 'best', by which Trainer may not save at the switch, and switch is 'restart': set "
                "save_strategy to 'steps' or 'epoch', or switch to 'auto'"
            )
        self.restart_from, self._full_rank, self._is_due = None, None, False
        _move_to_front(self)
        follow_checkpoints(model)
        if state.global_step and kwargs.get("optimizer") is not None:
            cut_state(model, kwargs["optimizer"])
        name = type(self).__name__
        saved = self._saved or _callback_state(state, name) if state.global_step else None
        self._saved = None
        previous, self.cuttlefish = self.cuttlefish, None
        if previous is not None:
            previous.close()  # an exception or Ctrl-C may have left its hooks
        self.cuttlefish = Cuttlefish(
            model,
            kwargs.get("optimizer"),
            self.config,
            total_steps=state.max_steps,
            scheduler=kwargs.get("lr_scheduler"),
            loss_factor=_loss_factor(args, model),
            can_restart=True,
        )
        if isinstance(self.cuttlefish.sharded, FlattenedModel):
            check_saved_form(AcceleratorState().fsdp_plugin)
        if self.cuttlefish.restarts:
            for option in ("save_only_model", "save_on_each_node"):
                if getattr(args, option):
                    raise ValueError(
                        f"{option} is True, and the switch by restart needs one whole checkpoint: set it to False"
                    )
        if saved:
            self.cuttlefish.load_state_dict(
                saved, _load_statistics(args, state) if state.is_world_process_zero else None
            )
        else:
            self.cuttlefish.start_at(state.global_step)
            if previous is not None:
                self.cuttlefish.keep_results(previous)
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

    def _stop_to_restart(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        folder = _checkpoint_folder(args, state)
        control.should_training_stop = True
        if state.is_world_process_zero and self.restart_from != str(folder):
            logger.info(
                "Cuttlefish: training stops here, after the switch (by restart). %s holds the factorized model and the state "
                "of the run; the same command with --resume_from_checkpoint %s goes on low rank.",
                folder,
                folder,
            )
        self.restart_from = str(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the Trainer's log: mean stable rank of each kind of projection, parameters, step of the switch."""
        if self.cuttlefish is None or logs is None or "loss" not in logs:
            return
        extra = self.cuttlefish.logs()
        logs.update(extra)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(extra)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each checkpoint: statistics and model card beside it, and the switch in it if one is due by restart."""
        if self.cuttlefish is not None:
            self.cuttlefish.note_save()
            if kwargs.get("optimizer") is not None:
                save_whole_state(_checkpoint_folder(args, state), self.cuttlefish.model, kwargs["optimizer"])
            if self.cuttlefish.processes.size > 1:  # only here do all of them come by, and their sums are needed
                self._save_statistics(args, state)
            model: nn.Module | None = self.cuttlefish.model
            if self._is_due:
                self._switch_in_checkpoint(args, state, control)
                model = self.cuttlefish.switched_model
            folder = _checkpoint_folder(args, state)
            if state.is_world_process_zero and folder.is_dir() and model is not None and low_rank_layers(model):
                metrics = next((r for r in reversed(state.log_history) if any(k.startswith("eval_") for k in r)), None)
                try:
                    write_model_card(folder, model, report=self.report, metrics=metrics)
                except Exception as error:  # the checkpoint itself is whole
                    logger.warning("Cuttlefish: %s got no model card: %s", folder, error)

    def _switch_in_checkpoint(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """The engine cannot be edited: the checkpoint just saved takes the switch, and the run stops to be resumed from it."""
        cuttlefish, folder = cast(Cuttlefish, self.cuttlefish), _checkpoint_folder(args, state)
        full_rank = self._full_rank or cuttlefish.state_dict()
        if not cuttlefish.switch_in_checkpoint(folder):
            self._is_due = False
            return
        self._full_rank = full_rank  # the model here stays as it was, and so does what is saved with it
        if state.is_world_process_zero:
            name = type(self).__name__
            saved = TrainerState.load_from_json(str(folder / FULL_RANK_STATE))
            entry = self._entry(cuttlefish.state_dict())
            before = saved.stateful_callbacks[name]
            saved.stateful_callbacks[name] = [*before[:-1], entry] if isinstance(before, list) else entry
            (folder / STATISTICS_FILE).unlink(missing_ok=True)
            saved.save_to_json(str(folder / FULL_RANK_STATE))
            os.replace(folder / FULL_RANK_STATE, folder / TRAINER_STATE_NAME)
        self._stop_to_restart(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.cuttlefish is not None:
            self.cuttlefish.end()

    # --- ExportableState: what Trainer writes into trainer_state.json ---

    def state(self) -> dict[str, Any]:
        """{"args": constructor arguments, "attributes": what is set afterwards}, JSON only.

        Trainer asks before it writes trainer_state.json, the last of a checkpoint's files, and before it deletes older
        checkpoints: the time to write the statistics, so that no whole checkpoint is without them.
        """
        if self._trainer is not None and self.cuttlefish is not None and self.cuttlefish.processes.size == 1:
            self._save_statistics(*self._trainer)
        run = self._full_rank or (self.cuttlefish.state_dict() if self.cuttlefish is not None else self._saved)
        return self._entry(run)

    def _entry(self, run: dict[str, Any] | None) -> dict[str, Any]:
        return {"args": {"config": self.config.to_dict()}, "attributes": {"_saved": run}}

    def _save_statistics(self, args: TrainingArguments, state: TrainerState) -> None:
        """Beside the checkpoint of this step, if statistics are being gathered: whole or not at all."""
        statistics = None if self.cuttlefish is None else self.cuttlefish.statistics_state()
        folder = _checkpoint_folder(args, state)
        if statistics is not None and state.is_world_process_zero and folder.is_dir():
            from safetensors.torch import save_file

            partial = folder / f".{STATISTICS_FILE}.partial"
            save_file(statistics, partial, metadata={"step": str(state.global_step)})
            os.replace(partial, folder / STATISTICS_FILE)


def _callback_state(state: TrainerState, name: str) -> dict[str, Any] | None:
    entry = state.stateful_callbacks.get(name) if isinstance(state.stateful_callbacks, dict) else None
    if isinstance(entry, list):
        entry = entry[-1] if entry else None
    attributes: Any = entry.get("attributes") if isinstance(entry, dict) else {}
    if not isinstance(attributes, dict):
        raise ValueError(f"trainer_state.json: the state of {name} has no attributes: {entry!r:.80}")
    return attributes.get("_saved")


def _loss_factor(args: TrainingArguments, model: nn.Module) -> float:
    """By what Trainer multiplies the loss: the number of processes (or, under nn.DataParallel, GPUs) that
    see other batches, where it counts items over all."""
    if not args.average_tokens_across_devices:
        return 1.0
    return float(args.world_size * max(1, args.n_gpu) // (getattr(model, "_tp_size", None) or 1))


def _is_to_be_parted(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed will fix the structure of the model when they take it."""
    return (
        bool(args.fsdp)
        or getattr(args, "deepspeed_plugin", None) is not None
        or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    )


def _shape_like_checkpoint(model: nn.Module, args: TrainingArguments, name: str) -> None:
    """Factorize as the checkpoint to be resumed is, before FSDP or DeepSpeed take the model: its weights are loaded afterwards."""
    folder = args.resume_from_checkpoint
    if isinstance(folder, bool) or str(folder).lower() in ("true", "1"):
        folder = get_last_checkpoint(str(args.output_dir)) if folder and Path(str(args.output_dir)).is_dir() else None
    path = Path(str(folder)) / TRAINER_STATE_NAME
    if folder is None or not path.is_file():
        return
    saved = _callback_state(TrainerState.load_from_json(str(path)), name)
    if saved and saved["plan"]:
        restructure(model, dict(RankPlan.from_dict(saved["plan"])))


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _load_statistics(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """Statistics saved beside the checkpoint that is resumed: in the folder named, or under the output folder."""
    from safetensors import safe_open

    folders = [_checkpoint_folder(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        path = folder / STATISTICS_FILE
        if not path.is_file():
            continue
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("step") == str(state.global_step):
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    return None


def _move_to_front(callback: TrainerCallback) -> None:
    """Stand before the trackers, so that what `on_log` adds reaches them. Callbacks given by users come after them.

    Trainer hands its handler to no callback; the frame that calls us is a method of it.
    """
    frame = sys._getframe(1)
    for _ in range(4):
        if frame is None:
            return
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            if callback in handler.callbacks:
                handler.callbacks.remove(callback)
                handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back  # type: ignore[assignment]
