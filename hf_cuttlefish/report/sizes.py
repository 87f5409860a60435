"""Choose a size by looking: what each size saves, and what it costs on rows held out. One decomposition serves all sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from ..config import CuttlefishConfig
from ..decide.aligning import aligned
from ..decide.plan import RankPlan, break_even_rank
from ..decide.ranks import plan_ranks, rank_by_hand, spectrum_of
from ..decide.rules import LayerSpectrum
from ..decide.size import largest_divergence
from ..decide.tables import text_table
from ..decide.targets import find_targets
from ..layers.sizes import count_parameters
from ..maths.factors import Decomposition, Moments, rough_cut
from ..measure.cuts import Measured, measure_cuts
from .flops import Flops, flops_of

METRICS = {"accuracy": "accuracy, %", "perplexity": "perplexity", "agreement": "same answer as dense, %"}
"""Metrics in the order in which one is shown: the first that is known."""

BEFORE_TRAINING = (
    "Measured before any training at that size. A run that trains on after the switch wins most of it back, so read the "
    "measured columns as an order, and look for the knee."
)


@dataclass(frozen=True)
class SizePoint:
    """One size. Parameters are numbers, `file_bytes` the weights in the model's own dtypes.

    Attributes:
        kept: share of the target layers' parameters, as it came out at whole ranks; 1 for the dense model.
        target_parameters, parameters: of the target layers, and of the whole model. flops: of the target layers.
        predicted_loss_increase: to second order; None without data. measured: on the rows held out; None without data.
    """

    kept: float
    target_parameters: int
    parameters: int
    flops: int
    file_bytes: int
    predicted_loss_increase: float | None
    measured: Measured | None


@dataclass(frozen=True)
class Panel:
    """What one panel of a picture shows: lines of (share kept, value), and the dense model's value."""

    title: str
    lines: dict[str, list[tuple[float, float]]]
    dense: float


