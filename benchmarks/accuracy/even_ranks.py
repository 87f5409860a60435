"""What few distinct ranks cost: each seed trains at full rank once, and goes on from there with even ranks and with free ones.

    python -m benchmarks.accuracy.even_ranks trec --data runs/benchmark-data --out runs/benchmark/even_ranks.jsonl --seeds 0 1 2

At the step of the switch the process is forked for each form, so that all of them have the same weights, moments, batches and dropout
before them. One line of JSON for each; lines that are in the file are not run again. On the CPU, in one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hf_cuttlefish
from hf_cuttlefish import CuttlefishConfig

from .arguments import share
from .data import TASKS, build
from .methods import Product, create
from .training import Training, all_batches, load_once
from .workers import quieten

Form = tuple[float | None, bool]
"""Share of the target layers' parameters to keep (None: the default), and whether ranks are even."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, help="folder that benchmarks.accuracy.prepare wrote")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    parser.add_argument("--budgets", nargs="+", type=share, default=[], help="sizes beside the default one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    known = set()
    if arguments.out.exists():
        records = [json.loads(line) for line in arguments.out.read_text("utf-8").splitlines()]
        known = {(r["dataset"], r["seed"], r["budget"], r["even_ranks"]) for r in records}
    for seed in arguments.seeds:
        forms = [(budget, even) for budget in (None, *arguments.budgets) for even in (False, True)]
        missing = [form for form in forms if (arguments.dataset, seed, *form) not in known]
        if missing:
            run(arguments.dataset, seed, missing, arguments.data, arguments.out)


def run(dataset: str, seed: int, forms: list[Form], data: Path | None, out: Path) -> None:
    """The full-rank phase once, and each form from its end, one after the other in processes of their own."""
    task, device = TASKS[dataset], torch.device("cpu")
    splits, classes = load_once(task, data, device)
    torch.manual_seed(seed)
    training = Training(
        task, create("cuttlefish", None, task.epochs, {}), build(task, classes, data), len(splits["train"]), device
    )
    method = training.method
    assert isinstance(method, Product)
    method.start(training)
    batches = all_batches(splits["train"], task, seed)
    for batch in batches:
        training.train_step(batch)
        if method.due(training):
            break
        method.after_step(training)
    rest = list(batches)
    for form in forms:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                record = {"dataset": dataset, "seed": seed, **go_on(training, form, iter(rest), splits)}
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{dataset}, seed {seed}, {form}: failed")


def go_on(training: Training, form: Form, batches: Iterator[dict[str, torch.Tensor]], splits: Any) -> dict[str, Any]:
    """The switch in a form, the low-rank phase, and what came of them."""
    budget, even = form
    method = training.method
    assert isinstance(method, Product)
    run = method.cuttlefish
    run.config = replace(CuttlefishConfig(target_ratio=budget), even_ranks=even)
    if not method.after_step(training) or run.plan is None:
        raise RuntimeError(f"no switch at step {training.step}")
    just_after = training.evaluate(splits["validation"])
    started = time.perf_counter()
    for batch in batches:
        training.train_step(batch)
        method.after_step(training)
    seconds = time.perf_counter() - started
    before, after = run.plan.parameters()
    shapes = {(d.in_features, d.out_features, d.rank) for d in run.plan.decisions.values()}
    record = {
        "budget": budget,
        "even_ranks": even,
        "kept": after / before,
        "distinct_shapes": len(shapes),
        "ranks": dict(run.plan),
        "notes": run.plan.notes,
        "predicted_loss_increase": run.plan.predicted_loss_increase,
        "switch_step": run.switch_step,
        "steps": training.total_steps,
        "just_after_switch": just_after,
        "validation": training.evaluate(splits["validation"]),
        "test_split": training.evaluate(splits["test"]),
        "seconds_after": seconds,
        "device": "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hf_cuttlefish": hf_cuttlefish.__version__,
        },
    }
    print({k: v for k, v in record.items() if k not in ("ranks", "versions")}, flush=True)
    return record


if __name__ == "__main__":
    main()
