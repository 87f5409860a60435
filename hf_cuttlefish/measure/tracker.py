"""Track: the stable ranks of a whole model, each check starting from the last one's vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from ..maths.stable_ranks import (
    BLOCK,
    COLD_STEPS,
    SMALL,
    cold_start,
    small_spectra,
    squared_norms,
    stable_rank,
    warm_step,
)

CHUNK = 16_000_000
"""Largest number of elements that the vectors of a group may have (64 MB in fp32), so that measuring needs little memory."""


SMALLEST, LARGEST = 1e-25, 1e25
"""Range of ||W||_F^2 in which fp32 is good enough."""


class StableRankTracker:
    """Stable ranks of many weights, each check starting from the last one's vectors.

    Kept of each weight are rows v = u W, where the orthonormal rows u span nearly its leading left singular vectors. A check
    is one step of block iteration, u = orth(v W^T) and v = u W, and the leading eigenvalue of v v^T: two thin products
    and a norm, so each weight is read three times and never copied. Between two checks the leading singular space hardly
    moves, and one step is exact enough (relative error below 1e-3; tests/maths/test_stable_ranks.py). The first check has no such
    rows and builds a block Krylov space (Golub and Kahan), which a flat spectrum needs.
    """

    def __init__(self) -> None:
        self._rows: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """Start cold at the next check. Called when a checkpoint is saved: a resumed run then measures the same bits."""
        self._rows.clear()

    def measure(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Stable rank of each weight (m, n), by name; NaN where a weight is not finite. One device synchronization a group.

        Of a stack (count, m, n) the mean over its matrices.
        """
        stacks = {name: len(weight) for name, weight in weights.items() if weight.ndim == 3}
        if stacks:
            single = {n: w for n, w in weights.items() if n not in stacks}
            single |= {f"{n}[{i}]": weights[n][i] for n, count in stacks.items() for i in range(count)}
            found = self.measure(single)
            means = {n: sum(found[f"{n}[{i}]"] for i in range(count)) / count for n, count in stacks.items()}
            return {name: means[name] if name in stacks else found[name] for name in weights}
        groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[str]] = {}
        for name, weight in weights.items():
            groups.setdefault((weight.shape, weight.dtype, weight.device), []).append(name)
        pending: list[tuple[list[str], torch.Tensor]] = []
        for (shape, _, device), names in groups.items():
            # On a CPU one at a time, while it is in the cache; elsewhere together, for fewer launches.
            most = 1 if device.type == "cpu" else max(1, CHUNK // (BLOCK * COLD_STEPS * sum(shape)))
            for chunk in _chunks(names, most):
                pending.append((chunk, self._measure_group(chunk, [weights[n].detach() for n in chunk])))
        ranks: dict[str, float] = {}
        for names, values in pending:
            for name, (total, top) in zip(names, values.tolist(), strict=True):
                # Outside this range fp32 loses squares of the entries; NaN lies outside every range.
                safe = SMALLEST < total < LARGEST and top > 0
                ranks[name] = max(1.0, total / top) if safe else _carefully(weights[name])
        return {name: ranks[name] for name in weights}

    @torch.no_grad()
    def _measure_group(self, names: list[str], weights: list[torch.Tensor]) -> torch.Tensor:
        """||W||_F^2 and sigma_1^2 of weights of one shape, (len(names), 2) in float64."""
        with torch.autocast(device_type=weights[0].device.type, enabled=False):
            if min(weights[0].shape) <= SMALL:
                return small_spectra(weights)
            if all(n in self._rows for n in names):
                top, rows = warm_step([self._rows[n] for n in names], weights)
            else:
                top, rows = cold_start(weights)
            self._rows.update(zip(names, rows, strict=True))
            total = squared_norms(weights)
        return torch.stack([total, top], -1)


def _carefully(weight: torch.Tensor) -> float:
    """For a weight of zeros, of huge or of tiny entries, or one that is not finite."""
    return float(stable_rank(weight)) if bool(torch.isfinite(weight).all()) else math.nan


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))
