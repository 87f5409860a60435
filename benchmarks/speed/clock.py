"""Time: of calls, and of what a GPU itself does in them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch


def timed(action: Callable[[], Any], steps: int, device: Any) -> list[float]:
    """Milliseconds of each call: on a GPU between events (waits of the device for the host are in it), else wall time."""
    if device.type != "cuda":
        result = []
        for _ in range(steps):
            begun = time.perf_counter()
            action()
            result.append(1000 * (time.perf_counter() - begun))
        return result
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def gpu_time(action: Callable[[], Any], steps: int) -> dict[str, float]:
    """Time that kernels ran and their number, per step, by the profiler; by kind of kernel for the largest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    total, kernels = 0.0, 0
    kinds: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            length = event.time_range.elapsed_us()
            total, kernels = total + length, kernels + 1
            kind = _kind(event.name)
            kinds[kind] = kinds.get(kind, 0.0) + length
    parts = {kind: round(us / 1000 / steps, 3) for kind, us in sorted(kinds.items(), key=lambda item: -item[1])[:8]}
    return {"gpu_ms": total / 1000 / steps, "kernels": kernels / steps, "gpu_parts": parts}


KINDS = {
    "gemm": ("gemm", "cutlass", "nvjet", "xmma", "splitK"),
    "attention": ("flash", "fmha", "cudnn"),
    "optimizer": ("multi_tensor", "adam"),
    "memset": ("Memset",),
    "copy": ("Memcpy",),
    "cast or copy": ("copy",),
    "triton": ("triton",),
    "norm": ("layer_norm", "LayerNorm"),
    "dropout": ("dropout",),
    "reduce": ("reduce",),
    "softmax": ("softmax",),
    "elementwise": ("elementwise",),
}
"""Kind of kernel -> words in the names of its kernels. The first kind that fits counts."""


def _kind(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
