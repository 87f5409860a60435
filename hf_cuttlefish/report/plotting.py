"""Pictures of a run over its steps: stable ranks, and the loss. The pictures of plans and sizes are found here as well.

Needs matplotlib (`pip install hf-cuttlefish[plots]`), which is imported when a plot is drawn and not before. Figures
are drawn for the width of a README column, in the colours of Okabe and Ito, viridis or cividis, which stay apart for colour-blind
readers; lines differ in their dashes or markers as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import (
    COLOURS,
    DASHES,
    headline,
    label_ends,
    mark_switch,
    new_figure,
    places_of,
    quiet_axes,
    save_figure,
)
from .plan_plots import plot_ranks, plot_spectra
from .size_plots import plot_accuracy, plot_sizes

__all__ = ["plot_accuracy", "plot_loss", "plot_ranks", "plot_sizes", "plot_spectra", "plot_stable_ranks"]


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
        quiet_axes(axes)
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
        runs.append(("full rank", list(full_rank), "#000000", DASHES[1]))
    if not any("loss" in r or "eval_loss" in r for _, records, *_ in runs for r in records):
        raise ValueError("no loss was logged, so there is nothing to draw")
    figure = new_figure(height=4.4)
    axes = figure.subplots()
    for name, records, colour, dashes in runs:
        _draw_losses(axes, name, records, colour, dashes)
    axes.margins(x=0.02)
    axes.set_ylim(bottom=0)
    if switch_step is not None:
        mark_switch([axes], switch_step)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    quiet_axes(axes)
    axes.legend(frameon=False, fontsize=10, loc="upper right")
    headline(axes, title or "Loss during training", "thin: as logged")
    return save_figure(figure, path)


def _draw_losses(axes: Axes, name: str, records: list[Mapping[str, Any]], colour: str, dashes: Any) -> None:
    """One run's losses: as logged, their running mean, and the evaluations."""
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


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean of a tenth of the values around each one, so that no step of them is moved to the right."""
    reach = len(values) // 20
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile, the values between them interpolated."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper
