"""Whole runs side by side in one process: each takes a step in turn, so that whatever else the machine does slows all of them alike.

Seconds are of the process's own CPU time, beside those of the clock: on one thread of a busy machine they are the work done.
"""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hf_cuttlefish.layers.low_rank import low_rank_layers

from .data import Images, load
from .methods import controller, start
from .networks import NETWORKS, Classifier


class Run:
    """One method's run, a step at a time; `seconds` (of the CPU) and `clock` are those of each step, statistics and switch included."""

    def __init__(self, method: str, network: str, width: int, batch: int, steps: int, budget: float) -> None:
        torch.manual_seed(0)
        self.batch, self.seconds, self.switch_seconds = batch, [], 0.0
        self.clock: list[float] = []
        self.model = Classifier(NETWORKS[network](1, 10, width)).to(memory_format=torch.channels_last)
        self.before = sum(p.numel() for p in self.model.parameters())
        config = start(method, self.model, budget, steps, steps)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        self.told = controller(method, self.model, self.optimizer, None, config, budget, steps)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, images: Images) -> None:
        """A training step and what the controller makes of it."""
        began, clock = time.process_time(), time.perf_counter()
        rows = torch.randint(0, len(images.train), (self.batch,), generator=self.generator)
        x = images.batch(rows, self.generator).contiguous(memory_format=torch.channels_last)
        self.model(pixel_values=x, labels=images.train_labels[rows])["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        stepped = time.process_time()
        if self.told is not None and self.told.step():
            self.switch_seconds = time.process_time() - stepped
        self.seconds.append(time.process_time() - began)
        self.clock.append(time.perf_counter() - clock)

    def record(self) -> dict[str, Any]:
        """Seconds of the whole run, of the switch, and of a step before it and after it (medians)."""
        at = getattr(self.told, "switch_step", None)
        parts = {"before": self.seconds[: at or None], "after": self.seconds[at:] if at else []}
        return {
            "switch_step": at,
            "parameters": sum(p.numel() for p in self.model.parameters()) / self.before,
            "factorized": len(low_rank_layers(self.model)),
            "seconds": sum(self.seconds),
            "clock_seconds": sum(self.clock),
            "switch_seconds": self.switch_seconds,
            "step": {part: statistics.median(times) if times else None for part, times in parts.items()},
        }


def in_turn(
    network: str, task: str, data: Path | None, width: int, batch: int, steps: int, budget: float
) -> dict[str, Any]:
    """Dense and Cuttlefish at a budget, step by step in turn on the CPU; the record of both."""
    images = load(task, data, torch.device("cpu"))
    runs = {method: Run(method, network, width, batch, steps, budget) for method in ("dense", "ours_budget")}
    for _ in range(steps):
        for run in runs.values():
            run.model.train()
            run.step(images)
    found = {method: run.record() for method, run in runs.items()}
    return {
        **{"network": network, "task": task, "width": width, "batch": batch, "steps": steps, "budget": budget},
        **{"device": f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads", "torch": torch.__version__},
        "runs": found,
        "times_as_fast": found["dense"]["seconds"] / found["ours_budget"]["seconds"],
    }


def line(record: dict[str, Any]) -> str:
    """One record in words."""
    dense, ours = record["runs"]["dense"], record["runs"]["ours_budget"]
    return (
        f"{record['network']}, {record['steps']} steps of {record['batch']} images on {record['device']}: dense {dense['seconds']:.1f} s, "
        f"ours {ours['seconds']:.1f} s ({record['times_as_fast']:.2f} times as fast; switch {ours['switch_seconds']:.1f} s; a step "
        f"{dense['step']['before']:.3f} -> {ours['step']['after'] or float('nan'):.3f} s)"
    )
