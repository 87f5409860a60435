"""Speed: training step, rank check, switch, memory and inference, dense and factorized in turn in one run.

    python benchmarks/speed.py --suite gpu --out benchmarks/results/speed_h100.json
    python benchmarks/speed.py --table benchmarks/results/speed_h100.json

Every variant of a model lives in a process of its own. All processes of a wave build, compile and warm up at the same time;
then exactly one at a time is asked to run a few steps, dense, factorized, dense, factorized, ..., while the others sleep.
So compilation costs little of the time on a lent machine, a variant's peak memory is its own, and drift hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARK = "@@speed@@ "
RECORD_VERSION = 1
HERE = Path(__file__).resolve().parent

# --- what is run ---

MODELS: dict[str, dict[str, Any]] = {
    "bert-base": {"kind": "bert"},
    "bert-large": {
        "kind": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "vit-base": {"kind": "vit"},
    "vit-large": {
        "kind": "vit",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "llama-1b": {
        **{
            "kind": "llama",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        **{"intermediate_size": 8192, "vocab_size": 32000, "tie_word_embeddings": True},
    },
    "minilm": {
        "kind": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bert-tiny": {
        "kind": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    },
    "vit-tiny": {
        **{
            "kind": "vit",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
        },
        **{"image_size": 32, "patch_size": 8},
    },
    "llama-tiny": {
        **{
            "kind": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        **{"intermediate_size": 256, "vocab_size": 512},
    },
}
LENGTHS = {"llama-1b": 1024, "bert-tiny": 16, "llama-tiny": 16}
"""Tokens an example; 128 elsewhere."""

PLAIN_MODES = ("eager", "infer", "infer-graph")
COMPILED_MODES = ("compiled", "graphs")
Setting = tuple[str, int]
"""(mode, batch). Modes: eager, compiled, graphs (reduce-overhead), infer, infer-graph (one CUDA graph of the forward)."""


def job(model: str, variant: str, *settings: Setting, ratio: float | None = 0.25) -> dict[str, Any]:
    """One process: a model, a way to run its layers, and the settings in which it is timed."""
    ratio = None if variant in ("dense", "lora") else ratio
    name = f"{model} {variant}" + (f" {ratio:g}" if ratio else "")
    return {"name": name, "job": "step", "model": model, "variant": variant, "ratio": ratio, "settings": list(settings)}


def other(kind: str, **options: Any) -> dict[str, Any]:
    """A process that measures something else by itself, after the steps of its wave."""
    return {"name": " ".join([kind, *map(str, options.values())]), "job": kind, "settings": [], **options}


def waves(suite: str) -> list[list[dict[str, Any]]]:
    """Jobs that are prepared together, wave by wave, the most telling ones first."""
    eager, compiled, graphs = "eager", "compiled", "graphs"
    infer = [("infer", 1), ("infer", 64), ("infer-graph", 1), ("infer-graph", 64)]
    if suite == "gpu":
        large = [(eager, 64), (compiled, 64)]
        base = [(eager, 32), (compiled, 32)]
        llama = [(eager, 4), (compiled, 4)]
        first = [
            job("bert-large", "dense", *large, (graphs, 64), *infer),
            job("bert-large", "pairs", *large, (graphs, 64), *infer),
            job("bert-large", "shared", *large, (graphs, 64)),
            job("bert-large", "pairs", *large, ratio=0.125),
            job("bert-large", "pairs", *large, ratio=0.5),
            job("bert-large", "mlp", *large),
            job("vit-base", "dense", (eager, 64), (compiled, 64), *infer),
            job("vit-base", "pairs", (eager, 64), (compiled, 64), *infer),
            job("vit-base", "shared", (eager, 64), (compiled, 64)),
            job("bert-base", "sequential", (eager, 32)),
            job("bert-base", "lora", (eager, 32), (compiled, 32)),
            other("layers"),
            other("select", model="bert-base", batch=32),
            other("select", model="bert-base", batch=128),
            other("select", model="bert-large", batch=64),
            other("switch", model="bert-base", batch=32),
        ]
        # bert-base sequential and lora are compared with the dense one of the same wave: timed here and in the next.
        first.append(job("bert-base", "dense", (eager, 32), (compiled, 32)))
        second = [
            job("bert-base", "dense", (eager, 8), *base, (eager, 128), (compiled, 128), (graphs, 32), *infer),
            job("bert-base", "pairs", (eager, 8), *base, (eager, 128), (compiled, 128), (graphs, 32), *infer),
            job("bert-base", "shared", (eager, 8), *base, (eager, 128), (compiled, 128), (graphs, 32)),
            job("bert-base", "function", (eager, 8), *base, (eager, 128)),
            job("bert-base", "direct", (eager, 8), *base),
            job("bert-base", "shared_plain", (eager, 8), *base),
            job("bert-base", "mlp", (eager, 8), *base, (eager, 128), (compiled, 128)),
            job("bert-base", "pairs", *base, ratio=0.125),
            job("bert-base", "pairs", *base, ratio=0.5),
            job("vit-large", "dense", (eager, 64), (compiled, 64), (graphs, 64), *infer),
            job("vit-large", "pairs", (eager, 64), (compiled, 64), (graphs, 64), *infer),
            job("vit-large", "shared", (eager, 64), (compiled, 64)),
            other("tracking", model="bert-base"),
        ]
        third = [
            job("llama-1b", "dense", *llama),
            job("llama-1b", "pairs", *llama),
            job("llama-1b", "shared", *llama),
            other("tracking", model="bert-large"),
            other("switch", model="bert-large", batch=64),
        ]
        return [first, second, third]
    if suite == "cpu":
        infer = infer[:2]
        mini, base = [(eager, 32), *infer], [(eager, 16), *infer]
        return [
            [
                job("bert-base", "dense", *base),
                job("bert-base", "pairs", *base),
                job("bert-base", "sequential", (eager, 16)),
                job("bert-base", "lora", (eager, 16)),
                job("bert-base", "pairs", (eager, 16), ratio=0.5),
                job("bert-base", "pairs", (eager, 16), ratio=0.125),
            ],
            [job("bert-base", variant, (compiled, 16)) for variant in ("dense", "pairs", "shared")],
            [
                other("layers"),
                other("tracking", model="bert-base"),
                other("switch", model="bert-base", batch=16),
                other("tracking", model="minilm"),
                other("switch", model="minilm", batch=32),
                other("select", model="minilm", batch=32),
            ],
            [
                job("minilm", "dense", *mini, (compiled, 32)),
                job("minilm", "pairs", *mini, (compiled, 32)),
                job("minilm", "merged", *mini),  # like the others: memory that training has used serves inference
                job("minilm", "sequential", (eager, 32)),
                job("minilm", "lora", (eager, 32)),
                job("minilm", "shared", (eager, 32), (compiled, 32)),
                job("minilm", "function", (eager, 32)),
                job("minilm", "direct", (eager, 32)),
                job("minilm", "pairs", (eager, 32), ratio=0.5),
                job("minilm", "pairs", (eager, 32), ratio=0.125),
            ],
        ]
    smoke = ["dense", "pairs", "direct", "function", "shared", "shared_plain", "mlp", "sequential", "lora"]
    few = [(eager, 2), (compiled, 2), ("infer", 1)]
    return [
        [
            *(job("bert-tiny", v, *(few if v in ("dense", "pairs", "shared", "mlp") else few[:1])) for v in smoke),
            job("bert-tiny", "merged", ("infer", 1)),
        ],
        [job(m, v, (eager, 2)) for m in ("vit-tiny", "llama-tiny") for v in ("dense", "pairs", "shared", "function")],
        [
            other("layers", small=True),
            other("tracking", model="bert-tiny"),
            other("select", model="bert-tiny", batch=2),
            other("switch", model="bert-tiny", batch=2),
        ],
    ]


# --- the process that asks ---


class Worker:
    """A process that holds one job and answers one question at a time."""

    def __init__(self, job: dict[str, Any], args: argparse.Namespace) -> None:
        self.job, self.name = job, job["name"]
        self.error: str | None = None
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job), "--device", args.device]
        environment = {
            **os.environ,
            "TORCHINDUCTOR_COMPILE_THREADS": str(args.compile_threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if args.device == "cuda" and job["job"] == "step":
            environment["OMP_NUM_THREADS"] = "1"  # many of us compile at the same time
        self.log = open(Path(args.log_folder) / f"{self.name.replace(' ', '_')}.log", "w")  # noqa: SIM115 (lives as long as we)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def send(self, question: dict[str, Any]) -> None:
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.error = self.error or "the process has died"

    def receive(self) -> dict[str, Any]:
        """The answer to the last question; {} if the process has failed (then `error` says why)."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if "error" in answer:
                    self.error = answer["error"]
                    return {}
                return answer
        self.error = self.error or f"the process has died (exit status {self.process.wait()})"
        return {}

    def ask(self, **question: Any) -> dict[str, Any]:
        self.send(question)
        return self.receive() if self.error is None else {}

    def stop(self, reason: str) -> None:
        """Give up on the process; whoever waits for its answer gets none."""
        if self.process.poll() is None:
            self.error = self.error or reason
            self.process.kill()  # ours, and it has nothing to save

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # ours, and it has nothing to save
        self.process.wait()
        self.log.close()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run a suite and return the record, which is also written after each wave."""
    started = time.perf_counter()
    left = lambda: args.time_limit - (time.perf_counter() - started)  # noqa: E731
    record: dict[str, Any] = {"version": RECORD_VERSION, "suite": args.suite, "steps": [], "errors": {}, "not_run": []}
    for number, wave in enumerate(waves(args.suite)):
        if args.waves and str(number + 1) not in args.waves.split(","):
            continue
        wave = [j for j in wave if not args.only or any(word in j["name"] for word in args.only.split(","))]
        if left() < args.wave_minimum:
            record["not_run"] += [j["name"] for j in wave]
            continue
        _run_wave(number + 1, wave, args, record, left)
        record["seconds"] = time.perf_counter() - started
        save(record, args.out)
    return record


def _run_wave(
    number: int, wave: list[dict[str, Any]], args: argparse.Namespace, record: dict[str, Any], left: Callable[[], float]
) -> None:
    """What needs no compiler first, then what is measured by itself, then the compiled: a short run has its numbers too."""
    begun = time.perf_counter()
    workers: list[Worker] = []
    guard = threading.Timer(max(1.0, left() + 20), lambda: [worker.stop("out of time") for worker in workers])
    guard.daemon = True
    guard.start()
    steps: list[Worker] = []
    try:
        for i in range(0, len(wave), args.workers):
            fresh = [Worker(j, args) for j in wave[i : i + args.workers]]
            workers += fresh
            _prepare(fresh, PLAIN_MODES, left(), record, begun)
        steps = [w for w in workers if w.job["job"] == "step"]
        _time_steps(steps, PLAIN_MODES, number, args, record, left)
        for worker in workers:
            if worker.job["job"] == "step" or worker.error is not None:
                continue
            if left() <= 0:
                record["not_run"].append(worker.name)
                continue
            answer = worker.ask(do="measure", seconds=left())
            if worker.error is None:
                job = {k: v for k, v in worker.job.items() if k != "prepared"}
                record.setdefault(worker.job["job"], []).append(job | answer)
            _tell(f"{worker.name}: {worker.error or 'measured'}")
            save(record, args.out)
        for i in range(0, len(steps), args.workers):
            some = [w for w in steps[i : i + args.workers] if any(m in COMPILED_MODES for m, _ in w.job["settings"])]
            _prepare(some, COMPILED_MODES, min(args.prepare_limit, left()), record, begun)
        _time_steps(steps, COMPILED_MODES, number, args, record, left)
    finally:
        guard.cancel()
        for worker in workers:
            if worker.error:
                record["errors"][worker.name] = worker.error
            worker.close()
        save(record, args.out)


def _prepare(workers: list[Worker], modes: Any, limit: float, record: dict[str, Any], begun: float) -> None:
    """Let all of them warm up these modes at the same time; who is not ready in time is given up, the others are kept."""
    names = list(modes)
    alive = [w for w in workers if w.error is None]
    answers: dict[str, dict[str, Any]] = {}

    def wait(worker: Worker) -> None:
        answers[worker.name] = worker.receive()

    threads = [threading.Thread(target=wait, args=(worker,), daemon=True) for worker in alive]
    for worker, thread in zip(alive, threads, strict=True):
        worker.send({"do": "prepare", "modes": names})
        thread.start()
    deadline = time.perf_counter() + max(1.0, limit)
    for worker, thread in zip(alive, threads, strict=True):
        thread.join(max(0.1, deadline - time.perf_counter()))
        if thread.is_alive():
            worker.stop("not ready in time: " + ", ".join(names))
            thread.join()
        answer = answers.get(worker.name) or {}
        if answer:
            worker.job["prepared"] = answer
            record["environment"] = answer["environment"]
        _tell(f"{worker.name}: {worker.error or 'ready'} after {time.perf_counter() - begun:.0f} s")


def _time_steps(
    steps: list[Worker],
    modes: tuple[str, ...],
    number: int,
    args: argparse.Namespace,
    record: dict[str, Any],
    left: Callable[[], float],
) -> None:
    """Turns of each setting, dense and factorized, A B A B; then what the profiler says."""
    wanted = dict.fromkeys((w.job["model"], m, b) for w in steps for m, b in w.job["settings"] if m in modes)
    for model, mode, batch in wanted:
        asked = [w for w in steps if w.job["model"] == model and (mode, batch) in map(tuple, w.job["settings"])]
        times: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for worker in asked:
                if worker.error is None and left() > 0:
                    answer = worker.ask(do="round", mode=mode, batch=batch, seconds=args.round_seconds)
                    times.setdefault(worker.name, []).extend(answer.get("ms", []))
        for worker in asked:
            ms = times.get(worker.name)
            if not ms:
                record["not_run"].append(f"{worker.name} {mode} {batch}")
                continue
            detail = worker.ask(do="extras", mode=mode, batch=batch) if worker.error is None and left() > 0 else {}
            record["steps"].append(_summary(worker, mode, batch, ms, detail, number))
        medians = [f"{name.removeprefix(model)} {statistics.median(ms):.2f}" for name, ms in times.items() if ms]
        _tell(f"{model} {mode} {batch}: {', '.join(medians)}")
        save(record, args.out)


def _summary(
    worker: Worker, mode: str, batch: int, ms: list[float], detail: dict[str, Any], wave: int
) -> dict[str, Any]:
    ordered = sorted(ms)
    quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    prepared = worker.job["prepared"]
    return {
        **{key: worker.job[key] for key in ("model", "variant", "ratio")},
        **{
            "mode": mode,
            "batch": batch,
            "ms": statistics.median(ordered),
            "q1": quartiles[0],
            "q3": quartiles[2],
            "n": len(ms),
        },
        **{"parameters": prepared["parameters"], "first_step_s": prepared["first"].get(f"{mode} {batch}")},
        **{"wave": wave, **prepared["memory"].get(f"{mode} {batch}", {}), **detail},
    }


def save(record: dict[str, Any], path: str | None) -> None:
    """Write the record as JSON."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- the process that runs ---


