"""Plots out of the records of runs. They need matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hf_cuttlefish.report.drawing import COLOURS, DASHES, MARKERS
from hf_cuttlefish.report.size_plots import plot_accuracy

from .records import LABELS, Record, grouped, mean_and_error, measured, method_key, paired, score, unique

LOOKS = {
    "cuttlefish": {"color": COLOURS[0], "marker": "o"},
    "former": {"color": COLOURS[0], "marker": "o", "markerfacecolor": "white"},
    "whitened_after": {"color": COLOURS[1], "marker": "X"},
    "paper_at_budget": {"color": COLOURS[4], "marker": "s"},
    "paper": {"color": COLOURS[4], "marker": "s", "markerfacecolor": "white"},
    "reference_bert": {"color": COLOURS[2], "marker": "^"},
    "pufferfish": {"color": COLOURS[3], "marker": "D"},
    "sifd": {"color": COLOURS[5], "marker": "v"},
    "svd_after": {"color": COLOURS[6], "marker": "P"},
    "lora": {"color": COLOURS[7], "marker": "*"},
}
"""A method's colour and marker, the same in every picture. Okabe and Ito's colours, which colour-blind readers tell apart."""
NAMES = {
    "trec": "TREC questions, MiniLM",
    "movie_snippets": "Movie snippets, MiniLM",
    "reuters_r8": "Reuters R8, MiniLM",
    "fashion_mnist_vit": "Fashion-MNIST, ViT-S",
}
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
    """Test accuracy by the share of the target parameters kept, a line for each method."""
    points, dense = [], None
    for method in (m for m in ("cuttlefish", *LABELS) if any(r["method"] == m for r in records)):
        if method == "cuttlefish" and points:
            continue  # ours comes first
        groups = grouped((r for r in records if r["method"] == method), method_key)
        for members in groups.values():
            mean, error = mean_and_error([score(r) for r in members])
            if method == "dense":
                dense = mean
                continue
            kept = sum(r["kept"] for r in members) / len(members)
            points.append({"method": LABELS[method], "size": kept, "score": mean, "error": error})
    dataset = records[0]["dataset"]
    title = f"{NAMES.get(dataset, dataset)}: test accuracy against size"
    looks = {
        LABELS[method]: {"markerfacecolor": look["color"], "ls": DASHES[i % len(DASHES)], **look}
        for i, (method, look) in enumerate(LOOKS.items())
    }
    plot_accuracy(points, dense, path, title, "test accuracy, %", looks)


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
        axes.set_title(split, loc="left")
        axes.set_xlabel("predicted increase of the loss, nats")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("measured increase at the switch, nats")
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
    axes.set_title("When to switch: validation accuracy, one seed", loc="left")
    axes.set_xlabel("switch, % of the run")
    axes.set_ylabel("accuracy against full rank, points")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)
