"""Convolutional networks from random weights, several runs at once on one device: `python -m benchmarks.convolutions --help`.

python -m benchmarks.convolutions --task digits --device cpu --workers 1 --out runs/convolutions
python -m benchmarks.convolutions --task fashion --data DATASET --out runs/convolutions --speed
python -m benchmarks.convolutions --table --out runs/convolutions
OMP_NUM_THREADS=1 python -m benchmarks.convolutions --task fashion --data DATASET --in-turn 60 --batch 32 --out runs/convolutions
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import write_json

from .in_turn import in_turn, line
from .methods import METHODS
from .networks import NETWORKS
from .norms import norms
from .speed import MODES, step_times
from .tables import table
from .training import Job, guarded

RECIPES = {
    "fashion": {"epochs": 5, "batch": 256, "width": 64, "rate": 0.05},
    "digits": {"epochs": 30, "batch": 64, "width": 16, "rate": 0.05},
}


def main() -> None:
    """Run what is asked for and is not in the folder yet, then print the table."""
    arguments = _arguments()
    out = Path(arguments.out)
    if arguments.in_turn:
        return _in_turn(arguments, out)
    if arguments.norms:
        return _norms(arguments, out)
    if not arguments.table:
        _run_all(arguments, out)
    records = [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*-*-*-*.json"))]
    print(table(records))
    if arguments.speed:
        _speed(arguments, out, records)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolutions", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=sorted(RECIPES), default="fashion")
    parser.add_argument("--data", type=Path, help="folder with the four *-ubyte.gz files of Fashion-MNIST")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=1 / 5.6)
    for name in ("epochs", "batch", "width"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--clip", type=float, default=2.0, help="longest gradient; 0: any")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=10, help="runs at once")
    parser.add_argument("--deadline", type=float, help="seconds after which no further run begins")
    parser.add_argument("--out", default="runs/convolutions")
    parser.add_argument(
        "--speed", action="store_true", help="time training steps, dense and at the ranks found, after the runs"
    )
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=["eager", "graphs"])
    parser.add_argument(
        "--in-turn",
        type=int,
        metavar="STEPS",
        help="only time a dense run and one at the budget, step by step in turn, on the CPU",
    )
    parser.add_argument(
        "--norms", action="store_true", help="only look at batch norms around the switch, on the digits"
    )
    parser.add_argument("--table", action="store_true", help="only print the table of what is in the folder")
    return parser.parse_args()


def _run_all(arguments: argparse.Namespace, out: Path) -> None:
    recipe = {k: getattr(arguments, k) or v for k, v in RECIPES[arguments.task].items()}
    jobs = [
        Job(arguments.task, network, method, seed, arguments.budget, clip=arguments.clip, **recipe)
        for seed in arguments.seeds
        for network in arguments.networks
        for method in arguments.methods
    ]
    jobs = [job for job in jobs if not (out / f"{job.name}.json").exists()]
    began, ends = time.perf_counter(), None if arguments.deadline is None else time.time() + arguments.deadline
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        waiting = {pool.submit(guarded, job, arguments.data, arguments.device, ends): job for job in jobs}
        for done in as_completed(waiting):
            job, record = waiting[done], done.result()
            if record is None or "error" in record:
                print(f"{job.name}: {'not begun' if record is None else record['error']}", flush=True)
                continue
            write_json(out / f"{job.name}.json", record)
            share = record["parameters"] / record["parameters_before"]
            print(
                f"{time.perf_counter() - began:5.0f} s  {job.name}: {record['accuracy']:.2f}% at {share:.0%}",
                flush=True,
            )


def _norms(arguments: argparse.Namespace, out: Path) -> None:
    records = []
    for network, seed in ((n, s) for n in arguments.networks for s in arguments.seeds):
        records.append(norms(network, arguments.width or 16, arguments.epochs or 6, arguments.budget, seed))
        print(records[-1], flush=True)
        write_json(out / "norms.json", {"rows": records})


def _in_turn(arguments: argparse.Namespace, out: Path) -> None:
    recipe = {k: int(getattr(arguments, k) or RECIPES[arguments.task][k]) for k in ("width", "batch")}
    records = []
    for network in arguments.networks:
        records.append(
            in_turn(network, arguments.task, arguments.data, **recipe, steps=arguments.in_turn, budget=arguments.budget)
        )
        print(line(records[-1]), flush=True)
        write_json(out / f"in-turn-{arguments.task}.json", {"rows": records})


def _speed(arguments: argparse.Namespace, out: Path, records: list[dict[str, Any]]) -> None:
    recipe = {k: getattr(arguments, k) or v for k, v in RECIPES[arguments.task].items()}
    side, rows = {"fashion": 28, "digits": 8}[arguments.task], []
    for network in arguments.networks:
        plans: dict[str, dict[str, int]] = {"dense": {}}
        for record in records:
            of_ours = record["method"] in ("ours", "ours_budget") and record["ranks"]
            if of_ours and (record["network"], record["task"]) == (network, arguments.task):
                plans.setdefault(record["method"], record["ranks"])
        rows += step_times(
            network, int(recipe["width"]), side, int(recipe["batch"]), plans, arguments.modes, arguments.device
        )
        for row in rows[-len(plans) * len(arguments.modes) :]:
            print(
                f"{row['network']} {row['mode']} {row['plan']}: {row['ms']:.2f} ms a step of {row['batch']}", flush=True
            )
    write_json(
        out / f"speed-{arguments.task}.json", {"device": arguments.device, "torch": torch.__version__, "rows": rows}
    )


if __name__ == "__main__":
    main()
