"""Find: which engine trains a model. A new engine is one file, and one word in `ENGINES`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import CuttlefishConfig
from ..patch.optimizer import follow_modules
from ..patch.structure import Exchanges, exchange, plan_structure
from ..processes import Processes, is_distributed
from .around import Around, check_not_wrapped, unwrap
from .base import Engine, Layers
from .ddp import DDP, DataParallel, check_no_ddp
from .deepspeed import DeepSpeed
from .files import weights_files
from .fsdp1 import FSDP1
from .fsdp2 import FSDP2
from .tensor_parallel import TensorParallel
from .zero_redundancy import follow_redundant, is_redundant

ENGINES: tuple[type[Engine], ...] = (FSDP1, DeepSpeed, FSDP2, TensorParallel, DDP, DataParallel)
"""All engines but the plain one, in the order in which they are looked for."""


def find_engine(model: Any, optimizer: Any = None, can_restart: bool = False) -> Engine:
    """The engine that trains a model; a plain `Engine` where nothing is found.

        engine = find_engine(ddp_model, optimizer)
        engine.processes.is_main

    Args:
        model: bare, or as DDP, nn.DataParallel, torch.compile or an engine has wrapped it.
        can_restart: whether the wrapper of an engine that fixes the structure is welcome.

    Raises:
        TypeError: no module. ValueError: an engine that is not supported is around the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    around = Around(unwrap(model.module if can_restart and type(model).__name__ == "DeepSpeedEngine" else model))
    for kind in ENGINES:
        engine = kind.find(around, optimizer)
        if engine is not None:
            return engine
    return Engine(around.model, optimizer)


def find_again(engine: Engine, layers: Layers, config: CuttlefishConfig, can_restart: bool) -> Engine:
    """After the first step: where several processes train a model, somebody must have come to exchange its gradients.

    Raises:
        RuntimeError: nobody has, or the processes came later than the run. ValueError: as `Engine.check`.
    """
    if engine.processes.size != Processes().size:
        raise RuntimeError("torch.distributed was set up after Cuttlefish was made: make it afterwards")
    if not is_distributed() and _devices() < 2:
        return engine  # nobody can have come, and to look at all live objects takes a tenth of a second
    found = find_engine(engine.model, engine.optimizer, can_restart)
    if not found.is_alone:
        found.check(layers, config, can_restart)
    found.check_replicas("after the first step")
    if found.is_alone and found.processes.size > 1:
        parents = ", ".join(Around(found.model).parents()) or "nothing"
        raise RuntimeError(
            f"{found.processes.size} processes train this model, but no DistributedDataParallel is around it (around "
            f"it: {parents}). What exchanges the gradients is not known, and "
            "replicas could drift apart in silence: wrap the model by DDP (accelerator.prepare(model); without a GPU "
            "Accelerate does so only with Accelerator(cpu=True) or ACCELERATE_USE_CPU=true)"
        )
    return found


def _devices() -> int:
    """Accelerators in the hands of this process: with one alone nn.DataParallel does no more than call the model."""
    accelerator: Any = getattr(torch, "accelerator", torch.cuda)
    return int(accelerator.device_count())


def check_is_free(model: nn.Module, optimizer: Any = None) -> None:
    """Raises where somebody trains a model, or holds a part of its optimizer, who would not hear of a change.

    Raises:
        ValueError: an engine is around the model, or has sharded it. TypeError: processes share the optimizer's state.
    """
    check_not_wrapped(model)
    check_no_ddp(model)
    if is_redundant(optimizer):
        raise TypeError(
            "ZeroRedundancyOptimizer has sharded its state among the processes: make it after factorize, or use Cuttlefish, "
            "which shards it anew"
        )


def will_fix_structure(args: Any) -> bool:
    """Whether an engine will fix the structure of the model when it takes it. args: TrainingArguments."""
    return (
        bool(args.fsdp)
        or getattr(args, "deepspeed_plugin", None) is not None
        or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    )


# --- around files: what an engine has to do or to say when weights are loaded into a model that it may hold ---


def takes_as_it_is(model: nn.Module, state: dict[str, torch.Tensor], prefix: str) -> bool:
    """Whether an engine loads these weights as they are; it has compared their structure with the model's then."""
    return any(kind.before_loading(model, state, prefix) for kind in ENGINES)


def has_fixed(name: str, layer: nn.Module, part: str) -> bool:
    """Whether an engine has fixed the structure of a layer. Raises ValueError if what is loaded ("down", "up", "dense") differs."""
    return any(kind.check_loaded(name, layer, part) for kind in ENGINES)


def restructure_under_engines(model: nn.Module, ranks: dict[str, int | None]) -> Exchanges:
    """`restructure` for a model that an engine may hold, which hears of it."""
    changes = plan_structure(model, ranks)
    for kind in ENGINES:
        kind.exchanging(model, changes)
    exchange(model, changes)
    for kind in ENGINES:
        kind.exchanged(model, changes)
    return changes


def follow_in_optimizer(optimizer: Any, changes: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Exchange the parameters of replaced modules, (old, new), in an optimizer of any kind; their state is dropped."""
    follow = follow_redundant if is_redundant(optimizer) else follow_modules
    follow(optimizer, changes)


def shard_loaded(model: nn.Module, state: dict[str, torch.Tensor], prefix: str) -> None:
    """Of whole tensors about to be loaded keep this process's parts, in place."""
    for kind in ENGINES:
        kind.shard_loaded(model, state, prefix)


def extend_parallel_plan(model: nn.Module, plan: dict[str, str]) -> None:
    """Before transformers makes a model parallel: add rules for the factors of its low-rank layers, in place."""
    for kind in ENGINES:
        kind.extend_parallel_plan(model, plan)


def settle_loaded(model: nn.Module) -> None:
    """After `from_pretrained` has loaded a factorized model."""
    for kind in ENGINES:
        kind.settle_loaded(model)


def checkpoint_files(folder: Path, processes: int) -> tuple[list[str], str | None]:
    """Files that a checkpoint must have, by the engine that has written it, and what it lacks besides (or None)."""
    for kind in ENGINES:
        found = kind.checkpoint_files(folder, processes)
        if found is not None:
            return found
    return [*weights_files(folder), "optimizer.pt", "scheduler.pt"], None
