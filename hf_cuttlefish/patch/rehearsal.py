"""Rehearse: what an optimizer makes of the switch, tried on a miniature of the very object before the run begins.

Optimizers are many, and say nowhere what they keep. So a small copy of the one at hand, all settings alike, trains one small
matrix on made-up gradients, and another copy its two factors on the gradients that they would have had. What the two have kept
tells which state follows from which: a moment that is linear in the gradient, an average of squares, a copy of the parameter.
Then the miniature switches, by the code that will carry the real switch out, and steps on. Where that fails, or the step is
out of proportion, the state starts anew; where that fails too, the optimizer is refused, by name.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy
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

ROWS, COLUMNS = 96, 64
"""Of the small matrix. It and its factors have at least 4096 numbers, from where on 8-bit optimizers pack their state."""
STEPS = 20
"""Enough for averages to be told from single gradients, and for a count of steps to show in a bias correction."""
RATE = 1e-5
"""Learning rate of a miniature: its parameters stay nearly where they are, so that copies of them are known as such."""
LIKE = 0.2
"""Relative difference up to which two states are the same: 8 bits err by a hundredth, unrelated ones by more than one."""
NEAR = 0.6
"""The same where squares come in, of which the projection drops the cross terms."""
TOO_LARGE, TOO_SMALL = 3.0, 0.05
"""How many times as large as expected the first update of the product may be. A slow beginning does no harm."""
_MOST = 10_000_000  # numbers that an optimizer may hold outside its state and still be copied


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


def optimizers_in(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizer and all that it keeps in its attributes, each once, the outermost first."""
    found: list[torch.optim.Optimizer] = []

    def look(value: Any, depth: int) -> None:
        if isinstance(value, torch.optim.Optimizer):
            if all(value is not other for other in found):
                found.append(value)
                for name, attribute in vars(value).items():
                    if name not in ("state", "param_groups"):
                        look(attribute, 0)
        elif depth < 3:
            for part in _parts_of(value):
                look(part, depth + 1)

    look(optimizer, 0)
    return found


