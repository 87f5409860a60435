"""Accuracy at equal size: Cuttlefish, its parts and its rivals, over data sets, sizes and seeds.

    python -m benchmarks.accuracy --suite smoke --out runs/benchmark/smoke                      # seconds, on a CPU
    python -m benchmarks.accuracy --suite table --data runs/benchmark-data --out runs/benchmark/table --workers 10
    python -m benchmarks.accuracy --report --out runs/benchmark/table

Each run writes one JSON file into the output folder; runs whose file is there are not run again. The tables and plots
are made from these files alone. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .arguments import share
from .suites import SUITES, runs_of
from .workers import carry_out, default_device


def main() -> int:
    """Command line; returns the exit status: 1 if a run failed, 2 if the time limit left some undone, 0 otherwise."""
    arguments = parse()
    if arguments.report:
        from .report import write_report

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
    parser.add_argument("--data", type=Path, help="folder that benchmarks.accuracy.prepare wrote")
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


if __name__ == "__main__":
    sys.exit(main())
