"""Accuracy at equal size: Cuttlefish, its parts and its rivals, over data sets, sizes and seeds.

    python benchmarks/accuracy.py --suite smoke --out runs/benchmark/smoke                      # seconds, on a CPU
    python benchmarks/accuracy.py --suite table --data runs/benchmark-data --out runs/benchmark/table --workers 10
    python benchmarks/accuracy.py --report --out runs/benchmark/table

Each run writes one JSON file into the output folder; runs whose file is there are not run again. The tables and plots
are made from these files alone. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites import SUITES, runs_of
from training import Run, execute


def main() -> int:
    """Command line; returns the exit status: 1 if a run failed, 2 if the time limit left some undone, 0 otherwise."""
    arguments = parse()
    if arguments.report:
        from report import write_report

        write_report(arguments.out)
        return 0
    suite = SUITES[arguments.suite]
    seeds = arguments.seeds if arguments.seeds is not None else list(range(suite["seeds"]))
    runs = runs_of(
        arguments.suite, arguments.datasets or suite["datasets"], seeds, arguments.budgets or suite["budgets"]
    )
    if arguments.methods:
        runs = [run for run in runs if run.method in arguments.methods]
    if arguments.groups:
        runs = [run for run in runs if run.group in arguments.groups]
    missing = [run for run in runs if not (arguments.out / f"{run.name}.json").exists()]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before", flush=True)
    if arguments.list:
        print("\n".join(run.name for run in missing))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    deadline = started + arguments.time_limit if arguments.time_limit else None
    settings = {
        "data": arguments.data,
        "out": arguments.out,
        "device": arguments.device or default_device(),
        "rows": arguments.limit_rows,
        "deadline": deadline,
        "workers": min(arguments.workers, max(1, len(missing))),
    }
    done, failed = carry_out(missing, settings)
    left = len(missing) - done - failed
    print(f"{done} runs done, {failed} failed, {left} not started, {time.time() - started:.0f} s", flush=True)
    return 1 if failed else 2 if left else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = "; ".join(f"{name}: {suite['help']}" for name, suite in SUITES.items())
    parser.add_argument("--suite", choices=sorted(SUITES), default="smoke", help=suites)
    parser.add_argument("--out", type=Path, required=True, help="output folder, one JSON a run")
    parser.add_argument("--data", type=Path, help="folder that benchmarks/prepare.py wrote")
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write report.md and plots from the JSON files"
    )
    parser.add_argument("--datasets", nargs="+", help="default: those of the suite")
    parser.add_argument("--methods", nargs="+", help="only these methods of the suite")
    parser.add_argument("--groups", nargs="+", help="only these groups of the suite (calibration, switch, ablation)")
    parser.add_argument("--budgets", nargs="+", type=share, help="shares of the target parameters to keep, such as 1/3")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0, 1, ...")
    parser.add_argument("--workers", type=int, default=0, help="processes that share the device; 0: run in this one")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--limit-rows", type=int, help="at most so many rows of each split, for a trial on a CPU")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no run after so many seconds")
    parser.add_argument("--list", action="store_true", help="run nothing; print the runs that are missing")
    return parser.parse_args()


def share(text: str) -> float:
    """A number between 0 and 1, also written as a fraction."""
    over, _, under = text.partition("/")
    value = float(over) / float(under or 1)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return value


def default_device() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def carry_out(runs: list[Run], settings: dict[str, Any]) -> tuple[int, int]:
    """Run what is missing, here or in worker processes; returns how many were done and how many failed."""
    done = failed = 0
    if settings["workers"] == 0:
        quieten()
        for run in runs:
            if settings["deadline"] and time.time() > settings["deadline"]:
                break
            good, line = attempt(run, settings)
            done, failed = done + good, failed + (not good)
            print(f"[{done + failed}/{len(runs)}] {line}", flush=True)
        return done, failed

    import multiprocessing

    # Inherited by the workers, which read it when they import torch: many processes, one thread each.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("spawn")
    tasks, lines = context.Queue(), context.Queue()
    for run in runs:
        tasks.put(run)
    workers = [context.Process(target=work, args=(tasks, lines, settings)) for _ in range(settings["workers"])]
    for worker in workers:
        tasks.put(None)  # one end mark for each
        worker.start()
    while True:
        alive = any(worker.is_alive() for worker in workers)
        try:
            good, line = lines.get(timeout=1)
        except queue.Empty:
            if not alive:
                break
            continue
        done, failed = done + good, failed + (not good)
        print(f"[{done + failed}/{len(runs)}] {line}", flush=True)
    tasks.cancel_join_thread()
    for worker in workers:
        worker.join()
    return done, failed


def work(tasks: Any, lines: Any, settings: dict[str, Any]) -> None:
    """A worker process: take runs until there are none, or until the time is over."""
    import torch

    torch.set_num_threads(1)
    quieten()
    while (run := tasks.get()) is not None:
        if settings["deadline"] and time.time() > settings["deadline"]:
            return
        lines.put(attempt(run, settings))


def attempt(run: Run, settings: dict[str, Any]) -> tuple[bool, str]:
    """Run and write the file; an error goes into a file of its own and does not end the benchmark."""
    import torch

    path = settings["out"] / f"{run.name}.json"
    failure = path.with_suffix(".error.txt")
    started = time.time()
    try:
        record = execute(run, settings["data"], torch.device(settings["device"]), settings["rows"])
    except Exception:
        failure.write_text(traceback.format_exc(), encoding="utf-8")
        return False, f"{run.name} FAILED: {traceback.format_exc().strip().splitlines()[-1]} (see {failure.name})"
    record["workers"] = settings["workers"]
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    failure.unlink(missing_ok=True)
    accuracy = 100 * record["validation"]["accuracy"]
    return True, f"{run.name}: validation {accuracy:.1f}, kept {record['kept']:.3f}, {time.time() - started:.1f} s"


def quieten() -> None:
    """Only errors of the libraries: hundreds of runs would each print a table."""
    for name in ("hf_cuttlefish", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
