"""The table of docs/serving.md on eight bits, from the record alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ..markdown import markdown_table

NAMES = {
    "fp32": "torch, fp32",
    "torchao int8 weights": "torchao, int8 weights",
    "torchao int8 dynamic": "torchao, int8 dynamic",
    "onnx fp32": "ONNX Runtime, fp32",
    "onnx int8": "ONNX Runtime, int8",
}


def eight_bits_table(record: Mapping[str, Any]) -> str:
    """One row for each task and scheme: dense, and factors beside it. Means over runs; times as factors over dense."""
    rows = record["rows"]
    lines = []
    for task, device, threads in dict.fromkeys((row["task"], row["device"], row["threads"]) for row in rows):
        for scheme, name in NAMES.items():
            some = [
                r
                for r in rows
                if (r["task"], r["device"], r["threads"], r["scheme"]) == (task, device, threads, scheme)
            ]
            if not some:
                continue
            dense, factors = ({r["run"]: r for r in some if r["form"] == form} for form in ("dense", "factors"))
            runs = sorted(dense.keys() & factors.keys())
            lines.append(
                [
                    task,
                    threads if device == "cpu" else device,
                    name,
                    *(f"{_mean(form[run]['bytes'] for run in runs) / 1e6:.1f}" for form in (dense, factors)),
                    *(_scores([form[run]["score"] for run in runs]) for form in (dense, factors)),
                    *(_ratio(dense, factors, runs, size) for size in ("1", "32")),
                    len(runs),
                ]
            )
    header = [
        "task",
        "threads",
        "how",
        "MB dense",
        "MB factors",
        "score dense",
        "score factors",
        "time at 1",
        "at 32",
        "runs",
    ]
    # Task and runs are columns where they differ; where not, the page says them.
    said = [i for i in (0, len(header) - 1) if len({line[i] for line in lines}) == 1]
    shown = [i for i in range(len(header)) if i not in said]
    return markdown_table([header[i] for i in shown], [[line[i] for i in shown] for line in lines])


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _scores(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{_mean(values):.2f}{spread}"


def _ratio(dense: Mapping[str, Any], factors: Mapping[str, Any], runs: list[str], size: str) -> str:
    """Of the factors' time in the dense model's, both taken in turn."""
    return f"{statistics.geometric_mean(factors[run]['ms'][size] / dense[run]['ms'][size] for run in runs):.2f}"
