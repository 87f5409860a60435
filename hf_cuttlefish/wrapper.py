"""Repair the wrapper: what the switch must do about DDP around the model. What it cannot repair is refused, named.

DistributedDataParallel listens to the Parameters that it found when it was built. After a switch it would leave the new
ones alone without a word, and every replica would go its own way. The loop holds the wrapper in a local variable, so it
cannot be exchanged; its `__init__` runs again on the same object instead.
"""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import Processes, is_distributed
from .layers import is_divided
from .sharding import ShardedModel, find_sharded, is_sharded

MIB = 1024 * 1024

_REFUSED = {
    "DataParallel": "nn.DataParallel in one of several processes: give each process one GPU and use DDP",
    "FullyShardedDataParallel": "FSDP1, whose flat parameters are fixed when it is built: train with Trainer and "
    "CuttlefishCallback, which switch by restart; or use FSDP2 (fsdp_version: 2) or DDP",
    "DeepSpeedEngine": "DeepSpeed, whose partitions are fixed when it is built: train with Trainer and CuttlefishCallback, which "
    "switch by restart, and resume with --resume_from_checkpoint as a training argument; or use FSDP2 or DDP",
    "PipelineEngine": "DeepSpeed's pipeline, which is not supported: use FSDP2 (fsdp_version: 2) or DDP",
}
"""Engines whose wrappers are known and cannot be repaired, and what to do instead."""

_CARRIED: dict[str, Callable[[Any], Any]] = {
    "device_ids": lambda ddp: ddp.device_ids,
    "output_device": lambda ddp: ddp.output_device,
    "dim": lambda ddp: ddp.dim,
    "broadcast_buffers": lambda ddp: ddp.broadcast_buffers,
    # The replicas are equal already (checked), and buffers may differ on purpose: nothing is to be synchronized.
    "init_sync": lambda ddp: False,
    "process_group": lambda ddp: ddp.process_group,
    "bucket_cap_mb": lambda ddp: None if ddp.bucket_bytes_cap_default else ddp.bucket_bytes_cap / MIB,
    "find_unused_parameters": lambda ddp: ddp.find_unused_parameters,
    "gradient_as_bucket_view": lambda ddp: ddp.gradient_as_bucket_view,
    "static_graph": lambda ddp: ddp.static_graph,
    "skip_all_reduce_unused_params": lambda ddp: ddp.skip_all_reduce_unused_params,
    "bucket_cap_mb_list": lambda ddp: [b / MIB for b in ddp.bucket_bytes_cap_list] or None,
    "batched_grad_copy": lambda ddp: ddp.batched_grad_copy,
}
"""Arguments of the constructor (torch 2.13) and where a built wrapper keeps them."""

_NOT_CARRIED = {
    "self",
    "module",
    "check_reduction",  # has had no effect for years
    "forward_sync_buffers",  # the new name of broadcast_buffers
    "device_mesh",  # the group is taken from it; meshes of more than one dimension are refused
    *("delay_all_reduce_named_params", "param_to_hook_all_reduce", "mixed_precision"),  # refused
}

_KEPT_ATTRIBUTES = (
    "training",
    "require_backward_grad_sync",
    "require_forward_param_sync",
    "_ddp_sink_clone",
    "buffer_hook",
)
"""State of the wrapper besides its hooks that `__init__` resets."""


