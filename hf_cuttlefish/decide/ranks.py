"""How much: the rank of each layer of a model, by a named rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..config import CuttlefishConfig
from ..layers.dense import check_rank
from ..layers.kinds import dense_weight, kind_of
from ..maths.factors import Decomposition, LayerMoments, Moments, decompose, decompose_together
from ..maths.stable_ranks import stable_rank
from .aligning import aligned, multiple_of
from .even import even_ranks
from .plan import RankDecision, RankPlan
from .rules import RULES, LayerSpectrum, allowed_rank, dropped_loss
from .targets import find_targets, matches, notes_of_dense

BATCH_BYTES = 2**29
"""Of the work on layers of one shape that are decomposed in one batch."""
BATCHED_ON = "cuda"
"""Where batches pay: a GPU takes as long for one matrix of a layer as for several, and waits after each."""


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
        model: a model with weights; on the meta device where none are needed: rule "ratio", and "loss" without statistics.
        config: rule, targets and limits; the default config if None.
        statistics: moments of the layers, as `gather_statistics` gives them. Without them rule "loss" treats all layers alike:
            each keeps target_ratio of its parameters or, if that is None, rank_ratio of its full rank.
        initial_stable_ranks: of the weights the run started from, for the scaled stable ranks as the paper has them.
        training_loss: current loss per example, the unit of `max_loss_increase`.

    Returns:
        A plan of all target layers, dense ones included.

    Raises:
        ValueError: a pattern without a match, weights that are not finite (named) or on the meta device.
    """
    config = CuttlefishConfig.coerce(config)
    layers = find_targets(model, config)
    config = aligned(config, model, layers)
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
    plan = plan_ranks(spectra, config, training_loss)
    plan.notes[:0] = notes_of_dense(model)
    return plan


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
    return _layer_spectrum(layer, d.spectrum.cpu(), moments if in_loss else None, initial), d


def spectra_of(
    layers: Mapping[str, nn.Module],
    config: CuttlefishConfig,
    moments: Mapping[str, Moments],
    initial: Mapping[str, float],
) -> Iterator[tuple[str, LayerSpectrum, Decomposition]]:
    """As `spectrum_of` of each layer; on a GPU those of one shape in batches, in any order. Raises as it does."""
    for names in _batches(layers):
        given = [moments.get(name) if config.rank_rule == "loss" else None for name in names]
        try:
            weights = [dense_weight(layers[name]) for name in names] if len(names) > 1 else []
            found = decompose_together(torch.stack(weights), given) if weights else []  # type: ignore[arg-type]
        except ValueError:
            found = []  # one by one, to name the layer
        if not found:
            for name in names:
                yield name, *spectrum_of(name, layers[name], config, moments.get(name), initial.get(name))
            continue
        values = torch.stack([d.spectrum for d in found]).cpu()  # the device is waited for once
        for name, d, spectrum, seen in zip(names, found, values, given, strict=True):
            yield name, _layer_spectrum(layers[name], spectrum, seen, initial.get(name)), d


def _batches(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Names of layers of one shape on one GPU, so many that their work fits into `BATCH_BYTES`; others alone."""
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in layers.items():
        weight = dense_weight(layer)
        if weight.ndim == 2 and weight.device.type == BATCHED_ON:
            together.setdefault((weight.shape, weight.dtype, weight.device), []).append(name)
        else:
            yield [name]
    for ((m, n), _, _), names in together.items():
        most = max(1, BATCH_BYTES // (8 * (3 * m * n + 8 * min(m, n) ** 2)))
        yield from (names[i : i + most] for i in range(0, len(names), most))


def _layer_spectrum(
    layer: nn.Module, spectrum: torch.Tensor, moments: Moments | None, initial: float | None
) -> LayerSpectrum:
    """moments: where the spectrum is in the metric of the loss."""
    n_out, n_in = dense_weight(layer).shape[-2:]
    count = kind_of(layer).count
    if moments is None:
        return LayerSpectrum(n_in, n_out, spectrum, None, 1.0, initial, count=count)
    tokens = moments.tokens if isinstance(moments, LayerMoments) else 1.0
    each = [] if isinstance(moments, LayerMoments) else moments
    blind = tuple(i for i, one in enumerate(each) if one is None)
    return LayerSpectrum(n_in, n_out, None, spectrum, tokens, initial, count=count, blind=blind)


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
    rule = even_ranks if config.even_ranks is True else RULES[config.rank_rule]
    wanted = rule(by_rule, config, training_loss, notes) if by_rule else {}
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
            least = max(wanted[name], s.least)
            rank, reason = allowed_rank(least, s.in_features, s.out_features, multiple_of(config))
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