def work(job: dict[str, Any], device: str) -> None:
    """Answer questions on stdin until it closes."""
    import traceback

    holder: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            do = question.pop("do")
            if do == "prepare":
                if "job" not in holder:
                    holder["job"] = JOBS[job["job"]](job, device)
                answer = holder["job"].prepare(**question)
            else:
                answer = getattr(holder["job"], do)(**question)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(MARK + json.dumps(answer), flush=True)


def build_model(name: str) -> Any:
    """A model of the table with random weights."""
    import transformers as hf

    options = dict(MODELS[name])
    kind = options.pop("kind")
    if kind == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**options))
    if kind == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(**options))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**options))


def make_batch(name: str, config: Any, size: int, device: Any) -> dict[str, Any]:
    """Random inputs and labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if MODELS[name]["kind"] == "vit":
        pixels = torch.randn(size, 3, config.image_size, config.image_size, generator=generator)
        return {"pixel_values": pixels.to(device), "labels": torch.zeros(size, dtype=torch.long, device=device)}
    length = LENGTHS.get(name, 128)
    ids = torch.randint(5, config.vocab_size, (size, length), generator=generator).to(device)
    if MODELS[name]["kind"] == "llama":
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    return {"input_ids": ids, "labels": torch.zeros(size, dtype=torch.long, device=device)}


def make_optimizer(model: Any, device: Any) -> Any:
    """AdamW over what is trained, fused on a GPU."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True if device.type == "cuda" else None)


