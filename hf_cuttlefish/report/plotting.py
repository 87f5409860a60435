"""Pictures: stable ranks and loss over training, the rank plan as a map, spectra, and accuracy against size.

Needs matplotlib (`pip install hf-cuttlefish[plots]`), which is imported when a plot is drawn and not before. Figures
are drawn for the width of a README column, in the colours of Okabe and Ito, viridis or cividis, which stay apart for colour-blind
readers; lines differ in their dashes or markers as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import (
    COLOURS,
    DASHES,
    MARKERS,
    depth_bar,
    headline,
    in_two_lines,
    label_ends,
    mark_switch,
    new_figure,
    places_of,
    save_figure,
    shades_of,
)

LEAST_SHARE = 1e-3
"""Where the axis of a spectrum ends: what is less than a thousandth of the energy shows as nothing."""


MOST_ROWS = 48
"""Rows of the rank map that can be labelled one by one; in longer maps some row labels and the numbers are left out."""


def plot_stable_ranks(
    history: Iterable[Mapping[str, Any]],
    switch_step: int | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the stable ranks over the training steps, a line for each kind of projection.

    The line is the median over the layers of that kind, the band reaches from their lower to their upper quartile. A
    fine-tune moves stable ranks by little, so a second panel shows their change since the first measurement.

    Args:
        history: records with `step` (optimizer steps so far), `layer` (module name) and `stable_rank`, as in
            `CuttlefishCallback.history`.
        switch_step: the step after which the layers were factorized: a labelled vertical line; None draws none.
        path: file to save to; its ending chooses the format. None: not saved.
        title: headline; None: a general one.

    Returns:
        The figure, also when it was saved. It belongs to no window: nothing has to be closed.

    Raises:
        ValueError: the history is empty.
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    records = list(history)
    if not records:
        raise ValueError("the history is empty: no stable rank was measured, so there is nothing to draw")
    kinds = {name: kind for name, (_, kind) in places_of(record["layer"] for record in records).items()}
    measured = [(kinds[r["layer"]], r["layer"], int(r["step"]), float(r["stable_rank"])) for r in records]
    first: dict[str, float] = {}
    for _, layer, _, value in measured:
        first.setdefault(layer, value)
    changes = [(kind, layer, step, 100 * (value / first[layer] - 1)) for kind, layer, step, value in measured]

    figure = new_figure(height=6.2)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    ends = _draw_medians(upper, measured)
    changed = _draw_medians(lower, changes)
    upper.set_ylim(bottom=0)
    upper.margins(x=0)
    if switch_step is not None:
        mark_switch([upper, lower], switch_step)
    upper.set_ylabel(r"stable rank   $\|W\|_F^2 \,/\, \sigma_1^2$")
    lower.set_ylabel("change since the\nfirst measurement, %")
    lower.set_xlabel("optimizer step")
    note = "for each projection: median and quartiles over the layers"
    headline(upper, title or "Stable ranks during training", note)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    label_ends(upper, ends)
    label_ends(lower, changed)
    return save_figure(figure, path)


def _draw_medians(axes: Axes, values: Iterable[tuple[str, str, int, float]]) -> list[tuple[float, float, str, str]]:
    """For values (kind, layer, step, value): a line of medians and a band of quartiles for each kind.

    Returns:
        (last step, median there, kind, colour) of each line.
    """
    curves: dict[str, dict[int, list[float]]] = {}  # kind -> step -> values of its layers
    for kind, _, step, value in values:
        curves.setdefault(kind, {}).setdefault(step, []).append(value)
    ends: list[tuple[float, float, str, str]] = []
    # In the order of the names, so that a kind has one colour whether its run or its checkpoint is drawn.
    for index, (kind, by_step) in enumerate(sorted(curves.items())):
        colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        steps = sorted(by_step)
        medians = [statistics.median(by_step[step]) for step in steps]
        quartiles = [_quartiles(by_step[step]) for step in steps]
        axes.fill_between(steps, [q[0] for q in quartiles], [q[1] for q in quartiles], color=colour, alpha=0.13, lw=0)
        marker = "o" if len(steps) < 3 else None
        axes.plot(steps, medians, ls=dashes, color=colour, lw=2, marker=marker, solid_capstyle="round")
        ends.append((steps[-1], medians[-1], kind, colour))
    return ends


def plot_ranks(plan: Mapping[str, int], path: str | Path | None = None) -> Figure:
    """Draw the rank plan as a heat map: a row for each layer, a column for each kind of projection.

    Args:
        plan: module name -> rank, as `CuttlefishCallback.plan`. A cell whose projection is not in the plan stays dense
            and is left grey.
        path: file to save to; its ending chooses the format. None: not saved.

    Returns:
        The figure, also when it was saved.

    Raises:
        ValueError: the plan is empty.
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    if not plan:
        raise ValueError("the plan is empty: no layer was factorized, so there is nothing to draw")
    places = places_of(plan)
    rows = sorted({row for row, _ in places.values()})
    columns = list(dict.fromkeys(kind for _, kind in places.values()))
    ranks: list[list[float]] = [[float("nan")] * len(columns) for _ in rows]
    for name, (row, kind) in places.items():
        ranks[rows.index(row)][columns.index(kind)] = plan[name]

    figure = new_figure(height=min(1.7 + 0.34 * len(rows), 12.0))
    axes = figure.add_subplot()
    axes.set_facecolor("0.88")
    top = max(plan.values())
    image = axes.imshow(ranks, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    if len(rows) <= MOST_ROWS and len(columns) <= 12:
        for y, line in enumerate(ranks):
            for x, rank in enumerate(line):
                dense = rank != rank  # not a number: not in the plan
                text = "dense" if dense else f"{rank:.0f}"
                ink = "0.3" if dense else "black" if rank / top > 0.5 else "white"
                axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=9)
    labels = [".".join(map(str, row)) for row in rows]
    every = -(-len(rows) // MOST_ROWS)
    axes.set_yticks(range(0, len(rows), every), labels[::every])
    axes.set_xticks(range(len(columns)), [in_two_lines(kind) for kind in columns])
    if len(columns) > 8:
        axes.tick_params(axis="x", rotation=40)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set_xticks([x + 0.5 for x in range(len(columns) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("layer")
    note = "grey: stays dense" if len(plan) < len(rows) * len(columns) else ""
    headline(axes, "Rank of each factorized projection", note)
    figure.colorbar(image, ax=axes, label="rank", pad=0.02).outline.set_visible(False)
    return save_figure(figure, path)


def plot_spectra(
    spectra: Mapping[str, Sequence[float]],
    plan: Mapping[str, int] | None = None,
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw, for every rank, what a cut at it would drop: the share of the sum of the squared singular values.

    A panel for each kind of projection, a line for each layer, darker for earlier ones.

    Args:
        spectra: module name -> singular values, falling; of the weights, or in the metric of the loss.
        plan: ranks to mark with dots; where it is a RankPlan, a dotted line shows break-even.
        path: file to save to; its ending chooses the format. None: not saved.
        title: headline; None: a general one.

    Returns:
        The figure, also when it was saved.

    Raises:
        ValueError: there is no spectrum, or one that is not falling, not finite, all zero or shorter than its rank.
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    if not spectra:
        raise ValueError("there are no spectra, so there is nothing to draw")
    left_out = {name: _left_out(name, values) for name, values in spectra.items()}
    places = places_of(spectra)
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    rows = sorted({row for row, _ in places.values()})
    across = min(3, len(kinds))
    down = -(-len(kinds) // across)
    figure = new_figure(height=1.2 + 2.4 * down)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    shades = shades_of(len(rows))
    break_evens = {name: d.break_even for name, d in getattr(plan, "decisions", {}).items()}
    for axes, kind in zip(panels, kinds, strict=False):
        inside = [name for name in spectra if places[name][1] == kind]
        for name in inside:
            shares, colour = left_out[name], shades[rows.index(places[name][0])]
            axes.plot(range(len(shares)), shares, color=colour, lw=1.4)
            rank = (plan or {}).get(name)
            if rank is not None and rank >= len(shares):
                raise ValueError(f"the plan gives {name} rank {rank}, but its spectrum has {len(shares) - 1} values")
            if rank is not None and shares[rank] >= LEAST_SHARE:
                axes.plot(rank, shares[rank], "o", color=colour, markersize=5, markeredgecolor="white", zorder=4)
        for rank in sorted({break_evens[name] for name in inside if name in break_evens}):
            axes.axvline(rank, color="black", lw=1, ls=":")
        axes.set_yscale("log")
        axes.set_ylim(LEAST_SHARE, 1)
        axes.set_yticks([1, 0.1, 0.01, 0.001], ["100%", "10%", "1%", "0.1%"])
        axes.set_xlim(0, max(len(left_out[name]) for name in inside) - 1)
        axes.set_title(kind, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    figure.supxlabel("rank", fontsize=10)
    figure.supylabel(r"share of $\sum\sigma^2$ dropped", fontsize=10)
    marks = ["dots: the plan's ranks"] * bool(plan) + ["dotted lines: break-even"] * bool(break_evens)
    figure.suptitle(title or "Spectra", x=0.01, ha="left", fontsize=13)
    if marks:
        figure.text(0.99, 0.975, ", ".join(marks), ha="right", va="top", color="0.35", fontsize=10)
    if len(rows) > 1:
        depth_bar(figure, panels[: len(kinds)], rows)
    return save_figure(figure, path)


def _left_out(name: str, values: Sequence[float]) -> list[float]:
    """Share of the sum of squares beyond each rank, from 0 to all."""
    squares = [float(v) ** 2 for v in values]
    total = math.fsum(squares)
    falling = all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(squares))
    if not (math.isfinite(total) and total > 0 and falling):
        raise ValueError(f"the spectrum of {name} must be falling, finite and not all zero")
    tails = [0.0, *itertools.accumulate(reversed(squares))]
    return [tail / tails[-1] for tail in reversed(tails)]


def plot_loss(
    log_history: Iterable[Mapping[str, Any]],
    switch_step: int | None = None,
    path: str | Path | None = None,
    title: str | None = None,
    full_rank: Iterable[Mapping[str, Any]] | None = None,
) -> Figure:
    """Draw the loss over the training steps, with the switch: as it was logged, its running mean, and the evaluations.

    Args:
        log_history: records with `step` and `loss` or `eval_loss`, as `trainer.state.log_history`.
        switch_step: the step after which the layers were factorized: a labelled vertical line; None draws none.
        path: file to save to; its ending chooses the format. None: not saved.
        title: headline; None: a general one.
        full_rank: the log of a run without a switch to compare with.

    Returns:
        The figure, also when it was saved.

    Raises:
        ValueError: no record holds a loss.
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    runs = [("with the switch" if full_rank is not None else "training", list(log_history), COLOURS[0], "-")]
    if full_rank is not None:
        runs.append(("full rank", list(full_rank), COLOURS[1], DASHES[1]))
    if not any("loss" in r or "eval_loss" in r for _, records, *_ in runs for r in records):
        raise ValueError("no loss was logged, so there is nothing to draw")
    figure = new_figure(height=4.4)
    axes = figure.subplots()
    for name, records, colour, dashes in runs:
        logged = [(r["step"], float(r["loss"])) for r in records if "loss" in r]
        if logged:
            steps, losses = zip(*logged, strict=True)
            axes.plot(steps, losses, color=colour, lw=0.8, alpha=0.4)
            axes.plot(steps, _running_mean(losses), color=colour, lw=2.2, ls=dashes, label=f"{name}, running mean")
        evaluated = [(r["step"], float(r["eval_loss"])) for r in records if "eval_loss" in r]
        if evaluated:
            mark = {"marker": "o" if dashes == "-" else "s", "markersize": 7, "markeredgecolor": "white", "zorder": 4}
            label = f"{name}, evaluation"
            axes.plot(*zip(*evaluated, strict=True), ls="none", color=colour, label=label, **mark)  # type: ignore[arg-type]
    axes.margins(x=0.02)
    axes.set_ylim(bottom=0)
    if switch_step is not None:
        mark_switch([axes], switch_step)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=10, loc="upper right")
    headline(axes, title or "Loss during training", "thin: as logged")
    return save_figure(figure, path)


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean of a tenth of the values around each one, so that no step of them is moved to the right."""
    reach = len(values) // 20
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def plot_accuracy(
    points: Iterable[Mapping[str, Any]],
    full_rank: float | None = None,
    path: str | Path | None = None,
    title: str | None = None,
    metric: str = "accuracy, %",
) -> Figure:
    """Draw what a model is worth against its size, a line for each method; the first method's is the strong one.

    Args:
        points: records with `method`, `size` (share of the target layers' parameters kept), `score`, and `error` (half a bar) if
            it is known.
        full_rank: the score of full rank: a labelled horizontal line; None draws none.
        path: file to save to; its ending chooses the format. None: not saved.
        title: headline; None: a general one.
        metric: what the score is.

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
    for index, (method, line) in enumerate(lines.items()):
        xs, ys, errors = zip(*sorted(line), strict=True)
        others = COLOURS[1:]  # the first colour is the first method's alone; when they begin again, markers are hollow
        colour = others[(index - 1) % len(others)] if index else COLOURS[0]
        style = {
            "color": colour,
            "markerfacecolor": "white" if index > len(others) else colour,
            "ls": DASHES[index % len(DASHES)],
            "marker": MARKERS[index % len(MARKERS)],
            "lw": 3 if index == 0 else 1.6,
            "markersize": 8 if index == 0 else 6,
            "zorder": 4 if index == 0 else 3,
        }
        axes.errorbar(xs, ys, errors, capsize=2, elinewidth=1, label=method, **style)
    if full_rank is not None:
        axes.axhline(full_rank, color="black", lw=1.2, ls=(0, (2, 2)))
        above = {
            "xy": (0, full_rank),
            "xycoords": ("axes fraction", "data"),
            "xytext": (4, 3),
            "textcoords": "offset points",
        }
        axes.annotate(f"full rank, {full_rank:.1f}", **above, fontsize=10)  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.margins(x=0.06)
    axes.minorticks_off()
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0) if sizes[0] * 0.9 <= t <= sizes[-1] * 1.1] or sizes
    axes.set_xticks(ticks, [f"{t:.0%}" for t in ticks])
    axes.set_xlabel("share of the target layers' parameters kept")
    axes.set_ylabel(metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9.5, handlelength=3.2)
    headline(axes, title or "Accuracy against size", "")
    return save_figure(figure, path)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile, the values between them interpolated."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper
