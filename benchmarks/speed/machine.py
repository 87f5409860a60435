"""The machine: what it is, its memory, and whose turn on it is."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers


def environment(device: Any) -> dict[str, Any]:
    """Where this ran."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "precision": "bf16 autocast" if device.type == "cuda" else "fp32",
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }


def reset_peak(device: Any) -> None:
    """Begin to measure the peak of memory anew; on a CPU free memory goes back to the system first (Linux only)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: Any) -> float:
    """The largest amount of memory held since `reset_peak`, MiB: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return float("nan")


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """One process at a time."""
    with open(Path(tempfile.gettempdir(), f"speed-{os.getppid()}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
