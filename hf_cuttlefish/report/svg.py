"""Charts as SVG text, with no library: for pages that stand alone. Colours are the page's variables, light and dark.

Lines differ in colour and dashes and are named at their ends; cells hold their number as text. So nothing hangs on colour alone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH = 760
LEFT, RIGHT, TOP, BOTTOM = 64, 196, 14, 44
"""Margins: the axis' numbers, the names of the lines, air, and the numbers and title below."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
COLOURS = 6
"""Classes s0 to s5 of the page's style."""


@dataclass(frozen=True)
class Line:
    """A line of a chart: points (x, y), and whether it is a thin one in the background, or has dots."""

    name: str
    points: Sequence[tuple[float, float]]
    is_faint: bool = False
    has_dots: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    marks: Mapping[float, str] | None = None,
    level: tuple[float, str] | None = None,
    from_zero: bool = False,
    height: int = 300,
    percent: bool = False,
) -> str:
    """Lines over an axis.

    Args:
        title: read out to those who do not see the picture. marks: x -> words at a vertical line. level: (y, words) of a horizontal one.
        from_zero: whether the axis begins at 0. percent: whether x is a share, shown in percent.

    Raises ValueError where no line has a point.
    """
    xs = [x for line in lines for x, _ in line.points] + list(marks or {})
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)] + ([level[0]] if level else [])
    if not xs or not ys:
        raise ValueError("there are no points, so there is nothing to draw")
    x_axis, y_axis = _Axis.over(xs, LEFT, WIDTH - RIGHT), _Axis.over(ys, height - BOTTOM, TOP, from_zero)
    parts = _frame(x_axis, y_axis, x_title, y_title, height, percent)
    if level is not None:
        y = y_axis.at(level[0])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT + 4, y - 5, level[1], "note"))
    for x, words in (marks or {}).items():
        at = x_axis.at(x)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        anchor, step = ("end", -5) if at > (LEFT + WIDTH - RIGHT) / 2 else ("start", 5)
        parts.append(_text(at + step, height - BOTTOM - 8, words, "note", anchor))
    strong = [line for line in lines if not line.is_faint]
    for line in lines:
        index = strong.index(line) if line in strong else 0
        parts += _drawn(line, index, x_axis, y_axis)
    parts += _names(strong, y_axis, x_axis)
    return _svg(title, height, parts)


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[int, int], int | None]
) -> str:
    """Whole numbers by row and column: deeper where larger; None is a cell that is named dense, and what is missing stays empty."""
    top = max((value for value in cells.values() if value), default=1)
    cell_height, left, head = (24 if len(rows) <= 48 else 10), 56, 46
    width = (WIDTH - left - 8) / max(1, len(columns))
    parts = []
    for j, name in enumerate(columns):
        x = left + width * (j + 0.5)
        for line, part in enumerate(_two_lines(name)):
            parts.append(_text(x, 16 + 14 * line, part, "note", "middle"))
    every = max(1, -(-len(rows) // 48))
    for i, row in enumerate(rows):
        if i % every == 0:
            parts.append(_text(left - 8, head + cell_height * (i + 0.5) + 4, row, "note", "end"))
    for (i, j), value in cells.items():
        x, y = left + width * j, head + cell_height * i
        depth = 0.0 if value is None else value / top
        solid = 1.0 if value is None else 0.12 + 0.88 * depth
        kind = "dense" if value is None else "cell"
        parts.append(
            f'<rect class="{kind}" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{cell_height - 2}" rx="2" '
            f'style="fill-opacity:{solid:.2f}"/>'
        )
        if cell_height > 12:
            ink = "on-deep" if depth > 0.5 else "on-pale"
            parts.append(_text(x + width / 2, y + 16, "dense" if value is None else str(value), ink, "middle"))
    return _svg(title, int(head + cell_height * len(rows) + 8), parts)


def bars(title: str, pairs: Sequence[tuple[str, float, float, str, str]]) -> str:
    """Before and after, one under the other: (name, before, after, words before, words after)."""
    parts: list[str] = []
    room = WIDTH - 330
    for i, (name, before, after, told_before, told_after) in enumerate(pairs):
        y, top = 8 + 58 * i, max(before, after) or 1
        parts.append(_text(0, y + 27, name, "label"))
        for j, (value, told) in enumerate(((before, told_before), (after, told_after))):
            at, length = y + 22 * j, max(2.0, room * value / top)
            kind = "before" if j == 0 else "after"
            parts.append(f'<rect class="{kind}" x="170" y="{at}" width="{length:.1f}" height="18" rx="2"/>')
            parts.append(_text(176 + length, at + 14, told, "note"))
    return _svg(title, 58 * len(pairs) + 4, parts)


@dataclass(frozen=True)
class _Axis:
    """From values to places on the page, with round numbers to mark."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, from_zero: bool = False) -> _Axis:
        low, high = min(values), max(values)
        low = min(low, 0.0) if from_zero else low
        if high <= low:
            high, low = high + (abs(high) or 1) * 0.05, low - (abs(low) or 1) * 0.05
        step = _round_step((high - low) / 5)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if start < end:  # the lines' own axis keeps to the data
            ticks = tuple(step * i for i in range(first, last + 1) if low - 1e-9 <= step * i <= high + 1e-9)
            return cls(low, high, start, end, ticks)
        return cls(step * first, step * last, start, end, tuple(step * i for i in range(first, last + 1)))

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_step(rough: float) -> float:
    size = 10 ** math.floor(math.log10(rough))
    return next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)


def _frame(x_axis: _Axis, y_axis: _Axis, x_title: str, y_title: str, height: int, percent: bool) -> list[str]:
    parts = []
    for value in y_axis.ticks:
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:.4g}", "note", "end"))
    for value in x_axis.ticks:
        told = f"{value:.0%}" if percent else f"{value:,.4g}" if value < 10000 else f"{value:,.0f}"
        parts.append(_text(x_axis.at(value), height - BOTTOM + 17, told, "note", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_title, "label", "middle"))
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(14 {middle:.0f}) rotate(-90)">{html.escape(y_title)}</text>'
    )
    return parts


def _drawn(line: Line, index: int, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in line.points if math.isfinite(y)]
    dashes = DASHES[index % len(DASHES)]
    kind = f"line s{index % COLOURS}" + (" faint" if line.is_faint else "")
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = f' stroke-dasharray="{dashes}"' if dashes and not line.is_faint else ""
    parts = [f'<polyline class="{kind}" points="{path}"{dash}/>']
    if line.has_dots or len(places) == 1:
        parts += [f'<circle class="dot s{index % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
    return parts


def _names(lines: Sequence[Line], y_axis: _Axis, x_axis: _Axis) -> list[str]:
    """The lines' names at their right ends, spread so that none covers another."""
    ends = []
    for index, line in enumerate(lines):
        seen = [(x, y) for x, y in line.points if math.isfinite(y)]
        x, y = max(seen) if seen else (x_axis.high, y_axis.low)
        ends.append((y_axis.at(y), x_axis.at(x), index, line.name))
    places: list[float] = []
    for y, *_ in sorted(ends):
        places.append(max(y, places[-1] + 15) if places else y)
    bottom = y_axis.start + 4
    for i in range(len(places) - 1, -1, -1):  # and back up, so that none leaves the picture below
        places[i] = min(places[i], bottom)
        bottom = places[i] - 15
    parts, at = [], WIDTH - RIGHT + 14
    for (y, x, index, name), place in zip(sorted(ends), places, strict=True):
        parts.append(
            f'<line class="lead s{index % COLOURS}" x1="{x:.1f}" y1="{y:.1f}" x2="{at - 3}" y2="{place:.1f}"/>'
        )
        parts.append(_text(at, place + 4, name, f"name s{index % COLOURS}"))
    return parts


def _two_lines(name: str) -> list[str]:
    if len(name) <= 12 or "." not in name:
        return [name]
    dots = [i for i, letter in enumerate(name) if letter == "."]
    at = min(dots, key=lambda dot: abs(dot - len(name) / 2)) + 1
    return [name[:at], name[at:]]


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    name = html.escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )
