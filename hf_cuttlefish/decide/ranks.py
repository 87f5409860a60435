"""How much: the rank of each layer of a model, by a named rule."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..config import CuttlefishConfig
from ..layers.dense import check_rank
from ..layers.kinds import dense_weight, kind_of
from ..maths.factors import Decomposition, LayerMoments, Moments, decompose
from ..maths.stable_ranks import stable_rank
from .plan import RankDecision, RankPlan
from .rules import RULES, LayerSpectrum, allowed_rank, dropped_loss
from .targets import find_targets, matches


def estimate_ranks(
    model: nn.Module,
    config: CuttlefishConfig | None = None,
    *,
    statistics: Mapping[str, Moments] | None = None,
    initial_stable_ranks: Mapping[str, float] | None = None,
    training_loss: float | None = None,
) -> RankPlan:
    """The rank of each target layer, as the switch would choose it now. Changes nothing.

        plan = estimate_ranks(model, CuttlefishConfig(target_ratio=0.3))
        print(plan.summary())

    Args:
        model: a model with weights (or on the meta device with rank_rule="ratio", which needs none).
        config: rule, targets and limits; the default config if None.
        statistics: moments of the layers (`MomentCollector.moments()`); rule "loss" falls back to "ratio" without them.
        initial_stable_ranks: of the weights the run started from, for xi as the paper has it.
        training_loss: current loss per example, the unit of `max_loss_increase`.

    Returns:
        A plan of all target layers, dense ones included.

    Raises:
        ValueError: a pattern without a match, weights that are not finite (named) or on the meta device.
    """
    config = CuttlefishConfig.coerce(config)
    layers = find_targets(model, config)
    spectra = {}
    shapes_only = needs_no_weights(config, statistics)
    for name, layer in layers.items():
        kind = kind_of(layer)
        (n_out, n_in), stack = kind.size, kind.count
        moments = (statistics or {}).get(name)
        initial = (initial_stable_ranks or {}).get(name)
        if rank_by_hand(name, config) is not None or shapes_only:
            measured = None if layer.weight.is_meta else _measured(name, layer)
            spectra[name] = LayerSpectrum(
                n_in, n_out, initial_stable_rank=initial, measured_stable_rank=measured, count=stack
            )
        else:
            spectra[name] = spectrum_of(name, layer, config, moments, initial)[0]
    return plan_ranks(spectra, config, training_loss)


def _measured(name: str, layer: nn.Module) -> float:
    try:
        return float(stable_rank(dense_weight(layer)).mean())
    except ValueError as error:
        raise ValueError(f"{name} cannot be factorized: {error}") from error


def needs_no_weights(config: CuttlefishConfig, statistics: Mapping[str, Moments] | None) -> bool:
    """Whether the rule looks at nothing but shapes."""
    return config.rank_rule == "ratio" or (config.rank_rule == "loss" and not statistics)


def spectrum_of(
    name: str, layer: nn.Module, config: CuttlefishConfig, moments: Moments | None, initial: float | None
) -> tuple[LayerSpectrum, Decomposition]:
    """The spectrum of one layer in the metric that the rule works in, and the decomposition behind it.

    Raises ValueError, naming the layer, for weights that are on the meta device or not finite.
    """
    weight = dense_weight(layer)
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: load its weights before factorizing it")
    in_loss = config.rank_rule == "loss" and moments is not None
    try:
        d = decompose(weight, moments if in_loss else None)
    except ValueError as error:
        raise ValueError(f"{name} cannot be factorized: {error}") from error
    n_out, n_in = weight.shape[-2:]
    spectrum, count = d.spectrum.cpu(), kind_of(layer).count
    if in_loss and moments is not None:
        tokens = moments.tokens if isinstance(moments, LayerMoments) else 1.0
        each = [] if isinstance(moments, LayerMoments) else moments
        blind = tuple(i for i, one in enumerate(each) if one is None)
        return LayerSpectrum(n_in, n_out, None, spectrum, tokens, initial, count=count, blind=blind), d
    return LayerSpectrum(n_in, n_out, spectrum, None, 1.0, initial, count=count), d


def plan_ranks(
    spectra: Mapping[str, LayerSpectrum],
    config: CuttlefishConfig,
    training_loss: float | None = None,
    left: Mapping[str, str] | None = None,
) -> RankPlan:
    """A plan from spectra alone, by the config's rule (a pure function).

    Args:
        left: layers that stay dense whatever the rule says -> reason; the rule does not count them.
    """
    notes: list[str] = []
    left = left or {}
    by_rule = {name: s for name, s in spectra.items() if rank_by_hand(name, config) is None and name not in left}
    wanted = RULES[config.rank_rule](by_rule, config, training_loss, notes) if by_rule else {}
    decisions = {}
    rank: int | None
    for name, s in spectra.items():
        by_hand = rank_by_hand(name, config)
        if name in left:
            rank, reason = None, left[name]
        elif by_hand is not None:
            check_rank(by_hand, s.in_features, s.out_features, name)
            rank, reason = by_hand, "rank_pattern"
        else:
            rank, reason = allowed_rank(max(wanted[name], s.least), s.in_features, s.out_features, config.rank_multiple)
        decisions[name] = RankDecision(
            s.in_features,
            s.out_features,
            rank,
            reason,
            s.stable_rank,
            dropped_loss(s, rank) if rank is not None else 0.0,
            s.count,
        )
    known = all(s.loss_spectrum is not None for s in by_rule.values()) and bool(by_rule)
    total = sum(d.predicted_loss_increase or 0.0 for d in decisions.values()) if known else None
    notes += [_blind_note(name, s, decisions[name].rank) for name, s in spectra.items() if s.blind and name not in left]
    for why in dict.fromkeys(left.values()):
        names = [name for name in left if left[name] == why]
        notes.append(f"{len(names)} layers stay dense ({names[0]}{', ...' if names[1:] else ''}): {why}")
    return RankPlan(decisions, config.rank_rule, notes, total)


def _blind_note(name: str, s: LayerSpectrum, rank: int | None) -> str:
    shown = ", ".join(map(str, s.blind[:12])) + (", ..." if len(s.blind) > 12 else "")
    cut = "and stay dense" if rank is None else f"and are cut by their weights alone, at no less than rank {s.least}"
    return f"{name}: {len(s.blind)} of {s.count} experts saw too few tokens ({shown}) {cut}"


def rank_by_hand(name: str, config: CuttlefishConfig) -> int | None:
    """The rank that `rank_pattern` gives a layer, or None."""
    for pattern, rank in config.rank_pattern.items():
        if matches(pattern, name):
            return rank
    return None
