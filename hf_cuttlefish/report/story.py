"""The story of a run, or of the sizes of a model, as a page: what happened, when, what is left, and how to load it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..decide.plan import RankPlan
from ..decide.tables import short_count
from ..patch.report import FactorizationReport
from .drawing import places_of
from .page import code, figure, page, paragraph, table, write
from .sizes import SizeCurve
from .svg import Line, bars, heat_map, line_chart


def run_page(
    report: FactorizationReport,
    path: str | Path | None = None,
    *,
    history: Iterable[Mapping[str, Any]] = (),
    log: Iterable[Mapping[str, Any]] = (),
    seconds: tuple[float, float] | None = None,
    auto_class: str = "AutoModel",
    title: str = "Cuttlefish: the story of a run",
) -> str:
    """The page of a run.

    Args:
        report: of the switch. path: file to write; None: only returned. history: as of `Cuttlefish.history`.
        log: records with `step` and `loss` or metrics, as `trainer.state.log_history`. seconds: of a step before and after.
        auto_class: that loads such a model.
    """
    log = list(log)
    before, after = report.parameters_before, report.parameters_after
    share = after / max(1, before)
    when = f" after step {report.step}" if report.step is not None else ""
    lead = (
        f"{len(report.plan)} layers were factorized{when}. The model went from {short_count(before)} to {short_count(after)} "
        f"parameters ({share:.0%})."
    )
    sections = [
        ("Size and speed", _size_and_speed(report, seconds)),
        ("Loss", _losses(log, report.step)),
        ("Results", _metrics(log)),
        ("Rank of each layer", [rank_map(report.plan)]),
        ("Stable ranks", _stable_ranks(list(history), report.step)),
        (
            "What was decided, and why",
            [paragraph(note) for note in (*report.plan.notes, f"Optimizer: {report.optimizer}.")],
        ),
        ("Load it", [code(_loading(auto_class))]),
    ]
    return write(path, page(title, lead, sections))


def sizes_page(curve: SizeCurve, path: str | Path | None = None, *, name: str = "the model") -> str:
    """The page of a model's sizes: the table, the curves with the knee, and the ranks at the knee."""
    knee = curve.knee()
    lead = f"What {name} would be at {len(curve.points)} sizes" + (
        f"; the knee is at {knee.kept:.0%}." if knee else "."
    )
    charts = [
        figure(
            line_chart(
                f"{panel.title} by size",
                [Line(line, sorted(points), has_dots=True) for line, points in panel.lines.items()],
                "share of the target layers' parameters kept",
                panel.title,
                {knee.kept: f"knee, {knee.kept:.0%}"} if knee else None,
                (panel.dense, f"dense, {panel.dense:.4g}"),
                percent=True,
            ),
            f"{panel.title[0].upper()}{panel.title[1:]}: the dotted level is the dense model.",
        )
        for panel in curve.panels()
    ]
    shown = curve.points.index(knee) if knee in curve.points else len(curve.points) // 2
    kept = curve.points[shown].kept
    sections = [
        ("Sizes", [table(curve.rows_of_table()), *(paragraph(note, quiet=True) for note in curve.notes())]),
        ("What a size costs", charts),
        (f"Rank of each layer at {kept:.0%}", [rank_map(curve.plans[shown])]),
    ]
    return write(path, page(f"Sizes of {name}", lead, sections))


def rank_map(plan: RankPlan) -> str:
    """The ranks, a row for each layer and a column for each kind of projection."""
    places = places_of(plan.decisions)
    rows = sorted({row for row, _ in places.values()})
    columns = list(dict.fromkeys(kind for _, kind in places.values()))
    cells = {
        (rows.index(places[name][0]), columns.index(places[name][1])): decision.rank
        for name, decision in plan.decisions.items()
    }
    names = [".".join(map(str, row)) or "-" for row in rows]
    drawn = heat_map("Rank of each layer, by block and kind of projection", names, columns, cells)
    return figure(drawn, "Rows are blocks. A deeper cell has a larger rank; 'dense' stays as it is.")


def _loading(auto_class: str) -> str:
    return f"""import hf_cuttlefish  # first
from transformers import {auto_class}

model = {auto_class}.from_pretrained(folder)

# without this package
model = {auto_class}.from_pretrained(folder, trust_remote_code=True)

# as an ordinary dense checkpoint, with this package
hf_cuttlefish.save_merged(model, dense_folder)"""