class StepJob:
    """Training steps and inference of one variant of one model."""

    def __init__(self, job: dict[str, Any], device: str) -> None:
        import torch

        self.job, self.device, self.torch = job, torch.device(device), torch
        self.model: Any = None
        self.first: dict[str, float] = {}
        self.memory: dict[str, dict[str, float]] = {}
        self.graphs: dict[int, Any] = {}
        self.batches: dict[int, Any] = {}

    def prepare(self, modes: list[str]) -> dict[str, Any]:
        """Build the model at the first call, and warm up the settings of these modes."""
        from hf_cuttlefish.layers.sizes import count_parameters

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
        import forwards

        torch, job = self.torch, self.job
        from hf_cuttlefish import CuttlefishConfig, estimate_ranks, merge
        from hf_cuttlefish.decide.targets import find_targets

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
                with _turn():  # it measures
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
        alone = contextlib.nullcontext if mode in ("compiled", "graphs") else _turn
        with alone():
            begun = time.perf_counter()
            self._patiently(lambda: self._run(mode, batch, 1))
            self.first[f"{mode} {batch}"] = time.perf_counter() - begun
            self._release()
        with _turn():
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
            self.torch.cuda.empty_cache()

    def _batch(self, size: int) -> dict[str, Any]:
        if size not in self.batches:
            self.batches[size] = make_batch(self.job["model"], self.model.config, size, self.device)
        return self.batches[size]

    def _autocast(self) -> Any:
        if self.device.type == "cuda":
            return self.torch.autocast("cuda", dtype=self.torch.bfloat16)
        return contextlib.nullcontext()

    def _train_step(self, call: Any, batch: dict[str, Any], mode: str) -> None:
        if mode == "graphs":
            self.torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            loss = call(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _inference(self, mode: str, batch: int) -> Callable[[], None]:
        inputs = {k: v for k, v in self._batch(batch).items() if k != "labels"}

        def forward() -> None:
            with self.torch.inference_mode(), self._autocast():
                self.model(**inputs)

        if mode == "infer":
            return forward
        if batch not in self.graphs:
            torch = self.torch
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
            action = lambda: self._train_step(call, inputs, mode)  # noqa: E731
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
            from torch.utils.flop_counter import FlopCounterMode

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


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """One process at a time."""
    with open(Path(tempfile.gettempdir(), f"speed-{os.getppid()}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_mlp(name: str) -> bool:
    return any(part in name for part in ("intermediate", "mlp", "fc1", "fc2")) or (
        name.endswith("output.dense") and "attention" not in name
    )


def timed(action: Callable[[], Any], steps: int, device: Any) -> list[float]:
    """Milliseconds of each call: on a GPU between events (waits of the device for the host are in it), else wall time."""
    import torch

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
    import torch
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


def _kind(name: str) -> str:
    for word, kind in (
        *(("gemm", "gemm"), ("cutlass", "gemm"), ("nvjet", "gemm"), ("xmma", "gemm"), ("splitK", "gemm")),
        *(("flash", "attention"), ("fmha", "attention"), ("cudnn", "attention"), ("multi_tensor", "optimizer")),
        *(
            ("adam", "optimizer"),
            ("Memset", "memset"),
            ("Memcpy", "copy"),
            ("copy", "cast or copy"),
            ("triton", "triton"),
        ),
        *(
            ("layer_norm", "norm"),
            ("LayerNorm", "norm"),
            ("dropout", "dropout"),
            ("reduce", "reduce"),
            ("softmax", "softmax"),
        ),
    ):
        if word in name:
            return kind
    return "elementwise" if "elementwise" in name else "other"


def environment(device: Any) -> dict[str, Any]:
    """Where this ran."""
    import torch
    import transformers

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


class OtherJob:
    """Something measured by itself."""

    def __init__(self, job: dict[str, Any], device: str) -> None:
        import torch

        self.job, self.device, self.torch = job, torch.device(device), torch

    def prepare(self, modes: list[str]) -> dict[str, Any]:
        """Only the imports: what is measured here needs the machine for itself."""
        import forwards  # noqa: F401
        import transformers  # noqa: F401

        import hf_cuttlefish  # noqa: F401

        return {"seconds": 0.0, "environment": environment(self.device)}

    def sync(self) -> float:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def milliseconds(self, action: Callable[[], Any], repeats: int = 5, warm: int = 1) -> float:
        """Median wall time of a call with the device waited for."""
        for _ in range(warm):
            action()
        found = []
        for _ in range(repeats):
            begun = self.sync()
            action()
            found.append(1000 * (self.sync() - begun))
        return statistics.median(found)


class LayersJob(OtherJob):
    """One layer or group forward and backward, by graph replay on a GPU: its own time, without the host; and its roofline."""

    def measure(self, seconds: float) -> dict[str, Any]:
        import forwards

        torch, small = self.torch, self.job.get("small", False)
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
                    rows += self.one(forwards, n, m, count, tokens, dtype, peaks)
        return {"peaks": peaks, "rows": rows}

    def peaks(self, dtype: Any, small: bool) -> dict[str, float]:
        """Best FLOP/s of a large matrix product and bytes/s of a large copy, on random data."""
        torch = self.torch
        size = 8192 if self.device.type == "cuda" else 2048
        a = torch.randn(size, size, device=self.device, dtype=dtype)
        b = torch.randn(size, size, device=self.device, dtype=dtype)
        ms = min(timed(lambda: a @ b, 12, self.device)[2:])
        big = torch.randn(2**28 if self.device.type == "cuda" else 2**24, device=self.device)
        out = torch.empty_like(big)
        copy = min(timed(lambda: out.copy_(big), 12, self.device)[2:])
        return {"flops": 2 * size**3 / ms * 1000, "bytes": 2 * big.nbytes / copy * 1000}

    def one(
        self, forwards: Any, n: int, m: int, count: int, tokens: int, dtype: Any, peaks: dict[str, float]
    ) -> list[Any]:
        """Rows of `count` layers n -> m over the same input: dense, and each forward at 1/2, 1/4 and 1/8."""
        torch = self.torch
        from torch import nn

        from hf_cuttlefish import LowRankLinear

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
        torch = self.torch
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


class TrackingJob(OtherJob):
    """One check of all stable ranks: ours, cold and warm, against singular values of every layer."""

    def measure(self, seconds: float) -> dict[str, Any]:
        torch = self.torch
        from hf_cuttlefish.decide.targets import find_targets
        from hf_cuttlefish.measure.tracker import StableRankTracker

        torch.manual_seed(0)
        model = build_model(self.job["model"]).to(self.device)
        weights = {name: layer.weight.detach() for name, layer in find_targets(model).items()}
        steps = [1e-3 * torch.randn_like(w) * w.std() for w in weights.values()]

        def move() -> None:
            for w, step in zip(weights.values(), steps, strict=True):
                w.add_(step)

        cold = self.milliseconds(lambda: StableRankTracker().measure(weights), 3)
        tracker = StableRankTracker()
        tracker.measure(weights)
        warm = []
        for _ in range(6):
            move()
            begun = self.sync()
            found = tracker.measure(weights)
            warm.append(1000 * (self.sync() - begun))
        exact, took = {}, {}
        few = dict(list(weights.items())[: 12 if self.job["model"] != "bert-tiny" else 2])
        for where in {str(self.device), "cpu"}:
            begun = self.sync()
            for name, w in few.items():
                s = torch.linalg.svdvals(w.to(where))
                exact[name] = float(s.square().sum() / s[0] ** 2)
            took[where] = 1000 * (self.sync() - begun) * len(weights) / len(few)
        error = max(abs(found[name] - value) / value for name, value in exact.items())
        return {
            "matrices": len(weights),
            "cold_ms": cold,
            "warm_ms": statistics.median(warm),
            "svdvals_ms": took,
            "svdvals_measured_on": len(few),
            "largest_relative_error": error,
        }


class SwitchJob(OtherJob):
    """The switch itself, in parts, through `Cuttlefish` in a training loop; its peak memory; and what its parts are made of."""

    def measure(self, seconds: float) -> dict[str, Any]:
        torch = self.torch
        from hf_cuttlefish import Cuttlefish, CuttlefishConfig
        from hf_cuttlefish.layers.sizes import count_parameters

        torch.manual_seed(0)
        model = build_model(self.job["model"]).to(self.device).train()
        optimizer = make_optimizer(model, self.device)
        batch = make_batch(self.job["model"], model.config, self.job["batch"], self.device)
        on_gpu = self.device.type == "cuda"
        few = 4 if on_gpu or "tiny" in self.job["model"] else 2
        config = CuttlefishConfig(switch_step=2 * few + 1, statistics_steps=few, target_ratio=0.3, on_error="raise")
        cuttlefish = Cuttlefish(model, optimizer, config, total_steps=1000)
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
            switched = cuttlefish.step()
            after = self.sync()
            rows.append(
                {"step_ms": 1000 * (done - begun), "cuttlefish_ms": 1000 * (after - done), "peak_mb": peak}
                | {"cuttlefish_peak_mb": peak_mb(self.device)}
                | {"switched": switched}
            )
        report = cuttlefish.report
        at = next(i for i, row in enumerate(rows) if row["switched"])
        plain, gathering, low = rows[1 : at - few], rows[at - few + 1 : at + 1], rows[at + 2 :]
        middle = lambda part, key: statistics.median(row[key] for row in part)  # noqa: E731
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
        torch = self.torch
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


class SelectJob(OtherJob):
    """Measured selection at rank ratios 1/4 and 1/8: what it chooses, how long that takes, and the step it leads to."""

    def measure(self, seconds: float) -> dict[str, Any]:
        """Select for an eager and a compiled run; for the eager one time all planned pairs and the chosen ones."""
        import copy

        import forwards

        torch = self.torch
        from hf_cuttlefish import CuttlefishConfig, estimate_ranks, profiling
        from hf_cuttlefish.decide.targets import find_targets
        from hf_cuttlefish.measure.shapes import FlowRecorder

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
                chosen = profiling.keep_faster(plan, flow)
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


def _clock_parts(sync: Callable[[], float]) -> dict[str, float]:
    """Wrap what the controller calls at the switch; the dictionary fills with milliseconds as it runs."""
    import functools

    from hf_cuttlefish import controller, patching, ranks, switch

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

    for module, name in (
        *((controller, "choose"), (controller, "carry_out"), (controller.MomentCollector, "add")),
        *((switch, "plan_ranks"), (switch, "cut"), (ranks, "decompose"), (patching, "_commit")),
    ):
        setattr(module, name, clocked(name, getattr(module, name)))
    return spent


def reset_peak(device: Any) -> None:
    """Begin to measure the peak of memory anew; on a CPU free memory goes back to the system first (Linux only)."""
    import ctypes

    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: Any) -> float:
    """The largest amount of memory held since `reset_peak`, MiB: allocated on a GPU, resident in the process on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return float("nan")


JOBS: dict[str, Any] = {
    "step": StepJob,
    "layers": LayersJob,
    "tracking": TrackingJob,
    "switch": SwitchJob,
    "select": SelectJob,
}

# --- tables ---


def tables(record: dict[str, Any]) -> Iterator[str]:
    """The record as Markdown."""
    e = record.get("environment") or {}
    yield (
        f"{e.get('device')}, {e.get('precision')}, {e.get('threads')} CPU threads, torch {e.get('torch')}, "
        f"transformers {e.get('transformers')}. Medians; in brackets the quartiles.\n"
    )
    dense = {(r["wave"], r["model"], r["mode"], r["batch"]): r for r in record["steps"] if r["variant"] == "dense"}
    peaks = next((job["peaks"] for job in record.get("layers", [])), None)
    rows = []
    for r in record["steps"]:
        floor = ""
        if peaks and "flops" in r:
            floor = f"{r['ms'] / 1000 / max(r['flops'] / peaks['flops'], r['parameter_bytes'] / peaks['bytes']):.2f}"
        base = dense.get((r["wave"], r["model"], r["mode"], r["batch"]))
        rows.append(
            (
                r["model"],
                r["mode"],
                r["batch"],
                r["variant"] + (f" 1/{1 / r['ratio']:g}" if r["ratio"] else ""),
                f"{r['parameters'] / 1e6:.1f}M",
                f"{r['ms']:.2f} ({r['q1']:.2f}-{r['q3']:.2f})",
                f"{r['ms'] / base['ms']:.2f}" if base else "",
                floor,
                f"{r['gpu_ms']:.2f}" if "gpu_ms" in r else "",
                f"{r['kernels']:.0f}" if "kernels" in r else "",
                f"{r['peak_mb']:.0f}" if "peak_mb" in r else "",
            )
        )
    rows.sort(key=lambda row: (row[0], row[1].startswith("infer"), row[1], row[2]))
    yield _markdown(
        (
            *("model", "mode", "batch", "layers", "parameters", "ms", "/ dense", "/ floor"),
            *("GPU ms", "kernels", "peak MiB"),
        ),
        rows,
    )
    for job in record.get("layers", []):
        p = job["peaks"]
        yield f"One layer (or three of one input), forward and backward; measured peaks {p['flops'] / 1e12:.2f} TFLOP/s, {p['bytes'] / 1e9:.0f} GB/s.\n"
        base = {
            (r["in"], r["out"], r["count"], r["tokens"], r["weights"]): r["ms"]
            for r in job["rows"]
            if r["rank"] is None
        }
        yield _markdown(
            (
                "in x out",
                "layers",
                "tokens",
                "weights",
                "variant",
                "rank",
                "ms",
                "dense / it",
                "floor ms",
                "it / floor",
            ),
            [
                (
                    *(f"{r['in']} x {r['out']}", r["count"], r["tokens"], r["weights"], r["variant"], r["rank"] or ""),
                    *(
                        f"{r['ms']:.3f}",
                        f"{base[(r['in'], r['out'], r['count'], r['tokens'], r['weights'])] / r['ms']:.2f}",
                    ),
                    *(f"{r['floor_ms']:.3f}", f"{r['ms'] / r['floor_ms']:.2f}"),
                )
                for r in job["rows"]
            ],
        )
    if record.get("tracking"):
        steps = {j["model"]: j["step_ms"] for j in record.get("switch", [])}
        yield _markdown(
            (
                *("model", "matrices", "cold ms", "warm ms", "svdvals ms", "largest relative error"),
                "dense steps that a run's checks cost",
            ),
            [
                (
                    *(j["model"], j["matrices"], f"{j['cold_ms']:.1f}", f"{j['warm_ms']:.1f}"),
                    ", ".join(f"{where} {ms:.0f}" for where, ms in j["svdvals_ms"].items()),
                    f"{j['largest_relative_error']:.1e}",
                    # 30% of 30 checks come before the switch, the first of them cold.
                    f"{(j['cold_ms'] + 9 * j['warm_ms']) / steps[j['model']]:.2f}" if j["model"] in steps else "",
                )
                for j in record["tracking"]
                if "cold_ms" in j
            ],
        )
    if record.get("switch"):
        keys = ("step_ms", "gathering_step_ms", "low_rank_step_ms", "switch_ms")
        keys += ("step_peak_mb", "gathering_peak_mb", "switch_peak_mb", "low_rank_peak_mb")
        yield _markdown(
            ("model", *(key.replace("_", " ") for key in keys)),
            [(j["model"], *(f"{j[key]:.1f}" for key in keys)) for j in record["switch"] if "step_ms" in j],
        )
        for j in record["switch"]:
            for key in ("parts_ms", "pieces_ms"):
                if j.get(key):
                    yield f"{j['model']}, {key}: " + ", ".join(f"{k} {v:.1f}" for k, v in j[key].items()) + "\n"
    for j in record.get("select", []):
        for row in j.get("plans", []):
            times = [
                f"{key[:-3]} {row[key]['low_rank']:.2f} ms, dense {row[key]['dense']:.2f} ms"
                for key in row
                if key.endswith("_ms")
            ]
            yield (
                f"Measured selection, {j['model']} batch {j['batch']}, ratio {row['ratio']:g}, "
                f"{'compiled' if row['compiled'] else 'eager'}: {row['chosen']} of {row['planned']} layers chosen in "
                f"{row['seconds']:.2f} s. {'; '.join(times)}\n"
            )
            yield "\n".join(f"- {note}" for note in row["notes"]) + "\n"
    for what in ("errors", "not_run"):
        if record.get(what):
            yield f"{what}: {record[what]}\n"


def _markdown(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    used = [i for i in range(len(header)) if not rows or any(row[i] != "" for row in rows)]
    lines = [[line[i] for i in used] for line in (header, tuple("---" for _ in header), *rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("gpu", "cpu", "smoke"), default="smoke")
    parser.add_argument("--device", default=None, help="cuda or cpu; as the suite needs if not given")
    parser.add_argument("--out", default=None, help="JSON file to write")
    parser.add_argument("--table", default=None, help="print the tables of a JSON file and do nothing else")
    parser.add_argument("--only", default=None, help="words separated by commas; only jobs whose name has one of them")
    parser.add_argument("--waves", default=None, help="numbers of the waves to run, such as 1,2")
    parser.add_argument("--rounds", type=int, default=3, help="times that each variant has its turn")
    parser.add_argument("--round-seconds", type=float, default=None, help="length of a turn")
    parser.add_argument("--time-limit", type=float, default=360.0, help="seconds after which nothing new is begun")
    parser.add_argument("--wave-minimum", type=float, default=60.0, help="seconds that must be left to begin a wave")
    parser.add_argument(
        "--prepare-limit", type=float, default=None, help="seconds that the processes of a wave may take to warm up"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes prepared at the same time")
    parser.add_argument("--compile-threads", type=int, default=1)
    parser.add_argument("--log-folder", default=tempfile.gettempdir())
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.table:
        print("\n".join(tables(json.loads(Path(args.table).read_text("utf-8")))))
        return
    args.device = args.device or ("cuda" if args.suite == "gpu" else "cpu")
    if args.worker:
        sys.path[:0] = [str(HERE), str(HERE.parent)]
        work(json.loads(args.worker), args.device)
        return
    args.workers = args.workers or (24 if args.device == "cuda" else 1)
    args.prepare_limit = args.prepare_limit or (200.0 if args.device == "cuda" else args.time_limit)
    args.round_seconds = args.round_seconds or (0.3 if args.device == "cuda" else 0.1 if args.suite == "smoke" else 3.0)
    record = run(args)
    print("\n".join(tables(record)))


if __name__ == "__main__":
    main()
