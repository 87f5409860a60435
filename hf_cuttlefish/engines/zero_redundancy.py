"""The optimizer of which each process holds a part: torch's ZeroRedundancyOptimizer, sharded anew at the switch.

Each parameter has one owner, whose local optimizer (`.optim`) steps it and alone holds its state. With factors in place of
weights the sizes are others, and so is the sharding. ZeroRedundancyOptimizer's `__init__` runs again on the same object; then
the state of each parameter that has another owner now is sent, one tensor at a time, projected by the old owner where it is
that of a weight. No process ever holds the whole state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn

from ..layers.parts import whole
from ..patch.edits import Edit
from ..patch.factor_state import State, state_of_factors, state_summary
from ..patch.modules import Change
from ..patch.optimizer import (
    check_can_switch,
    check_holds,
    follow_modules,
    groups_with_factors,
    inner_optimizer,
)
from ..processes import Processes

_KEPT_ATTRIBUTES = ("defaults", "_optim_constructor", "_join_config")
"""What `__init__` sets besides the hooks and is to stay."""


def is_redundant(optimizer: Any) -> bool:
    """Whether it is torch's ZeroRedundancyOptimizer (or Accelerate's wrapper of it), of whose state each process holds a part."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(inner).__mro__)


def refuse_redundant(optimizer: Any) -> None:
    """Raises ValueError for a ZeroRedundancyOptimizer, where parameters are sharded."""
    if is_redundant(optimizer):
        raise ValueError(
            "ZeroRedundancyOptimizer steps whole parameters, and these are sharded: use an ordinary optimizer, or DDP"
        )


def check_redundant(optimizer: Any, processes: Processes) -> None:
    """Raises ValueError for a ZeroRedundancyOptimizer that could not be sharded anew. processes: that train the model."""
    inner: Any = inner_optimizer(optimizer)
    if inner._overlap_with_ddp:
        raise ValueError(
            "ZeroRedundancyOptimizer was built with overlap_with_ddp=True, and steps in a communication hook that knows the old "
            "parameters: leave it at False"
        )
    if processes.group is not None:
        mine, theirs = (dist.get_process_group_ranks(group) for group in (inner.process_group, processes.group))
        if mine != theirs:
            raise ValueError(
                f"ZeroRedundancyOptimizer has sharded its state among the processes {mine}, and DistributedDataParallel "
                f"trains them on {theirs}: give both the same process_group"
            )


@dataclass(frozen=True)
class _Described:
    """A tensor of a state, as other processes hear of it.

    Attributes:
        beside: whether it is on its parameter's device; if not, on the host. value: of a tensor without dimensions.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    beside: bool
    value: Any = None


class ShardAnew(Edit):
    """A ZeroRedundancyOptimizer's parameters are sharded anew, and each one's state goes to its new owner.

    The ZeroRedundancyOptimizer stays the same object, as do the optimizer inside it and their groups, so schedulers, hooks and
    GradScalers keep what they know. All processes must apply at the same point.

    Raises ValueError as `check_holds`, or for an unknown mode.
    """

    def __init__(self, change: Change) -> None:
        self.optimizer = cast(Any, inner_optimizer(change.optimizer))
        self.summary = type(self.optimizer).__name__
        self._processes = Processes(self.optimizer.process_group)
        self._undo: _Snapshot | None = None
        self._pairs = pairs = change.parameters
        check_holds(self.optimizer, {p.name: p.weight for p in pairs})
        local = self.optimizer.optim
        self._groups = groups_with_factors(self.optimizer.param_groups, pairs)
        self._had = sum(bool(local.state.get(p.weight)) for p in pairs)
        verdicts = check_can_switch(local, {p.name: p.weight for p in pairs}, change.optimizer_state)
        of = State(local, 0, verdicts)
        new = state_of_factors(local.state, pairs, change.optimizer_state, whole, type(local).__name__, of)
        gone = {p.weight for p in pairs}
        self._state = {p: s for p, s in local.state.items() if p not in gone} | new

    def apply(self) -> None:
        """Shard the parameters anew, then send the state.

        Raises:
            ValueError: the processes shard the parameters differently; on all of them.
            OtherProcessError: another process could not shard them, or has no memory for what it would get.
        """
        with self._processes.together():
            self._undo = _Snapshot(self.optimizer)
            for group, params in zip(self.optimizer.param_groups, self._groups, strict=True):
                group["params"] = params
            _shard(self.optimizer)
            self._order = {p: i for i, p in enumerate(_parameters(self.optimizer))}
            self._has = {self._order[p]: _described(p, s) for p, s in self._state.items() if p in self._order and s}
        self._exchange()

    def _exchange(self) -> None:
        """Give each parameter's state to its new owner."""
        local = self.optimizer.optim
        everywhere = self._processes.gather((self._has, [self._order[p] for p in _parameters(local)], self._had))
        owner = {i: rank for rank, (_, wanted, _) in enumerate(everywhere) for i in wanted}
        if sorted(i for _, wanted, _ in everywhere for i in wanted) != list(range(len(self._order))):
            raise ValueError(
                "the processes shard the parameters of ZeroRedundancyOptimizer in different ways: give each process the same "
                "parameter groups in the same order"
            )
        moves = [
            (i, source, described)
            for source, (has, _, _) in enumerate(everywhere)
            for i, described in sorted(has.items())
            if owner[i] != source
        ]
        new = self._send(moves, [owner[i] == self._processes.rank for i in range(len(self._order))])
        local.state.clear()
        local.state.update(new)
        known = {i for has, _, _ in everywhere for i in has}
        carried = sum(self._order.get(pair.down, -1) in known for pair in self._pairs)
        had = sum(had for *_, had in everywhere)
        self.summary = state_summary(
            f"{type(self.optimizer).__name__}({type(local).__name__})", carried, had, len(self._pairs)
        )

    def _send(
        self, moves: Sequence[tuple[int, int, dict[str, Any]]], mine: Sequence[bool]
    ) -> dict[Any, dict[str, Any]]:
        """This process's new state. moves: (parameter's number, its old owner, its state described). mine: by number."""
        parameters = list(self._order)
        with self._processes.together():  # nothing but the sending is left then, which all or none come to
            new = {p: s for p, s in self._state.items() if p not in self._order or mine[self._order[p]]}
            for i, _, described in moves:
                if mine[i]:
                    new[parameters[i]] = {key: _empty(parameters[i], what) for key, what in described.items()}
            sent = [(i, source, key, what) for i, source, d in moves for key, what in d.items() if _is_sent(what)]
            most = max((_bytes(what) for *_, what in sent), default=0)
            buffer = torch.empty(most, dtype=torch.uint8, device=parameters[0].device)
        for i, source, key, what in sent:
            flat = buffer[: _bytes(what)]
            part = flat.view(what.dtype).view(what.shape)
            if self._processes.rank == source:
                part.copy_(self._state[parameters[i]][key])
            self._processes.broadcast_(flat, source)
            if mine[i]:
                new[parameters[i]][key].copy_(part)
        return new

    def undo(self) -> None:
        """Back to what `apply` found; nothing to do before."""
        if self._undo is not None:
            self._undo.restore()
            self._undo = None


