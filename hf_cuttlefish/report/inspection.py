"""Look: what each rank rule would make of a model, and what a factorized model is now. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..config import RANK_RULES, CuttlefishConfig
from ..decide.aligning import aligned
from ..decide.plan import RankDecision, RankPlan
from ..decide.ranks import plan_ranks
from ..decide.rules import DEFAULT_RATIO, LayerSpectrum
from ..decide.tables import text_table
from ..decide.targets import find_targets
from ..layers.kinds import dense_weight, find_layers, kind_of
from ..layers.low_rank import LowRankLayer, low_rank_layers
from ..layers.sizes import count_parameters, group_name
from ..maths.factors import LayerMoments, Moments, decompose
from ..maths.stable_ranks import stable_rank
from .flops import Flops, flops_of

SHORT = {"stable_rank": "stable", "scaled_stable_rank": "scaled", "accumulative": "accum."}
"""Rules whose names would make a table too wide."""


NOW = "now"
"""What the table calls the ranks that a factorized model has."""


@dataclass(frozen=True)
class Inspection:
    """Plans of one model by rule, all of the same layers in the same order.

    Attributes:
        plans: rule -> plan; the only key is "now" where the model is factorized already.
        parameters: of the whole model as it is.
        spectra: layer -> its spectra; empty where the model is factorized already.
        flops: of the layers, for a token or an image.
    """

    plans: dict[str, RankPlan]
    parameters: int
    spectra: dict[str, LayerSpectrum]
    flops: Flops = field(default_factory=Flops)

    def parameters_after(self, rule: str) -> int:
        """Of the whole model, factorized by that rule."""
        if rule == NOW:
            return self.parameters
        before, after = self.plans[rule].parameters()
        return self.parameters - before + after

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: a list of layers with the numbers by rule, and the totals by rule."""
        first, key = next(iter(self.plans.values())), self.flops.key
        layers = []
        for name, d in first.decisions.items():
            decisions = {rule: plan.decisions[name] for rule, plan in self.plans.items()}
            layers.append(
                {
                    "name": name,
                    "out_features": d.out_features,
                    "in_features": d.in_features,
                    "stable_rank": d.stable_rank,
                    "full_rank": d.full_rank,
                    "break_even": d.break_even,
                    "parameters": d.parameters_before,
                    key: self.flops.each(name) * d.parameters_before,
                    "rules": {
                        rule: {
                            "rank": x.rank,
                            "reason": x.reason,
                            "parameters": x.parameters_after,
                            key: self.flops.each(name) * x.parameters_after,
                            "predicted_loss_increase": x.predicted_loss_increase,
                        }
                        for rule, x in decisions.items()
                    },
                }
            )
        return {
            "parameters": self.parameters,
            "rules": {rule: self._totals(rule) for rule in self.plans},
            "layers": layers,
        }

    def table(self, rule: str) -> str:
        """A line for each layer with its rank under every rule, then size and FLOPs by `rule`, then a line for each rule."""
        chosen = self.plans[rule]
        rows = [
            [
                "layer",
                "shape",
                "stable rank",
                "break-even",
                *(SHORT.get(name, name) for name in self.plans),
                f"size ({rule})",
                f"kFLOPs ({rule})",
            ]
        ]
        for name, d in chosen.decisions.items():
            ranks = [plan.decisions[name].rank for plan in self.plans.values()]
            flops = self.flops.each(name) * d.parameters_after / 1000
            rows.append(
                [
                    name,
                    f"{d.out_features}x{d.in_features}",
                    "" if d.stable_rank is None else f"{d.stable_rank:.1f}",
                    str(d.break_even),
                    *("dense" if rank is None else str(rank) for rank in ranks),
                    f"{d.parameters_after:,} ({d.parameters_after / d.parameters_before:.0%})",
                    f"{flops:,.0f}",
                ]
            )
        totals = [["rule", "factorized", "these layers", "whole model", self.flops.header, "predicted loss increase"]]
        for name in self.plans:
            t = self._totals(name)
            predicted = t["predicted_loss_increase"]
            totals.append(
                [
                    name,
                    f"{t['factorized_layers']} of {len(chosen.decisions)}",
                    _change(t["target_parameters_before"], t["target_parameters"], 1),
                    _change(t["parameters_before"], t["parameters"], 1),
                    _change(t[f"{self.flops.key}_before"], t[self.flops.key], 10**6),
                    "" if predicted is None else f"{predicted:.3g}",
                ]
            )
        notes = [f"note ({name}): {note}" for name, plan in self.plans.items() for note in plan.notes]
        return "\n".join([text_table(rows), "", text_table(totals), *notes])

    def _totals(self, rule: str) -> dict[str, Any]:
        plan = self.plans[rule]
        before, after = plan.parameters()
        total = self.parameters_after(rule)
        return {
            "factorized_layers": len(plan),
            "target_parameters_before": before,
            "target_parameters": after,
            "parameters_before": total + before - after,
            "parameters": total,
            f"{self.flops.key}_before": self.flops.total(plan, before=True),
            self.flops.key: self.flops.total(plan),
            "predicted_loss_increase": plan.predicted_loss_increase,
            "notes": list(plan.notes),
        }


