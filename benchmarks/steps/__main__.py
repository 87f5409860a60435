"""Steps on one GPU, dense and low rank in turn in one process: wall time, the device's own, launches, memory.

    python -m benchmarks.steps --cases bert-base llama-8b --modes eager graphs infer --time-limit 480 --out runs/steps.json

`--compile-first 8` compiles all of them beforehand, 8 processes at a time, into a folder that the timed process reads from: so a lent
machine's cores are all at work. Seconds of first steps are then those of a filled cache.

A case has as many blocks as it says: where only the ratio counts, few, for compilation takes long. The optimizer is fused AdamW,
the precision bf16 autocast, gradients are clipped as by the Trainer, shapes are static. `parts` are milliseconds of forward,
backward, clipping and the optimizer, each waited for by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hf_cuttlefish import GraphedStep
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.kinds import dense_weight
from hf_cuttlefish.patch.running import RunMultiplied

from ..speed.clock import gpu_time
from ..speed.forwards import fill, groups_by_input, use_lora, use_shared
from ..speed.machine import environment
from .cases import CASES, build, make_batch

ROUNDS, STEPS = 5, 8
COMPILED: dict[str, str | None] = {
    "compiled": None,
    "graphs": "reduce-overhead",
    "max-autotune": "max-autotune",
    "max-autotune-no-cudagraphs": "max-autotune-no-cudagraphs",
    "infer-graphs": "reduce-overhead",
    "compiled-step-graph": None,
    "autotuned-step-graph": "max-autotune-no-cudagraphs",
}
"""Mode here -> mode of torch.compile."""
STEP_GRAPHS = ("step-graph", "compiled-step-graph", "autotuned-step-graph")
"""Modes in which forward, backward and clipping are one CUDA graph (`GraphedStep`)."""
CHECKPOINTED = " checkpointed"
"""End of a variant's name: its blocks are run again in backward."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=["tiny"])
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["dense", "pairs 0.25", "multiplied 0.25"],
        help="'pairs 0.4', 'dense checkpointed', ...",
    )
    parser.add_argument("--modes", nargs="+", choices=["eager", "infer", "step-graph", *COMPILED], default=["eager"])
    parser.add_argument("--infer-rows", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of 8 steps each, all variants in turn")
    parser.add_argument("--compile-first", type=int, default=0, metavar="N", help="compile by N processes at a time")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds after which nothing more is begun")
    parser.add_argument("--out", type=Path, default=Path("runs/steps.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    began = time.time()
    if arguments.compile_first:
        compile_first(arguments.cases, arguments.modes, arguments.variants, arguments.compile_first)
    records: list[dict[str, Any]] = []
    for case in arguments.cases:
        for mode in arguments.modes:
            rows_of = arguments.infer_rows if mode.startswith("infer") else [CASES[case][2]]
            for rows in rows_of:
                if time.time() - began > arguments.time_limit:
                    break
                until = began + arguments.time_limit
                records += run(case, mode, rows, arguments.variants, device, until, arguments.rounds)
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                found = {"environment": environment(device), "records": records, "seconds": time.time() - began}
                arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compile_first(cases: list[str], modes: list[str], variants: list[str], together: int) -> None:
    """Run each case, compiled mode and variant for some steps in a process of its own; what fails there fails again when timed."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())
    jobs = [(c, m, v) for c in cases for m in modes if m in COMPILED for v in variants]

    def one(job: tuple[str, str, str]) -> int:
        case, mode, variant = job
        words = ["--cases", case, "--modes", mode, "--variants", variant, "--rounds", "2", "--out", os.devnull]
        command = [sys.executable, "-m", "benchmarks.steps", *words]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode

    began = time.time()
    with ThreadPoolExecutor(together) as pool:
        failed = [job for job, code in zip(jobs, pool.map(one, jobs), strict=True) if code]
    print(f"compiled {len(jobs)} in {time.time() - began:.0f} s; ended with an error: {failed or 'none'}", flush=True)


def run(
    case: str, mode: str, rows: int, variants: list[str], device: torch.device, until: float, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """All variants of a case in one mode, in turn; a line of each is printed."""
    jobs: dict[str, Job] = {}
    first: dict[str, float] = {}
    for variant in variants:
        if jobs and time.time() > until:
            break
        began = time.perf_counter()
        try:
            jobs[variant] = job = Job(case, variant, mode, rows, device)
            for _ in range(4):
                job.step()
            job.wait()
        except Exception as error:
            jobs.pop(variant, None)
            print(case, mode, variant, repr(error)[:300], flush=True)
        first[variant] = time.perf_counter() - began
    times: dict[str, list[float]] = {variant: [] for variant in jobs}
    for _ in range(rounds):
        for variant, job in jobs.items():
            times[variant] += job.time(STEPS)
    records = []
    for variant, job in jobs.items():
        record = {"case": case, "mode": mode, "rows": rows, "variant": variant, "ms": statistics.median(times[variant])}
        record |= {"quartiles": [round(v, 3) for v in statistics.quantiles(times[variant], n=4)[::2]]}
        record |= {"host_ms": statistics.median(job.host)}  # processor time of all threads, until all is launched
        record |= {"first_seconds": first[variant], "parameters": sum(p.numel() for p in job.model.parameters())}
        record |= job.memory() | job.parts() | job.device_time()
        records.append(record)
    for record in records:
        record["of_dense"] = round(record["ms"] / records[0]["ms"], 3)
        print(
            {k: round(v, 3) if isinstance(v, float) else v for k, v in record.items() if k != "gpu_parts"}, flush=True
        )
    jobs.clear()
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return records


class Job:
    """One model in one form and mode."""

    def __init__(self, case: str, variant: str, mode: str, rows: int, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self.host: list[float] = []
        kind, sizes, _, length = CASES[case]
        torch.manual_seed(0)
        self.model = build(kind, sizes).to(device).train(not mode.startswith("infer"))
        self.batch = make_batch(kind, self.model.config, rows, length, device)
        form, _, ratio = variant.removesuffix(CHECKPOINTED).partition(" ")
        self.form: RunMultiplied | None = None
        if variant.endswith(CHECKPOINTED):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if form == "lora":
            self.model = use_lora(self.model, list(find_targets(self.model))).to(device)
        elif form != "dense":
            self._cut(form, float(ratio or 0.25), kind)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True if device.type == "cuda" else None)
        self.call: Any = self.model
        if mode in COMPILED:
            # Without a GPU the paths alone are tried.
            how: dict[str, Any] = {"mode": COMPILED[mode]} if device.type == "cuda" else {"backend": "eager"}
            self.call = torch.compile(self.model, dynamic=False, **how)
        on_gpu = device.type == "cuda"  # elsewhere the paths alone are tried
        self.graphed = GraphedStep(self.model, self.backward) if mode in STEP_GRAPHS and on_gpu else self.backward

    def _cut(self, form: str, ratio: float, kind: str) -> None:
        """Pairs at one share of the full rank in all layers, and the form that they run in."""
        targets = find_targets(self.model)
        if form.startswith("mlp"):
            targets = {n: la for n, la in targets.items() if len(set(dense_weight(la).shape)) == 2}
        ranks = {n: max(8, round(ratio * min(dense_weight(la).shape) / 8) * 8) for n, la in targets.items()}
        if form == "uneven":  # as rule "loss" spreads them
            ranks = {n: max(8, rank + 8 * ((i * 5) % 9 - 4)) for i, (n, rank) in enumerate(ranks.items())}
        layers = fill(self.model, ranks)
        self.model.to(self.device)
        if form in ("multiplied", "uneven", "alone"):
            self.form = RunMultiplied(self.model, together=form != "alone")
            self.form.start()
        elif form == "shared":
            batch = {
                name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in self.batch.items()
            }
            use_shared(layers, groups_by_input(self.model, list(ranks), batch), fused=False)

    def step(self) -> None:
        """One step of training, or one forward."""
        if self.mode.startswith("infer"):
            with torch.inference_mode(), self._autocast():
                self.call(**self.batch)
            return
        if self.mode in STEP_GRAPHS:
            self.graphed(self.batch)
        else:
            self.forward().backward()
            self.clip()
        self.update()

    def backward(self, batch: Any) -> torch.Tensor:
        """Forward, backward and clipping of a batch: what one graph holds."""
        with self._autocast():
            loss = self.call(**batch).loss
        loss.backward()
        self.clip()
        return loss.detach()  # type: ignore[no-any-return]

    def forward(self) -> torch.Tensor:
        if self.mode in ("graphs", "max-autotune"):
            torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            return self.call(**self.batch).loss  # type: ignore[no-any-return]

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> Any:
        on_gpu = self.device.type == "cuda"
        return torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else contextlib.nullcontext()

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, steps: int) -> list[float]:
        """Milliseconds a step: of so many launched one after another, and waited for at their end; after one that warms up."""
        self.step()
        began, worked = self.wait(), time.process_time()
        for _ in range(steps):
            self.step()
        self.host.append(1000 * (time.process_time() - worked) / steps)
        return [1000 * (self.wait() - began) / steps]

    def parts(self) -> dict[str, Any]:
        """Milliseconds of the parts of a training step, medians."""
        if self.mode.startswith("infer") or self.mode in STEP_GRAPHS:
            return {}
        found: dict[str, list[float]] = {"forward": [], "backward": [], "clip": [], "optimizer": []}

        def clock(name: str, action: Callable[[], Any]) -> Any:
            began = self.wait()
            result = action()
            found[name].append(1000 * (self.wait() - began))
            return result

        for _ in range(5):
            loss = clock("forward", self.forward)
            clock("backward", loss.backward)
            clock("clip", self.clip)
            clock("optimizer", self.update)
        return {"parts": {name: round(statistics.median(values), 2) for name, values in found.items()}}

    def memory(self) -> dict[str, Any]:
        """The largest amount allocated in a step, of this model alone: above what was there, and with its parameters and state."""
        if self.device.type != "cuda":
            return {}
        self.step()
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        own = sum(p.nbytes for p in self.model.parameters())
        own += sum(v.nbytes for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before + own) / 2**20}

    def device_time(self) -> dict[str, Any]:
        """The device's own time and the number of kernels of a step."""
        if self.device.type != "cuda":
            return {}
        with contextlib.suppress(Exception):
            return gpu_time(lambda: [self.step() for _ in range(2)], 2)
        return {}


if __name__ == "__main__":
    main()
