"""Two pictures: the stable ranks over training, and the rank plan as a map of layers by projections.

Needs matplotlib (`pip install hf-cuttlefish[plots]`), which is imported when a plot is drawn and not before. Figures
are drawn for the width of a README column, in the colours of Okabe and Ito, which stay apart for colour-blind readers.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
"""Okabe and Ito's palette, strongest contrast on white first; its yellow is too pale for a line and left out."""

WIDTH, DPI = 8.0, 150
"""Width of every figure in inches, and pixels per inch of a saved file."""

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
    kinds = {name: kind for name, (_, kind) in _places(record["layer"] for record in records).items()}
    measured = [(kinds[r["layer"]], r["layer"], int(r["step"]), float(r["stable_rank"])) for r in records]
    first: dict[str, float] = {}
    for _, layer, _, value in measured:
        first.setdefault(layer, value)
    changes = [(kind, layer, step, 100 * (value / first[layer] - 1)) for kind, layer, step, value in measured]

    figure = _new_figure(height=6.2)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    ends = _draw_medians(upper, measured)
    _draw_medians(lower, changes)
    upper.set_ylim(bottom=0)
    upper.margins(x=0)
    if switch_step is not None:
        _mark_switch(upper, lower, switch_step)
    upper.set_ylabel(r"stable rank   $\|W\|_F^2 \,/\, \sigma_1^2$")
    lower.set_ylabel("change since the\nfirst measurement, %")
    lower.set_xlabel("optimizer step")
    note = "for each projection: median and quartiles over the layers"
    _headline(upper, title or "Stable ranks during training", note)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    _label_ends(upper, ends)
    return _save(figure, path)


def _draw_medians(axes: Axes, values: Iterable[tuple[str, str, int, float]]) -> list[tuple[float, float, str, str]]:
    """For values (kind, layer, step, value): a line of medians and a band of quartiles for each kind.

    Returns:
        (last step, median there, kind, colour) of each line.
    """
    curves: dict[str, dict[int, list[float]]] = {}  # kind -> step -> values of its layers
    for kind, _, step, value in values:
        curves.setdefault(kind, {}).setdefault(step, []).append(value)
    ends: list[tuple[float, float, str, str]] = []
    for index, (kind, by_step) in enumerate(curves.items()):
        colour, dashes = COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS) % 3]
        steps = sorted(by_step)
        medians = [statistics.median(by_step[step]) for step in steps]
        quartiles = [_quartiles(by_step[step]) for step in steps]
        axes.fill_between(steps, [q[0] for q in quartiles], [q[1] for q in quartiles], color=colour, alpha=0.13, lw=0)
        marker = "o" if len(steps) < 3 else None
        axes.plot(steps, medians, dashes, color=colour, lw=2, marker=marker, solid_capstyle="round")
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
    places = _places(plan)
    rows = sorted({row for row, _ in places.values()})
    columns = list(dict.fromkeys(kind for _, kind in places.values()))
    ranks: list[list[float]] = [[float("nan")] * len(columns) for _ in rows]
    for name, (row, kind) in places.items():
        ranks[rows.index(row)][columns.index(kind)] = plan[name]

    figure = _new_figure(height=min(1.7 + 0.34 * len(rows), 12.0))
    axes = figure.add_subplot()
    axes.set_facecolor("0.88")
    top = max(plan.values())
    image = axes.imshow(ranks, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    if len(rows) <= MOST_ROWS and len(columns) <= 12:
        for y, line in enumerate(ranks):
            for x, rank in enumerate(line):
                dense = rank != rank  # not a number: not in the plan
                text = "dense" if dense else f"{rank:.0f}"
                ink = "0.4" if dense else "black" if rank / top > 0.5 else "white"
                axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=9)
    labels = [".".join(map(str, row)) for row in rows]
    every = -(-len(rows) // MOST_ROWS)
    axes.set_yticks(range(0, len(rows), every), labels[::every])
    axes.set_xticks(range(len(columns)), [_in_two_lines(kind) for kind in columns])
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
    _headline(axes, "Rank of each factorized projection", note)
    figure.colorbar(image, ax=axes, label="rank", pad=0.02).outline.set_visible(False)
    return _save(figure, path)


def _places(names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Module name -> (row, kind): its block number(s), and a short name of what it is there.

    `bert.encoder.layer.3.attention.self.query` is ((3,), "query"). The row is the first number in the name, or all
    of its numbers where the first leaves two projections in one place (stages of Swin, experts of a mixture). The kind
    is the shortest ending that no other kind shares; numbers and the lists they count are left out of it.
    """
    unique = list(dict.fromkeys(names))
    numbers, kinds = {}, {}
    for name in unique:
        parts = name.split(".")
        numbers[name] = tuple(int(part) for part in parts if part.isdigit())
        kinds[name] = tuple(
            part
            for part, following in zip(parts, [*parts[1:], ""], strict=True)
            if not part.isdigit() and not following.isdigit()
        )
    first = {name: (numbers[name][:1], kinds[name]) for name in unique}
    if len(set(first.values())) == len(unique):
        numbers = {name: number[:1] for name, number in numbers.items()}
    while all(len(kind) > 1 for kind in kinds.values()) and len({kind[0] for kind in kinds.values()}) == 1:
        kinds = {name: kind[1:] for name, kind in kinds.items()}  # what all of them start with names nothing
    short = _shortest_endings(set(kinds.values()))
    return {name: (numbers[name], short[kinds[name]]) for name in unique}


def _shortest_endings(kinds: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """For each name in parts, the fewest last parts that no other name ends in."""
    short = {}
    for kind in kinds:
        for length in range(1, len(kind) + 1):
            if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
                break
        short[kind] = ".".join(kind[-length:]) if kind else "(model)"
    return short


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile, the values between them interpolated."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def _new_figure(height: float) -> Figure:
    """An empty figure that belongs to no window, so that it can be drawn where there is no screen.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install hf-cuttlefish[plots]") from error
    return Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)


def _headline(axes: Axes, title: str, note: str) -> None:
    """Title flush left, with a quieter line under it."""
    axes.set_title(title, loc="left", fontsize=13, pad=22 if note else 8)
    if note:
        just_above = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 6), "textcoords": "offset points"}
        axes.annotate(note, **just_above, color="0.35", fontsize=10)  # type: ignore[arg-type]


