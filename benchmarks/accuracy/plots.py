"""Plots out of the records of runs. They need matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .records import LABELS, Record, grouped, mean_and_error, measured, method_key, paired, score, unique

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999", "#D55E00", "#F0E442")
"""Okabe and Ito's, which colour-blind readers tell apart; markers differ as well."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
YOUNG = 0.2
"""Share of the run before which a switch counts as early in the calibration."""

FELL = 3e-4
"""Measured increases of the loss below this (it may also fall) are drawn at the lower edge of the calibration."""


def _axes(width: float = 6.4, height: float = 4.4) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def plot_sizes(records: list[Record], path: Path) -> None:
    """Accuracy by the share of the target parameters kept, a line for each method."""
    figure, axes = _axes()
    methods = [m for m in LABELS if any(r["method"] == m for r in records)]
    others = [m for m in methods if m not in ("dense", "cuttlefish")]
    looks = {m: (COLOURS[i % 8], MARKERS[i % 8]) for i, m in enumerate(others)}
    looks |= {"dense": ("black", ""), "cuttlefish": ("black", "o")}
    for method in methods:
        groups = grouped((r for r in records if r["method"] == method), method_key)
        points = {
            key: (sum(r["kept"] for r in members) / len(members), *mean_and_error([score(r) for r in members]))
            for key, members in groups.items()
        }
        if method == "dense":
            axes.axhline(points[method, 0.0][1], color="black", linewidth=1, linestyle="--", label=LABELS[method])
            continue
        own = method == "cuttlefish"
        colour, usual = looks[method]
        style = {"color": colour, "linewidth": 2.4 if own else 1.2, "zorder": 3 if own else 2, "capsize": 2}
        free = points.pop((method, 0.0), None) if own else None
        for label, marker, line in ((LABELS[method], usual, sorted(points.values())), ("our default", "*", [free])):
            if not line or line[0] is None:
                continue
            xs, ys, errors = zip(*line, strict=True)
            errors = [0 if math.isnan(e) else e for e in errors]
            axes.errorbar(xs, ys, errors, marker=marker, markersize=12 if marker == "*" else 6, label=label, **style)
    axes.set_xscale("log")
    ticks = [0.1, 1 / 5.6, 1 / 3, 0.5, 1]
    axes.set_xticks(ticks, ["10%", "1/5.6", "1/3", "1/2", "1"])
    axes.minorticks_off()
    axes.set_xlabel("share of the target layers' parameters kept")
    axes.set_ylabel("accuracy, %")
    axes.set_title(records[0]["dataset"])
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_calibration(records: list[Record], path: Path) -> None:
    """Predicted increase of the loss against the increase measured at the switch, on both splits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.6), sharex=True, sharey=True, layout="constrained")
    datasets = unique(r["dataset"] for r in records)
    for i, (axes, split) in enumerate(zip(panels, ("training rows", "validation split"), strict=True)):
        for dataset, colour, marker in zip(datasets, COLOURS, MARKERS, strict=False):
            for r in (r for r in records if r["dataset"] == dataset):
                x, y = r["method_notes"]["predicted_loss_increase"], measured(r)[i]  # type: ignore[index]
                fill = "none" if r["switch_share"] < YOUNG - 0.005 else colour
                shape = marker if y > FELL else "$\\downarrow$"
                axes.plot(x, max(y, FELL), linestyle="", marker=shape, color=colour, markerfacecolor=fill, alpha=0.8)
        ends = [min(r["method_notes"]["predicted_loss_increase"] for r in records), 0.2]
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=FELL * 0.8)
        axes.set_title(split)
        axes.set_xlabel("predicted increase of the loss")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("measured increase at the switch")
    keys = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=dataset)
        for dataset, colour, marker in zip(datasets, COLOURS, MARKERS, strict=False)
    ]
    early = f"hollow: switched before {YOUNG:.0%} of the run"
    keys += [
        Line2D([], [], linestyle="", marker="o", color="grey", markerfacecolor="none", label=early),
        Line2D([], [], linestyle="", marker="$\\downarrow$", color="grey", label=f"less than {FELL:g}, or it fell"),
        Line2D([], [], color="black", linewidth=1, label="measured = predicted"),
    ]
    figure.legend(handles=keys, fontsize=8, ncols=3, loc="outside lower center")
    _save(figure, path)


def plot_switch(records: list[Record], dense: dict[Any, Record], path: Path) -> None:
    """Difference from full rank by the time of the switch."""
    figure, axes = _axes()
    budgets = sorted({r["budget"] for r in records}, reverse=True)
    for budget, colour, marker in zip(budgets, COLOURS, MARKERS, strict=False):
        groups = grouped((r for r in records if r["budget"] == budget), lambda r: r["options"]["switch"])
        points = []
        for at in sorted(groups):
            values = [v for v in (paired(r, dense, "accuracy") for r in groups[at]) if v is not None]
            if values:
                points.append((100 * at, *mean_and_error(values)))
        if points:
            xs, ys, errors = zip(*points, strict=True)
            errors = [0 if math.isnan(e) else e for e in errors]
            style = {"color": colour, "marker": marker, "capsize": 2, "label": f"{budget:.3f} kept"}
            axes.errorbar(xs, ys, errors, **style)
    axes.axhline(0, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("switch, % of the run")
    axes.set_ylabel("accuracy against full rank, points")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)
