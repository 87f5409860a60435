"""The check of all stable ranks."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.tracker import StableRankTracker

from ..models import build_model
from .base import OtherJob


class TrackingJob(OtherJob):
    """One check of all stable ranks: ours, cold and warm, against singular values of every layer."""

    def measure(self, seconds: float) -> dict[str, Any]:
        torch.manual_seed(0)
        model = build_model(self.job["model"]).to(self.device)
        weights = {name: layer.weight.detach() for name, layer in find_targets(model).items()}
        steps = [1e-3 * torch.randn_like(w) * w.std() for w in weights.values()]

        def move() -> None:
            for w, step in zip(weights.values(), steps, strict=True):
                w.add_(step)

        cold = self.milliseconds(lambda: StableRankTracker().measure(weights), 3)
        tracker = StableRankTracker()
        tracker.measure(weights)
        warm = []
        for _ in range(6):
            move()
            begun = self.sync()
            found = tracker.measure(weights)
            warm.append(1000 * (self.sync() - begun))
        exact, took = {}, {}
        few = dict(list(weights.items())[: 12 if self.job["model"] != "bert-tiny" else 2])
        for where in {str(self.device), "cpu"}:
            begun = self.sync()
            for name, w in few.items():
                s = torch.linalg.svdvals(w.to(where))
                exact[name] = float(s.square().sum() / s[0] ** 2)
            took[where] = 1000 * (self.sync() - begun) * len(weights) / len(few)
        error = max(abs(found[name] - value) / value for name, value in exact.items())
        return {
            "matrices": len(weights),
            "cold_ms": cold,
            "warm_ms": statistics.median(warm),
            "svdvals_ms": took,
            "svdvals_measured_on": len(few),
            "largest_relative_error": error,
        }
