"""What Trainer knows and hands to no callback: its saved state, its folders, how it scales the loss."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..config import CuttlefishConfig
from ..cuttlefish import Cuttlefish
from ..decide.files import replaced
from ..decide.plan import RankPlan
from ..engines.find import will_fix_structure
from ..engines.restart import FULL_RANK_STATE
from ..layers.low_rank import low_rank_layers
from ..patch.report import FactorizationReport
from ..patch.structure import restructure
from ..report.model_card import auto_class, write_companion_card
from ..saving.checkpoints import STATISTICS_FILE
from ..saving.companions import remember
from ..saving.doors import put_beside
from ..saving.following import follow_checkpoints
from .by_itself import graphs_by_itself
from .graphs import GraphedTrainer

logger = logging.getLogger(__name__)


def callback_state(state: TrainerState, name: str) -> dict[str, Any] | None:
    """What our callback has saved in the Trainer's state, if it has. Raises ValueError for a state that is broken."""
    entry = state.stateful_callbacks.get(name) if isinstance(state.stateful_callbacks, dict) else None
    if isinstance(entry, list):
        entry = entry[-1] if entry else None
    attributes: Any = entry.get("attributes") if isinstance(entry, dict) else {}
    if not isinstance(attributes, dict):
        raise ValueError(f"trainer_state.json: the state of {name} has no attributes: {entry!r:.80}")
    return attributes.get("_saved")


def trained(args: Any, model: Any, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The arguments and the module that transformers trains: SetFit gives its own, which are neither, and those beside them.

    Args:
        given: the other keyword arguments of the event.
    """
    if isinstance(model, nn.Module) or not isinstance(given.get("st_model"), nn.Module):
        return args, model
    return given.get("st_args", args), given["st_model"]


def known_of(run: Cuttlefish, state: TrainerState | None) -> dict[str, Any]:
    """What the page of a run tells besides its report."""
    log = [] if state is None else state.log_history
    return {"history": run.history, "log": log, "seconds": run.watch.seconds, "auto_class": auto_class(run.model)}


def loss_factor(args: TrainingArguments, model: nn.Module) -> float:
    """By what Trainer multiplies the loss: the number of processes (or, under nn.DataParallel, GPUs) that
    see other batches, where it counts items over all."""
    if not args.average_tokens_across_devices:
        return 1.0
    return float(args.world_size * max(1, args.n_gpu) // (getattr(model, "_tp_size", None) or 1))


def begin(
    model: Any, args: TrainingArguments, state: TrainerState, config: CuttlefishConfig, **given: Any
) -> Cuttlefish:
    """The run, at the start of training. given: what else Trainer hands to its callbacks.

    Raises:
        TypeError, ValueError: as `Cuttlefish`; settings of the Trainer that a switch could not go with.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the Trainer gives its callbacks no model that is a torch.nn.Module (got {type(model).__name__}): use Cuttlefish in "
            "a loop of your own, with the module inside it"
        )
    check_arguments(args, config)
    follow_checkpoints(model)
    optimizer = given.get("optimizer")
    run = Cuttlefish(
        model,
        optimizer,
        config,
        total_steps=state.max_steps,
        scheduler=given.get("lr_scheduler"),
        loss_factor=loss_factor(args, model),
        can_restart=True,
    )
    run.engine.check_saving(args)
    if state.global_step and optimizer is not None:
        run.engine.after_loading_optimizer(optimizer)
    return run


def check_again(previous: Cuttlefish | None, run: Cuttlefish) -> None:
    """Raises ValueError where this run would switch once more with an optimizer whose rate the last switch has scaled."""
    if previous is None or previous.switch_step is None or previous.config.learning_rate_scale == 1:
        return
    if run.layers and previous.engine.optimizer is run.engine.optimizer:
        raise ValueError(
            "the model is dense again (load_best_model_at_end), and this Trainer's optimizer has the learning rate of the low-rank "
            "phase: make a new Trainer to train once more"
        )