@dataclass(frozen=True)
class SizeCurve:
    """Sizes of one model, from large to small; `dense` is the model as it is. plans: of each size. rows: that measured. flops: what they are of."""

    dense: SizePoint
    points: list[SizePoint]
    plans: list[RankPlan]
    rows: int = 0
    flops: Flops = field(default_factory=Flops)

    @property
    def metric(self) -> str | None:
        """The metric that is shown, as a field of `Measured`; None where none is known."""
        known = self.dense.measured
        return next((name for name in METRICS if known is not None and getattr(known, name) is not None), None)

    def knee(self) -> SizePoint | None:
        """Where the curve bends most: farthest below the straight line from the dense model to the smallest size.

        By measured loss, or by the divergence where there is none ("Kneedle" of Satopaa et al. 2011). None with fewer than
        three sizes, or where nothing was lost.
        """
        heights = [self._height(point) for point in (self.dense, *self.points)]
        if len(self.points) < 3 or any(h is None for h in heights):
            return None
        rise = heights[-1] - heights[0]  # type: ignore[operator]
        width = self.dense.kept - self.points[-1].kept
        if rise <= 0 or width <= 0:
            return None
        below = [
            (self.dense.kept - point.kept) / width - (height - heights[0]) / rise  # type: ignore[operator]
            for point, height in zip(self.points, heights[1:], strict=True)
        ]
        best = max(range(len(below)), key=below.__getitem__)
        return self.points[best] if below[best] > 0 else None

    def within_bound(self) -> SizePoint | None:
        """The smallest size whose outputs stay within the bound that a run's default size keeps to; None if none does."""
        if self.dense.measured is None or (loss := self.dense.measured.loss) is None:
            return None
        limit = largest_divergence(loss, self.dense.measured.perplexity is not None)
        near = [p for p in self.points if p.measured is not None and _divergence(p.measured) <= limit]
        return near[-1] if near else None

    def panels(self) -> list[Panel]:
        """Loss with its prediction, then the metric; only what was measured."""
        found = []
        if self.dense.measured is None:
            return []
        loss = self.dense.measured.loss
        if loss is not None:
            lines = {"measured": self._line("loss")}
            predicted = [(p.kept, loss + p.predicted_loss_increase) for p in self.points if p.predicted_loss_increase]
            if len(predicted) == len(self.points):
                lines["predicted"] = predicted
            found.append(Panel("loss", lines, loss))
        elif self.dense.measured.divergence is not None:
            found.append(Panel("divergence of the outputs, nats", {"measured": self._line("divergence")}, 0.0))
        if self.metric is not None:
            percent = 1 if self.metric == "perplexity" else 100
            values = [(kept, percent * value) for kept, value in self._line(self.metric)]
            dense = percent * getattr(self.dense.measured, self.metric)
            found.append(Panel(METRICS[self.metric], {"measured": values}, dense))
        return found

    def _line(self, name: str) -> list[tuple[float, float]]:
        return [(p.kept, float(getattr(p.measured, name))) for p in self.points if p.measured is not None]

    def rows_of_table(self) -> list[list[str]]:
        """Header, the dense model, and a row a size."""
        header = ["kept", "these layers", "whole model", self.flops.header, "file, MB", "predicted loss"]
        header += ["measured loss", METRICS.get(self.metric or "", "")]
        loss = self.dense.measured.loss if self.dense.measured is not None else None
        rows = []
        for point in (self.dense, *self.points):
            predicted = point.predicted_loss_increase
            rows.append(
                [
                    "dense" if point is self.dense else f"{point.kept:.0%}",
                    f"{point.target_parameters:,}",
                    f"{point.parameters:,} ({point.parameters / self.dense.parameters:.0%})",
                    f"{point.flops / 1e6:.2f}",
                    f"{point.file_bytes / 1e6:.1f}",
                    "" if predicted is None else f"+{predicted:.3g}" if loss is None else f"{loss + predicted:.4g}",
                    _number(point.measured, "loss"),
                    _number(point.measured, self.metric),
                ]
            )
        return [header, *rows]

    def notes(self) -> list[str]:
        """What to read out of the table."""
        if self.dense.measured is None:
            return [
                "No --data: nothing was measured, and every layer keeps the same share. Give --data FILE to see what a size costs."
            ]
        found = [f"{BEFORE_TRAINING} Rows held out: {self.rows}."]
        if (knee := self.knee()) is not None:
            found.append(f"Knee: {knee.kept:.0%}. Below it each further cut costs more for what it saves.")
        if (near := self.within_bound()) is not None:
            found.append(
                f"Smallest size whose outputs stay close to the dense model's (within the bound of a run's default size): {near.kept:.0%}."
            )
        return found

    def table(self) -> str:
        """A line a size."""
        return "\n".join([text_table(self.rows_of_table()), "", *self.notes()])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        knee, near = self.knee(), self.within_bound()
        return {
            "dense": self._point(self.dense),
            "sizes": [self._point(point) for point in self.points],
            "rows": self.rows,
            "knee": None if knee is None else knee.kept,
            "within_bound": None if near is None else near.kept,
        }

    def _point(self, point: SizePoint) -> dict[str, Any]:
        return {(self.flops.key if name == "flops" else name): value for name, value in asdict(point).items()}

    def _height(self, point: SizePoint) -> float | None:
        if point.measured is None or self.dense.measured is None:
            return None
        return point.measured.loss if self.dense.measured.loss is not None else point.measured.divergence


