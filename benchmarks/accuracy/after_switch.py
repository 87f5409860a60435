"""What to change after the switch: learning rate and Frobenius decay, each from the same snapshot, on the validation split.

    python -m benchmarks.accuracy.after_switch trec --data runs/benchmark-data --out runs/benchmark/after_switch.jsonl \\
        --seeds 0 1 --settings scale=1 scale=1.5 scale=2 decay=1

The full-rank phase and the switch are run once a seed; every setting goes on from there, over the same batches and with
the same dropout. One line of JSON for each; lines that are in the file are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_cuttlefish
from hf_cuttlefish.layers.low_rank import low_rank_layers

from .arguments import share
from .data import TASKS, build
from .methods import create, product_gradients
from .training import Training, all_batches, load_once
from .workers import quieten


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, help="folder that benchmarks.accuracy.prepare wrote")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    parser.add_argument("--budget", type=share, default=1 / 5.6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--settings",
        nargs="+",
        type=setting,
        default=[setting("scale=1"), setting("scale=1.5"), setting("scale=2"), setting("decay=1")],
        help="scale=X: learning rate after the switch times X; decay=X: Frobenius decay X for the factors' weight decay",
    )
    arguments = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    known = set()
    if arguments.out.exists():
        for line in arguments.out.read_text("utf-8").splitlines():
            record = json.loads(line)
            known.add((record["dataset"], record["budget"], record["seed"], *record["setting"].values()))
    for seed in arguments.seeds:
        key = (arguments.dataset, arguments.budget, seed)
        missing = [s for s in arguments.settings if (*key, *s.values()) not in known]
        if missing:
            run(arguments.dataset, arguments.budget, seed, missing, arguments.data, arguments.out)


def setting(text: str) -> dict[str, Any]:
    """A setting from the command line."""
    name, _, value = text.partition("=")
    if name not in ("scale", "decay") or not value:
        raise argparse.ArgumentTypeError(f"{text} is neither scale=X nor decay=X")
    return {
        "learning_rate_scale": float(value) if name == "scale" else 1.0,
        "frobenius_decay": float(value) if name == "decay" else None,
    }


def run(dataset: str, budget: float, seed: int, settings: list[dict[str, Any]], data: Path | None, out: Path) -> None:
    """The full-rank phase once, and each setting from its end."""
    task, device = TASKS[dataset], torch.device("cpu")
    splits, classes = load_once(task, data, device)
    torch.manual_seed(seed)
    model = build(task, classes, data)
    training = Training(task, create("cuttlefish", budget, task.epochs, {}), model, len(splits["train"]), device)
    training.method.start(training)
    started = time.perf_counter()
    batches = list(all_batches(splits["train"], task, seed))
    for batch in batches:
        training.train_step(batch)
        if training.method.after_step(training):
            break
    else:
        raise RuntimeError(f"{dataset}, seed {seed}: the run ended without a switch")
    full_rank_seconds = time.perf_counter() - started
    random_state, snapshot = torch.get_rng_state(), copy.deepcopy(training.model)
    state = copy.deepcopy(training.optimizer.state_dict())
    names = {id(p): name for name, p in training.model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in training.optimizer.param_groups]
    just_after = training.evaluate(splits["validation"])
    for chosen in settings:
        started = time.perf_counter()
        torch.set_rng_state(random_state)
        training.model = copy.deepcopy(snapshot)
        parameters = dict(training.model.named_parameters())
        training.optimizer = torch.optim.AdamW(
            [{"params": [parameters[n] for n in names]} for names in groups], fused=True
        )
        training.optimizer.load_state_dict(copy.deepcopy(state))
        go_on(training, batches, **chosen)
        record = {
            "dataset": dataset,
            "budget": budget,
            "seed": seed,
            "setting": chosen,
            "switch_step": training.step,
            "steps": training.total_steps,
            "just_after_switch": just_after,
            "validation": training.evaluate(splits["validation"]),
            "train": training.evaluate(splits["train"], splits["train"].measured_rows),
            "seconds": {"before": full_rank_seconds, "after": time.perf_counter() - started},
            "device": "CPU",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "hf_cuttlefish": hf_cuttlefish.__version__,
            },
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(seed, chosen, record["validation"], f"{record['seconds']['after']:.0f} s", flush=True)


def go_on(
    training: Training,
    batches: list[dict[str, torch.Tensor]],
    learning_rate_scale: float,
    frobenius_decay: float | None,
) -> None:
    """The low-rank phase, from the step after the switch to the end."""
    model, optimizer = training.model, training.optimizer
    schedule = training.scheduler.lr_lambdas[0]
    for step in range(training.step, training.total_steps):
        rate = training.task.learning_rate * schedule(step) * learning_rate_scale
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(**batches[step]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if frobenius_decay is not None:
            decay_products(model, rate, frobenius_decay, training.task.weight_decay)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def decay_products(model: nn.Module, rate: float, decay: float, plain_decay: float) -> None:
    """Frobenius decay, decoupled as AdamW's; the coming plain decay of the factors is undone beforehand."""
    for layer in low_rank_layers(model).values():
        factors = (layer.up.weight, layer.down.weight)
        for factor, gradient in zip(factors, product_gradients(layer), strict=True):
            factor.mul_(1 / (1 - rate * plain_decay))
            factor.sub_(gradient, alpha=rate * decay)


if __name__ == "__main__":
    main()
