"""Carry the optimizer: the one place that touches an optimizer. Its factors take their weight's place, and its state.

Where each process holds a part of the state, `redundancy.py` does what is said here for its part.

With W = U V (U = up, V = down) and G the gradient by W, the gradients by the factors are G V^T and U^T G. So first moments
and momentum buffers carry over exactly, m_U = m V^T and m_V = U^T m; second moments approximately, v_U = v (V o V)^T and
v_V = (U o U)^T v, the cross terms dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .sharding import part_like, whole

logger = logging.getLogger(__name__)

LINEAR_STATE = ("exp_avg", "momentum_buffer", "grad_avg", "exp_avg_diff")
"""State tensors that are linear in the gradient (names used by torch.optim and transformers)."""
SQUARE_STATE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""State tensors that are sums or averages of squared gradients."""
FACTORED_STATE = ("exp_avg_sq_row", "exp_avg_sq_col")
"""Adafactor: v ~ row column^T / mean(row)."""
SCALAR_STATE = ("step", "RMS", "mu_product")


@dataclass(frozen=True)
class FactorParameters:
    """One dense weight and the pair that takes its place.

    Attributes:
        weight: the dense Parameter, (m, n), or (n, m) where `transposed` (Conv1D).
        down: (r, n), up: (m, r), new Parameters.
    """

    name: str
    weight: nn.Parameter
    down: nn.Parameter
    up: nn.Parameter
    transposed: bool = False


@dataclass
class OptimizerEdit:
    """A prepared change of an optimizer: `apply` and `undo` only swap references, so neither can fail half-way."""

    optimizer: torch.optim.Optimizer
    new_groups: list[list[nn.Parameter]]
    new_state: dict[torch.Tensor, dict[str, Any]]
    removed: list[nn.Parameter]
    summary: str
    _old_groups: list[list[nn.Parameter]] = field(default_factory=list)
    _old_state: dict[torch.Tensor, Any] = field(default_factory=dict)

    def apply(self) -> None:
        """Edit the existing groups in place: the scheduler and a GradScaler keep the optimizer that they know."""
        self._old_groups = [group["params"] for group in self.optimizer.param_groups]
        for group, params in zip(self.optimizer.param_groups, self.new_groups, strict=True):
            group["params"] = params
        for parameter in self.removed:
            if parameter in self.optimizer.state:
                self._old_state[parameter] = self.optimizer.state.pop(parameter)
        self.optimizer.state.update(self.new_state)

    def undo(self) -> None:
        """Back to what `apply` found; nothing to do if `apply` has not come to change anything."""
        if not self._old_groups:
            return
        for group, params in zip(self.optimizer.param_groups, self._old_groups, strict=True):
            group["params"] = params
        for parameter in self.new_state:
            self.optimizer.state.pop(parameter, None)
        self.optimizer.state.update(self._old_state)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper.

    Raises:
        TypeError: something whose parameter groups cannot be edited (a DeepSpeed or an unknown optimizer).
    """
    seen = optimizer
    while type(seen).__module__.startswith("accelerate.") and hasattr(seen, "optimizer"):
        seen = seen.optimizer
    kind = type(seen)
    if kind.__module__.startswith("deepspeed") or not isinstance(seen, torch.optim.Optimizer):
        raise TypeError(
            f"{kind.__module__}.{kind.__name__} is no torch.optim.Optimizer whose parameters can be replaced"
        )
    return seen


def is_redundant(optimizer: Any) -> bool:
    """Whether it is torch's ZeroRedundancyOptimizer (or Accelerate's wrapper of it), of whose state each process holds a part."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(inner).__mro__)


