"""The switch, whole and in parts."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, cuttlefish, switch
from hf_cuttlefish.decide import ranks
from hf_cuttlefish.layers.sizes import count_parameters
from hf_cuttlefish.measure.moments import MomentCollector
from hf_cuttlefish.patch import modules

from ..machine import peak_mb, reset_peak
from ..models import build_model, make_batch, make_optimizer
from .base import OtherJob


class SwitchJob(OtherJob):
    """The switch itself, in parts, through `Cuttlefish` in a training loop; its peak memory; and what its parts are made of."""

    def measure(self, seconds: float) -> dict[str, Any]:
        torch.manual_seed(0)
        model = build_model(self.job["model"]).to(self.device).train()
        optimizer = make_optimizer(model, self.device)
        batch = make_batch(self.job["model"], model.config, self.job["batch"], self.device)
        on_gpu = self.device.type == "cuda"
        few = 4 if on_gpu or "tiny" in self.job["model"] else 2
        config = CuttlefishConfig(switch_step=2 * few + 1, statistics_steps=few, target_ratio=0.3, on_error="raise")
        ours = Cuttlefish(model, optimizer, config, total_steps=1000)
        spent = _clock_parts(self.sync)
        rows: list[dict[str, float]] = []
        for _ in range(3 * few + 2):
            reset_peak(self.device)
            begun = self.sync()
            with torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else contextlib.nullcontext():
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = self.sync()
            peak = peak_mb(self.device)
            reset_peak(self.device)
            switched = ours.step()
            after = self.sync()
            rows.append(
                {"step_ms": 1000 * (done - begun), "cuttlefish_ms": 1000 * (after - done), "peak_mb": peak}
                | {"cuttlefish_peak_mb": peak_mb(self.device)}
                | {"switched": switched}
            )
        report = ours.report
        at = next(i for i, row in enumerate(rows) if row["switched"])
        plain, gathering, low = rows[1 : at - few], rows[at - few + 1 : at + 1], rows[at + 2 :]

        def middle(part: list[dict[str, float]], key: str) -> float:
            return statistics.median(row[key] for row in part)

        return {
            "parameters_after": count_parameters(model),
            "parameters_before": report.parameters_before,
            "step_ms": middle(plain, "step_ms"),
            "gathering_step_ms": middle(gathering, "step_ms"),
            "low_rank_step_ms": middle(low, "step_ms"),
            "switch_ms": rows[at]["cuttlefish_ms"],
            "switch_seconds": report.seconds,
            "parts_ms": spent,
            "step_peak_mb": middle(plain, "peak_mb"),
            "gathering_peak_mb": max(row["peak_mb"] for row in gathering),
            "switch_peak_mb": rows[at]["cuttlefish_peak_mb"],
            "low_rank_peak_mb": middle(low, "peak_mb"),
            "optimizer": report.optimizer,
            "pieces_ms": self.pieces() if "tiny" not in self.job["model"] else {},
            "rows": rows,
        }

    def pieces(self) -> dict[str, float]:
        """Times of the linear algebra that a switch is made of, and of other ways to do it."""
        k = 1024 if "large" in self.job["model"] else 768
        result = {}
        for dtype, name in ((torch.float64, "f64"), (torch.float32, "f32")):
            a = torch.randn(k, k, device=self.device, dtype=dtype)
            gram = a @ a.mT / k + torch.eye(k, device=self.device, dtype=dtype)
            wide = torch.randn(k, 4 * k, device=self.device, dtype=dtype)
            actions: dict[str, Callable[[], Any]] = {
                "eigh": lambda gram=gram: torch.linalg.eigh(gram),
                "cholesky": lambda gram=gram: torch.linalg.cholesky_ex(gram),
                "solve_triangular": lambda gram=gram, a=a: torch.linalg.solve_triangular(gram.tril().mT, a, upper=True),
                "product k x k x 4k": lambda a=a, wide=wide: a @ wide,
                "qr 4k x k/4": lambda wide=wide: torch.linalg.qr(wide[: k // 4].mT),
                "svd k/4": lambda a=a: torch.linalg.svd(a[: k // 4, : k // 4]),
                "eigh k/4": lambda gram=gram: torch.linalg.eigh(gram[: k // 4, : k // 4]),
                "svd k": lambda a=a: torch.linalg.svd(a),
            }
            if self.device.type == "cuda":
                stack = gram.expand(6, k, k).contiguous()
                actions["eigh, 6 in a batch"] = lambda stack=stack: torch.linalg.eigh(stack)
                host = gram.cpu()
                actions["eigh on the CPU"] = lambda host=host: torch.linalg.eigh(host)
            for what, action in actions.items():
                with contextlib.suppress(Exception):
                    result[f"{what} {name}"] = self.milliseconds(action, 2, 1)
        return result


def _clock_parts(sync: Callable[[], float]) -> dict[str, float]:
    """Wrap what the run calls at the switch; the dictionary fills with milliseconds as it runs."""

    spent: dict[str, float] = {}

    def clocked(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = sync()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + 1000 * (sync() - begun)

        return call

    for holder, name, called in (
        (cuttlefish, "choose", "choose"),
        (switch, "carry_out", "carry_out"),
        (MomentCollector, "add", "add"),
        (switch, "plan_ranks", "plan_ranks"),
        (switch, "cut", "cut"),
        (ranks, "decompose", "decompose"),
        (modules, "commit", "_commit"),  # the name that older records have
    ):
        setattr(holder, name, clocked(called, getattr(holder, name)))
    return spent
