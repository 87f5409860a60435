"""Draw: the figure, colours, labels and marks that all plots share. Needs matplotlib, imported when a plot is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
"""Okabe and Ito's palette, strongest contrast on white first; its yellow is too pale for a line and left out."""


WIDTH, DPI = 8.0, 150
"""Width of every figure in inches, and pixels per inch of a saved file."""


DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))


MARKERS = "os^DvPX*"


LABEL_HEIGHT = 0.17
"""Inches from a label at a line's end to the next."""


def places_of(names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
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


def check_matplotlib() -> None:
    """Raises ImportError, which says how to install it, if matplotlib is missing: before work that ends in a picture."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install hf-cuttlefish[plots]") from error


def new_figure(height: float) -> Figure:
    """An empty figure that belongs to no window, so that it can be drawn where there is no screen.

    Raises:
        ImportError: as `check_matplotlib`.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)


def headline(axes: Axes, title: str, note: str) -> None:
    """Title flush left, with a quieter line under it."""
    axes.set_title(title, loc="left", fontsize=13, pad=22 if note else 8)
    if note:
        just_above = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 6), "textcoords": "offset points"}
        axes.annotate(note, **just_above, color="0.35", fontsize=10)  # type: ignore[arg-type]


def quiet_axes(axes: Axes, grid: str = "y") -> None:
    """No frame at the top and the right, and pale lines behind the data. grid: "x", "y" or "both"."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9")  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def mark_switch(panels: Sequence[Axes], switch_step: int) -> None:
    """A vertical line through all panels where the layers were factorized, labelled in the first."""
    axes = panels[0]
    left, right = axes.get_xlim()
    axes.set_xlim(left, max(right, switch_step))
    left, right = axes.get_xlim()
    for each in panels:
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


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name every line at its right end, in its colour; labels that would overlap are spread apart."""
    bottom, top = axes.get_ylim()
    inches = axes.get_position().height * axes.figure.get_figheight()  # type: ignore[union-attr]
    gap = (top - bottom) * LABEL_HEIGHT / inches
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


def in_two_lines(kind: str) -> str:
    """Break a long name at the dot nearest to its middle, so that columns stay narrow."""
    dots = [match.start() for match in re.finditer(r"\.", kind)]
    if len(kind) <= 10 or not dots:
        return kind
    at = min(dots, key=lambda dot: abs(dot - len(kind) / 2)) + 1
    return f"{kind[:at]}\n{kind[at:]}"


def shades_of(count: int) -> list[Any]:
    """Colours from dark to light for so many layers; the palest, yellow, is left out, since it is none on white."""
    from matplotlib import colormaps

    return [colormaps["cividis"](0.88 * i / max(1, count - 1)) for i in range(count)]


def depth_bar(figure: Figure, panels: Any, rows: Sequence[tuple[int, ...]]) -> None:
    """The scale of `shades_of`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm([i - 0.5 for i in range(len(rows) + 1)], len(rows))
    every = -(-len(rows) // 12)
    bar = figure.colorbar(
        ScalarMappable(norm, ListedColormap(shades_of(len(rows)))), ax=list(panels), label="layer", pad=0.02, aspect=30
    )
    bar.set_ticks(range(0, len(rows), every), labels=[".".join(map(str, row)) for row in rows[::every]])
    bar.ax.tick_params(which="both", length=0)
    bar.outline.set_visible(False)


def figure_path(path: str | Path) -> Path:
    """The file that `save_figure` writes: without an ending it is a PNG, and gets one."""
    return Path(path) if Path(path).suffix else Path(f"{str(path).rstrip('.')}.png")


def save_figure(figure: Figure, path: str | Path | None) -> Figure:
    """Save a figure where a path is given, and hand it back."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(figure_path(path))
    return figure
