"""DDP: its wrapper is repaired at the switch. What cannot be repaired is refused. And nn.DataParallel, which needs no repair.

DistributedDataParallel listens to the Parameters that it found when it was built. After a switch it would leave the new
ones alone without a word, and every replica would go its own way. The loop holds the wrapper in a local variable, so it
cannot be exchanged; its `__init__` runs again on the same object instead.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import CuttlefishConfig
from ..layers.low_rank import low_rank_layers
from ..patch.edits import Edit
from ..patch.modules import Change
from ..patch.optimizer import inner_optimizer
from ..patch.structure import Exchanges
from ..processes import Processes, is_distributed
from .around import Around, live_modules, refuse_wrapper
from .base import Engine, Layers, check_same_bits
from .zero_redundancy import is_redundant

MIB = 1024 * 1024


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


class DDP(Engine):
    """The model inside DistributedDataParallel, a replica on each process of its group."""

    def __init__(self, model: nn.Module, optimizer: Any, ddp: DistributedDataParallel) -> None:
        super().__init__(model, optimizer)
        self.ddp = ddp
        self.processes = self.peers = Processes(ddp.process_group)

    @classmethod
    def find(cls, around: Around, optimizer: Any) -> DDP | None:
        """Raises ValueError where an engine that is not supported is around the model, or more than one DDP."""
        ddp = find_ddp(around)
        return None if ddp is None else cls(around.model, optimizer, ddp)

    def check(self, layers: Layers, config: CuttlefishConfig, can_restart: bool = False) -> None:
        super().check(layers, config)
        check_ddp(self.ddp, self.model, layers)

    def check_step(self) -> None:
        check_can_step(self.ddp)

    def check_replicas(self, when: str) -> None:
        """What DDP ignores may differ."""
        ignored = self.ddp.parameters_to_ignore
        held = {n: p for n, p in self.ddp.module.named_parameters() if n not in ignored}
        check_same_bits(self.processes, held, when)

    def edits(self, change: Change) -> list[Edit]:
        edits = [*super().edits(change), RebuildDDP(self.ddp)]
        return edits if is_redundant(self.optimizer) else [*edits, SendState(self)]

    @classmethod
    def exchanged(cls, model: nn.Module, changes: Exchanges) -> None:
        """Let the DDP around the model know. Nothing is sent, so every process may do it when it loads; all have to load."""
        if is_distributed() and changes and (ddp := find_ddp(Around(model))) is not None:
            check_ddp(ddp, model, {})
            rebuild = RebuildDDP(ddp)
            try:
                rebuild.apply()
            except BaseException:
                rebuild.undo()
                raise
            rebuild.finish()


class DataParallel(Engine):
    """The model inside nn.DataParallel, which copies it anew in each forward: nothing is to be repaired."""

    @classmethod
    def find(cls, around: Around, optimizer: Any) -> DataParallel | None:
        wrappers = [m for m in around.wrappers if isinstance(m, nn.DataParallel)]
        if not wrappers:
            return None
        engine = cls(around.model, optimizer)
        engine.replicas = max([1, *(len(m.device_ids) for m in wrappers)])
        return engine


class SendState(Edit):
    """The projected state, as the main process has it: it comes out of matrix products, which round differently by device."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def apply(self) -> None:
        processes = self.engine.processes
        if processes.size == 1:
            return
        state = inner_optimizer(self.engine.optimizer).state
        for pair in low_rank_layers(self.engine.model).values():
            for parameter in pair.factors:
                for _, value in sorted(state.get(parameter, {}).items()):
                    if hasattr(value, "ndim") and value.ndim > 0:
                        processes.broadcast_(value)


def find_ddp(around: Around) -> DistributedDataParallel | None:
    """The DDP around a model, or around a module that holds it; None if there is none.

    Raises:
        ValueError: an engine that is not supported is around the model, or more than one DDP.
    """
    if sum(isinstance(w, DistributedDataParallel) for w in around.wrappers) > 1:
        around.look_again()  # the wrapper of an earlier run may only be waiting to be freed
    for wrapper in around.wrappers:
        refuse_wrapper(wrapper)
    ddps = [w for w in around.wrappers if isinstance(w, DistributedDataParallel)]
    if len(ddps) > 1:
        raise ValueError(
            f"{len(ddps)} DistributedDataParallel objects are around this {type(around.model).__name__}, and they would all "
            "exchange its gradients: delete those of earlier runs, or make a new model for each run"
        )
    return ddps[0] if ddps else None


def check_no_ddp(model: nn.Module) -> None:
    """Raises ValueError for a model inside DDP, which would leave parameters that it does not know alone, in silence."""
    if is_distributed() and find_ddp(Around(model)) is not None:
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


class RebuildDDP(Edit):
    """DDP's `__init__` runs again on the same object, for the parameters that its module has now.

    Every constructor argument, all hooks (communication hooks too), the training flag and the state of `no_sync` are
    carried over.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.ddp = ddp
        self._old: dict[str, Any] = {}
        self._copies: list[DistributedDataParallel] = []

    def apply(self) -> None:
        """Raises what the constructor raises."""
        ddp = self.ddp
        self._old = dict(ddp.__dict__)
        # Accelerate's compilation block by block calls a shallow copy of the wrapper, which shares the reducer.
        self._copies = [
            m
            for m in live_modules()
            if isinstance(m, DistributedDataParallel) and m is not ddp and vars(m).get("reducer") is ddp.reducer
        ]
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        arguments = {name: get(ddp) for name, get in _CARRIED.items() if name in known}
        arguments |= {n: getattr(ddp, n) for n in known if n not in {*_CARRIED, *_NOT_CARRIED} and hasattr(ddp, n)}
        builtin_hook = _builtin_comm_hook(ddp)
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

    def undo(self) -> None:
        """Put the wrapper back as it was."""
        if not self._old:
            return
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