def check_holds(optimizer: Any, weights: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError unless the optimizer holds every trainable weight given, naming the first that it does not."""
    held = {id(p) for group in inner_optimizer(optimizer).param_groups for p in group["params"]}
    missing = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {missing[0]}.weight ({len(missing)} of {len(weights)} target weights are missing): "
            "pass the optimizer of this very model, made after the model was last changed, or freeze the layers with "
            "requires_grad_(False)"
        )


def prepare(
    optimizer: Any,
    pairs: Sequence[FactorParameters],
    mode: str = "carry",
    gather: Callable[[torch.Tensor], torch.Tensor] = whole,
) -> OptimizerEdit:
    """Work out the optimizer's new groups and state without changing anything.

    Each pair stands where its weight stood, (down, up), so that groups keep the order of `named_parameters` and saved
    states, which go by position, load again.

    Args:
        mode: "carry" projects known states, "reset" starts empty. Unknown kinds of state are reset, with a log line.
        gather: gives the whole of a tensor of which the processes hold parts.

    Raises:
        TypeError: as `inner_optimizer`, and for ZeroRedundancyOptimizer (`redundancy.py`).
        ValueError: as `check_holds`, or an unknown mode.
    """
    inner = inner_optimizer(optimizer)
    if is_redundant(inner):
        raise TypeError(
            "ZeroRedundancyOptimizer has divided the parameters among the processes: make it after factorize, or use Cuttlefish, "
            "which divides them anew"
        )
    check_holds(inner, {p.name: p.weight for p in pairs})
    groups = groups_with_factors(inner.param_groups, pairs)
    state = state_of_factors(inner.state, pairs, mode, gather, type(inner).__name__)
    had = sum(bool(inner.state.get(pair.weight)) for pair in pairs)
    return OptimizerEdit(
        inner, groups, state, [p.weight for p in pairs], summary(type(inner).__name__, len(state) // 2, had, len(pairs))
    )


def summary(name: str, carried: int, had: int, layers: int) -> str:
    """The line of the report. carried, had: how many of the layers' states were projected, and existed."""
    return f"{name}: " + (f"state carried for {carried} of {layers} layers" if had else "no state yet")


def groups_with_factors(
    groups: Iterable[Mapping[str, Any]], pairs: Iterable[FactorParameters]
) -> list[list[nn.Parameter]]:
    """The parameters of each group, where each pair stands where its weight stood."""
    new_of = {id(p.weight): [p.down, p.up] for p in pairs}
    return [[new for old in group["params"] for new in new_of.get(id(old), [old])] for group in groups]


def state_of_factors(
    held: Mapping[torch.Tensor, dict[str, Any]],
    pairs: Iterable[FactorParameters],
    mode: str,
    gather: Callable[[torch.Tensor], torch.Tensor],
    name: str,
) -> dict[torch.Tensor, dict[str, Any]]:
    """The projected state of the factors, but for those whose weight has none in `held`. name: of the optimizer, for the log.

    Raises ValueError for an unknown mode.
    """
    if mode not in ("carry", "reset"):
        raise ValueError(f"optimizer_state is {mode!r}: it must be 'carry' or 'reset'")
    state: dict[torch.Tensor, dict[str, Any]] = {}
    reset: set[str] = set()
    for pair in pairs:
        old = held.get(pair.weight)
        if not old or mode == "reset":
            continue
        if unknown := unknown_state(old):
            reset.update(unknown)
            continue
        state[pair.down], state[pair.up] = project(old, pair, gather)
    if reset:
        logger.warning(
            "Cuttlefish: %s keeps the state %s, which has no known projection; the factors start with empty state.",
            name,
            ", ".join(sorted(reset)),
        )
    return state


def check_in_step(model: nn.Module, optimizer: Any, before: set[int], pairs: Sequence[FactorParameters]) -> None:
    """Raises RuntimeError unless the optimizer holds what it held, each replaced weight exchanged for its two factors.

    Args:
        before: ids of the parameters that the optimizer held before the switch.
    """
    after = [id(p) for group in inner_optimizer(optimizer).param_groups for p in group["params"]]
    expected = set(before)
    for pair in pairs:
        if id(pair.weight) in expected:
            expected -= {id(pair.weight)}
            expected |= {id(pair.down), id(pair.up)}
    stale = {id(p.weight) for p in pairs} & {id(p) for p in model.parameters()}
    if set(after) != expected or len(after) != len(set(after)) or stale:
        raise RuntimeError(
            "after the switch the optimizer and the model hold different parameters; nothing was changed"
        )


def unknown_state(state: Iterable[str]) -> list[str]:
    """Names of the kinds of state that `project` does not know."""
    return [k for k in state if k not in LINEAR_STATE + SQUARE_STATE + FACTORED_STATE + SCALAR_STATE]


@torch.no_grad()
def project(
    old: dict[str, Any], pair: FactorParameters, gather: Callable[[torch.Tensor], torch.Tensor] = whole
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a pair's two factors, down and up, from that of the weight whose place they take."""
    down, up = gather(pair.down).float(), gather(pair.up).float()
    old = {k: gather(v) if isinstance(v, torch.Tensor) else v for k, v in old.items()}
    for_down: dict[str, Any] = {}
    for_up: dict[str, Any] = {}
    for key, value in old.items():
        if key in SCALAR_STATE or not isinstance(value, torch.Tensor):
            for_down[key], for_up[key] = _copy(value), _copy(value)
        elif key in LINEAR_STATE:
            dense = _as_weight(value, pair)
            for_up[key] = (dense @ down.mT).to(value.dtype)
            for_down[key] = (up.mT @ dense).to(value.dtype)
        elif key in SQUARE_STATE:
            dense = _as_weight(value, pair)
            for_up[key] = (dense @ down.square().mT).to(value.dtype)
            for_down[key] = (up.square().mT @ dense).to(value.dtype)
    if "exp_avg_sq_row" in old and "exp_avg_sq_col" in old:
        row, column = old["exp_avg_sq_row"].float(), old["exp_avg_sq_col"].float()
        dense = torch.outer(row / row.mean().clamp_min(torch.finfo(torch.float32).tiny), column)
        dense = dense.mT if pair.transposed else dense
        for state, moment in ((for_up, dense @ down.square().mT), (for_down, up.square().mT @ dense)):
            state["exp_avg_sq_row"] = moment.mean(-1).to(old["exp_avg_sq_row"].dtype)
            state["exp_avg_sq_col"] = moment.mean(-2).to(old["exp_avg_sq_col"].dtype)
    for state, parameter in ((for_down, down), (for_up, up)):
        if isinstance(state.get("RMS"), float):
            state["RMS"] = float(parameter.square().mean().sqrt())
    return _parts(for_down, pair.down), _parts(for_up, pair.up)


def _parts(state: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """State of the parameter's shape, cut as the parameter is where that is sharded."""
    return {k: part_like(v, parameter) if getattr(v, "shape", None) == parameter.shape else v for k, v in state.items()}


def _as_weight(value: torch.Tensor, pair: FactorParameters) -> torch.Tensor:
    return value.float().mT if pair.transposed else value.float()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def follow(optimizer: Any, changes: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Exchange the parameters of replaced modules, (old, new), whose new weights are about to be loaded; their state is dropped."""
    inner = inner_optimizer(optimizer)
    new_of: dict[int, list[nn.Parameter]] = {}
    gone: list[nn.Parameter] = []
    for old, new in changes:
        kept = {id(p) for p in new.parameters()}
        old_parameters = [p for p in old.parameters() if id(p) not in kept]
        fresh = [p for p in new.parameters() if id(p) not in {id(q) for q in old.parameters()}]
        for i, parameter in enumerate(old_parameters):
            new_of[id(parameter)] = fresh if i == 0 else []
        gone += old_parameters
    for group in inner.param_groups:
        group["params"] = [q for p in group["params"] for q in new_of.get(id(p), [p])]
    for parameter in gone:
        inner.state.pop(parameter, None)