def follow(model: nn.Module, args: TrainingArguments, name: str, optimizer: Any = None) -> None:
    """Before weights are loaded: let them choose the structure, or shape the model where it will be fixed by then."""
    follow_checkpoints(model, optimizer)
    if will_fix_structure(args):
        shape_like_checkpoint(model, args, name)


def follow_late(callback: TrainerCallback) -> bool:
    """For a callback given by `Trainer.add_callback`, which hears of no model before weights are loaded; whether it is done.

    Trainer asks for its state when training begins, after the weights and before the optimizer: follow now, and load the
    weights once more.
    """
    frame = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            return False
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            folder = frame.f_locals.get("resume_from_checkpoint")
            follow(cast(nn.Module, owner.model), owner.args, type(callback).__name__, owner.optimizer)
            if folder and not will_fix_structure(owner.args):
                owner._load_from_checkpoint(folder)
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def say_restart(args: TrainingArguments, state: TrainerState, said: str | None) -> str:
    """Tell once that training stops to be resumed; returns the folder to resume from. said: what was told before."""
    folder = str(checkpoint_folder(args, state))
    if state.is_world_process_zero and said != folder:
        logger.info(
            "Cuttlefish: training stops here, after the switch (by restart). %s holds the factorized model and the state "
            "of the run; the same command with --resume_from_checkpoint %s goes on low rank.",
            folder,
            folder,
        )
    return folder


def shape_like_checkpoint(model: nn.Module, args: TrainingArguments, name: str) -> None:
    """Factorize as the checkpoint to be resumed is, before FSDP or DeepSpeed take the model: its weights are loaded afterwards."""
    folder = args.resume_from_checkpoint
    if isinstance(folder, bool) or str(folder).lower() in ("true", "1"):
        folder = get_last_checkpoint(str(args.output_dir)) if folder and Path(str(args.output_dir)).is_dir() else None
    path = Path(str(folder)) / TRAINER_STATE_NAME
    if folder is None or not path.is_file():
        return
    saved = callback_state(TrainerState.load_from_json(str(path)), name)
    if saved and saved["plan"]:
        restructure(model, dict(RankPlan.from_dict(saved["plan"])))


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where Trainer saves the checkpoint of this step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def save_statistics(args: TrainingArguments, state: TrainerState, statistics: Mapping[str, Any] | None) -> None:
    """Beside the checkpoint of this step, if there are any: whole or not at all."""
    folder = checkpoint_folder(args, state)
    if statistics is not None and state.is_world_process_zero and folder.is_dir():
        from safetensors.torch import save_file

        with replaced(folder / STATISTICS_FILE) as partial:
            save_file(dict(statistics), partial, metadata={"step": str(state.global_step)})


