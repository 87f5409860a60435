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
BEFORE = "a step before"
"""Under this word a report keeps the seconds of a step before the switch, for a run that goes on from a checkpoint after it."""


class Pace:
    """Seconds of steps; the last ones before `mark`, and the first ones after it.

        pace = Pace(); pace.begin(); ...; pace.step(); ...; pace.mark(); pace.begin(); ...; pace.step(); ...; pace.compare()

    A step lasts from `begin` to `step`. Where nobody says when it begins, it does so at the end of the last one.

    Attributes:
        before, after: of the steps that count. latest: of the last step, or None.
    """

    def __init__(self) -> None:
        self.before: list[float] = []
        self.after: list[float] = []
        self.latest: float | None = None
        self.is_after = False
        self._apart: tuple[list[float], list[float]] = [], []  # from one end of a step to the next, before and after
        self._known: float | None = None
        self._begun: float | None = None
        self._last: float | None = None
        self._passed = 0

    def begin(self) -> None:
        """The data of a step are there: what came before (the loader, an evaluation, a save) is no part of it."""
        self._begun = time.perf_counter()

    def step(self, counts: bool = True) -> None:
        """A step has ended. counts: whether it was an ordinary one."""
        now, last = time.perf_counter(), self._last
        begun = last if self._begun is None else self._begun
        self._last, self._begun = now, None
        self.latest = None if begun is None else now - begun
        if self.latest is None or not counts:
            return
        if self.is_after and self._passed < UNCOUNTED:
            self._passed += 1
        elif not self.is_known:
            kept, apart = (self.after if self.is_after else self.before), self._apart[self.is_after]
            kept.append(self.latest)
            apart.extend([] if last is None else [now - last])
            del kept[:-STEPS], apart[:-STEPS]

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
        return median(self.before) if len(self.before) >= LEAST else self._known

    def compare(self) -> tuple[float, float] | None:
        """Median seconds of a step before and after; None with too few steps."""
        before = self.seconds_before
        return None if before is None or len(self.after) < LEAST else (before, median(self.after))

    def is_slower(self, times: float) -> bool:
        """Whether steps take more than so many times as long, and the loop sees at least half of it.

        Behind a slow loader, or beside a device that works while data are fetched, a longer step need not hold up the loop.
        """
        found = self.compare()
        if found is None or found[1] <= times * found[0]:
            return False
        before, after = self._apart
        return min(len(before), len(after)) < LEAST or median(after) - median(before) > (found[1] - found[0]) / 2
