"""One layer alone, by each way to run it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_cuttlefish import LowRankLinear

from .. import forwards
from ..clock import timed
from .base import OtherJob


class LayersJob(OtherJob):
    """One layer or group forward and backward, by graph replay on a GPU: its own time, without the host; and its roofline."""

    def measure(self, seconds: float) -> dict[str, Any]:
        small = self.job.get("small", False)
        on_gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        peaks = self.peaks(dtype, small)
        begun = time.perf_counter()
        shapes = [
            (1024, 4096),
            (4096, 1024),
            (768, 768),
            (768, 3072),
            (3072, 768),
            (1024, 1024),
            (2048, 8192),
            (4096, 14336),
        ]
        sizes = [32768, 4096, 8192]
        if not on_gpu:
            shapes, sizes = [(768, 768), (768, 3072), (3072, 768), (1024, 4096), (384, 384)], [2048]
        if small:
            shapes, sizes = [(64, 256)], [128]
        rows = []
        for tokens in sizes:
            for n, m in shapes:
                if n * m > 30e6 and tokens == 32768:
                    continue
                for count in (1, 3) if n == m else (1,):
                    if time.perf_counter() - begun > min(seconds, 40 if on_gpu else 240):
                        break
                    rows += self.one(n, m, count, tokens, dtype, peaks)
        return {"peaks": peaks, "rows": rows}

    def peaks(self, dtype: Any, small: bool) -> dict[str, float]:
        """Best FLOP/s of a large matrix product and bytes/s of a large copy, on random data."""
        size = 8192 if self.device.type == "cuda" else 2048
        a = torch.randn(size, size, device=self.device, dtype=dtype)
        b = torch.randn(size, size, device=self.device, dtype=dtype)
        ms = min(timed(lambda: a @ b, 12, self.device)[2:])
        big = torch.randn(2**28 if self.device.type == "cuda" else 2**24, device=self.device)
        out = torch.empty_like(big)
        copy = min(timed(lambda: out.copy_(big), 12, self.device)[2:])
        return {"flops": 2 * size**3 / ms * 1000, "bytes": 2 * big.nbytes / copy * 1000}

    def one(self, n: int, m: int, count: int, tokens: int, dtype: Any, peaks: dict[str, float]) -> list[Any]:
        """Rows of `count` layers n -> m over the same input: dense, and each forward at 1/2, 1/4 and 1/8."""

        x = torch.randn(tokens, n, device=self.device, dtype=dtype, requires_grad=True)
        gs = [torch.randn(tokens, m, device=self.device, dtype=dtype) for _ in range(count)]
        rows = []
        item = x.element_size()

        def row(variant: str, rank: int | None, weights: str, layers: list[Any]) -> None:
            parameters = [p for layer in layers for p in layer.parameters()]

            def action() -> None:
                with torch.autocast(self.device.type, dtype=dtype, enabled=weights == "autocast"):
                    ys = [layer(x) for layer in layers]
                torch.autograd.grad(ys, [x, *parameters], gs)

            try:
                ms = self.replay(action)
            except torch.OutOfMemoryError:
                return
            inner = count * (n * m if rank is None else rank * (n + m))
            hidden = 0 if rank is None else 3 * count * rank  # written once, read in the next product and in backward
            # x and the outputs; in backward both gradients, and x again: each read or written once. Weights three times.
            moved = item * (tokens * (3 * n + 2 * count * m + hidden) + 3 * inner)
            floor = 1000 * max(6 * tokens * inner / peaks["flops"], moved / peaks["bytes"])
            rows.append(
                {"in": n, "out": m, "count": count, "tokens": tokens, "variant": variant, "rank": rank}
                | {"weights": weights, "ms": ms, "floor_ms": floor}
            )

        kinds = ["autocast", "pure"] if self.device.type == "cuda" else ["pure"]
        for weights in kinds:
            wdtype = torch.float32 if weights == "autocast" else dtype
            row("dense", None, weights, [nn.Linear(n, m, device=self.device, dtype=wdtype) for _ in range(count)])
            for ratio in (0.25, 0.125, 0.5):
                rank = max(1, int(min(m, n) * ratio))
                for variant in ("pairs", "function") if count == 1 else ("pairs", "shared", "shared_plain"):
                    if ratio != 0.25 and variant not in ("pairs", "shared"):
                        continue
                    made = {str(i): LowRankLinear(n, m, rank, device=self.device, dtype=wdtype) for i in range(count)}
                    if variant == "function":
                        forwards.use_function(made)
                    elif variant.startswith("shared"):
                        forwards.use_shared(made, [list(made)], fused=variant == "shared")
                    row(variant, rank, weights, list(made.values()))
        return rows

    def replay(self, action: Callable[[], Any]) -> float:
        """Median milliseconds: of a graph's replays on a GPU, of calls on a CPU."""
        if self.device.type != "cuda":
            return statistics.median(timed(action, 6, self.device)[1:])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                action()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        result = statistics.median(timed(graph.replay, 22, self.device)[2:])
        del graph
        return result