def unwrap(model: Any) -> nn.Module:
    """The bare model inside DDP, nn.DataParallel and torch.compile; what FSDP1 is around as it is (`flattened` describes it).

    Raises ValueError, naming the engine, for a wrapper that is known and cannot be repaired.
    """
    while True:
        if _is_compiled(model):
            model = model._orig_mod
        elif "_orig_mod" in vars(model):  # Accelerate compiles block by block in a copy of all that holds the blocks
            model = vars(model)["_orig_mod"]
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.DataParallel):  # copies the model anew in each forward, so nothing is to be repaired
            _refuse_wrapper(model)
            model = model.module
        else:
            if not is_unit(model):
                _refuse_wrapper(model)
            return model


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP around a model, or around a module that holds it; None if there is none.

    Neither the model nor a Trainer's callback has a way to it, so all live objects are looked through (once a run).

    Raises:
        ValueError: an engine that is not supported is around the model, or more than one DDP.
    """
    found = _wrappers(model)
    if sum(isinstance(w, DistributedDataParallel) for w in found) > 1:
        gc.collect()  # the wrapper of an earlier run may only be waiting to be freed
        found = _wrappers(model)
    for wrapper in found:
        _refuse_wrapper(wrapper)
    ddps = [w for w in found if isinstance(w, DistributedDataParallel)]
    if len(ddps) > 1:
        raise ValueError(
            f"{len(ddps)} DistributedDataParallel objects are around this {type(model).__name__}, and they would all "
            "exchange its gradients: delete those of earlier runs, or make a new model for each run"
        )
    return ddps[0] if ddps else None


def find_fully_shard(model: nn.Module) -> ShardedModel | None:
    """The model as fully_shard (FSDP2) holds it, or None. Raises ValueError for what is not supported (`ShardedModel`)."""
    return find_sharded(model, _live_modules()) if is_distributed() else None


def find_deepspeed(model: nn.Module, optimizer: Any) -> Any:
    """The DeepSpeed engine that trains the model with this optimizer (or Accelerate's wrapper of it); None if there is none."""
    engines = [w for w in _wrappers(model) if type(w).__name__ == "DeepSpeedEngine"]
    inner = getattr(optimizer, "optimizer", optimizer)
    mine = [engine for engine in engines if engine.optimizer is inner]
    if engines and not mine:
        raise ValueError(
            f"a DeepSpeed engine is around this {type(model).__name__}, and it steps another optimizer than the one given: "
            "pass the optimizer that deepspeed.initialize or accelerator.prepare returned"
        )
    return mine[0] if mine else None


def find_units(model: nn.Module) -> list[nn.Module]:
    """All FSDP1 modules around or inside the model."""
    around = [m for m in _wrappers(model) if is_unit(m)]
    return list({id(m): m for m in (*around, *model.modules()) if is_unit(m)}.values())


def is_unit(module: nn.Module) -> bool:
    """Whether a module is one of FSDP1's wrappers."""
    return type(module).__name__ == "FullyShardedDataParallel"


def _wrappers(model: nn.Module) -> list[nn.Module]:
    """Engines' wrappers among all live objects that hold the model somewhere."""
    engines = [m for m in _live_modules() if isinstance(m, DistributedDataParallel) or type(m).__name__ in _REFUSED]
    return [m for m in engines if m is not model and any(inner is model for inner in m.modules())]


def count_replicas(model: nn.Module) -> int:
    """Over how many devices of this process nn.DataParallel splits a batch of the model; 1 without it."""
    wrappers = [m for m in _live_modules() if isinstance(m, nn.DataParallel) and any(i is model for i in m.modules())]
    return max([1, *(len(m.device_ids) for m in wrappers)])


def holders(model: nn.Module) -> list[str]:
    """Class names of live modules that have the model as a child, for messages."""
    return sorted({type(m).__name__ for m in _live_modules() if any(c is model for c in m._modules.values())})


def _live_modules() -> list[nn.Module]:
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
    _refuse_wrapper(model)
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
        if is_divided(parameter) and not sharded:
            raise ValueError(
                f"{name} is divided among the processes by DeepSpeed ZeRO-3: in the middle of training use Trainer with "
                "CuttlefishCallback, which switches by restart; otherwise change the model before it is divided"
            )
        if type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False):
            raise ValueError(f"{name} is flattened by {_REFUSED['FullyShardedDataParallel']}")


