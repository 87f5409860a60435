"""Decide when: have the stable ranks stopped moving? Pure functions on a history; lengths are shares of the whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

SMOOTHING = 3
"""Time constant, in checks, of the exponential average of log stable ranks."""


def relative_slopes(steps: Sequence[int], ranks: Mapping[str, Sequence[float]], total_steps: int) -> dict[str, float]:
    """Smoothed relative change of each layer's stable rank, per whole run.

    The paper stops where |d rank / dt| <= epsilon in rank units per epoch (arXiv 2305.02538, section 3.3), which depends on
    the layer's size and the run's length; d ln(rank) / d(share of the run) depends on neither.

    Args:
        steps: at which the ranks were measured, rising. ranks: layer -> one value a step.
        total_steps: length of the run.

    Returns:
        layer -> |slope|; infinite with fewer than three checks or a value that is not positive and finite.
    """
    result = {}
    for name, values in ranks.items():
        if len(values) < 3 or not all(math.isfinite(v) and v > 0 for v in values):
            result[name] = math.inf
            continue
        smooth, slope = math.log(values[0]), 0.0
        for (before, after), value in zip(pairwise(steps), values[1:], strict=True):
            last = smooth
            smooth += (math.log(value) - smooth) * 2 / (SMOOTHING + 1)
            span = max(1, after - before) / total_steps
            slope += ((smooth - last) / span - slope) * 2 / (SMOOTHING + 1)
        result[name] = abs(slope)
    return result


def has_converged(
    steps: Sequence[int], ranks: Mapping[str, Sequence[float]], total_steps: int, tolerance: float
) -> bool:
    """Whether every layer's relative slope is at most `tolerance` (per whole run)."""
    return bool(ranks) and all(s <= tolerance for s in relative_slopes(steps, ranks, total_steps).values())
