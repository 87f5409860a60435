"""Run what two GPUs of one machine can show, and write it as JSON.

    python -m benchmarks.two_gpus.prepare runs/two-gpus-data
    python -m benchmarks.two_gpus --data runs/two-gpus-data --out $OUT --seconds 460
    python -m benchmarks.two_gpus --data runs/two-gpus-data --out runs/two --cpu --quick --workers 1   # a trial: gloo

Launches of the example scripts run a few at a time and share the GPUs; what is timed (scaling, Llama) runs alone after them. No
start after the time is over; what was not run is named in the record.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Event
from typing import Any

from .launches import HERE, ROOT, Launch, all_launches, outcome
from .prepare import ready

TIMED = 215
"""Seconds kept for what runs alone."""


class Runner:
    """Carries out launches, each once the one that it comes after has ended, and keeps what came of them."""

    def __init__(self, out: Path, deadline: float, environment: dict[str, str]) -> None:
        self.out, self.deadline, self.environment = out, deadline, environment
        self.records: dict[str, dict[str, Any]] = {}
        self.done: dict[str, Event] = {}
        self._port = 29600

    def run(self, launch: Launch) -> None:
        """Start it, wait for its end, and note how it went."""
        record: dict[str, Any] = {"fails": launch.fails}
        try:
            if launch.after is not None:
                self.done[launch.after].wait()
            left = self.deadline - time.time()
            if left < 20:
                record["not run"] = "the time was over"
                return
            self._port += 1
            command = launch.command(self.out, self._port)
            record["command"] = self._plain(" ".join(command[1:]))
            self._start(launch, command, min(launch.limit, left), record)
            record |= outcome(self.out / launch.name)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
        finally:
            self.records[launch.name] = record
            self.done[launch.name].set()
            print(f"{launch.name}: {'good' if is_good(record) else 'NOT GOOD'} {record.get('seconds', '')}", flush=True)

    def _plain(self, text: str) -> str:
        """Without the paths of this machine."""
        from accelerate.commands import accelerate_cli

        text = text.replace(accelerate_cli.__file__, "accelerate")
        return text.replace(f"{ROOT}/", "").replace(str(self.out), "OUT")

    def _start(self, launch: Launch, command: list[str], limit: float, record: dict[str, Any]) -> None:
        started = time.time()
        log = self.out / f"{launch.name}.log"
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                record["exit"] = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                record["exit"] = "time limit"
                os.killpg(process.pid, 15)
                time.sleep(2)
                if process.poll() is None:
                    os.killpg(process.pid, 9)
        record["seconds"] = round(time.time() - started, 1)
        text = log.read_text("utf-8", errors="replace")
        if launch.fails and "SIGKILL" not in text and "exitcode: -9" not in text and "Signal 9" not in text:
            record["error"] = "it ended, but not by the signal"
        record["said"] = [
            self._plain(li)
            for li in text.splitlines()
            if li.startswith(("Cuttlefish", "hf_cuttlefish")) or "fresh process" in li
        ][-8:]
        if (record["exit"] != 0) is not launch.fails:
            record["log"] = text[-3000:]


def is_good(record: dict[str, Any]) -> bool:
    """Whether it ended as it should."""
    return "error" not in record and "exit" in record and (record["exit"] != 0) is bool(record.get("fails"))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=460, help="of wall time for everything")
    parser.add_argument("--workers", type=int, default=6, help="launches at a time")
    parser.add_argument("--only", nargs="+", help="these launches alone (and scaling, llama)")
    parser.add_argument("--stand-ins", action="store_true", help="use them although `datasets` and `evaluate` are here")
    parser.add_argument("--quick", action="store_true", help="few steps, small shapes")
    parser.add_argument("--cpu", action="store_true", help="gloo, two processes on the CPU")
    arguments = parser.parse_args()
    started = time.time()
    out = arguments.out.resolve()
    scratch = out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    data = ready(arguments.data.resolve())
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "ACCELERATE_"))}
    missing = [
        name for name in ("datasets", "evaluate") if arguments.stand_ins or importlib.util.find_spec(name) is None
    ]
    paths = [str(ROOT), *([str(HERE / "stand_in")] if missing else []), os.environ.get("PYTHONPATH", "")]
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    environment |= {"NCCL_NVLS_ENABLE": "0"}

    launches = [
        x for x in all_launches(data, arguments.quick, arguments.cpu) if not arguments.only or x.name in arguments.only
    ]
    runner = Runner(scratch, started + arguments.seconds - (0 if arguments.quick else TIMED), environment)
    runner.done = {launch.name: Event() for launch in launches}
    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(runner.run, launches))
    runner.deadline = started + arguments.seconds
    for launch in timed(scratch, arguments.quick, arguments.cpu):
        if not arguments.only or launch.name in arguments.only:
            runner.done[launch.name] = Event()
            runner.run(launch)
    record = {**about(), "stand-ins": missing, "seconds": round(time.time() - started, 1), "runs": runner.records}
    (out / "two_gpus.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    for log in scratch.glob("*.log"):
        logs.joinpath(log.name).write_text(log.read_text("utf-8", errors="replace")[-20_000:], "utf-8")
    shutil.rmtree(scratch)
    bad = [name for name, found in runner.records.items() if not is_good(found)]
    print(f"{len(runner.records)} launches, not good: {bad or 'none'}; {record['seconds']} s", flush=True)
    return 1 if bad else 0


def timed(out: Path, quick: bool, cpu: bool) -> list[Launch]:
    """What runs alone."""
    small = {"quick": 1} if quick or cpu else {}
    launches = []
    for processes in (1, 2):
        name = f"scaling, {processes} processes"
        launches.append(
            Launch(
                name, HERE / "scaling.py", "torchrun", processes, {}, {"folder": f"{{out}}/{name}", **small}, limit=150
            )
        )
    name = "llama fsdp2"
    return [
        *launches,
        Launch(name, HERE / "llama.py", "torchrun", 2, {}, {"folder": f"{{out}}/{name}", **small}, limit=200),
    ]


def about() -> dict[str, Any]:
    """Device and versions."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {}
    for package in ("torch", "transformers", "accelerate", "datasets", "evaluate"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"devices": names or ["CPU"], "python": platform.python_version(), "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
