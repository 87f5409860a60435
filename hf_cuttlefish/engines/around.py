"""Look around: what is around a model among all live objects, and what stands in the way there.

Neither a model nor a Trainer's callback has a way to the wrapper around the model, so all live objects are looked through, once.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..layers.low_rank import low_rank_layers
from ..layers.parts import is_empty_between_uses, is_sharded
from ..measure.eager import has_compiled
from ..patch.graphed_step import drop_graphs
from ..processes import Processes, is_distributed

_REFUSED = {
    "DataParallel": "nn.DataParallel in one of several processes: give each process one GPU and use DDP",
    "FullyShardedDataParallel": "FSDP1, whose flat parameters are fixed when it is built: train with Trainer and "
    "CuttlefishCallback, which switch by restart; or use FSDP2 (fsdp_version: 2) or DDP",
    "DeepSpeedEngine": "DeepSpeed, whose partitions are fixed when it is built: train with Trainer and CuttlefishCallback, which "
    "switch by restart, and resume with --resume_from_checkpoint as a training argument; or use FSDP2 or DDP",
    "PipelineEngine": "DeepSpeed's pipeline, which is not supported: use FSDP2 (fsdp_version: 2) or DDP",
}
"""Engines' wrappers by class, and what to do where one of them may not be changed."""


class Around:
    """A bare model and what is around it; the live objects are walked once, when they are first asked for.

    Attributes:
        model: bare. is_factorized: whether it holds low-rank layers already, so that nothing will be changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def is_factorized(self) -> bool:
        return bool(low_rank_layers(self.model))

    @cached_property
    def live(self) -> list[nn.Module]:
        """All modules of this process."""
        return live_modules()

    @cached_property
    def holders(self) -> list[nn.Module]:
        """All modules that hold the model somewhere inside."""
        return [m for m in self.live if m is not self.model and any(inner is self.model for inner in m.modules())]

    @cached_property
    def wrappers(self) -> list[nn.Module]:
        """Engines' wrappers among the holders, their subclasses too."""
        return [m for m in self.holders if isinstance(m, DistributedDataParallel) or _wrapper_kind(m)]

    def look_again(self) -> None:
        """Forget what was seen, after letting go of what only waits to be freed."""
        gc.collect()
        for name in ("live", "holders", "wrappers"):
            vars(self).pop(name, None)

    def parents(self) -> list[str]:
        """Class names of live modules that have the model as a child, for messages."""
        return sorted({type(m).__name__ for m in self.live if any(c is self.model for c in m._modules.values())})


def unwrap(model: Any) -> nn.Module:
    """The bare model inside DDP, nn.DataParallel and torch.compile; what FSDP1 is around as it is (engines/fsdp1.py describes it).

    Raises ValueError, naming the engine, for a wrapper that is known and cannot be repaired.
    """
    while True:
        if is_compiled(model):
            model = model._orig_mod
        elif "_orig_mod" in vars(model):  # Accelerate compiles block by block in a copy of all that holds the blocks
            model = vars(model)["_orig_mod"]
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.DataParallel):  # copies the model anew in each forward, so nothing is to be repaired
            refuse_wrapper(model)
            model = model.module
        else:
            if not is_unit(model):
                refuse_wrapper(model)
            return model


def is_unit(module: nn.Module) -> bool:
    """Whether a module is one of FSDP1's wrappers."""
    return type(module).__name__ == "FullyShardedDataParallel"


def live_modules() -> list[nn.Module]:
    """All modules of this process."""
    is_module: dict[type, bool] = {}  # there are hundreds of thousands of objects, of few classes
    found = []
    for o in gc.get_objects():
        kind = type(o)
        if kind not in is_module:
            is_module[kind] = issubclass(kind, nn.Module)
        if is_module[kind] and "_modules" in o.__dict__:
            found.append(o)
    return found


