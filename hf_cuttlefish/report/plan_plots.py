"""Pictures of a rank plan: ranks as a map of layers by projections, and the spectra that they cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import depth_bar, headline, in_two_lines, new_figure, places_of, quiet_axes, save_figure, shades_of

LEAST_SHARE = 1e-3
"""Where the axis of a spectrum ends: what is less than a thousandth of the energy shows as nothing."""


MOST_ROWS = 48
"""Rows of the rank map that can be labelled one by one; in longer maps some row labels and the numbers are left out."""


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
        inside = {name: left_out[name] for name in spectra if places[name][1] == kind}
        colours = {name: shades[rows.index(places[name][0])] for name in inside}
        marks = sorted({break_evens[name] for name in inside if name in break_evens})
        _draw_spectra(axes, kind, inside, colours, plan or {}, marks)
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


def _draw_spectra(
    axes: Axes,
    kind: str,
    left_out: Mapping[str, Sequence[float]],
    colours: Mapping[str, Any],
    ranks: Mapping[str, int],
    break_evens: Sequence[int],
) -> None:
    """One panel: a line for each layer of a kind, with its rank as a dot and break-even as dotted lines."""
    for name, shares in left_out.items():
        axes.plot(range(len(shares)), shares, color=colours[name], lw=1.4)
        rank = ranks.get(name)
        if rank is not None and rank >= len(shares):
            raise ValueError(f"the plan gives {name} rank {rank}, but its spectrum has {len(shares) - 1} values")
        if rank is not None and shares[rank] >= LEAST_SHARE:
            axes.plot(rank, shares[rank], "o", color=colours[name], markersize=5, markeredgecolor="white", zorder=4)
    for rank in break_evens:
        axes.axvline(rank, color="black", lw=1, ls=":")
    axes.set_yscale("log")
    axes.set_ylim(LEAST_SHARE, 1)
    axes.set_yticks([1, 0.1, 0.01, 0.001], ["100%", "10%", "1%", "0.1%"])
    axes.set_xlim(0, max(map(len, left_out.values())) - 1)
    axes.set_title(kind, fontsize=10, loc="left")
    quiet_axes(axes)


def _left_out(name: str, values: Sequence[float]) -> list[float]:
    """Share of the sum of squares beyond each rank, from 0 to all."""
    squares = [float(v) ** 2 for v in values]
    total = math.fsum(squares)
    falling = all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(squares))
    if not (math.isfinite(total) and total > 0 and falling):
        raise ValueError(f"the spectrum of {name} must be falling, finite and not all zero")
    tails = [0.0, *itertools.accumulate(reversed(squares))]
    return [tail / tails[-1] for tail in reversed(tails)]