def load_statistics(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """Statistics saved beside the checkpoint that is resumed: in the folder named, or under the output folder."""
    from safetensors import safe_open

    folders = [checkpoint_folder(args, state)]
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


def move_to_front(callback: TrainerCallback) -> None:
    """Stand before the trackers, so that what `on_log` adds reaches them. Callbacks given by users come after them."""
    handler = _who_calls(CallbackHandler)
    if handler is not None and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


def complete_cards_of_caller() -> None:
    """See `complete_created_cards`, for the class of the Trainer that is being made; TRL's write cards of their own."""
    caller = _who_calls(Trainer)
    if caller is not None:
        complete_created_cards(type(caller))


def graphed_trainer(config: CuttlefishConfig) -> GraphedTrainer:
    """Of the Trainer that calls the callback. Raises ValueError as `GraphedTrainer`, where no Trainer calls, and for objective "speed"."""
    if config.objective == "speed":
        raise ValueError(
            "objective is 'speed', which times steps that are not recorded, and cuda_graphs=True records them: set objective='size', or "
            "leave cuda_graphs out"
        )
    caller = _who_calls(Trainer)
    if caller is None:
        raise ValueError("cuda_graphs=True needs a transformers.Trainer: in a loop of your own use GraphedStep")
    return GraphedTrainer(caller)


def graphs_after_switch(config: CuttlefishConfig) -> GraphedTrainer | None:
    """Of the Trainer that calls the callback, started; None where its steps are not ones to be recorded unasked."""
    caller = _who_calls(Trainer)
    try:
        graphs = None if caller is None else graphs_by_itself(caller, config)
        if graphs is not None:
            graphs.start()
    except Exception as error:  # nobody has asked for it
        logger.info("Cuttlefish: steps run without CUDA graphs, since asking whether they may failed: %s", error)
        return None
    return graphs


def _who_calls(kind: type) -> Any:
    """The object of this kind whose method has called the callback: Trainer hands itself and its handler to none."""
    frame = sys._getframe(2)
    for _ in range(6):
        if frame is None:
            return None
        if isinstance(frame.f_locals.get("self"), kind):
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def check_arguments(args: TrainingArguments, config: CuttlefishConfig) -> None:
    """Raises ValueError for settings of the Trainer that a switch could not go with."""
    if will_fix_structure(args) and args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end could not go back to a checkpoint from before the switch under FSDP or DeepSpeed, whose "
            "parts are fixed by then: set it to False, and load the best checkpoint with from_pretrained after the run"
        )
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True copies the model's parameters onto the reference model's one by one, and after the switch they "
            "are others: set it to False, or stop it at the switch and make the reference model anew"
        )
    if config.switch == "restart" and args.save_strategy == "best":
        raise ValueError(
            "save_strategy is 'best', by which Trainer may not save at the switch, and switch is 'restart': set "
            "save_strategy to 'steps' or 'epoch', or switch to 'auto'"
        )


def add_to_logs(logs: dict[str, Any], state: TrainerState, extra: Mapping[str, Any]) -> None:
    """Add numbers to what Trainer logs, and to its history of it."""
    logs.update(extra)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(extra)


def write_low_rank_state(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Make the exchanged checkpoint one that resumes: the full-rank trainer_state.json comes back with our new entry."""
    saved = TrainerState.load_from_json(str(folder / FULL_RANK_STATE))
    before = saved.stateful_callbacks[name]
    saved.stateful_callbacks[name] = [*before[:-1], entry] if isinstance(before, list) else entry
    (folder / STATISTICS_FILE).unlink(missing_ok=True)
    saved.save_to_json(str(folder / FULL_RANK_STATE))
    os.replace(folder / FULL_RANK_STATE, folder / TRAINER_STATE_NAME)


def write_card(folder: Path, model: nn.Module | None, state: TrainerState, report: FactorizationReport | None) -> None:
    """The model card of a factorized model beside its checkpoint; a card that cannot be written is only said."""
    if not state.is_world_process_zero or not folder.is_dir() or model is None or not low_rank_layers(model):
        return
    metrics = next((r for r in reversed(state.log_history) if any(k.startswith("eval_") for k in r)), None)
    remember(model, report=report, metrics=metrics)
    write_companion_card(folder, model)


def prepare_push(args: TrainingArguments, model: nn.Module | None, state: TrainerState, report: Any) -> None:
    """Trainer copies a checkpoint's weights and config.json into the output folder, and uploads that: the rest follows."""
    folder = Path(str(args.output_dir))
    if state.is_world_process_zero and folder.is_dir() and model is not None and low_rank_layers(model):
        put_beside(folder, model)
        write_card(folder, model, state, report)


def complete_created_cards(kind: type[Trainer] = Trainer) -> None:
    """Let `create_model_card` of a Trainer, and so `push_to_hub`, keep our part of the card. Done once a class."""
    owner = next(cls for cls in kind.__mro__ if "create_model_card" in vars(cls))
    original = vars(owner)["create_model_card"]
    if getattr(original, "_by_cuttlefish", False):
        return

    @functools.wraps(original)
    def create_model_card(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if self.is_world_process_zero() and low_rank_layers(model):
            write_companion_card(str(self.args.output_dir), model)

    create_model_card._by_cuttlefish = True  # type: ignore[attr-defined]
    owner.create_model_card = create_model_card  # type: ignore[attr-defined]