def check_not_wrapped(model: nn.Module, sharded: bool = False) -> None:
    """Raises ValueError for a model inside an engine's wrapper, or one whose weights an engine has sharded.

    Args:
        sharded: whether weights under fully_shard are welcome (somebody takes care of them).
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("the model is wrapped by nn.DataParallel: pass the model inside it (model.module)")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "the model is wrapped by DDP: pass the model inside it (accelerator.unwrap_model(model)). In the middle of "
            "training the wrapper must be repaired too: use Cuttlefish or CuttlefishCallback, which do that"
        )
    refuse_wrapper(model)
    for name, module in model.named_modules():
        if is_unit(module):
            raise ValueError(f"{name or 'the model'} is wrapped by {_REFUSED['FullyShardedDataParallel']}")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) and not sharded:
            raise ValueError(
                f"{name} is sharded over devices (DTensor: FSDP2 or tensor parallel). In the middle of training use Cuttlefish "
                "or CuttlefishCallback, which handle fully_shard, and Trainer with models that from_pretrained has made tensor "
                "parallel (tp_plan='auto'); otherwise change the model before it is sharded"
            )
        if is_empty_between_uses(parameter) and not sharded:
            raise ValueError(
                f"{name} is sharded by DeepSpeed ZeRO-3: in the middle of training use Trainer with "
                "CuttlefishCallback, which switches by restart; otherwise change the model before it is sharded"
            )
        if type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False):
            raise ValueError(f"{name} is flattened by {_REFUSED['FullyShardedDataParallel']}")


def forget_compiled(model: nn.Module) -> None:
    """Drop what torch.compile and CUDA graphs have of the old model, so that the next step compiles once and old graphs are freed.

    Blocks that are compiled one by one share their code, and torch gives up after `recompile_limit` (8) versions of it
    and runs the rest uncompiled. Blocks of different ranks are different versions, so the limit is raised to their number.
    """
    drop_graphs(model)
    if "torch._dynamo.utils" not in sys.modules:  # nothing is compiled before it is imported, which takes seconds
        return
    if not has_compiled() and not any(map(_is_block, model.modules())):
        return  # a reset of nothing takes seconds on a GPU, and to look at all modules a tenth
    blocks = sum(map(_is_block, live_modules()))
    torch.compiler.reset()
    settings = torch._dynamo.config
    if blocks > getattr(settings, "recompile_limit", blocks):
        settings.recompile_limit = blocks


def compiles_blocks(model: nn.Module) -> bool:
    """Whether blocks of a bare model are compiled one by one, so that those of one shape share one graph."""
    if not has_compiled():
        return False
    inside = {id(module) for module in model.modules() if module is not model}
    # Accelerate wraps the blocks in a copy of all that holds them, or compiles them in place.
    wrapped = (module._modules["_orig_mod"] for module in live_modules() if is_compiled(module))
    blocks = {id(block): block for block in (*wrapped, *filter(_is_block, model.modules())) if id(block) in inside}
    kinds = Counter(type(block) for block in blocks.values() if block is not None and block._modules)
    return max(kinds.values(), default=0) > 1


def compiled_runner(model: nn.Module) -> Callable[..., Any] | None:
    """What runs a bare model compiled as its training does; None where nothing is found that has compiled it.

    Where an engine is inside of what is compiled, the same is made for the model alone.
    """
    live, inside = live_modules(), {id(module) for module in model.modules()}
    for module in reversed(live):
        if is_compiled(module):
            held = module._modules["_orig_mod"]
            while isinstance(held, DistributedDataParallel):
                held = held.module
            if held is model:
                return module if module._modules["_orig_mod"] is model else cast(Any, module).dynamo_ctx(model)
    for module in reversed(live):  # Accelerate's copy of all that holds the blocks
        if type(module) is type(model) and module is not model:
            blocks = [m._modules["_orig_mod"] for m in module.modules() if is_compiled(m)]
            if any(id(block) in inside for block in blocks):
                return module
    return model if any(_is_block(m) or _has_compiled_forward(m) for m in model.modules()) else None


def _has_compiled_forward(module: nn.Module) -> bool:
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def _is_block(module: nn.Module) -> bool:
    return is_compiled(module) or vars(module).get("_compiled_call_impl") is not None


def refuse_wrapper(model: nn.Module) -> None:
    """Raises ValueError, naming the engine and what to do, for a wrapper inside which nothing may be changed."""
    if isinstance(model, nn.DataParallel) and not (is_distributed() and Processes().size > 1):
        return
    if kind := _wrapper_kind(model):
        raise ValueError(f"the model is wrapped by {_REFUSED[kind]}")


def _wrapper_kind(module: nn.Module) -> str | None:
    """The engine's wrapper that a module is, or is a subclass of, by its name in `_REFUSED`."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _REFUSED), None)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has wrapped this very module."""
    # fully_shard makes a class of its own from the one that it is given.
    return "_orig_mod" in model._modules and any(c.__name__ == "OptimizedModule" for c in type(model).__mro__)
