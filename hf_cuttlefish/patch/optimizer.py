"""Carry the optimizer: the one place that touches an optimizer. Factors take their weight's place, and its state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers.parts import part_like, whole
from ..maths.projection import project, unknown_state
from .edits import Edit

logger = logging.getLogger(__name__)


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


class SwapParameters(Edit):
    """The factors take their weights' places in an optimizer, with their weights' state projected.

    Each pair stands where its weight stood, (down, up), so that groups keep the order of `named_parameters` and saved states,
    which go by position, load again. The optimizer and its groups stay the same objects: the scheduler and a GradScaler keep
    what they know. `apply` and `undo` only swap references, so neither can fail half-way.

    Args:
        mode: "carry" projects known states, "reset" starts empty. Unknown kinds of state are reset, with a log line.
        gather: gives the whole of a tensor of which the processes hold parts.

    Raises:
        TypeError: as `inner_optimizer`, and for ZeroRedundancyOptimizer, whose edit is in engines/zero_redundancy.py.
        ValueError: as `check_holds`, or an unknown mode.
    """

    def __init__(
        self,
        optimizer: Any,
        pairs: Sequence[FactorParameters],
        mode: str = "carry",
        gather: Callable[[torch.Tensor], torch.Tensor] = whole,
    ) -> None:
        self.optimizer = inner_optimizer(optimizer)
        if is_redundant(self.optimizer):
            raise TypeError(
                "ZeroRedundancyOptimizer has sharded its state among the processes: make it after factorize, or use Cuttlefish, "
                "which shards it anew"
            )
        check_holds(self.optimizer, {p.name: p.weight for p in pairs})
        held, name = self.optimizer.state, type(self.optimizer).__name__
        self._groups = groups_with_factors(self.optimizer.param_groups, pairs)
        self._state = state_of_factors(held, pairs, mode, gather, name)
        self._removed = [p.weight for p in pairs]
        had = sum(bool(held.get(pair.weight)) for pair in pairs)
        self.summary = state_summary(name, len(self._state) // 2, had, len(pairs))
        self._old_groups: list[list[nn.Parameter]] = []
        self._old_state: dict[torch.Tensor, Any] = {}

    def apply(self) -> None:
        self._old_groups = [group["params"] for group in self.optimizer.param_groups]
        for group, params in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = params
        for parameter in self._removed:
            if parameter in self.optimizer.state:
                self._old_state[parameter] = self.optimizer.state.pop(parameter)
        self.optimizer.state.update(self._state)

    def undo(self) -> None:
        if not self._old_groups:
            return
        for group, params in zip(self.optimizer.param_groups, self._old_groups, strict=True):
            group["params"] = params
        for parameter in self._state:
            self.optimizer.state.pop(parameter, None)
        self.optimizer.state.update(self._old_state)


class CheckParameters(Edit):
    """Changes nothing, and fails unless the optimizer holds what it held, each replaced weight exchanged for its two factors."""

    def __init__(self, model: nn.Module, optimizer: Any, pairs: Sequence[FactorParameters]) -> None:
        self.model, self.optimizer, self.pairs = model, inner_optimizer(optimizer), pairs
        self._before = {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    def apply(self) -> None:
        """Raises RuntimeError for a difference."""
        after = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        expected = set(self._before)
        for pair in self.pairs:
            if id(pair.weight) in expected:
                expected -= {id(pair.weight)}
                expected |= {id(pair.down), id(pair.up)}
        stale = {id(p.weight) for p in self.pairs} & {id(p) for p in self.model.parameters()}
        if set(after) != expected or len(after) != len(set(after)) or stale:
            raise RuntimeError(
                "after the switch the optimizer and the model hold different parameters; nothing was changed"
            )


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper.

    Raises:
        TypeError: something whose parameter groups cannot be edited (a DeepSpeed or an unknown optimizer).
    """
    if optimizer is None:
        raise TypeError(
            "optimizer is None: give the torch optimizer that trains the model, such as torch.optim.AdamW(model.parameters()); "
            "without training, factorize(model, plan) needs none"
        )
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


def state_summary(name: str, carried: int, had: int, layers: int) -> str:
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
        state[pair.down], state[pair.up] = project_pair(old, pair, gather)
    if reset:
        logger.warning(
            "Cuttlefish: %s keeps the state %s, which has no known projection; the factors start with empty state.",
            name,
            ", ".join(sorted(reset)),
        )
    return state


def project_pair(
    old: dict[str, Any], pair: FactorParameters, gather: Callable[[torch.Tensor], torch.Tensor] = whole
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a pair's two factors, down and up, sharded as they are, from that of the weight whose place they take."""
    held = {k: gather(v) if isinstance(v, torch.Tensor) else v for k, v in old.items()}
    for_down, for_up = project(held, gather(pair.down), gather(pair.up), pair.transposed)
    return _parts(for_down, pair.down), _parts(for_up, pair.up)


def _parts(state: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """State of the parameter's shape, cut as the parameter is where that is sharded."""
    return {k: part_like(v, parameter) if getattr(v, "shape", None) == parameter.shape else v for k, v in state.items()}


def follow_modules(optimizer: Any, changes: Iterable[tuple[nn.Module, nn.Module]]) -> None:
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
