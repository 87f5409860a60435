"""Rehearse: what an optimizer makes of the switch, tried on a miniature of the very object before the run begins.

Optimizers are many, and say nowhere what they keep. So a small copy of the one at hand, all settings alike, trains one small
matrix on made-up gradients, and another copy its two factors on the gradients that they would have had. What the two have kept
tells which state follows from which: a moment that is linear in the gradient, an average of squares, a copy of the parameter.
Then the miniature switches, by the code that will carry the real switch out, and steps on. Where that fails, or the step is
out of proportion, the state starts anew; where that fails too, the optimizer is refused, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..maths.projection import (
    FACTORED_STATE,
    KINDS,
    LINEAR_STATE,
    ROUNDING_STATE,
    SCALAR_STATE,
    SQUARE_STATE,
    as_matrix,
)
from .miniature import LIKE, UnableError, aside, changed, differ, miniature, new_state, same, step_with, words
from .optimizer_parts import beside_groups, groups_in, has_shape, is_packed, kept_elsewhere, plain, states_in

ROWS, COLUMNS = 96, 64
"""Of the small matrix. It and its factors have at least 4096 numbers, from where on 8-bit optimizers pack their state."""
STEPS = 20
"""Enough for averages to be told from single gradients, and for a count of steps to show in a bias correction."""
NEAR = 0.6
"""The same where squares come in, of which the projection drops the cross terms."""
TOO_LARGE, TOO_SMALL = 3.0, 0.05
"""How many times as large as expected the first update of the product may be. A slow beginning does no harm."""


@dataclass
class Verdict:
    """What becomes of an optimizer's state of one weight.

    Attributes:
        how: "carried", "fresh", "refused", or "unknown" where nothing could be tried, for the reason in `why`.
        kinds: for each optimizer (the given one and those inside it) state name -> its kind, as `maths.projection.KINDS`.
        start: how new state begins: "empty", "constructor" (as the optimizer's own constructor makes it), or "alike": what
            the weight has, numbers as they are, copies of the weight as copies of the new parameter, all else zero.
        why: for people.
    """

    how: str
    kinds: list[dict[str, str]] = field(default_factory=list)
    start: str = "empty"
    why: str = ""


def rehearse(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, swap: Callable[..., Any], mode: str = "carry"
) -> Verdict:
    """Try the switch of one weight's group on a miniature of the optimizer. The optimizer itself and all random states stay.

    Args:
        weight: one of those that the optimizer holds. mode: "carry" or "reset".
        swap: swap(miniature, weight, down, up, verdict) exchanges a weight, by the code of the real switch.
    """
    try:
        with aside():
            return _Rehearsal(optimizer, weight, swap).verdict(mode)
    except UnableError as error:
        return Verdict("unknown", why=str(error))


class _Rehearsal:
    def __init__(self, optimizer: torch.optim.Optimizer, weight: nn.Parameter, swap: Callable[..., Any]) -> None:
        self.optimizer, self.template, self.swap = optimizer, weight, swap
        self.counts: set[str] = set()
        with_generator = torch.Generator().manual_seed(0)

        def matrix(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=with_generator).mul_(scale).to(weight.device)

        # So small that a square, a modulus and a sign follow the factors by very different powers of them.
        self.up, self.down = matrix(ROWS, COLUMNS, scale=0.02), matrix(COLUMNS, COLUMNS, scale=0.02)
        self.dense = self.up @ self.down
        self.gradients = [matrix(ROWS, COLUMNS, scale=0.01) for _ in range(STEPS + 1)]

    def verdict(self, mode: str) -> Verdict:
        name = type(self.optimizer).__name__
        # The same gradients for the matrix, and for factors that have been there all along.
        start, dense = self._trained()
        factors = self._swapped(self._dense(start), Verdict("fresh", start=start))
        try:
            first = self._change(factors, 0)
        except Exception as error:
            return Verdict("refused", why=f"{name} cannot begin new parameters ({words(error)})")
        if not torch.isfinite(first).all():
            return Verdict("refused", why=f"{name} gives new parameters values that are not finite")
        for step in range(1, STEPS):
            if problem := self._stumbles(factors, step):
                return Verdict("refused", why=f"{name} cannot step new parameters ({problem})")
        (weight,) = _parameters(dense)
        if (where := kept_elsewhere(dense, {"": weight})) is not None:
            return Verdict(
                "refused", why=f"{name} keeps what it knows of the weights in {where}, which cannot follow the switch"
            )
        kinds, unknown = self._kinds(dense, factors) if mode == "carry" else ([], [])
        if beside_groups(groups_in(dense), [weight]):
            unknown.append("in its groups")
        expected = self._change(factors, STEPS)
        if mode == "carry" and not unknown:
            carried = Verdict("carried", kinds, start)
            if not any(kinds):
                return Verdict("carried", kinds, start, why="it keeps no state")
            problem = self._problem(carried, expected)
            if problem is None:
                return carried
        elif mode == "carry":
            problem = f"the state {', '.join(sorted(unknown))} has no known projection"
        else:
            problem = "as asked"
        fresh = Verdict("fresh", kinds, start, why=problem)
        too_much = self._problem(fresh, first)
        if too_much is None:
            return fresh
        return Verdict("refused", why=f"{name} starts the state of new parameters wrongly: {too_much}")

    def _trained(self) -> tuple[str, torch.optim.Optimizer]:
        """How new state begins, the first way that the optimizer can step on, and the miniature that has."""
        errors: list[str] = []
        for start in ("empty", "constructor", "alike"):
            try:
                before, dense = groups_in(self._dense(start)), self._dense(start, STEPS)
                if not self.counts:  # a run that is resumed, or about to switch, has counted further
                    self.counts = changed(before, groups_in(dense)) - {"params", "lr"}
                    dense = self._dense(start, STEPS) if self.counts else dense
                return start, dense
            except UnableError:
                raise
            except Exception as error:
                errors.append(words(error))
        raise UnableError(errors[0])

    def _dense(self, start: str, steps: int = 0) -> torch.optim.Optimizer:
        weight = nn.Parameter(self.dense.clone())
        twin = miniature(self.optimizer, self.template, weight, self.counts)
        for state, begun in zip(states_in(twin), new_state(self.optimizer, self.template, weight, start), strict=True):
            if begun:
                state[weight] = begun
        for step in range(steps):
            self._change(twin, step)
        return twin

    def _swapped(self, twin: torch.optim.Optimizer, verdict: Verdict) -> torch.optim.Optimizer:
        (weight,) = _parameters(twin)
        down, up = nn.Parameter(self.down.clone()), nn.Parameter(self.up.clone())
        self.swap(twin, weight, down, up, verdict)
        return twin

    def _change(self, twin: torch.optim.Optimizer, step: int) -> torch.Tensor:
        """By how much the product (or the one matrix) changes in a step."""
        held, gradient = _parameters(twin), self.gradients[step]
        before = _product(held)
        if len(held) == 1:
            gradients = {held[0]: gradient}
        else:
            down, up = held
            gradients = {down: up.detach().mT @ gradient, up: gradient @ down.detach().mT}
        step_with(twin, gradients)
        return _product(held) - before

    def _stumbles(self, twin: torch.optim.Optimizer, step: int) -> str | None:
        """What a step raises, in words."""
        try:
            self._change(twin, step)
        except Exception as error:
            return words(error)
        return None

    def _problem(self, verdict: Verdict, expected: torch.Tensor) -> str | None:
        """What goes wrong when a trained miniature switches and steps on; None for nothing."""
        try:
            change = self._change(self._swapped(self._dense(verdict.start, STEPS), verdict), STEPS)
        except Exception as error:
            return words(error)
        if not torch.isfinite(change).all():
            return "the first update is not finite"
        size, usual = float(change.norm()), float(expected.norm())
        if usual and not TOO_SMALL < size / usual < TOO_LARGE:
            return f"the first update would be {size / usual:.2g} times as large as it should"
        return None

    def _kinds(
        self, dense: torch.optim.Optimizer, factors: torch.optim.Optimizer
    ) -> tuple[list[dict[str, str]], list[str]]:
        """Each kind of state, told from what a matrix and its factors have come to; and the names of those unknown."""
        (weight,), (down, up) = _parameters(dense), _parameters(factors)
        kinds: list[dict[str, str]] = []
        unknown: list[str] = []
        for of_weight, of_factors in zip(states_in(dense), states_in(factors), strict=True):
            old, for_down, for_up = (
                s.get(p) or {} for s, p in ((of_weight, weight), (of_factors, down), (of_factors, up))
            )
            kinds.append({})
            for key, value in old.items():
                kind = self._kind(key, (value, for_down.get(key), for_up.get(key)), (weight, down, up))
                if kind is None:
                    unknown.append(str(key))
                else:
                    kinds[-1][key] = kind
        return kinds, unknown

    def _kind(self, key: str, values: tuple[Any, Any, Any], parameters: Sequence[nn.Parameter]) -> str | None:
        if key in FACTORED_STATE or key in ROUNDING_STATE or key in SCALAR_STATE:
            return KINDS[key]
        old, for_down, for_up = values
        if not all(isinstance(v, torch.Tensor) and v.ndim for v in values):
            return "scalar" if same(old, for_down) and same(old, for_up) else None
        fit = [has_shape(v, p) and v.dtype.is_floating_point for v, p in zip(values, parameters, strict=True)]
        if not all(fit) or len({v.shape[:-2] for v in values}) > 1:
            return None
        packed = any(is_packed(v) for v in values)
        old, for_down, for_up = (as_matrix(plain(v), p.shape) for v, p in zip(values, parameters, strict=True))
        if old.ndim == 2 and all(
            differ(v, plain(p)) < LIKE for v, p in zip((old, for_down, for_up), parameters, strict=True)
        ):
            return "parameter"
        down, up = self.down.float(), self.up.float()
        like = 2 * LIKE if packed else LIKE  # 4 bits err by a fifth, and so does the other side
        if differ(old @ down.mT, for_up) < like and differ(up.mT @ old, for_down) < like:
            return "linear" if key not in SQUARE_STATE else None
        norms = down.norm(dim=1), up.norm(dim=0)
        if differ(old @ down.mT / norms[0], for_up) < NEAR and differ(up.mT @ old / norms[1][:, None], for_down) < NEAR:
            return "normalized"
        guesses = ((old @ down.square().mT, for_up), (up.square().mT @ old, for_down))
        if (old >= 0).all() and key not in LINEAR_STATE:
            loose = key in SQUARE_STATE  # a maximum or a centred average differs more
            fits = all(
                0.3 < float(guess.sum() / true.sum().clamp_min(1e-38)) < 3 and (loose or differ(guess, true) < NEAR)
                for guess, true in guesses
            )
            return "square" if fits else None
        return None


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return list({id(p): p for group in groups_in(optimizer) for p in group["params"]}.values())


def _product(held: Sequence[nn.Parameter]) -> torch.Tensor:
    """The matrix that one Parameter, or a pair (down, up), stands for."""
    with torch.no_grad():
        return held[0].float().clone() if len(held) == 1 else held[1].float() @ held[0].float()