def inspect_model(
    model: nn.Module,
    config: CuttlefishConfig | None = None,
    *,
    statistics: Mapping[str, Moments] | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    example: Mapping[str, Any] | None = None,
) -> Inspection:
    """The rank of each target layer under every rule; of a factorized model, the ranks that it has.

    Rule "loss" needs statistics. Without them it stands for what `factorize` can do then: the same share
    (`target_ratio`, 0.4 by default) of each layer's parameters.

    Args:
        model: with weights; one decomposition of a layer is held at a time.
        config: targets and the rules' settings.
        statistics: moments of the layers (`post_training.gather_statistics`).
        progress: wraps the names of the layers as they are worked on, as tqdm does.
        example: keyword arguments of the model's forward: where convolutions are targets, FLOPs are those of one of its
            examples, each layer at its feature map; None: of a black image, where the model reads images.

    Raises:
        ValueError: as `find_targets`; weights that are not finite, naming the layer.
    """
    if low_rank_layers(model):
        plan = present_plan(model, measure=True)
        return Inspection({NOW: plan}, count_parameters(model), {}, flops_of(model, plan.decisions, example))
    config = CuttlefishConfig.coerce(config)
    if not statistics and config.target_ratio is None and config.max_loss_increase is None:
        config = replace(config, rank_rule="loss", target_ratio=DEFAULT_RATIO)
    layers = find_targets(model, config)
    config = aligned(config, model, layers)
    spectra = {}
    for name in progress(list(layers)):
        weight, moments = dense_weight(layers[name]), (statistics or {}).get(name)
        m, n = weight.shape[-2:]
        try:
            values = decompose(weight).spectrum.cpu()
            in_loss = None if moments is None else decompose(weight, moments).spectrum.cpu()
        except ValueError as error:
            raise ValueError(f"{name} cannot be factorized: {error}") from error
        tokens = moments.tokens if isinstance(moments, LayerMoments) else 1.0
        count = kind_of(layers[name]).count
        spectra[name] = LayerSpectrum(n, m, values, in_loss, tokens, count=count)
    plans = {}
    for rule in RANK_RULES:
        sized = {} if rule == "loss" else {"target_ratio": None, "max_loss_increase": None}
        plans[rule] = plan_ranks(spectra, replace(config, rank_rule=rule, **sized))  # type: ignore[arg-type]
    return Inspection(plans, count_parameters(model), spectra, flops_of(model, layers, example))


def present_plan(model: nn.Module, measure: bool = False) -> RankPlan:
    """The ranks that a factorized model has, as a plan; dense layers of the same projections are in its decisions.

    Args:
        measure: work out the stable rank of each layer, too (of the factors' product).

    Raises:
        ValueError: the model has no factorized layer.
    """
    pairs = low_rank_layers(model)
    if not pairs:
        raise ValueError(f"{type(model).__name__} has no factorized layer")
    groups = {group_name(name) for name in pairs}
    decisions = {}
    for name, module in find_layers(model):
        rank = module.rank if isinstance(module, LowRankLayer) else None
        if rank is None and group_name(name) not in groups:
            continue
        kind, found = kind_of(module), None
        if measure:
            weight = module.product() if isinstance(module, LowRankLayer) else kind.weight
            found = float(stable_rank(weight).mean())
        m, n = kind.size
        decisions[name] = RankDecision(n, m, rank, "as it is", found, count=kind.count)
    return RankPlan(decisions, rule="as it is")


def _change(before: int, after: int, unit: int) -> str:
    digits = 0 if unit == 1 else 2
    return f"{before / unit:,.{digits}f} -> {after / unit:,.{digits}f} ({after / max(1, before):.0%})"
