"""Tables out of the records of a suite's runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from ..markdown import markdown_table
from .records import (
    LABELS,
    Record,
    grouped,
    mean_and_error,
    measured,
    method_key,
    paired,
    score,
    show,
    unique,
)


def conditions(records: Sequence[Record]) -> str:
    """Where the runs were made, with which versions, and what the columns say."""

    def seen(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(v) for v in values}))

    versions = records[0]["versions"]
    unstable = [r for r in records if not r["train_loss"]["finite"]]
    lines = [
        f"{len(records)} runs on {seen(r['device'] for r in records)}; "
        + ", ".join(f"{k} {seen(r['versions'][k] for r in records)}" for k in versions)
        + ".",
        "Mean over seeds ± its standard error. 'Kept' is the share of the target layers' weight parameters.",
    ]
    if unstable:
        lines.append(f"The loss was not finite in {len(unstable)} runs.")
    return "\n".join(lines)


def methods_table(records: list[Record], dense: dict[Any, Record]) -> str:
    """A row for each method and budget of one data set."""

    def row(members: list[Record]) -> list[str]:
        first = members[0]
        steps = [r["seconds_per_step"] for r in members]
        speeds = [s["before"] / s["after"] if s["before"] and s["after"] else None for s in steps]
        return [
            LABELS.get(first["method"], first["method"]),
            f"{first['budget']:.3f}" if first["budget"] else "",
            show([sum(r["kept"] for r in members) / len(members)], 3),
            f"{sum(r['parameters']['after']['model'] for r in members) / len(members) / 1e6:.2f}M",
            show(score(r) for r in members),
            show((paired(r, dense, "accuracy") for r in members), sign=True),
            show(
                [
                    100 * r["around_switch"]["after"]["validation"]["accuracy"] if r["around_switch"]["after"] else None
                    for r in members
                ]
            ),
            show([r["switch_share"] for r in members if r["switch_share"] is not None][:1], 2),
            show(speeds, 2),
            str(len(members)),
        ]

    header = (
        "method",
        "budget",
        "kept",
        "model",
        "accuracy",
        "against full rank",
        "right after the switch (validation)",
    )
    groups = grouped(records, method_key)
    order = sorted(groups, key=lambda key: (-key[1] if key[1] else -2.0, list(LABELS).index(key[0])))
    return markdown_table((*header, "switch at", "speed-up of a step", "seeds"), (row(groups[key]) for key in order))


def summary_table(records: list[Record], dense: dict[Any, Record]) -> str:
    """Mean difference from full rank over data sets, each data set counting the same, and its error over seeds.

    How many seeds there were stands in brackets where it is not three.
    """
    budgets = sorted({r["budget"] for r in records if r["budget"]}, reverse=True)

    def cell(members: list[Record]) -> str:
        sets = grouped(members, lambda r: r["dataset"])
        pairs = [
            mean_and_error([d for r in m if (d := paired(r, dense, "accuracy")) is not None]) for m in sets.values()
        ]
        if not pairs:
            return ""
        mean, errors = sum(value for value, _ in pairs) / len(pairs), [e for _, e in pairs if not math.isnan(e)]
        error = f" ± {math.sqrt(sum(e * e for e in errors)) / len(pairs):.2f}" if errors else ""
        runs = "-".join(str(n) for n in sorted({len(m) for m in sets.values()}))
        return f"{mean:+.2f}{error}" + ("" if runs == "3" else f" (n {runs})")

    rows = []
    for method in LABELS:
        groups = grouped((r for r in records if r["method"] == method), lambda r: r["budget"] or 0.0)
        if method == "dense" or not groups:
            continue
        free = (
            f"{cell(groups[0.0])} at {show([sum(r['kept'] for r in groups[0.0]) / len(groups[0.0])], 2)}"
            if 0.0 in groups
            else ""
        )
        rows.append([LABELS[method], *(cell(groups[b]) if b in groups else "" for b in budgets), free])
    own = any(row[-1] for row in rows)
    header = ("method", *(f"{b:.2f} kept" for b in budgets), *(["at its own size"] if own else []))
    return markdown_table(header, rows if own else [row[:-1] for row in rows])


def calibration_table(records: list[Record], dense: dict[Any, Record]) -> str:
    """Predicted against measured loss, by size."""

    def row(members: list[Record]) -> list[str]:
        first = members[0]
        notes = [r["method_notes"] for r in members]
        measured = [measured(r) for r in members]
        size = f"budget {first['budget']:.3f}" if first["budget"] else _options(first) or "default"
        relative = [
            n["predicted_loss_increase"] / n["window_loss"] if _known(n, "window_loss") else None for n in notes
        ]
        of_curvature = [
            n["predicted_loss_increase"] / n["curvature"] if _known(n, "curvature") else None for n in notes
        ]
        return [
            first["dataset"],
            size,
            show((r["kept"] for r in members), 3),
            show((n.get("predicted_loss_increase") for n in notes), 4),
            show((m[0] for m in measured if m), 4),
            show((m[1] for m in measured if m), 4),
            show(relative, 4),
            show(of_curvature, 5),
            show((r["switch_share"] for r in members), 2),
            show((paired(r, dense, "accuracy") for r in members), sign=True),
            show((paired(r, dense, "loss") for r in members), 3, sign=True),
        ]

    header = (
        "data",
        "size",
        "kept",
        "predicted",
        "measured, train",
        "measured, validation",
        "predicted / training loss",
    )
    header = (*header, "predicted / curvature", "switch at", "accuracy at the end", "loss at the end")
    groups = grouped(records, lambda r: (r["dataset"], r["budget"] or 0.0, _options(r)))
    return markdown_table(header, (row(groups[key]) for key in sorted(groups, key=lambda k: (k[0], -k[1], k[2]))))


def switch_table(records: list[Record], dense: dict[Any, Record]) -> str:
    """Differences from full rank over all data sets, by the share of the run at which the switch came."""
    groups = grouped(records, lambda r: (r["budget"], r["options"]["switch"]))
    shares = sorted({share for _, share in groups})
    rows = [
        [
            f"{budget:.2f}",
            what,
            *(show((paired(r, dense, key) for r in groups.get((budget, at), [])), digits, sign=True) for at in shares),
        ]
        for budget in sorted({budget for budget, _ in groups}, reverse=True)
        for what, key, digits in (("points", "accuracy", 1), ("loss", "loss", 3))
    ]
    return markdown_table(("kept", "", *(f"{at:.0%}" for at in shares)), rows)


def ablation_table(records: list[Record], dense: dict[Any, Record]) -> str:
    """Differences from full rank over data sets, by metric, ranks and optimizer state: accuracy and loss at each size."""
    budgets = sorted({r["budget"] for r in records}, reverse=True)
    order = {"weight": 0, "input": 1, "loss": 2, "uniform": 0, "energy": 1, "global": 2, "carry": 0, "reset": 1}
    groups = grouped(records, lambda r: tuple(r["options"][k] for k in ("metric", "ranks", "state")))

    def cells(members: list[Record]) -> Iterable[str]:
        for budget in budgets:
            chosen = [r for r in members if r["budget"] == budget]
            yield show((paired(r, dense, "accuracy") for r in chosen), sign=True)
            yield show((paired(r, dense, "loss") for r in chosen), 3, sign=True)

    header = [f"{what} at {budget:.2f}" for budget in budgets for what in ("points", "loss")]
    ordered = sorted(groups, key=lambda key: [order[part] for part in key])
    return markdown_table(("metric", "ranks", "state", *header), ([*key, *cells(groups[key])] for key in ordered))


def calibration_ratios(records: list[Record]) -> str:
    """Median of measured over predicted increase, by data set and by the share of the run at which the switch came."""
    shares = ((0.0, 0.15), (0.15, 0.25), (0.25, 1.0))

    def cell(dataset: str, low: float, high: float) -> str:
        chosen = [r for r in records if r["dataset"] == dataset and low <= r["switch_share"] < high]
        pairs = [(measured(r)[1], r["method_notes"]["predicted_loss_increase"]) for r in chosen]  # type: ignore[index]
        return f"{median(measured / predicted for measured, predicted in pairs):.1f} (n {len(pairs)})" if pairs else ""

    rows = [[d, *(cell(d, *ends) for ends in shares)] for d in unique(r["dataset"] for r in records)]
    return markdown_table(("data", *(f"switch at {low:.0%} to {high:.0%}" for low, high in shares)), rows)


def _options(record: Record) -> str:
    return ", ".join(f"{k}={v}" for k, v in record["options"].items())


def _known(notes: Record, key: str) -> bool:
    return bool(notes.get(key)) and notes.get("predicted_loss_increase") is not None
