"""End to end through Trainer: dense and Cuttlefish, eager and as CUDA graphs, everything counted.

    python -m benchmarks.end_to_end --cases bert-base --steps 300 --out runs/end_to_end.json
    python -m benchmarks.end_to_end --cases llama-1b:8 bert-large:12 --modes graphs --deadline 430 --out runs/large.json

`llama-1b:8` is the model with 8 of its blocks, which compile in less time. Each run has a process of its own and the device to
itself (all processes are started first, and wait); random weights, static shapes, bf16. What counts is the time of `trainer.train()`: compilation, gathering, the switch and
compiling anew are in it. Each run has a folder of its own for what the compiler keeps, so that all compile from nothing; with
`--cache FOLDER` they share one, and the record says so. The file is written after each run; records that it holds already stay.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from ..files import write_whole
from .cases import CASES
from .run import METHODS, MODES, profile_switch, run

READY = "READY"
GRACE = 60.0
"""Seconds that a run may take to end beyond its limit, before its process is ended."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", type=case_and_blocks, default=[("bert-tiny", None)], help="NAME or NAME:BLOCKS"
    )
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["eager", "graphs"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["dense", "cuttlefish"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ratio", type=kept, default=0.25, help="target_ratio, or 'default': what the run measures")
    parser.add_argument("--out", type=Path, default=Path("runs/end_to_end.json"))
    parser.add_argument("--deadline", type=float, default=430.0, help="seconds after which no run is begun")
    parser.add_argument(
        "--stop", type=float, default=540.0, help="seconds after which a run ends with the step that it is in"
    )
    parser.add_argument(
        "--cache", type=Path, default=None, help="folder of compiled code for all runs; else each has its own"
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="processes of the loader; else none, and 4 for images on a GPU"
    )
    parser.add_argument("--profile", action="store_true", help="print where the switch spends its time")
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wait:
        wait_for_a_job(arguments.profile)
        return
    began = time.time()
    jobs = [
        {
            "case": case,
            "blocks": blocks,
            "mode": mode,
            "method": method,
            "steps": arguments.steps,
            "ratio": arguments.ratio,
            "workers": arguments.workers,
        }
        for case, blocks in arguments.cases
        for mode in arguments.modes
        for method in arguments.methods
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        caches = [arguments.cache or Path(empty, str(i)) for i in range(len(jobs))]
        processes = [start(cache, arguments.profile) for cache in caches]
        for process in processes:
            wait_until_ready(process)
        for job, process in zip(jobs, processes, strict=True):
            passed = time.time() - began
            if passed > arguments.deadline:
                print(f"not begun after {passed:.0f} s: {job}", flush=True)
                process.kill()
                process.wait()
                continue
            record = finish(process, job, max(arguments.stop - passed, 1.0), arguments.profile)
            record["cache"] = "its own" if arguments.cache is None else "shared"
            add(arguments.out, record)
            print({k: v for k, v in record.items() if k not in ("ms", "notes", "told")}, flush=True)


def wait_for_a_job(profile: bool) -> None:
    """Import what a run needs, wait for its turn, and make it; no job, no run."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_cuttlefish").setLevel(logging.INFO)
    if profile:
        profile_switch()
    print(READY, flush=True)
    if job := sys.stdin.readline():
        print("RECORD " + json.dumps(run(**json.loads(job))), flush=True)


def start(cache: Path, profile: bool = False) -> subprocess.Popen[str]:
    """A process that imports all and waits, so that this takes no run's time. cache: what its compiler keeps."""
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--wait", *(["--profile"] if profile else [])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    """Until the process has imported all, or has ended; what it says until then is printed."""
    for line in process.stdout or ():
        if line.strip() == READY:
            break
        print(line.rstrip(), flush=True)


def finish(process: subprocess.Popen[str], job: dict[str, Any], limit: float, profile: bool = False) -> dict[str, Any]:
    """The record of one run, made by a process that waits; with `error`, the end of what it printed, where it made none.

    Args:
        limit: seconds.
    """
    began = time.time()
    last, record, told = deque[str](maxlen=40), None, list[str]()
    timer = threading.Timer(limit + GRACE, process.kill)
    timer.start()
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process was started without pipes: start it with start()")
    with contextlib.suppress(BrokenPipeError):  # it has ended already, and what it printed says why
        process.stdin.write(json.dumps(job | {"limit": limit - 10.0}) + "\n")
        process.stdin.close()
    for line in process.stdout:
        if line.startswith("RECORD "):
            record = json.loads(line.removeprefix("RECORD "))
            break  # a compiler's workers may hold the pipe open for longer
        last.append(line)
        if profile or line.startswith(("Cuttlefish", "{")):
            print(line.rstrip()[:400], flush=True)
        if line.startswith("Cuttlefish") and "a step takes" in line:
            told.append(line.rstrip())
    process.wait()
    timer.cancel()
    process.stdout.close()
    if record is None:
        return {**job, "process_seconds": time.time() - began, "error": "".join(last)[-3000:]}
    return {**record, "process_seconds": time.time() - began, "told": told}


def add(path: Path, record: dict[str, Any]) -> None:
    """Add a record to the file, one a line, in the place of an older one of the same run."""
    records = json.loads(path.read_text("utf-8")) if path.exists() else []
    names = ("case", "blocks", "mode", "method", "ratio", "steps_asked", "loader_workers")
    kept = [r for r in records if "error" in r or any(r.get(name) != record.get(name) for name in names)]
    write_whole(path, "[\n" + ",\n".join(json.dumps(r) for r in [*kept, record]) + "\n]\n")


def case_and_blocks(text: str) -> tuple[str, int | None]:
    """ "llama-1b:8" -> its name and 8 blocks; "llama-1b" -> all of them. Raises argparse.ArgumentTypeError."""
    name, _, blocks = text.partition(":")
    if name not in CASES or (blocks and not (blocks.isdecimal() and 0 < int(blocks) <= CASES[name].blocks)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(CASES)}, with at most its blocks after a colon"
        )
    return name, int(blocks) if blocks else None


def kept(text: str) -> float | None:
    """A share, or None for "default"."""
    return None if text == "default" else float(text)


if __name__ == "__main__":
    main()