def follow_redundant(optimizer: Any, changes: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """As `follow_modules`, but all state is dropped: the others' parameters may have new owners too. Nothing is sent."""
    follow_modules(optimizer, changes)
    inner: Any = inner_optimizer(optimizer)
    _shard(inner)
    inner.optim.state.clear()


class _Snapshot:
    """All that `apply` and `exchange` change of a ZeroRedundancyOptimizer, by reference: nothing is copied."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._attributes = optimizer, dict(optimizer.__dict__)
        self._groups = [(group, group["params"]) for o in (optimizer, optimizer.optim) for group in o.param_groups]
        self._state = dict(optimizer.optim.state)
        views = _parameters(optimizer) if optimizer.parameters_as_bucket_view else []
        self._views = [(p, p.data) for p in views]

    @torch.no_grad()
    def restore(self) -> None:
        self._optimizer.__dict__.clear()
        self._optimizer.__dict__.update(self._attributes)
        for group, params in self._groups:
            group["params"] = params
        self._optimizer.optim.state.clear()
        self._optimizer.optim.state.update(self._state)
        for parameter, data in self._views:  # the old buckets are sent from now on
            if parameter.data_ptr() != data.data_ptr():
                data.copy_(parameter.data)
                parameter.data = data


def _shard(optimizer: Any) -> None:
    """Run ZeroRedundancyOptimizer's `__init__` again, for the parameters that its groups have now."""
    kind: Any = next(c for c in type(optimizer).__mro__ if c.__name__ == "ZeroRedundancyOptimizer")
    old, local, groups = dict(optimizer.__dict__), optimizer.optim, optimizer.param_groups

    def same_optimizer(mine: list[dict[str, Any]], **_: Any) -> torch.optim.Optimizer:
        for group, new in zip(local.param_groups, mine, strict=True):
            group["params"] = new["params"]
        return local

    kind.__init__(
        optimizer,
        [dict(group) for group in groups],  # copies: the groups that schedulers know keep their rates
        optimizer_class=same_optimizer,
        process_group=optimizer.process_group,
        parameters_as_bucket_view=optimizer.parameters_as_bucket_view,
        **optimizer.defaults,
    )
    optimizer.param_groups = groups
    for name, value in old.items():
        if "hooks" in name or name in _KEPT_ATTRIBUTES:
            optimizer.__dict__[name] = value


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _described(parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Any]:
    """A state without its tensors, small enough for every process to hear of.

    Raises TypeError for values of unknown types, which might hold tensors.
    """
    described: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            only = value.item() if value.ndim == 0 else None
            described[key] = _Described(tuple(value.shape), value.dtype, value.device == parameter.device, only)
        elif value is None or isinstance(value, (bool, int, float, str)):
            described[key] = value
        else:
            raise TypeError(
                f"the optimizer inside ZeroRedundancyOptimizer keeps a {type(value).__name__} as its state {key!r}, and only "
                "tensors and numbers can be sent to another process: use another optimizer"
            )
    return described


def _empty(parameter: nn.Parameter, described: Any) -> Any:
    """Room for a value that will be sent, and the value itself where it has been told already."""
    if not isinstance(described, _Described):
        return described
    device = parameter.device if described.beside else torch.device("cpu")
    if not described.shape:
        return torch.tensor(described.value, dtype=described.dtype, device=device)
    return torch.empty(described.shape, dtype=described.dtype, device=device)


def _is_sent(described: Any) -> bool:
    return isinstance(described, _Described) and bool(described.shape)


def _bytes(described: _Described) -> int:
    return torch.Size(described.shape).numel() * described.dtype.itemsize