def size_curve(
    model: nn.Module,
    ratios: Sequence[float],
    config: CuttlefishConfig | None = None,
    *,
    statistics: Mapping[str, Moments] | None = None,
    held_out: Sequence[Mapping[str, Any]] = (),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> SizeCurve:
    """What a model would be at each size: parameters, FLOPs, bytes, and loss and metric on batches that are held out.

        curve = size_curve(model, [0.5, 0.33, 0.25], statistics=gather_statistics(...), held_out=batches)
        print(curve.table())

    The model does not change. Memory: beside the model the layers' factors at break-even, no larger than their weights.

    Args:
        model: dense, with weights, on its device. ratios: shares of the target layers' parameters, each above 0 and below 1.
        config: targets and limits. statistics: moments of the layers; without them the factors are those of the plain SVD.
        held_out: batches that the statistics were not made with. progress: wraps layers and batches, as tqdm does.

    Raises:
        ValueError: no ratio, one out of range; as `find_targets`; weights that are not finite, naming the layer.
    """
    ratios = sorted(set(ratios), reverse=True)
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(f"ratios are {ratios}: give one or more, each above 0 and below 1")
    config = replace(CuttlefishConfig.coerce(config), rank_rule="loss", max_loss_increase=None)
    layers = find_targets(model, config)
    config = aligned(config, model, layers)
    # One decomposition of each layer, cut off at break-even, serves every size.
    spectra: dict[str, LayerSpectrum] = {}
    parts: dict[str, Decomposition] = {}
    for name in progress(list(layers)):
        layer = layers[name]
        spectra[name], found = spectrum_of(name, layer, config, (statistics or {}).get(name), None)
        m, n = spectra[name].out_features, spectra[name].in_features
        most = max(break_even_rank(n, m), rank_by_hand(name, config) or 1)
        parts[name] = found.shortened(
            min(most, m, n), found.up.dtype if _weight(layer).element_size() > 4 else torch.float32
        )
    plans = [plan_ranks(spectra, replace(config, target_ratio=ratio)) for ratio in ratios]
    # Every size on the same batches.
    cuts = [{name: rough_cut(parts[name], rank) for name, rank in plan.items()} for plan in plans] if held_out else []
    measured: list[Any] = (
        measure_cuts(model, layers, cuts, held_out, progress) if held_out else [None] * (1 + len(plans))
    )
    before = sum(_weight(layer).numel() for layer in layers.values())
    flops = flops_of(model, layers, held_out[0] if held_out else None)
    sizes = _Sizes(count_parameters(model), before, _bytes_of(model), layers, flops)
    points = [sizes.point(plan, found) for plan, found in zip(plans, measured[1:], strict=True)]
    rows = sum(next(len(v) for v in batch.values() if hasattr(v, "__len__")) for batch in held_out)
    return SizeCurve(sizes.point(None, measured[0]), points, plans, rows, flops)


@dataclass(frozen=True)
class _Sizes:
    """Of the dense model: parameters, those of the target layers, bytes, the layers and their FLOPs."""

    parameters: int
    targets: int
    bytes: int
    layers: Mapping[str, nn.Module]
    flops: Flops

    def point(self, plan: RankPlan | None, measured: Measured | None) -> SizePoint:
        """The dense model (None), or what it would be under a plan."""
        after, saved = self.targets, 0
        flops = sum(self.flops.each(name) * _weight(layer).numel() for name, layer in self.layers.items())
        for name, decision in {} if plan is None else plan.decisions.items():
            less = decision.parameters_before - decision.parameters_after
            flops -= self.flops.each(name) * less
            after, saved = after - less, saved + less * _weight(self.layers[name]).element_size()
        return SizePoint(
            after / max(1, self.targets),
            after,
            self.parameters - self.targets + after,
            flops,
            self.bytes - saved,
            0.0 if plan is None and measured is not None else None if plan is None else plan.predicted_loss_increase,
            measured,
        )


def _weight(layer: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, layer.weight)


def _bytes_of(model: nn.Module) -> int:
    """What the weights take in a file: each tensor once, in its own dtype."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _divergence(measured: Measured) -> float:
    return float("inf") if measured.divergence is None else measured.divergence


def _number(measured: Measured | None, name: str | None) -> str:
    value = None if measured is None or name is None else getattr(measured, name)
    if value is None:
        return ""
    return f"{100 * value:.2f}" if name in ("accuracy", "agreement") else f"{value:.4g}"