def _mark_switch(axes: Axes, below: Axes, switch_step: int) -> None:
    """A vertical line through both axes where the layers were factorized, labelled in the first."""
    left, right = axes.get_xlim()
    axes.set_xlim(left, max(right, switch_step))
    left, right = axes.get_xlim()
    for each in (axes, below):
        each.axvline(switch_step, color="black", lw=1.2, ls=(0, (4, 3)), zorder=1, clip_on=False)
    on_the_right_half = switch_step > (left + right) / 2
    axes.annotate(
        f"switch to low rank,\nafter step {switch_step}",
        xy=(switch_step, 0.02),
        xytext=(-6 if on_the_right_half else 6, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if on_the_right_half else "left",
        va="bottom",
        fontsize=10,
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
    )


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name every line at its right end, in its colour; labels that would overlap are spread apart."""
    bottom, top = axes.get_ylim()
    gap = (top - bottom) * 0.055
    ordered = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _, _ in ordered:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    for index in range(len(heights) - 1, -1, -1):  # and back down, so that none leaves the axes at the top
        ceiling = heights[index + 1] - gap if index + 1 < len(heights) else top - gap / 2
        heights[index] = min(heights[index], ceiling)
    right = axes.get_xlim()[1]
    for (x, y, kind, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            kind,
            xy=(x, y),
            xytext=(1.03, (height - bottom) / (top - bottom)),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=10,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.8,
                "alpha": 0.6,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            }
            if x < right or abs(height - y) > gap / 4
            else None,
            annotation_clip=False,
        )


def _in_two_lines(kind: str) -> str:
    """Break a long name before its last part, so that columns stay narrow."""
    return re.sub(r"\.(?=[^.]*$)", ".\n", kind) if len(kind) > 10 else kind


def _save(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure
