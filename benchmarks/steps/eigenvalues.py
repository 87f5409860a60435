"""Where the switch's eigenvalues are found soonest: `python -m benchmarks.steps.eigenvalues --out runs/eigenvalues.json`.

A BERT-base's layers: 72 symmetric matrices of 768 (the decompositions), 72 of 192 (the factors' balance), float64. In one batch;
in several threads, each with a stream of its own; on the CPU, one matrix a thread. The first call of a process has a row of its own:
the solver's library is loaded in it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def in_threads(gram: torch.Tensor, threads: int) -> Pair:
    """`torch.linalg.eigh` of a batch, by so many threads; on a GPU each has a stream."""
    on_gpu = gram.device.type == "cuda"
    here = torch.cuda.current_stream(gram.device) if on_gpu else None

    def work(part: torch.Tensor) -> Pair:
        if here is None:
            return torch.linalg.eigh(part)  # type: ignore[no-any-return]
        stream = torch.cuda.Stream(gram.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream), torch.no_grad():
            found = torch.linalg.eigh(part)
        stream.synchronize()
        return found  # type: ignore[no-any-return]

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(work, gram.chunk(threads)))
    return torch.cat([values for values, _ in parts]), torch.cat([vectors for _, vectors in parts])


@torch.no_grad()
def on_cpu(gram: torch.Tensor, threads: int) -> Pair:
    """There and back; one matrix a thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, vectors = in_threads(gram.cpu(), threads)
    finally:
        torch.set_num_threads(before)
    return values.to(gram.device), vectors.to(gram.device)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[768, 192])
    parser.add_argument("--count", type=int, default=72)
    parser.add_argument("--out", type=Path, default=Path("runs/eigenvalues.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = min(16, os.cpu_count() or 1)
    records: list[dict[str, Any]] = []
    small = torch.eye(8, dtype=torch.float64, device=device)[None].repeat(2, 1, 1)
    _time(records, "the first call of a process, 8 x 8", 8, lambda: torch.linalg.eigh(small), 1)
    for size in arguments.sizes:
        x = torch.randn(arguments.count, size, 2 * size, device=device).double()
        gram = x @ x.mT
        exact = torch.linalg.eigvalsh(gram[:1].cpu())
        _time(records, "one matrix", size, lambda g=gram: torch.linalg.eigh(g[:1]))
        _time(records, "one batch", size, lambda g=gram: torch.linalg.eigh(g))
        _time(records, "one batch, float32", size, lambda g=gram: torch.linalg.eigh(g.float()))
        for threads in (2, 4, 8):
            found = _time(records, f"{threads} threads", size, lambda g=gram, n=threads: in_threads(g, n))
            torch.testing.assert_close(found[0][:1].cpu(), exact, rtol=1e-9, atol=1e-9 * float(exact.max()))
        _time(records, f"CPU, {cores} threads", size, lambda g=gram: on_cpu(g, cores))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"device": _name(device), "torch": torch.__version__, "records": records}, indent=1) + "\n"
        )


def _time(records: list[dict[str, Any]], how: str, size: int, action: Callable[[], Any], repeats: int = 2) -> Any:
    """Milliseconds of the last of some calls, waited for."""
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        found = action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    records.append({"how": how, "size": size, "ms": round(1000 * seconds, 1)})
    print(records[-1], flush=True)
    return found


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


if __name__ == "__main__":
    main()
