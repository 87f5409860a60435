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
