"""Speed: training step, rank check, switch, memory and inference, dense and factorized in turn in one run.

    python -m benchmarks.speed --suite gpu --out benchmarks/results/speed_h100.json
    python -m benchmarks.speed --table benchmarks/results/speed_h100.json

Every variant of a model lives in a process of its own. All processes of a wave build, compile and warm up at the same time;
then exactly one at a time is asked to run a few steps, dense, factorized, dense, factorized, ..., while the others sleep.
So compilation costs little of the time on a lent machine, a variant's peak memory is its own, and drift hits all alike.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from .tables import tables
from .worker import run


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
        from .answers import work  # the parent needs no torch

        work(json.loads(args.worker), args.device)
        return
    args.workers = args.workers or (24 if args.device == "cuda" else 1)
    args.prepare_limit = args.prepare_limit or (200.0 if args.device == "cuda" else args.time_limit)
    args.round_seconds = args.round_seconds or (0.3 if args.device == "cuda" else 0.1 if args.suite == "smoke" else 3.0)
    record = run(args)
    print("\n".join(tables(record)))


if __name__ == "__main__":
    main()
