"""The table of the runs: mean and spread over seeds."""

from __future__ import annotations

import statistics
from typing import Any

from ..markdown import markdown_table
from .methods import METHODS

NAMES = {
    "dense": "dense",
    "ours": "Cuttlefish, default",
    "ours_budget": "Cuttlefish, 1/5.6",
    "paper": "paper's rule",
    "paper_budget": "paper's stable ranks, 1/5.6",
    "pufferfish": "Pufferfish, 1/5.6",
    "sifd": "spectral init + Frobenius decay, 1/5.6",
}
TASKS = {"digits": "digits", "fashion": "Fashion-MNIST"}
NETWORKS = {"resnet18": "ResNet-18", "vgg": "VGG"}


def table(records: list[dict[str, Any]]) -> str:
    """Test accuracy, mean and spread over seeds, with the share of parameters kept in brackets; a column a task and network."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["network"], record["method"]), []).append(record)
    columns = sorted({(task, network) for task, network, _ in groups})
    rows = []
    for method in METHODS:
        cells = [_cell(groups.get((*column, method), [])) for column in columns]
        if any(cells):
            rows.append([NAMES[method], *cells])
    return markdown_table(["", *(f"{TASKS[task]}, {NETWORKS[network]}" for task, network in columns)], rows)


def in_turn_table(records: list[dict[str, Any]]) -> str:
    """Seconds of a step and of a whole run, dense and at the budget: CPU seconds on one thread, seconds of the clock on more."""
    rows = []
    for record in records:
        dense, ours = record["runs"]["dense"], record["runs"]["ours_budget"]
        threads = int(record["device"].split(", ")[1].split()[0])
        seconds = [run["seconds" if threads == 1 else "clock_seconds"] for run in (dense, ours)]
        # Steps are recorded in CPU seconds alone: as many of the clock's as in the run that they belong to.
        step = [
            s / run["seconds"] * t
            for s, run, t in zip((dense["step"]["before"], ours["step"]["after"]), (dense, ours), seconds, strict=True)
        ]
        rows.append(
            [
                f"{NETWORKS[record['network']]}, width {record['width']}",
                f"{threads}, {record['batch']}",
                f"{1000 * step[0]:.0f} ms",
                f"{1000 * step[1]:.0f} ms ({step[0] / step[1]:.2f} times as fast)",
                record["steps"],
                f"{seconds[0]:.1f} s",
                f"{seconds[1]:.1f} s ({seconds[0] / seconds[1]:.2f} times as fast)",
            ]
        )
    header = ["", "threads, images", "a dense step", "a step after the switch", "steps of a run", "dense", "1/5.6"]
    return markdown_table(header, rows)


def gpu_table(records: list[dict[str, Any]]) -> str:
    """Milliseconds of a training step on a GPU, dense and at the ranks that runs have found, by network and mode."""
    steps = {(row["network"], row["mode"], row["plan"]): row["ms"] for row in records}
    rows = []
    for network, mode in dict.fromkeys((network, mode) for network, mode, _ in steps):
        dense = steps[network, mode, "dense"]
        times = [steps[network, mode, plan] for plan in ("ours", "ours_budget")]
        rows.append(
            [f"{NETWORKS[network]}, {mode}", f"{dense:.2f} ms", *(f"{t:.2f} ms ({t / dense:.2f})" for t in times)]
        )
    return markdown_table(["", "dense", "default (of dense)", "1/5.6 (of dense)"], rows)


def norms_table(records: list[dict[str, Any]]) -> str:
    """Test accuracy at the switch, with the running statistics as they are and renewed; mean and spread over seeds."""
    rows = []
    for what, first, name in (("dense", "dense", "dense"), ("right after the switch", "right_after", "low_rank")):
        keys = [first, f"{name}_after_10_passes", f"{name}_after_40_passes"]
        rows.append([what, *(_spread([record[key] for record in records]) for key in keys)])
    rows.append(["40 training steps later", _spread([record["after_40_steps"] for record in records]), "", ""])
    return markdown_table(["", "as they are", "after 10 forward passes", "after 40"], rows)


def _cell(records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    share = statistics.mean(r["parameters"] / r["parameters_before"] for r in records)
    seeds = f", n {len(records)}" if len(records) != 3 else ""
    kept = f" ({share:.0%}{seeds})" if share < 1 or seeds else ""
    return f"{_spread([r['accuracy'] for r in records])}{kept}"


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"
