"""Training steps and inference: of the dense model, and of each way to run its low-rank layers."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_cuttlefish import CuttlefishConfig, estimate_ranks, merge
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.sizes import count_parameters

from .. import forwards
from ..clock import gpu_time, timed
from ..machine import environment, peak_mb, reset_peak, turn
from ..models import build_model, make_batch, make_optimizer
from ..suites import PLAIN_MODES


class StepJob:
    """Training steps and inference of one variant of one model."""

    def __init__(self, job: dict[str, Any], device: str) -> None:
        self.job, self.device = job, torch.device(device)
        self.model: Any = None
        self.first: dict[str, float] = {}
        self.memory: dict[str, dict[str, float]] = {}
        self.graphs: dict[int, Any] = {}
        self.batches: dict[int, Any] = {}

    def prepare(self, modes: list[str]) -> dict[str, Any]:
        """Build the model at the first call, and warm up the settings of these modes."""
        begun = time.perf_counter()
        if self.model is None:
            self._build()
        for mode, batch in self.settings:
            if mode in modes:
                self._warm_up(mode, batch)
        return {
            "seconds": time.perf_counter() - begun,
            "parameters": count_parameters(self.model),
            "first": self.first,
            "memory": self.memory,
            "environment": environment(self.device),
        }

    def _build(self) -> None:
        job = self.job

        torch.manual_seed(0)
        torch._dynamo.config.cache_size_limit = 64
        torch._dynamo.config.automatic_dynamic_shapes = False
        self.settings = [(mode, batch) for mode, batch in job["settings"]]
        with self.device:
            model = build_model(job["model"])
        targets = list(find_targets(model))
        variant = job["variant"]
        if variant == "lora":
            model = forwards.use_lora(model, targets)
        elif variant != "dense":
            ranks = dict(estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_ratio=job["ratio"])))
            shapes = forwards.dense_shapes(model, list(ranks))
            if variant == "mlp":
                ranks = {
                    name: rank for name, rank in ranks.items() if shapes[name][0] != shapes[name][1] and _is_mlp(name)
                }
            batch = make_batch(job["model"], model.config, 1, self.device)
            groups = forwards.groups_by_input(model, list(ranks), batch)
            layers = forwards.fill(model, ranks)
            if variant == "direct":
                forwards.use_direct(layers)
            elif variant == "function":
                forwards.use_function(layers)
            elif variant in ("shared", "shared_plain"):
                forwards.use_shared(layers, groups, fused=variant == "shared")
            elif variant == "sequential":
                forwards.use_sequential(model, layers)
            elif variant == "merged":
                with turn():  # it measures
                    merge(model, where="slower", example_inputs={k: v for k, v in batch.items() if k != "labels"})
        self.model = model.to(self.device).train()
        self.optimizer = make_optimizer(model, self.device)
        self.callables = {
            "eager": self.model,
            "compiled": torch.compile(self.model, dynamic=False),
            "graphs": torch.compile(self.model, dynamic=False, mode="reduce-overhead"),
        }

    def _warm_up(self, mode: str, batch: int) -> None:
        """First steps. Others of the wave do the same on this GPU, so that who needs no compiler takes turns."""
        cuda = self.device.type == "cuda"
        alone = contextlib.nullcontext if mode in ("compiled", "graphs") else turn
        with alone():
            begun = time.perf_counter()
            self._patiently(lambda: self._run(mode, batch, 1))
            self.first[f"{mode} {batch}"] = time.perf_counter() - begun
            self._release()
        with turn():
            if cuda:
                self._patiently(lambda: self._run(mode, batch, 3))
                self._release()
            reset_peak(self.device)
            self._patiently(lambda: self._run(mode, batch, 1))
            if cuda or not mode.startswith("infer"):  # a process that has trained keeps more than inference needs
                self.memory[f"{mode} {batch}"] = {"peak_mb": peak_mb(self.device)}
            self._release()

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """Where memory is short for a moment, wait and try again."""
        for attempt in range(40):
            try:
                return action()
            except RuntimeError as error:
                if attempt == 39 or not any(word in str(error) for word in ("out of memory", "CUBLAS", "CUDNN")):
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                self._release()
                time.sleep(1 + (os.getpid() + attempt) % 3)

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batch(self, size: int) -> dict[str, Any]:
        if size not in self.batches:
            self.batches[size] = make_batch(self.job["model"], self.model.config, size, self.device)
        return self.batches[size]

    def _autocast(self) -> Any:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _train_step(self, call: Any, batch: dict[str, Any], mode: str) -> None:
        if mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            loss = call(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _inference(self, mode: str, batch: int) -> Callable[[], None]:
        inputs = {k: v for k, v in self._batch(batch).items() if k != "labels"}

        def forward() -> None:
            with torch.inference_mode(), self._autocast():
                self.model(**inputs)

        if mode == "infer":
            return forward
        if batch not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    forward()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
            self.graphs[batch] = graph
        return self.graphs[batch].replay

    def _run(self, mode: str, batch: int, steps: int) -> list[float]:
        """Milliseconds of each of so many steps, each from the end of the one before it."""
        if mode.startswith("infer"):
            self.model.eval()
            action = self._inference(mode, batch)
        else:
            self.model.train()
            call, inputs = self.callables[mode], self._batch(batch)
            action = functools.partial(self._train_step, call, inputs, mode)
        return timed(action, steps, self.device)

    def round(self, mode: str, batch: int, seconds: float) -> dict[str, Any]:
        """A few steps, as many as fit into `seconds`; the first one warms up and does not count."""
        one = self._run(mode, batch, 2)[-1] / 1000
        steps = max(2 if self.device.type == "cpu" else 4, min(200, int(seconds / max(one, 1e-6))))
        ms = self._run(mode, batch, steps + 1)[1:]
        self._release()
        return {"ms": ms}

    def extras(self, mode: str, batch: int) -> dict[str, Any]:
        """FLOPs of a step and what its parameters move; by the profiler the GPU's own time and the number of kernels."""
        told = self.job["variant"] in ("dense", "pairs", "shared") and self.job["ratio"] in (None, 0.25)
        result: dict[str, Any] = {}
        if mode in PLAIN_MODES:
            plain = "infer" if mode == "infer-graph" else mode
            with FlopCounterMode(display=False) as counter:
                self._run(plain, batch, 1)
            result["flops"] = counter.get_total_flops()
            # Inference reads each parameter once; a step reads it twice and writes its gradient, and AdamW reads gradient,
            # parameter and two moments and writes the last three.
            sizes = [p.nbytes * (10 if p.requires_grad and mode == "eager" else 1) for p in self.model.parameters()]
            result["parameter_bytes"] = sum(sizes)
        if self.device.type == "cuda" and told:
            with contextlib.suppress(Exception):
                self._run(mode, batch, 1)
                result = gpu_time(lambda: self._run(mode, batch, 2), 2)
            self._release()
        return result


def _is_mlp(name: str) -> bool:
    return any(part in name for part in ("intermediate", "mlp", "fc1", "fc2")) or (
        name.endswith("output.dense") and "attention" not in name
    )
