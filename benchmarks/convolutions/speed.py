"""How long a training step takes, dense and at the ranks that runs have found: eager and compiled, each the best of three rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hf_cuttlefish import factorize

from .networks import NETWORKS, Classifier

MODES: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}, "graphs": {"mode": "reduce-overhead"}}


def step_times(
    network: str,
    width: int,
    side: int,
    batch: int,
    plans: Mapping[str, Mapping[str, int]],
    modes: list[str],
    device: str,
) -> list[dict[str, Any]]:
    """Milliseconds of a training step (forward, backward, SGD) by mode and plan; plans: name -> ranks, none for dense."""
    rows = []
    for mode in modes:
        steps = {}
        for name, ranks in plans.items():
            torch.manual_seed(0)
            model = Classifier(NETWORKS[network](1, 10, width)).to(device, memory_format=torch.channels_last)
            if ranks:
                factorize(model, dict(ranks))
            steps[name] = _step(model, side, batch, MODES[mode], device)
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(3):
            for name, step in steps.items():
                best[name] = min(best[name], _time(step, device))
        rows += [{"network": network, "mode": mode, "batch": batch, "plan": n, "ms": ms} for n, ms in best.items()]
        torch._dynamo.reset()
    return rows


def _step(model: nn.Module, side: int, batch: int, compiled: dict[str, Any] | None, device: str) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    kind = torch.device(device).type
    x = torch.randn(batch, 1, side, side, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            return model(pixel_values=x, labels=y)["loss"]

    run = forward if compiled is None else torch.compile(forward, **compiled)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run().backward()
        optimizer.step()

    return step


def _time(step: Callable[[], None], device: str) -> float:
    is_gpu = torch.device(device).type == "cuda"
    repeats = 20 if is_gpu else 3
    for _ in range(3 if is_gpu else 1):
        step()
    if is_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    if is_gpu:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / repeats