def check_no_ddp(model: nn.Module) -> None:
    """Raises ValueError for a model inside DDP, which would leave parameters that it does not know alone, in silence."""
    if is_distributed() and find_ddp(model) is not None:
        raise ValueError(
            "DDP is around this model, and its replicas would drift apart in silence: factorize before "
            "accelerator.prepare(model), or use Cuttlefish or CuttlefishCallback, which repair DDP"
        )


def check_ddp(ddp: DistributedDataParallel, model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raises ValueError, naming the option, where a DDP could not be built again as it was.

    Args:
        model: the model inside. targets: name in it -> layer to be replaced.
    """
    where = "DistributedDataParallel was built with"
    if ddp._delay_all_reduce_params:
        raise ValueError(
            f"{where} delay_all_reduce_named_params, whose hook is not kept by it and would be lost at the switch"
        )
    if ddp.mixed_precision is not None:
        raise ValueError(
            f"{where} mixed_precision, whose low-precision copies are fixed then: use autocast (bf16=True) instead"
        )
    if getattr(ddp, "_use_python_reducer", False):
        raise ValueError(
            "torch._dynamo.config.optimize_ddp is 'python_reducer', which is not supported: set it to True"
        )
    mesh = getattr(ddp, "device_mesh", None)
    if mesh is not None and mesh._get_root_mesh() != mesh:
        raise ValueError(
            f"{where} a device_mesh that is part of a larger one (tensor parallel), which is not supported"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()):
        raise ValueError(
            "the optimizer runs inside the backward pass (apply_optimizer_in_backward), which is not supported"
        )
    unknown = [
        n for n in inspect.signature(DistributedDataParallel.__init__).parameters if n not in {*_CARRIED, *_NOT_CARRIED}
    ]
    lost = [name for name in unknown if not hasattr(ddp, name)]
    if lost:
        warnings.warn(
            f"this torch's DistributedDataParallel has arguments that hf_cuttlefish does not know ({', '.join(lost)}): they "
            "will have their defaults after the switch",
            stacklevel=2,
        )
    prefix = next(f"{n}." if n else "" for n, m in ddp.module.named_modules() if m is model)
    ignored = [name for name in targets if f"{prefix}{name}.weight" in ddp.parameters_to_ignore]
    if ignored:
        raise ValueError(
            f"DistributedDataParallel was told to ignore {ignored[0]}.weight ({len(ignored)} target layers), and would not "
            "ignore its factors: exclude these layers"
        )


def check_can_step(ddp: DistributedDataParallel) -> None:
    """Raises RuntimeError inside a Join context, where some processes may have ended and would not answer."""
    config = getattr(ddp, "_join_config", None)
    if config is not None and config.enable:
        raise RuntimeError(
            "Join (accelerator.join_uneven_inputs) lets processes end before the others, and they would be waited for in "
            "vain: give each process the same number of batches (even_batches=True)"
        )


def check_synchronized(ddp: DistributedDataParallel | None, model: nn.Module, processes: Processes, when: str) -> None:
    """Raises RuntimeError, naming parameters, unless all processes hold the same bits. What DDP ignores is left out."""
    ignored = set() if ddp is None else ddp.parameters_to_ignore
    root = model if ddp is None else ddp.module
    differing = processes.differing({n: p for n, p in root.named_parameters() if n not in ignored})
    if differing:
        raise RuntimeError(
            f"the replicas of the model hold different parameters {when}: {differing[0]} and {len(differing) - 1} more. "
            "Training on would go wrong in silence; resume from the last checkpoint"
        )


class RebuiltDDP:
    """A DDP whose `__init__` has run again on the same object, for the parameters that its module has now.

    Every constructor argument, all hooks (communication hooks too), the training flag and the state of `no_sync` are
    carried over. `finish` or `undo` must follow.

    Raises:
        Whatever the constructor raises; the wrapper is then as it was.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.ddp = ddp
        self._old = dict(ddp.__dict__)
        # Accelerate's compilation block by block calls a shallow copy of the wrapper, which shares the reducer.
        self._copies = [
            m
            for m in _live_modules()
            if isinstance(m, DistributedDataParallel) and m is not ddp and vars(m).get("reducer") is ddp.reducer
        ]
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        arguments = {name: get(ddp) for name, get in _CARRIED.items() if name in known}
        arguments |= {n: getattr(ddp, n) for n in known if n not in {*_CARRIED, *_NOT_CARRIED} and hasattr(ddp, n)}
        builtin_hook = _builtin_comm_hook(ddp)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name in torch 2.13
                DistributedDataParallel.__init__(ddp, ddp.module, **arguments)
            hooks = [k for k in nn.Module().__dict__ if "hooks" in k or k == "_is_full_backward_hook"]
            for key in (*hooks, *_KEPT_ATTRIBUTES):
                if key in self._old:
                    ddp.__dict__[key] = self._old[key]
            for hook, state in self._old["_comm_hooks"]:
                ddp.register_comm_hook(state, hook)
            if builtin_hook is not None:
                ddp._register_builtin_comm_hook(builtin_hook)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put the wrapper back as it was."""
        reducer = self.ddp.__dict__.get("reducer")
        if reducer is not None and reducer is not self._old["reducer"]:
            reducer._remove_autograd_hooks()
        self.ddp.__dict__.clear()
        self.ddp.__dict__.update(self._old)

    def finish(self) -> None:
        """Let go of what belonged to the old parameters."""
        for copy in self._copies:
            vars(copy).update({k: v for k, v in vars(self.ddp).items() if k not in ("_modules", "_orig_mod", "module")})
        self._copies.clear()
        self._old["reducer"]._remove_autograd_hooks()
        for _, state in self.ddp._comm_hooks:
            _restart_comm_state(state)
        self._old.clear()


def repair_ddp(model: nn.Module) -> None:
    """After layers have been exchanged for weights about to be loaded: let the DDP around the model, if any, know.

    Nothing is sent, so every process may do it when it loads; all of them have to load.
    """
    if is_distributed() and (ddp := find_ddp(model)) is not None:
        check_ddp(ddp, model, {})
        RebuiltDDP(ddp).finish()


def forget_compiled() -> None:
    """Drop what torch.compile has made of the old model, so that the next step compiles once and old graphs are freed.

    Blocks that are compiled one by one share their code, and torch gives up after `recompile_limit` (8) versions of it
    and runs the rest uncompiled. Blocks of different ranks are different versions, so the limit is raised to their number.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled before this is imported, which takes seconds
        return
    torch.compiler.reset()
    settings = torch._dynamo.config
    blocks = sum(_is_compiled(m) or vars(m).get("_compiled_call_impl") is not None for m in _live_modules())
    if blocks > getattr(settings, "recompile_limit", blocks):
        settings.recompile_limit = blocks


def _builtin_comm_hook(ddp: DistributedDataParallel) -> Any:
    """The hook set by `_register_builtin_comm_hook`, of which only DDP's logger knows."""
    from torch.distributed import BuiltinCommHookType

    name = str(ddp._get_ddp_logging_data().get("comm_hook", "")) if not ddp._comm_hooks else ""
    return BuiltinCommHookType.__members__.get(name.rpartition(".")[2])


def _restart_comm_state(state: object) -> None:
    """PowerSGD keeps errors by bucket, and the buckets are new: let it warm up again as it did at the start."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    if isinstance(state, PowerSGDState):
        state.iter = 0
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()


def _refuse_wrapper(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel) and not (is_distributed() and Processes().size > 1):
        return
    why = _REFUSED.get(type(model).__name__)
    if why is not None:
        raise ValueError(f"the model is wrapped by {why}")


def _is_compiled(model: nn.Module) -> bool:
    # fully_shard makes a class of its own from the one that it is given.
    return "_orig_mod" in model._modules and any(c.__name__ == "OptimizedModule" for c in type(model).__mro__)