def groups_in(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer and of those inside it, each dictionary once."""
    groups = {id(group): group for one in optimizers_in(optimizer) for group in one.param_groups}
    return list(groups.values())


def states_in(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The state of an optimizer and of those inside it, each mapping once, in the order of `Verdict.kinds`."""
    states = {id(one.state): one.state for one in optimizers_in(optimizer)}
    return list(states.values())


def beside_groups(
    groups: Sequence[dict[str, Any]], weights: Sequence[nn.Parameter]
) -> list[tuple[dict[Any, Any], nn.Parameter, Any]]:
    """State that stands in a group and not in `optimizer.state`: (dictionary, weight, what it holds of the weight)."""
    tables = [value for group in groups for value in group.values() if isinstance(value, dict)]
    return [(table, weight, table[weight]) for table in tables for weight in weights if weight in table]


def has_shape(value: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a state has its weight's shape: as it is, flat, or several in one."""
    return value.shape[-2:] == weight.shape or (value.ndim == 1 and value.numel() == weight.numel())


def kept_elsewhere(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> str | None:
    """The first attribute, neither groups nor state, by which an optimizer knows one of the weights; None for none.

    By the Parameter itself, or by its name or id as the key of a dictionary.
    """
    wanted = {id(weight) for weight in weights.values()}
    names = {f"{name}.weight" for name in weights}

    def knows(value: Any, depth: int) -> bool:
        if isinstance(value, torch.Tensor):
            return id(value) in wanted
        if isinstance(value, str | torch.optim.Optimizer | nn.Module) or depth > 3:
            return False
        if isinstance(value, Mapping) and any(
            (isinstance(key, str) and key in names) or (isinstance(key, int) and key in wanted) for key in value
        ):
            return True
        return any(knows(part, depth + 1) for part in _parts_of(value))

    known = [one.state for one in optimizers_in(optimizer)] + [one.param_groups for one in optimizers_in(optimizer)]
    for one in optimizers_in(optimizer):
        for name, value in vars(one).items():
            if "hook" not in name and not any(value is other for other in known) and knows(value, 0):
                return f"{type(one).__name__}.{name}"
    return None


def _parts_of(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []


def rehearse(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, swap: Callable[..., Any], mode: str = "carry"
) -> Verdict:
    """Try the switch of one weight's group on a miniature of the optimizer. The optimizer itself and all random states stay.

    Args:
        weight: one of those that the optimizer holds. mode: "carry" or "reset".
        swap: swap(miniature, weight, down, up, verdict) exchanges a weight, by the code of the real switch.
    """
    try:
        with _aside():
            return _Rehearsal(optimizer, weight, swap).verdict(mode)
    except _Unable as error:
        return Verdict("unknown", why=str(error))


def new_state(
    optimizer: torch.optim.Optimizer,
    weight: nn.Parameter,
    parameter: nn.Parameter,
    start: str,
) -> list[dict[str, Any]]:
    """The state with which the optimizer would begin a new parameter in a weight's group, for each that is in it."""
    if start == "empty":
        return [{} for _ in states_in(optimizer)]
    made = []
    for one, state in zip(_owners(optimizer), states_in(optimizer), strict=True):
        if start == "alike":
            made.append({k: _alike(v, weight, parameter) for k, v in (state.get(weight) or {}).items()})
        else:
            made.append(_by_constructor(one, weight, parameter))
    return made


def own_state(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, parameter: nn.Parameter, start: str
) -> list[dict[str, Any]]:
    """The state that the optimizer keeps of a parameter of this size once it has stepped: to copy into, in its own classes."""
    stand_in = nn.Parameter(parameter.detach().clone())
    with _aside():
        twin = _miniature(optimizer, weight, stand_in)
        for state, begun in zip(states_in(twin), new_state(optimizer, weight, stand_in, start), strict=True):
            if begun:
                state[stand_in] = begun
        _step(twin, {stand_in: torch.zeros_like(stand_in)})
        return [dict(state.get(stand_in) or {}) for state in states_in(twin)]


class _Unable(Exception):
    """The miniature cannot be made, or does not train a dense matrix either: nothing can be said."""


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
            return Verdict("refused", why=f"{name} cannot begin new parameters ({_words(error)})")
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
                    self.counts = _changed(before, groups_in(dense)) - {"params", "lr"}
                    dense = self._dense(start, STEPS) if self.counts else dense
                return start, dense
            except _Unable:
                raise
            except Exception as error:
                errors.append(_words(error))
        raise _Unable(errors[0])

    def _dense(self, start: str, steps: int = 0) -> torch.optim.Optimizer:
        weight = nn.Parameter(self.dense.clone())
        twin = _miniature(self.optimizer, self.template, weight, self.counts)
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
        _step(twin, gradients)
        return _product(held) - before

    def _stumbles(self, twin: torch.optim.Optimizer, step: int) -> str | None:
        """What a step raises, in words."""
        try:
            self._change(twin, step)
        except Exception as error:
            return _words(error)
        return None

    def _problem(self, verdict: Verdict, expected: torch.Tensor) -> str | None:
        """What goes wrong when a trained miniature switches and steps on; None for nothing."""
        try:
            change = self._change(self._swapped(self._dense(verdict.start, STEPS), verdict), STEPS)
        except Exception as error:
            return _words(error)
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
            return "scalar" if _same(old, for_down) and _same(old, for_up) else None
        fit = [has_shape(v, p) and v.dtype.is_floating_point for v, p in zip(values, parameters, strict=True)]
        if not all(fit) or len({v.shape[:-2] for v in values}) > 1:
            return None
        packed = any(is_packed(v) for v in values)
        old, for_down, for_up = (as_matrix(plain(v), p.shape) for v, p in zip(values, parameters, strict=True))
        if old.ndim == 2 and all(
            _differ(v, plain(p)) < LIKE for v, p in zip((old, for_down, for_up), parameters, strict=True)
        ):
            return "parameter"
        down, up = self.down.float(), self.up.float()
        like = 2 * LIKE if packed else LIKE  # 4 bits err by a fifth, and so does the other side
        if _differ(old @ down.mT, for_up) < like and _differ(up.mT @ old, for_down) < like:
            return "linear" if key not in SQUARE_STATE else None
        norms = down.norm(dim=1), up.norm(dim=0)
        if (
            _differ(old @ down.mT / norms[0], for_up) < NEAR
            and _differ(up.mT @ old / norms[1][:, None], for_down) < NEAR
        ):
            return "normalized"
        guesses = ((old @ down.square().mT, for_up), (up.square().mT @ old, for_down))
        if (old >= 0).all() and key not in LINEAR_STATE:
            loose = key in SQUARE_STATE  # a maximum or a centred average differs more
            fits = all(
                0.3 < float(guess.sum() / true.sum().clamp_min(1e-38)) < 3 and (loose or _differ(guess, true) < NEAR)
                for guess, true in guesses
            )
            return "square" if fits else None
        return None


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary fp32 tensor of the same values, also of a packed one that optimizers keep (torchao's)."""
    unpack = getattr(tensor, "dequantize", None) if is_packed(tensor) else None
    return (unpack() if unpack is not None else tensor.detach()).float()


def is_packed(tensor: Any) -> bool:
    """Whether it is of a class of its own that stands for packed numbers, and no DTensor."""
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor) not in (torch.Tensor, nn.Parameter)
        and not hasattr(tensor, "full_tensor")
        and type(tensor).dequantize is not torch.Tensor.dequantize
    )


# --- miniatures ---


def _miniature(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, stand_in: nn.Parameter, counts: Collection[str] = ()
) -> torch.optim.Optimizer:
    """A copy of an optimizer that holds a stand-in for one weight and nothing else, as if it had just been made.

    Args:
        counts: names of what it counts in its groups, which starts anew.

    Raises _Unable where it holds more than can be copied.
    """
    memo: dict[int, Any] = {}
    originals = optimizers_in(optimizer)
    for group in groups_in(optimizer):
        for parameter in group["params"]:
            memo[id(parameter)] = stand_in if parameter is weight else nn.Parameter(torch.zeros(2, 2))
    for one in originals:
        memo[id(one)] = object.__new__(type(one))
        memo[id(one.state)] = defaultdict(dict)
    _check_small(originals, memo)
    try:
        for one in originals:
            twin = memo[id(one)]
            for name, value in vars(one).items():
                if name == "step":
                    continue  # a scheduler has wrapped it, and the wrapper knows the original
                twin.__dict__[name] = OrderedDict() if "_hooks" in name else copy.deepcopy(value, memo)
    except Exception as error:
        raise _Unable(f"a copy of it cannot be made ({_words(error)})") from error
    made = cast(torch.optim.Optimizer, memo[id(optimizer)])
    for group in groups_in(made):
        group["params"] = [p for p in group["params"] if p is stand_in]
        _begin(group, optimizer.defaults, counts)
    return made


def _check_small(originals: Sequence[torch.optim.Optimizer], memo: Mapping[int, Any]) -> None:
    numbers = 0

    def look(value: Any, depth: int) -> None:
        nonlocal numbers
        if isinstance(value, nn.Module):
            raise _Unable("it holds the model itself")
        if isinstance(value, torch.Tensor) and id(value) not in memo:
            numbers += value.numel()
        elif not isinstance(value, torch.optim.Optimizer) and depth < 4:
            for part in _parts_of(value):
                look(part, depth + 1)

    for one in originals:
        for name, value in vars(one).items():
            if name not in ("state", "param_groups"):
                look(value, 0)
    if numbers > _MOST:
        raise _Unable(f"it holds {numbers:,} numbers outside its state")


def _begin(group: dict[str, Any], defaults: Mapping[str, Any], counts: Collection[str]) -> None:
    """Settings of a run that is to begin: a small rate, gradients that are the made-up ones alone, counts where they start."""
    if isinstance(group.get("lr"), torch.Tensor):
        group["lr"] = torch.full_like(group["lr"], RATE)
    elif group.get("lr") is not None:
        group["lr"] = RATE
    if isinstance(group.get("weight_decay"), float | int):
        group["weight_decay"] = 0.0
    for key in counts:
        if key in defaults:
            group[key] = copy.deepcopy(defaults[key])
        elif key in group:
            group[key] = torch.zeros_like(group[key]) if isinstance(group[key], torch.Tensor) else type(group[key])(0)


def _changed(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the numbers in groups that steps have changed, or made."""
    return {
        key
        for old, new in zip(before, after, strict=True)
        for key, value in new.items()
        if isinstance(value, int | float | torch.Tensor) and (key not in old or not _same(old[key], value))
    }


def _by_constructor(one: torch.optim.Optimizer, weight: nn.Parameter, parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimizer's own constructor makes of a parameter with the settings of a weight's group."""
    group = next((g for g in one.param_groups if any(p is weight for p in g["params"])), None)
    if group is None:
        return {}
    known = inspect.signature(type(one).__init__).parameters
    settings = {k: copy.deepcopy(v) for k, v in one.defaults.items() if k in known}
    made = type(one)(
        [{**{k: copy.deepcopy(v) for k, v in group.items() if k != "params"}, "params": [parameter]}], **settings
    )
    return dict(made.state.get(parameter) or {})


def _alike(value: Any, weight: nn.Parameter, parameter: nn.Parameter) -> Any:
    """A new parameter's state where a weight has `value`."""
    if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
        return copy.deepcopy(value)
    copied = _differ(plain(value), plain(weight)) < LIKE
    return parameter.detach().clone() if copied else torch.zeros_like(parameter, dtype=value.dtype)


def _owners(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers whose state `states_in` gives."""
    return list({id(one.state): one for one in reversed(optimizers_in(optimizer))}.values())[::-1]


def _step(twin: torch.optim.Optimizer, gradients: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """One step of a miniature: without a closure, or with one where it asks for that."""

    def closure() -> torch.Tensor:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient.detach().clone()
        return torch.zeros(())

    train = getattr(twin, "train", None)
    if callable(train):
        train()
    closure()
    kind: Any = type(twin)
    try:
        kind.step(twin)
    except Exception as error:
        if "closure" not in str(error).lower() and not isinstance(error, AssertionError):
            raise
        closure()
        kind.step(twin, closure)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return list({id(p): p for group in groups_in(optimizer) for p in group["params"]}.values())


def _product(held: Sequence[nn.Parameter]) -> torch.Tensor:
    """The matrix that one Parameter, or a pair (down, up), stands for."""
    with torch.no_grad():
        return held[0].float().clone() if len(held) == 1 else held[1].float() @ held[0].float()


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference; infinite where both are zero, for nothing has been seen then."""
    size = float(torch.maximum(one.norm(), other.norm()))
    return float((one - other).norm()) / size if size else float("inf")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    with contextlib.suppress(Exception):
        return bool(type(one) is type(other) and one == other)
    return False


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """What is done here leaves all random states as they were, compiles nothing, and builds no graph."""
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = (
        list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    )
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
