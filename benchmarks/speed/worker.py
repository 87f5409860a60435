"""The process that asks: it starts the others, lets them warm up together and run one at a time."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import write_json
from .suites import COMPILED_MODES, PLAIN_MODES, waves

ROOT = Path(__file__).resolve().parents[2]
MARK = "@@speed@@ "
RECORD_VERSION = 1


class Worker:
    """A process that holds one job and answers one question at a time."""

    def __init__(self, job: dict[str, Any], args: argparse.Namespace) -> None:
        self.job, self.name = job, job["name"]
        self.error: str | None = None
        command = [sys.executable, "-m", "benchmarks.speed", "--worker", json.dumps(job), "--device", args.device]
        environment = {
            **os.environ,
            "TORCHINDUCTOR_COMPILE_THREADS": str(args.compile_threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if args.device == "cuda" and job["job"] == "step":
            environment["OMP_NUM_THREADS"] = "1"  # many of us compile at the same time
        self.log = open(Path(args.log_folder) / f"{self.name.replace(' ', '_')}.log", "w")  # noqa: SIM115 (lives as long as we)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
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

    def left() -> float:
        return args.time_limit - (time.perf_counter() - started)

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
        write_json(Path(path), record)


def _tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
