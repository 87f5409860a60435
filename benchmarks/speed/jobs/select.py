"""Layers chosen by measured speed."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch

from hf_cuttlefish import CuttlefishConfig, estimate_ranks
from hf_cuttlefish.decide.speed import keep_faster
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.shapes import FlowRecorder

from .. import forwards
from ..clock import timed
from ..models import build_model, make_batch, make_optimizer
from .base import OtherJob


class SelectJob(OtherJob):
    """Measured selection at rank ratios 1/4 and 1/8: what it chooses, how long that takes, and the step it leads to."""

    def measure(self, seconds: float) -> dict[str, Any]:
        """Select for an eager and a compiled run; for the eager one time all planned pairs and the chosen ones."""

        torch.manual_seed(0)
        with self.device:
            model = build_model(self.job["model"]).train()
        batch = make_batch(self.job["model"], model.config, self.job["batch"], self.device)
        on_gpu = self.device.type == "cuda"

        def stepper(model: Any) -> Callable[[], None]:
            optimizer = make_optimizer(model, self.device)

            def step() -> None:
                with torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else contextlib.nullcontext():
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return step

        def low_rank(ranks: Any) -> Callable[[], None]:
            other = copy.deepcopy(model)
            forwards.fill(other, dict(ranks))
            return stepper(other)

        dense = stepper(model)
        for _ in range(3 if on_gpu else 1):
            dense()
        flow = FlowRecorder(model, find_targets(model))
        flow.start()
        while not flow.done:
            dense()
            flow.step()
        result: dict[str, Any] = {"step_time": flow.step_time and vars(flow.step_time), "plans": []}
        clocked = flow.step_time
        for ratio in (0.25, 0.125):
            plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_ratio=ratio))
            for compiled in (False, True) if on_gpu else (False,):
                flow.compiled, flow.step_time = compiled, None if compiled else clocked
                begun = self.sync()
                chosen = keep_faster(plan, flow)
                row = {"ratio": ratio, "compiled": compiled, "seconds": self.sync() - begun, "planned": len(plan)}
                row |= {"chosen": len(chosen), "notes": chosen.notes}
                for name, ranks in (("all", plan), ("chosen", chosen)) if not compiled else ():
                    if ranks and (name == "all" or len(ranks) < len(plan)):
                        row[f"{name}_ms"] = self.compare(dense, lambda ranks=ranks: low_rank(ranks))
                result["plans"].append(row)
        return result

    def compare(self, dense: Callable[[], None], make: Callable[[], Callable[[], None]]) -> dict[str, float]:
        """Medians of dense and factorized steps in turn."""
        low, times = make(), {"dense": [], "low_rank": []}
        on_gpu = self.device.type == "cuda"
        for _ in range(3 if on_gpu else 2):
            for key, step in (("dense", dense), ("low_rank", low)):
                times[key] += timed(step, 9 if on_gpu else 3, self.device)[1:]
        return {key: statistics.median(ms) for key, ms in times.items()}
