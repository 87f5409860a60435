"""A job that measures something by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..machine import environment


class OtherJob:
    """Something measured by itself."""

    def __init__(self, job: dict[str, Any], device: str) -> None:
        self.job, self.device = job, torch.device(device)

    def prepare(self, modes: list[str]) -> dict[str, Any]:
        """Nothing but the imports, which are done: what is measured here needs the machine for itself."""

        return {"seconds": 0.0, "environment": environment(self.device)}

    def sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def milliseconds(self, action: Callable[[], Any], repeats: int = 5, warm: int = 1) -> float:
        """Median wall time of a call with the device waited for."""
        for _ in range(warm):
            action()
        found = []
        for _ in range(repeats):
            begun = self.sync()
            action()
            found.append(1000 * (self.sync() - begun))
        return statistics.median(found)
