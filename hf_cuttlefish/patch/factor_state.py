"""The state of factors: projected from their weight's, packed again where it was, or as the optimizer begins it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers.parts import part_like, whole
from ..maths.projection import KINDS, PLAIN, Layout, project, unknown_state
from .miniature import new_state, own_state
from .optimizer_parts import has_shape, is_packed, plain
from .rehearsal import Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FactorParameters:
    """One dense weight and the pair that takes its place.

    Attributes:
        weight: the dense Parameter. down, up: new Parameters.
        layout: how these lie in their parameters.
        behind: parameters that stand before the factors in `named_parameters`, although they may have stood behind the weight.
    """

    name: str
    weight: nn.Parameter
    down: nn.Parameter
    up: nn.Parameter
    layout: Layout = PLAIN
    behind: tuple[nn.Parameter, ...] = ()


@dataclass(frozen=True)
class State:
    """Which state is meant: the one numbered `which` of those of an optimizer and of the ones inside it."""

    optimizer: torch.optim.Optimizer
    which: int
    verdicts: Mapping[int, Verdict]

    def kinds(self, weight: nn.Parameter) -> Mapping[str, str]:
        """State name -> kind, of what can be carried."""
        verdict = self.verdicts.get(id(weight))
        if verdict is None or verdict.how == "unknown":
            return KINDS
        return verdict.kinds[self.which] if verdict.how == "carried" else {}

    def why(self, weight: nn.Parameter) -> str:
        """Why nothing is carried, where that was found out beforehand."""
        verdict = self.verdicts.get(id(weight))
        return verdict.why if verdict is not None and verdict.how == "fresh" else ""

    def begun(self, weight: nn.Parameter, parameter: nn.Parameter) -> dict[str, Any]:
        """With what a new parameter starts."""
        return new_state(self.optimizer, weight, parameter, self._start(weight))[self.which]

    def own(self, weight: nn.Parameter, parameter: nn.Parameter) -> dict[str, Any]:
        """What the optimizer would keep of a new parameter, in its own classes."""
        return own_state(self.optimizer, weight, parameter, self._start(weight))[self.which]

    def _start(self, weight: nn.Parameter) -> str:
        verdict = self.verdicts.get(id(weight))
        return verdict.start if verdict is not None else "empty"


def not_carried(held: Mapping[str, Any], weight: torch.Tensor, kinds: Mapping[str, str]) -> list[str]:
    """Names in a weight's state that have no projection: of no known kind, or not of the weight's shape."""
    return unknown_state(held, kinds) + [
        key
        for key, value in held.items()
        if isinstance(value, torch.Tensor) and key in kinds and not _fits(value, weight, kinds[key])
    ]


def _fits(value: torch.Tensor, weight: torch.Tensor, kind: str) -> bool:
    """Whether a tensor can be of that kind: moments have their weight's shape, flat or several in one."""
    if kind == "scalar":
        return value.numel() == 1
    return kind == "factored" or (has_shape(value, weight) and value.dtype.is_floating_point)


def carried_pairs(
    pairs: Iterable[FactorParameters], states: Sequence[Any], verdicts: Mapping[int, Verdict], mode: str
) -> int:
    """Of how many pairs all the state that there is goes on."""
    if mode == "reset":
        return 0
    carried = 0
    for pair in pairs:
        verdict = verdicts.get(id(pair.weight), Verdict("unknown"))
        kinds = verdict.kinds if verdict.how == "carried" else [KINDS if verdict.how == "unknown" else {}] * len(states)
        held = [(state.get(pair.weight) or {}, known) for state, known in zip(states, kinds, strict=True)]
        carried += any(old for old, _ in held) and not any(not_carried(old, pair.weight, known) for old, known in held)
    return carried


def state_summary(name: str, carried: int, had: int, layers: int) -> str:
    """The line of the report. carried, had: how many of the layers' states were projected, and existed."""
    return f"{name}: " + (f"state carried for {carried} of {layers} layers" if had else "no state yet")


def state_of_factors(
    held: Mapping[torch.Tensor, dict[str, Any]],
    pairs: Iterable[FactorParameters],
    mode: str,
    gather: Callable[[torch.Tensor], torch.Tensor],
    name: str,
    of: State,
) -> dict[torch.Tensor, dict[str, Any]]:
    """The state of the factors: projected, or as the optimizer starts it; none where that is empty.

    Args:
        held: the state before. name: of the optimizer, for the log. of: which state `held` is.

    Raises ValueError for an unknown mode.
    """
    if mode not in ("carry", "reset"):
        raise ValueError(f"optimizer_state is {mode!r}: it must be 'carry' or 'reset'")
    state: dict[torch.Tensor, dict[str, Any]] = {}
    reset: set[str] = set()
    for pair in pairs:
        old, kinds = held.get(pair.weight), of.kinds(pair.weight)
        if old and mode == "carry":
            if not (unknown := not_carried(old, pair.weight, kinds)):
                state[pair.down], state[pair.up] = project_pair(old, pair, gather, kinds, of)
                continue
            reset.add(
                of.why(pair.weight) or f"the state {', '.join(sorted(map(str, unknown)))} has no known projection"
            )
        for parameter in (pair.down, pair.up):
            if begun := of.begun(pair.weight, parameter):
                state[parameter] = begun
    if reset:
        logger.warning(
            "Cuttlefish: the state of %s is not carried, and starts anew for the factors: %s.",
            name,
            "; ".join(sorted(reset)),
        )
    return state


def project_pair(
    old: dict[str, Any],
    pair: FactorParameters,
    gather: Callable[[torch.Tensor], torch.Tensor] = whole,
    kinds: Mapping[str, str] = KINDS,
    of: State | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a pair's two factors, down and up, sharded as they are, from that of the weight whose place they take.

    Args:
        of: which state it is, where some of it is packed and has to be packed again as the optimizer does it.
    """
    packed = [key for key, value in old.items() if is_packed(value)]
    held = {k: _whole(v, gather) if isinstance(v, torch.Tensor) else v for k, v in old.items()}
    new = project(held, gather(pair.down), gather(pair.up), pair.layout, kinds)
    for state, parameter in zip(new, (pair.down, pair.up), strict=True):
        if packed and of is not None:
            own = of.own(pair.weight, parameter)
            for key in packed:
                state[key] = own[key].copy_(state[key])
    return _parts(new[0], pair.down), _parts(new[1], pair.up)


def _whole(tensor: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return plain(tensor) if is_packed(tensor) else gather(tensor)


def _parts(state: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """State of the parameter's shape, cut as the parameter is where that is sharded."""
    return {k: part_like(v, parameter) if getattr(v, "shape", None) == parameter.shape else v for k, v in state.items()}
