"""Pictures of what a size costs: accuracy by method, and what was measured of one model's cuts. The knee is where to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import (
    COLOURS,
    DASHES,
    MARKERS,
    headline,
    label_ends,
    new_figure,
    quiet_axes,
    save_figure,
)
from .sizes import SizeCurve

TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


def plot_accuracy(
    points: Iterable[Mapping[str, Any]],
    full_rank: float | None = None,
    path: str | Path | None = None,
    title: str | None = None,
    metric: str = "accuracy, %",
    looks: Mapping[str, Mapping[str, Any]] | None = None,
) -> Figure:
    """Draw what a model is worth against its size, a line for each method; the first method's is the strong one.

    Args:
        points: records with `method`, `size` (share of the target layers' parameters kept), `score`, and `error` (half a bar) if
            it is known.
        full_rank: the score of full rank: a labelled horizontal line; None draws none.
        path: file to save to; its ending chooses the format. None: not saved.
        title: headline; None: a general one.
        metric: what the score is.
        looks: method -> colour, marker and the like, so that a method looks the same in every picture; None: by order.

    Returns:
        The figure, also when it was saved.

    Raises:
        ValueError: there are no points, or a size is not above 0.
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for p in points:
        error = p.get("error")
        known = 0.0 if error is None or not math.isfinite(error) else float(error)
        lines.setdefault(str(p["method"]), []).append((float(p["size"]), float(p["score"]), known))
    sizes = sorted({size for line in lines.values() for size, *_ in line})
    if not sizes or sizes[0] <= 0:
        raise ValueError("there are no points with a size above 0, so there is nothing to draw")
    figure = new_figure(height=4.8)
    axes = figure.subplots()
    ends = []
    for index, (method, line) in enumerate(lines.items()):
        xs, ys, errors = zip(*sorted(line), strict=True)
        style = {**_look(index), **(looks or {}).get(method, {})}
        axes.errorbar(xs, ys, errors, capsize=2, elinewidth=1, label=method, **style)
        ends.append((xs[-1], ys[-1], method, style["color"]))
    if full_rank is not None:
        axes.axhline(full_rank, color="black", lw=1.2, ls=(0, (2, 2)))
        _above(axes, full_rank, f"full rank, {full_rank:.1f}")
    axes.margins(x=0.06)
    _size_axis(axes, sizes)
    axes.set_ylabel(metric)
    quiet_axes(axes, "both")
    label_ends(axes, ends)
    headline(axes, title or "Accuracy against size", "")
    return save_figure(figure, path)


def plot_sizes(curve: SizeCurve, path: str | Path | None = None, title: str | None = None) -> Figure:
    """Draw what each size of one model costs: the measured and the predicted loss, and the metric, with the knee marked.

    Args:
        curve: of `hf_cuttlefish.report.sizes.size_curve`, with batches to measure on.
        path: file to save to; its ending chooses the format. None: not saved. title: headline; None: a general one.

    Raises:
        ValueError: nothing was measured.
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    panels = curve.panels()
    if not panels:
        raise ValueError("nothing was measured at these sizes, so there is nothing to draw: give data")
    figure = new_figure(height=1.0 + 2.9 * len(panels))
    knee = curve.knee()
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        ends = []
        for index, (name, points) in enumerate(panel.lines.items()):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, color=COLOURS[index], ls=DASHES[index], marker=MARKERS[index], lw=2)
            ends.append((xs[-1], ys[-1], name, COLOURS[index]))
            if knee is not None and index == 0:
                axes.plot(knee.kept, dict(points)[knee.kept], "o", ms=16, mfc="none", mec="black", zorder=5)
                axes.annotate(
                    f"knee: {knee.kept:.0%}",
                    xy=(knee.kept, dict(points)[knee.kept]),
                    xytext=(0, 14),
                    textcoords="offset points",
                    ha="center",
                )
        axes.axhline(panel.dense, color="black", lw=1.2, ls=(0, (2, 2)))
        axes.margins(x=0.06, y=0.12)
        _size_axis(axes, sorted(x for points in panel.lines.values() for x, _ in points))
        _above(axes, panel.dense, f"dense, {panel.dense:.4g}")
        axes.set_ylabel(panel.title)
        quiet_axes(axes, "both")
        label_ends(axes, ends)
        if panel is panels[0]:
            note = (
                f"measured on {curve.rows} rows that the factors were not made with, before any training at that size"
            )
            headline(axes, title or "What each size costs", note)
    return save_figure(figure, path)


def _look(index: int) -> dict[str, Any]:
    """The first colour is the first method's alone; when the others begin again, markers are hollow."""
    others = COLOURS[1:]
    colour = others[(index - 1) % len(others)] if index else COLOURS[0]
    return {
        "color": colour,
        "markerfacecolor": "white" if index > len(others) else colour,
        "ls": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "lw": 3 if index == 0 else 1.6,
        "markersize": 8 if index == 0 else 6,
        "zorder": 4 if index == 0 else 3,
    }


def _size_axis(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()
    ticks = [t for t in TICKS if sizes[0] * 0.9 <= t <= sizes[-1] * 1.1] or list(sizes)
    axes.set_xticks(ticks, [f"{t:.0%}" for t in ticks])
    axes.set_xlabel("share of the target layers' parameters kept")


def _above(axes: Axes, height: float, text: str) -> None:
    """Name a horizontal line at its left end."""
    place: dict[str, Any] = {"xy": (0, height), "xycoords": ("axes fraction", "data")}
    axes.annotate(text, **place, xytext=(4, 3), textcoords="offset points", fontsize=10)
