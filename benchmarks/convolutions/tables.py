"""The table of the runs: mean and spread over seeds."""

from __future__ import annotations

import statistics
from typing import Any

from .methods import METHODS


def table(records: list[dict[str, Any]]) -> list[str]:
    """A Markdown table: mean and spread of the test accuracy over seeds, parameters, seconds."""
    lines = [
        "| task | network | method | seeds | parameters kept | test accuracy | against dense | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["network"], record["method"]), []).append(record)
    for (task, network, method), found in sorted(groups.items(), key=lambda g: (*g[0][:2], METHODS.index(g[0][2]))):
        accuracies = [r["accuracy"] for r in found]
        share = statistics.mean(r["parameters"] / r["parameters_before"] for r in found)
        dense = {r["seed"]: r["accuracy"] for r in groups.get((task, network, "dense"), [])}
        apart = [r["accuracy"] - dense[r["seed"]] for r in found if r["seed"] in dense]
        seconds = statistics.mean(r["seconds"] for r in found)
        against = _spread(apart, True) if apart and method != "dense" else ""
        cells = [task, network, method, str(len(found)), f"{share:.1%}", _spread(accuracies), against, f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(values: list[float], signed: bool = False) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{'+' if signed else ''}.2f} ± {deviation:.2f}"
