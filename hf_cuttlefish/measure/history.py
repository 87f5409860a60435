"""What was measured: stable ranks by step and layer, bounded in size, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_CHECKS = 512
"""Checks kept; beyond, every second of the older half is dropped, so that memory and checkpoints stay bounded."""


class StableRankHistory:
    """Stable ranks of all tracked layers at the steps where they were measured.

    Attributes:
        steps: steps of the checks, rising. ranks: layer -> one value a check.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ranks: dict[str, list[float]] = {}

    def append(self, step: int, ranks: Mapping[str, float]) -> None:
        """Add one check. Raises ValueError for another set of layers than before."""
        if self.steps and set(ranks) != set(self.ranks):
            raise ValueError("a check must measure the layers that were measured before")
        self.steps.append(step)
        for name, value in ranks.items():
            self.ranks.setdefault(name, []).append(value)
        if len(self.steps) > MOST_CHECKS:
            half = len(self.steps) // 2
            keep = [i for i in range(len(self.steps)) if i == 0 or i >= half or i % 2 == 0]
            self.steps = [self.steps[i] for i in keep]
            self.ranks = {name: [values[i] for i in keep] for name, values in self.ranks.items()}

    def records(self) -> list[dict[str, Any]]:
        """[{"step", "layer", "stable_rank"}, ...], by step and then by layer."""
        return [
            {"step": step, "layer": name, "stable_rank": values[i]}
            for i, step in enumerate(self.steps)
            for name, values in self.ranks.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"steps": list(self.steps), "ranks": {name: list(v) for name, v in self.ranks.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StableRankHistory:
        """Reads what `to_dict` wrote. Raises ValueError for anything else, and for lists that do not fit together."""
        history = cls()
        try:
            history.steps = [int(s) for s in data["steps"]]
            history.ranks = {str(n): [float(v) for v in values] for n, values in data["ranks"].items()}
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(
                'the stable-rank history must be {"steps": [numbers], "ranks": {layer: [numbers]}}, and it is not: '
                f"{error!r:.200}"
            ) from error
        if any(len(values) != len(history.steps) for values in history.ranks.values()):
            raise ValueError("the stable-rank history does not have one value a step for each layer")
        return history
