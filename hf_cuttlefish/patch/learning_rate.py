"""The learning rate after the switch: the rates of the optimizer, and what its scheduler works out the next ones from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from .edits import Edit
from .optimizer import inner_optimizer, unwrapped

IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Rates that an optimizer's groups hold; the third and fourth are OneCycleLR's, the last is SWALR's."""


IN_SCHEDULERS = ("base_lrs", "max_lrs", "min_lrs", "default_min_lr", "eta_min", "_last_lr")
"""Rates that a scheduler holds. All of them are saved in its state_dict, so that a resumed run has them scaled already."""


SMALL, SCALE_OF_SMALL = 0.25, 1.5
"""Where the alignment is not known and less than a quarter of the target layers' parameters is kept. Where it is known and low,
1.5 loses about a point against 1 (docs/results-records.md)."""
GAIN, LARGEST_SCALE = 6.0, 3.0
"""The scale is 1 + GAIN times the alignment of the weights' travel (`Heading`), at most LARGEST_SCALE. 4 to 8 for 6 ends the
same; a constant of 2 ruins runs whose rate is as high as they bear, and 3 makes them diverge (docs/results.md)."""
SCALE_UNKNOWN = 1.35
"""Where the alignment is not known, as in runs too short to see it, and a quarter or more is kept."""


def suggested_scale(kept: float, alignment: float | None = None) -> float:
    """What a `learning_rate_scale` of None stands for.

    Args:
        kept: share of the target layers' parameters after the switch.
        alignment: share of directed travel before the switch (`Heading.alignment`); None where it is not known.
    """
    if alignment is None:
        return SCALE_OF_SMALL if kept < SMALL else SCALE_UNKNOWN
    return min(LARGEST_SCALE, 1 + GAIN * max(0.0, alignment))


def averages_weights(optimizer: Any) -> bool:
    """Whether the model's weights are an average that the optimizer keeps: schedule-free ones, which have modes to train and eval."""
    inner = unwrapped(optimizer)
    return callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None))


def check_can_scale(optimizer: Any, scheduler: Any) -> None:
    """Raises unless `ScaleLearningRate` would last: what a scheduler works out next must follow from what is scaled.

    Raises:
        TypeError: no scheduler that is known.
        ValueError: a scheduler of another optimizer, one that drives the optimizer and was not given, or an optimizer that
            sets its rate by itself.
    """
    inner = _stepping(optimizer)
    if any(group.get("lr") is None for group in inner.param_groups):
        raise ValueError(
            f"learning_rate_scale needs a learning rate, and {type(inner).__name__} finds its own (lr is None): give it one, "
            "or leave learning_rate_scale at 1"
        )
    if scheduler is None:
        if any("initial_lr" in group for group in inner.param_groups):
            raise ValueError(
                "learning_rate_scale: a scheduler drives this optimizer (its groups have an initial_lr) and would undo the "
                "scaling at its next step: pass it, Cuttlefish(..., scheduler=scheduler)"
            )
        return
    for part in _parts(scheduler):
        if type(part).__module__.startswith("deepspeed."):
            raise TypeError(
                f"learning_rate_scale: {type(part).__name__} is DeepSpeed's own scheduler, which saves no rate that could be scaled: "
                "use a scheduler of torch or transformers, or leave learning_rate_scale at 1"
            )
        if not isinstance(part, LRScheduler) and not hasattr(part, "min_lrs"):  # the latter: transformers' GreedyLR
            raise TypeError(
                f"scheduler is a {type(part).__module__}.{type(part).__name__}: learning_rate_scale knows the schedulers of "
                "torch.optim.lr_scheduler and transformers"
            )
        driven = unwrapped(part.optimizer)
        if driven is not inner and getattr(driven, "param_groups", None) is not inner.param_groups:
            raise ValueError(
                f"the scheduler ({type(part).__name__}) drives another optimizer than the one given: pass the scheduler of "
                "this optimizer"
            )


class ScaleLearningRate(Edit):
    """The rate of every group, now and in all that the scheduler will set, times `scale`.

    Raises:
        TypeError, ValueError: as `check_can_scale`.
    """

    def __init__(self, optimizer: Any, scheduler: Any, scale: float) -> None:
        check_can_scale(optimizer, scheduler)
        self._groups, self._scheduler, self.scale = _stepping(optimizer).param_groups, scheduler, scale
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def apply(self) -> None:
        before = float(self._groups[0]["lr"])
        holders: list[tuple[dict[str, Any], tuple[str, ...]]] = [(group, IN_GROUPS) for group in self._groups]
        scheduler = self._scheduler
        holders += [(vars(part), IN_SCHEDULERS) for part in (_parts(scheduler) if scheduler is not None else ())]
        # One tensor may stand in several places: all products are worked out before the first is written.
        scaled = [
            (holder, name, holder[name], _times(holder[name], self.scale))
            for holder, names in holders
            for name in names
            if holder.get(name) is not None
        ]
        self._before = [(h, n, v.clone() if isinstance(v, torch.Tensor) else v) for h, n, v, _ in scaled]
        for holder, name, _, value in scaled:
            _write(holder, name, value)
        self.summary = said_of(self.scale, before)

    def undo(self) -> None:
        for holder, name, value in self._before:
            _write(holder, name, value)


def learning_rate_edit(
    optimizer: Any, scheduler: Any, scale: float | None, kept: float, alignment: float | None = None
) -> Edit:
    """What the switch does to the learning rate: as `learning_rate_scale` says, or as the run and the plan suggest.

    Args:
        scale: learning_rate_scale. kept, alignment: see `suggested_scale`.

    Raises:
        TypeError, ValueError: as `wanted_scale`.
    """
    wanted, why_not = wanted_scale(optimizer, scheduler, scale, kept, alignment)
    if wanted != 1:
        return ScaleLearningRate(optimizer, scheduler, wanted)
    edit = Edit()
    edit.summary = why_not
    return edit


def wanted_scale(
    optimizer: Any, scheduler: Any, scale: float | None, kept: float, alignment: float | None
) -> tuple[float, str]:
    """What the rates are to be multiplied by, and where that is 1 against the suggestion, why. Arguments as of `learning_rate_edit`.

    Raises:
        TypeError, ValueError: as `check_can_scale`, for a scale that was asked for; without one the rate is left alone then.
    """
    if scale is None:
        # What travels there is an average, straight at any rate: it tripled a rate that was high enough (TREC 84.5 -> 71.8).
        wanted = 1.0 if averages_weights(optimizer) else suggested_scale(kept, alignment)
    else:
        wanted = float(scale)
    if wanted == 1:
        return wanted, ""
    try:
        check_can_scale(optimizer, scheduler)
    except (TypeError, ValueError) as error:
        if scale is not None:
            raise
        return 1.0, f"learning rate unchanged ({error})"
    return wanted, ""


def said_of(scale: float, before: float) -> str:
    """What the report says of it. before: the first group's rate."""
    return f"learning rate times {scale:g} from here on ({before:.3g} -> {before * scale:.3g})"


# --- in what is saved ---


def scaled_groups(groups: Iterable[Mapping[str, Any]], scale: float) -> list[dict[str, Any]]:
    """Copies of an optimizer's groups, as `ScaleLearningRate` would make them."""
    return [_scaled(group, IN_GROUPS, scale) for group in groups]


def scaled_scheduler(state: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """A copy of a scheduler's state_dict, as `ScaleLearningRate` would make it."""
    found = _scaled(state, IN_SCHEDULERS, scale)
    if "_schedulers" in state:
        found["_schedulers"] = [scaled_scheduler(part, scale) for part in state["_schedulers"]]
    return found


def bare_scheduler(scheduler: Any) -> Any:
    """What Accelerate's wrapper is around."""
    while type(scheduler).__module__.startswith("accelerate.") and hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


# --- inside ---


def _stepping(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside, also one of DeepSpeed's: its groups' rates can be set, if not its parameters."""
    inner = unwrapped(optimizer)
    return inner if isinstance(inner, torch.optim.Optimizer) else inner_optimizer(inner)


def _scaled(holder: Mapping[str, Any], names: Iterable[str], scale: float) -> dict[str, Any]:
    return {**holder, **{n: _times(holder[n], scale) for n in names if holder.get(n) is not None}}


def _write(holder: dict[str, Any], name: str, value: Any) -> None:
    if name == "lr" and isinstance(holder[name], torch.Tensor):
        holder[name].copy_(value)  # a compiled or captured step reads this very tensor
    else:
        holder[name] = value


def _times(rates: Any, scale: float) -> Any:
    return [rate * scale for rate in rates] if isinstance(rates, (list, tuple)) else rates * scale


def _parts(scheduler: Any) -> Iterator[Any]:
    """The scheduler inside Accelerate's wrapper, and those that it is made of."""
    scheduler = bare_scheduler(scheduler)
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)
