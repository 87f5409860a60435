"""Measure: how long a step takes before the switch and after it, as the loop itself sees it. No synchronization."""

from __future__ import annotations

import time
from statistics import median

STEPS = 24
"""Steps of each phase that are kept; the median counts."""
UNCOUNTED = 4
"""First steps after the switch: something is compiled, or memory is found."""
LEAST = 8
"""With fewer steps nothing is said."""


class Pace:
    """Seconds between the ends of steps; the last ones before `mark`, and the first ones after it.

    pace = Pace(); pace.step(); ...; pace.mark(); pace.step(); ...; pace.compare()
    """

    def __init__(self) -> None:
        self.before: list[float] = []
        self.after: list[float] = []
        self._is_after = False
        self._last: float | None = None
        self._passed = 0

    def step(self, counts: bool = True) -> None:
        """A step has ended. counts: whether it was an ordinary one."""
        now = time.perf_counter()
        last, self._last = self._last, now
        if last is None or not counts:
            return
        if not self._is_after:
            self.before = [*self.before[-STEPS + 1 :], now - last]
        elif self._passed < UNCOUNTED:
            self._passed += 1
        elif len(self.after) < STEPS:
            self.after.append(now - last)

    def mark(self) -> None:
        """The step that has just ended was the one of the switch, or another after which steps take another time."""
        self._is_after, self._last, self._passed = True, None, 0
        self.after.clear()

    def pause(self) -> None:
        """What comes before the next step (an evaluation, a save) does not count."""
        self._last = None

    @property
    def is_known(self) -> bool:
        """Whether enough steps have passed since the switch."""
        return len(self.after) == STEPS

    def compare(self) -> tuple[float, float] | None:
        """Median seconds a step before and after; None with too few steps."""
        if min(len(self.before), len(self.after)) < LEAST:
            return None
        return median(self.before), median(self.after)
