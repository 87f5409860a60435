"""A run: what is to be run, and the name of its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """What is to be run. `options` are fields of the method; `test` says whether the test split may be looked at."""

    dataset: str
    method: str
    budget: float | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    test: bool = True

    @property
    def name(self) -> str:
        """Name of the run's file, without its ending."""
        parts = [self.dataset, self.method, "" if self.budget is None else f"{self.budget:.3f}"]
        parts += [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.options.items()]
        return "-".join([part for part in parts if part] + [f"seed{self.seed}"])
