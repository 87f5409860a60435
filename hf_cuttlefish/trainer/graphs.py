"""Steps of a Trainer as CUDA graphs: forward, backward and clipping are recorded once for each shape of batch."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import BatchEncoding, Trainer

from ..engines.around import unwrap
from ..patch.capture import NotCapturedError
from ..patch.graphed_step import GraphedStep
from .whose import is_of

logger = logging.getLogger(__name__)

OWN = ("training_step", "compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager", "_prepare_inputs",
       "_prepare_input", "_prepare_context_parallel_inputs", "_clip_grad_norm", "floating_point_ops")  # fmt: skip
"""Methods of a Trainer that make up a step."""
OF_ACCELERATOR = ("backward", "clip_grad_norm_", "autocast")
RECORDS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that record graphs themselves."""


class GraphedTrainer:
    """Let a Trainer run each step's forward, backward and clipping as one CUDA graph, from `start` to `stop`.

        graphs = GraphedTrainer(trainer); graphs.start(); ...; graphs.stop()

    Three methods of this one object are replaced: `training_step`, the accelerator's `clip_grad_norm_`, and `floating_point_ops`,
    whose counts are kept for each shape. Steps are as in `GraphedStep`.

    Raises ValueError: no CUDA device, several processes or GPUs, a setting that no graph goes with; it names the setting.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        check(trainer)
        self.model: nn.Module = unwrap(trainer.model)
        self.step = GraphedStep(self.model, self._run, self._of_optimizer)
        self._step_of_trainer: Callable[..., Any] = trainer.training_step
        self._clip_of_accelerator: Callable[..., Any] = trainer.accelerator.clip_grad_norm_
        self._count_of_trainer: Callable[..., Any] = trainer.floating_point_ops
        self._before: list[tuple[Any, str, Any]] = []
        self._clipped: tuple[float, torch.Tensor] | None = None
        self._kind: Callable[[dict[str, Any]], Any] = dict
        self._counts: dict[Any, Any] = {}

    def start(self) -> None:
        """Before the first step. Says what a Trainer of a class of its own does only while a step is recorded."""
        trainer: Any = self.trainer
        own = [n for n in ("compute_loss", "training_step") if getattr(type(trainer), n) is not getattr(Trainer, n)]
        self.step.packs = "compute_loss" in own  # it may pack sequences itself
        if own or trainer.compute_loss_func is not None:
            logger.warning(
                "Cuttlefish: with cuda_graphs, what %s of %s does beside computing the loss (counting, logging) happens only while a "
                "step is recorded, and numbers that it takes from Python stay as they were then.",
                " and ".join(own) or "compute_loss_func",
                type(trainer).__name__,
            )
        for owner, name, method in (
            (trainer, "training_step", self.training_step),
            (trainer, "floating_point_ops", self.floating_point_ops),
            (trainer.accelerator, "clip_grad_norm_", self.clip_grad_norm_),
        ):
            self._before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, method)
        _STARTED.add(self)

    def stop(self) -> None:
        """The Trainer is as it was, and the graphs are freed."""
        for owner, name, before in self._before:
            vars(owner).pop(name, None)
            if before is not None:
                setattr(owner, name, before)
        self._before.clear()
        self.step.end()
        _STARTED.discard(self)

    # --- in the place of the Trainer's own ---

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a micro-batch; gradients are in the parameters, and clipped where the step is a whole one."""
        trainer: Any = self.trainer
        # As the Trainer does in each step; to walk all modules takes a millisecond.
        if not self.step.trains:
            model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        if num_items_in_batch is not None and not isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = torch.tensor(num_items_in_batch, device=trainer.args.device)
        micro_batches = getattr(
            trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps
        )
        self._kind = type(inputs) if isinstance(inputs, BatchEncoding) else dict
        batch = {"inputs": dict(inputs), "items": num_items_in_batch, "micro_batches": micro_batches}
        # Gradients that are there are clipped with those of the batch, by the Trainer.
        adds_up = micro_batches != 1 or any(p.grad is not None for p in self._of_optimizer())
        batch["most"] = None if adds_up else self._most()
        batch["smoothing"] = getattr(trainer.label_smoother, "epsilon", None)
        batch["loss"] = id(trainer.label_smoother), id(trainer.compute_loss_func)
        batch["replaced"] = self._replaced()
        self._clipped = None
        loss, norm = self.step(batch)
        if norm is not None:
            self._clipped = batch["most"], norm
        return loss

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """The norm that was found with the gradients; else as Accelerate does."""
        clipped, self._clipped = self._clipped, None
        if clipped is not None and max_norm == clipped[0] and norm_type == 2:
            return clipped[1]
        return self._clip_of_accelerator(parameters, max_norm, norm_type)

    def floating_point_ops(self, inputs: Any) -> Any:
        """The Trainer's count, made once for each shape and number of parameters."""
        if self.step.refused is not None:
            return self._count_of_trainer(inputs)
        shapes = tuple((n, v.shape) for n, v in inputs.items() if isinstance(v, torch.Tensor))
        key = shapes, self.step.state
        if key not in self._counts:
            self._counts[key] = self._count_of_trainer(inputs)
        return self._counts[key]

    # --- inside ---

    def _replaced(self) -> tuple[int, ...]:
        """Which methods somebody has put on the Trainer and its accelerator: another graph for others."""
        of_trainer, of_accelerator = vars(self.trainer), vars(self.trainer.accelerator)
        found = [id(of_trainer[n]) for n in OWN if n in of_trainer]
        return tuple(found + [id(of_accelerator[n]) for n in OF_ACCELERATOR if n in of_accelerator])

    def _of_optimizer(self) -> list[nn.Parameter]:
        """All that is trained: a loss may have parameters of its own."""
        groups = getattr(self.trainer.optimizer, "param_groups", ())
        return [p for group in groups for p in group["params"]]

    def _most(self) -> float | None:
        """What gradients are clipped at in the step; None where the Trainer does that itself, or not at all."""
        trainer: Any = self.trainer
        most, name = trainer.args.max_grad_norm, "_clip_grad_norm"
        clips_itself = getattr(type(trainer), name, None) is not getattr(Trainer, name, None)
        # Somebody may have put a clipping of their own into the accelerator.
        clips = getattr(self._clip_of_accelerator, "__func__", None)
        clips_itself |= clips is not Accelerator.clip_grad_norm_ or not is_of(clips, ("accelerate",))
        if not most or most < 0 or clips_itself or trainer.accelerator.scaler is not None:
            return None
        return float(most) if trainer.accelerator.sync_gradients else None

    def _run(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is recorded: the Trainer's step, and clipping where nothing is added to these gradients later."""
        trainer: Any = self.trainer
        state = trainer.state
        if torch.cuda.is_current_stream_capturing():
            trainer.state = _StateInRecording(state)
        try:
            loss = self._step_of_trainer(trainer.model_wrapped, self._kind(batch["inputs"]), batch["items"])
        finally:
            trainer.state = state
        if batch["most"] is None:
            return loss, None
        trained = [p for p in self.model.parameters() if p.grad is not None]
        return loss, torch.nn.utils.clip_grad_norm_(trained, batch["most"])


_STARTED: weakref.WeakSet[GraphedTrainer] = weakref.WeakSet()


def stop_graphs_of(model: nn.Module | None) -> None:
    """End what runs of this model, or of what it wraps, have left that an exception or Ctrl-C has ended."""
    bare = None if model is None else unwrap(model)
    for graphs in [g for g in _STARTED if g.model is bare]:
        graphs.stop()


class _StateInRecording:
    """The Trainer's state while a step is recorded: what changes with each step would stay as it is then."""

    def __init__(self, state: Any) -> None:
        self.__dict__["_state"] = state

    def __getattr__(self, name: str) -> Any:
        if name in ("global_step", "epoch"):
            raise NotCapturedError(f"the loss reads state.{name}, which changes: put it into the batch as a tensor")
        return getattr(self._state, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._state, name, value)


def check(trainer: Trainer) -> None:
    """Raises ValueError for a Trainer whose steps can't be recorded."""
    args = trainer.args
    if args.device.type != "cuda":
        raise ValueError(
            f"cuda_graphs=True needs a CUDA device, and this Trainer is on {args.device}: leave it out here"
        )
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"cuda_graphs=True records the steps of one process with one GPU, and here are {args.world_size} with {args.n_gpu} each: "
            "leave it out, or set CUDA_VISIBLE_DEVICES=0"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "cuda_graphs=True does not go with DeepSpeed or FSDP (deepspeed, fsdp of the arguments): leave it out"
        )
    if (wrapper := _wrapper(trainer.model_wrapped)) is not None:
        raise ValueError(
            f"cuda_graphs=True does not go with {wrapper}, which wraps the model here: start one process without a launcher, or leave it "
            "out"
        )
    if args.torch_compile and args.torch_compile_mode in RECORDS:
        raise ValueError(
            f"cuda_graphs=True records whole steps, and torch_compile_mode={args.torch_compile_mode!r} records parts of them itself: "
            "set torch_compile_mode='default'"
        )
    if args.torch_compile and args.torch_compile_backend == "cudagraphs":
        raise ValueError(
            "cuda_graphs=True records whole steps, and torch_compile_backend='cudagraphs' records parts of them itself: leave it out"
        )
    if args.torch_empty_cache_steps is not None:
        raise ValueError(
            f"torch_empty_cache_steps is {args.torch_empty_cache_steps}, which frees memory within a step, and no graph can hold that: "
            "leave it out, or cuda_graphs=True"
        )
    if getattr(args, "activation_offloading", False):
        raise ValueError(
            "activation_offloading=True moves tensors to the host within a step: leave it out, or cuda_graphs=True"
        )
    optim = getattr(args.optim, "value", args.optim)
    if optim in ("lomo", "adalomo") or "layerwise" in str(optim):
        raise ValueError(f"optim is {optim!r}, which steps within backward: leave cuda_graphs=True out")


def _wrapper(model: nn.Module) -> str | None:
    """Class of what stands around the model beside torch.compile: a launcher with one process makes DDP, whose own work is no kernel's."""
    bare, inside = unwrap(model), model
    while inside is not bare:
        compiled = inside._modules.get("_orig_mod") or vars(inside).get("_orig_mod")
        if compiled is None:
            return type(inside).__name__
        inside = compiled
    return None
