"""A miniature: a copy of an optimizer, all settings alike, that holds one small parameter and has just been made."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..measure.random_states import random_states_kept
from .optimizer_parts import groups_in, optimizers_in, owners, parts_of, plain, states_in

RATE = 1e-5
"""Learning rate of a miniature: its parameters stay nearly where they are, so that copies of them are known as such."""
LIKE = 0.2
"""Relative difference up to which two states are the same: 8 bits err by a hundredth, unrelated ones by more than one."""
_MOST = 10_000_000  # numbers that an optimizer may hold outside its state and still be copied


def miniature(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, stand_in: nn.Parameter, counts: Collection[str] = ()
) -> torch.optim.Optimizer:
    """A copy of an optimizer that holds a stand-in for one weight and nothing else, as if it had just been made.

    Args:
        counts: names of what it counts in its groups, which starts anew.

    Raises UnableError where it holds more than can be copied.
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
        raise UnableError(f"a copy of it cannot be made ({words(error)})") from error
    made = cast(torch.optim.Optimizer, memo[id(optimizer)])
    for group in groups_in(made):
        group["params"] = [p for p in group["params"] if p is stand_in]
        _begin(group, optimizer.defaults, counts)
    return made


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
    for one, state in zip(owners(optimizer), states_in(optimizer), strict=True):
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
    with aside():
        twin = miniature(optimizer, weight, stand_in)
        for state, begun in zip(states_in(twin), new_state(optimizer, weight, stand_in, start), strict=True):
            if begun:
                state[stand_in] = begun
        step_with(twin, {stand_in: torch.zeros_like(stand_in)})
        return [dict(state.get(stand_in) or {}) for state in states_in(twin)]


class UnableError(Exception):
    """The miniature cannot be made, or does not train a dense matrix either: nothing can be said."""


def _check_small(originals: Sequence[torch.optim.Optimizer], memo: Mapping[int, Any]) -> None:
    numbers = 0
    for one in originals:
        for name, value in vars(one).items():
            if name not in ("state", "param_groups"):
                numbers += _numbers_in(value, memo, 0)
    if numbers > _MOST:
        raise UnableError(f"it holds {numbers:,} numbers outside its state")


def _numbers_in(value: Any, memo: Mapping[int, Any], depth: int) -> int:
    """How many numbers there are in what is not in the memo. No closure: one that calls itself would keep all this alive."""
    if isinstance(value, nn.Module):
        raise UnableError("it holds the model itself")
    if isinstance(value, torch.Tensor) and id(value) not in memo:
        return value.numel()
    if isinstance(value, torch.optim.Optimizer) or depth == 4:
        return 0
    return sum([_numbers_in(part, memo, depth + 1) for part in parts_of(value)])


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


def changed(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the numbers in groups that steps have changed, or made."""
    return {
        key
        for old, new in zip(before, after, strict=True)
        for key, value in new.items()
        if isinstance(value, int | float | torch.Tensor) and (key not in old or not same(old[key], value))
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
    copied = differ(plain(value), plain(weight)) < LIKE
    return parameter.detach().clone() if copied else torch.zeros_like(parameter, dtype=value.dtype)


def step_with(twin: torch.optim.Optimizer, gradients: Mapping[nn.Parameter, torch.Tensor]) -> None:
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


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference; infinite where both are zero, for nothing has been seen then."""
    size = float(torch.maximum(one.norm(), other.norm()))
    return float((one - other).norm()) / size if size else float("inf")


def same(one: Any, other: Any) -> bool:
    """Whether two values of a state are equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    with contextlib.suppress(Exception):
        return bool(type(one) is type(other) and one == other)
    return False


def words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What is done here leaves all random states as they were, compiles nothing, and builds no graph."""
    with random_states_kept(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
