"""Decide when: at which steps to check, to gather and to switch. Numbers only; knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..config import CuttlefishConfig
from ..maths.convergence import has_converged

CHECKS_PER_RUN = 30
EXAMPLES_PER_FEATURE = 2
"""Statistics see so many examples (loss terms) for each row of the widest moment, as long as that is no more than
`LONGEST_WINDOW` of the run (docs/results.md)."""
LONGEST_WINDOW = 0.15
SHORTEST_STRETCH = 12
"""Steps of a stretch of the weights' travel: longer than the memory of momentum (10 steps at 0.9)."""


class Schedule:
    """When a run checks its stable ranks, gathers statistics and switches.

        schedule = Schedule(CuttlefishConfig(), total_steps=300)
        schedule.decide(100, steps, ranks); schedule.is_due(100)

    Args:
        config: its switch_step, earliest_switch, latest_switch, check_steps, statistics_steps and tolerance are read.
        total_steps: optimizer steps of the whole run.

    Attributes:
        statistics_needed: steps (see `need`). switch_at: the step at which the switch is due, or None while it is not known. reason: why then.

    Raises:
        TypeError: total_steps is no whole number. ValueError: it is below 1, or the config's switch_step is past it.
    """

    def __init__(self, config: CuttlefishConfig, total_steps: int) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int):
            raise TypeError(f"total_steps must be a whole number of optimizer steps, got {total_steps!r}")
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}: give the optimizer steps of the whole run, at least 1")
        self.config, self.total_steps = config, total_steps
        self.statistics_needed = 0
        self.switch_at: int | None = None
        self.reason: str | None = None

    def check_fits(self) -> None:
        """Raises ValueError for a switch_step that the run does not come to."""
        if self.config.switch_step is not None and self.config.switch_step > self.total_steps:
            raise ValueError(
                f"switch_step is {self.config.switch_step}, but the run has {self.total_steps} steps: choose one below"
            )

    @property
    def check_steps(self) -> int:
        """Steps between two checks of the stable ranks."""
        return self.config.check_steps or max(1, self.total_steps // CHECKS_PER_RUN)

    @property
    def statistics_steps(self) -> int:
        """Steps before the switch in which statistics are gathered."""
        if self.config.rank_rule != "loss":
            return 0
        wanted = self.config.statistics_steps
        if wanted is None:
            longest = round(LONGEST_WINDOW * self.total_steps)
            wanted = max(min(24, max(4, round(0.04 * self.total_steps))), min(self.statistics_needed, longest))
        return min(wanted, self.config.switch_step or self.latest_step)

    def need(self, width: int, terms: float) -> None:
        """How long the statistics take: width: rows of the widest moment. terms: loss terms in a step."""
        self.statistics_needed = math.ceil(EXAMPLES_PER_FEATURE * width / terms) if terms > 0 else 0

    @property
    def stretch(self) -> int:
        """Steps of a stretch over which the weights' travel is measured."""
        return max(SHORTEST_STRETCH, self.total_steps // CHECKS_PER_RUN)

    @property
    def earliest_step(self) -> int:
        return max(1, math.ceil(self.config.earliest_switch * self.total_steps))

    @property
    def latest_step(self) -> int:
        return max(1, int(self.config.latest_switch * self.total_steps))

    @property
    def due(self) -> int:
        """The step of the switch; before it is decided the latest one."""
        return self.switch_at or self.latest_step

    def start_at(self, step: int) -> None:
        """Join a run that has come to `step` without us. Raises ValueError if that is at or past a fixed switch_step."""
        if self.config.switch_step is not None and self.config.switch_step <= step:
            raise ValueError(
                f"switch_step is {self.config.switch_step}, but the run resumes at step {step}: choose one after it"
            )
        self.switch_at = None
        if step + self.statistics_steps >= self.latest_step:
            self.switch_at = min(step + max(1, self.statistics_steps), self.total_steps)
            self.reason = "latest_switch"

    def is_check(self, step: int) -> bool:
        """Whether the stable ranks are to be measured after this step."""
        return step % self.check_steps == 0 and step != self.switch_at

    def decide(self, step: int, steps: Sequence[int], ranks: Mapping[str, Sequence[float]]) -> None:
        """Fix the switch once the stable ranks have converged, or time is up.

        Args:
            steps: of the checks, rising. ranks: layer -> one stable rank a check.
        """
        if self.switch_at is not None:
            return
        if self.config.switch_step is not None:
            self.switch_at, self.reason = max(self.config.switch_step, step), "switch_step"
            return
        ready = step + self.statistics_steps
        if ready < min(self.earliest_step, self.latest_step):
            return
        converged = has_converged(steps, ranks, self.total_steps, self.config.stable_rank_tolerance)
        if ready >= self.latest_step:
            self.switch_at = max(self.latest_step, step)
            self.reason = "stable ranks have converged" if converged else "latest_switch"
        elif converged:
            self.switch_at, self.reason = ready, "stable ranks have converged"

    @property
    def is_known_at_once(self) -> bool:
        """Whether the switch is fixed before any step: by the config, or because the run is so short."""
        return self.config.switch_step is not None or self.latest_step <= self.statistics_steps

    def is_gathering(self, step: int) -> bool:
        """Whether statistics are to be gathered in the step after this one."""
        if self.switch_at is None or self.statistics_steps == 0:
            return False
        return self.switch_at - self.statistics_steps <= step < self.switch_at

    def is_due(self, step: int) -> bool:
        """Whether the switch is due after this step."""
        return self.switch_at is not None and step >= self.switch_at

    def postpone(self, step: int) -> int:
        """Statistics are lost at `step` and gathered anew: returns the later step of the switch."""
        later = min(step + self.statistics_steps, self.total_steps)
        self.switch_at = max(self.switch_at or 0, later)
        return self.switch_at