def _size_and_speed(report: FactorizationReport, seconds: tuple[float, float] | None) -> list[str]:
    pairs = [
        ("Whole model", report.parameters_before, report.parameters_after),
        ("Blocks", report.encoder_parameters_before, report.encoder_parameters_after),
        ("Factorized layers", report.target_parameters_before, report.target_parameters_after),
    ]
    drawn = [
        (name, before, after, f"{before:,} before", f"{after:,} after ({after / max(1, before):.0%})")
        for name, before, after in pairs
    ]
    parts = [figure(bars("Parameters before and after", drawn), "Parameters before the switch and after it.")]
    if seconds is None:
        return [
            *parts,
            paragraph("Too few steps were timed on both sides of the switch to compare their speed.", quiet=True),
        ]
    old, new = seconds
    speed = bars(
        "Seconds of a training step",
        [("A training step", old, new, f"{1000 * old:.3g} ms before", f"{1000 * new:.3g} ms after ({new / old:.0%})")],
    )
    return [*parts, figure(speed, "Median time of a training step, as the loop saw it on this machine.")]


def _losses(log: Sequence[Mapping[str, Any]], switch: int | None) -> list[str]:
    trained = [(float(r["step"]), float(r["loss"])) for r in log if "loss" in r and "step" in r]
    evaluated = [(float(r["step"]), float(r["eval_loss"])) for r in log if "eval_loss" in r and "step" in r]
    lines = []
    if len(trained) > 40:
        lines += [Line("as logged", trained, is_faint=True), Line("training, smoothed", _smoothed(trained))]
    elif trained:
        lines.append(Line("training", trained, has_dots=True))
    if evaluated:
        lines.append(Line("evaluation", evaluated, has_dots=True))
    if not lines:
        return []
    marks = {} if switch is None else {float(switch): f"switch, step {switch}"}
    chart = line_chart("Loss over the run", lines, "optimizer step", "loss", marks, from_zero=True)
    return [figure(chart, "Loss over the run, with the switch marked.")]


def _metrics(log: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {r["step"]: r for r in log if "step" in r and any(k.startswith("eval_") for k in r)}
    evaluations = list(found.values())  # the last one of a step
    skipped = re.compile(r"eval_(runtime|.*_per_second|.*_time|model_preparation_time)$")
    names = list(dict.fromkeys(k for r in evaluations for k in r if k.startswith("eval_") and not skipped.match(k)))
    if not names:
        return []
    header = ["step", *(name.removeprefix("eval_") for name in names)]
    rows = [[f"{r['step']:,}", *(_cell(r.get(name)) for name in names)] for r in evaluations[-12:]]
    return [table([header, *rows])]


def _stable_ranks(history: Sequence[Mapping[str, Any]], switch: int | None) -> list[str]:
    """Change since the first measurement, a line for each kind of projection: the levels themselves hardly move."""
    if not history:
        return []
    kinds = {name: kind for name, (_, kind) in places_of(r["layer"] for r in history).items()}
    first: dict[str, float] = {}
    values: dict[str, dict[int, list[float]]] = {}
    levels: dict[str, list[float]] = {}
    for r in history:
        base = first.setdefault(r["layer"], float(r["stable_rank"])) or 1.0
        change = 100 * (float(r["stable_rank"]) / base - 1)
        values.setdefault(kinds[r["layer"]], {}).setdefault(int(r["step"]), []).append(change)
        if r["stable_rank"] is not None and first[r["layer"]] == r["stable_rank"]:
            levels.setdefault(kinds[r["layer"]], []).append(float(r["stable_rank"]))
    lines = [
        Line(
            f"{kind} ({statistics.median(levels[kind]):.1f})",
            [(s, statistics.median(v)) for s, v in sorted(steps.items())],
        )
        for kind, steps in sorted(values.items())
    ]
    marks = {} if switch is None else {float(switch): f"switch, step {switch}"}
    chart = line_chart(
        "Change of the stable ranks since the start", lines, "optimizer step", "change since the start, %", marks
    )
    caption = "Median over the layers of each kind; in brackets the stable rank at the start. Flat lines mean that a switch can come."
    return [figure(chart, caption)]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    reach = max(1, len(points) // 20)
    return [
        (x, statistics.fmean(y for _, y in points[max(0, i - reach) : i + reach + 1]))
        for i, (x, _) in enumerate(points)
    ]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "" if value is None else str(value)
