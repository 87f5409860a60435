"""Measure: how long a step takes before the switch and after it. Nothing is waited for until the two are compared."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

STEPS = 24
"""Steps of each phase that are kept; the median counts."""
UNCOUNTED = 4
"""First steps after the switch: something is compiled, or memory is found."""
LEAST = 8
"""With fewer steps nothing is said."""
BEFORE = "a step before"
"""Under this word a report keeps the seconds of a step before the switch, for a run that goes on from a checkpoint after it."""


def _mark_on_device(model: nn.Module | None = None) -> Any:
    """An event behind all that the model's device has been given, or the current one; None without CUDA."""
    if not torch.cuda.is_initialized():
        return None
    device = None if model is None else next((p.device for p in model.parameters()), None)
    # Parameters that are offloaded lie in the host's memory, and are computed with on the current device.
    stream = torch.cuda.current_stream(device if device is not None and device.type == "cuda" else None)
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


@dataclass(frozen=True)
class Moment:
    """A point of time, as the host passes it and, where there is CUDA, as the device does.

        a = Moment(); ...; b = Moment(); a.seconds_to(b)

    A host that waits for nothing launches whole steps ahead (as CUDA graphs a step is one launch). Its own times then say
    nothing of what a step takes, and the device's do. A host that is late is late on the device too: an event waits for it.
    """

    host: float = field(default_factory=lambda: time.perf_counter())
    device: Any = field(default_factory=lambda: _mark_on_device())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without its event, which cannot be: a copy has the host's time."""
        return type(self), (self.host, None)

    def seconds_to(self, later: Moment) -> float:
        """Seconds until a later moment; waits until the device has come by."""
        if self.device is None or later.device is None:
            return later.host - self.host
        self.device.synchronize()  # the two may stand in two streams
        later.device.synchronize()
        return float(self.device.elapsed_time(later.device)) / 1000


Gap = tuple[Moment, Moment]
"""From when to when."""


class Pace:
    """Seconds of steps; the last ones before `mark`, and the first ones after it.

        pace = Pace(); pace.begin(); ...; pace.step(); ...; pace.mark(); pace.begin(); ...; pace.step(); ...; pace.compare()

    A step lasts from `begin` to `step`. Where nobody says when it begins, it does so at the end of the last one.

    Args:
        model: on whose device steps are timed; None for the current device.

    Attributes:
        before, after: the steps that count. latest: seconds of the host's last step, or None.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.before: list[Gap] = []
        self.after: list[Gap] = []
        self.latest: float | None = None
        self.is_after = False
        self._apart: tuple[list[Gap], list[Gap]] = [], []  # from one end of a step to the next, before and after
        self._known: float | None = None
        self._begun: Moment | None = None
        self._last: Moment | None = None
        self._passed = 0

    def begin(self) -> None:
        """The data of a step are there: what came before (the loader, an evaluation, a save) is no part of it."""
        self._begun = self._now()

    def step(self, counts: bool = True) -> None:
        """A step has ended. counts: whether it was an ordinary one."""
        now, last = self._now(), self._last
        begun = last if self._begun is None else self._begun
        self._last, self._begun = now, None
        self.latest = None if begun is None else now.host - begun.host
        if begun is None or not counts:
            return
        if self.is_after and self._passed < UNCOUNTED:
            self._passed += 1
        elif not self.is_known:
            kept, apart = (self.after if self.is_after else self.before), self._apart[self.is_after]
            kept.append((begun, now))
            apart.extend([] if last is None else [(last, now)])
            del kept[:-STEPS], apart[:-STEPS]

    def _now(self) -> Moment:
        return Moment(device=_mark_on_device(self.model))

    def mark(self, known: float | None = None) -> None:
        """The step that has just ended was the one of the switch, or another after which steps take another time.

        Args:
            known: seconds of a step before the switch, from a run that this one goes on from.
        """
        self.is_after, self._last, self._begun, self._passed = True, None, None, 0
        self._known = self._known if known is None else known
        self.after.clear()
        self._apart[1].clear()

    def pause(self) -> None:
        """What comes before the next step (an evaluation, a save) does not count."""
        self._last = None

    @property
    def is_known(self) -> bool:
        """Whether enough steps have passed since the switch."""
        return len(self.after) == STEPS

    @property
    def seconds_before(self) -> float | None:
        """Median seconds of a step before the switch; None with too few of them."""
        return _middle(self.before) if len(self.before) >= LEAST else self._known

    def compare(self) -> tuple[float, float] | None:
        """Median seconds of a step before and after; None with too few steps."""
        before = self.seconds_before
        return None if before is None or len(self.after) < LEAST else (before, _middle(self.after))

    def is_slower(self, times: float) -> bool:
        """Whether steps take more than so many times as long, and the loop sees at least half of it.

        Behind a slow loader, or beside a device that works while data are fetched, a longer step need not hold up the loop.
        """
        found = self.compare()
        if found is None or found[1] <= times * found[0]:
            return False
        before, after = self._apart
        return min(len(before), len(after)) < LEAST or _middle(after) - _middle(before) > (found[1] - found[0]) / 2


def _middle(gaps: list[Gap]) -> float:
    """Median seconds."""
    return median(begin.seconds_to(end) for begin, end in gaps)
