"""How small: the smallest size whose measured effect on kept batches is within bounds. One decomposition gives every size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..config import CuttlefishConfig
from ..maths.factors import Decomposition, rough_cut
from ..measure.kept import Effect, KeptBatches
from .ranks import plan_ranks
from .rules import DEFAULT_RATIO, LayerSpectrum, starts_at_random

SIZES = (0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)
"""Default sizes to choose from: shares of the target layers' parameters."""
LEARNING_SIZES = (0.3, 0.35, 0.4, 0.45, 0.5)
"""The same where the rest of the run learns more than a cut takes: from random weights, or with weights that still travel straight."""
BOUNDED_SIZES = (0.1, 0.14, 0.18, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Sizes that `max_loss_increase` chooses from."""
TOKEN_SIZES = (*SIZES, 0.9)
"""Sizes to choose from for a pretrained language model."""
DENSE = 1.0
"""What is chosen where no size is within a bound."""
DIVERGENCE = 0.01
"""Largest mean divergence of a cut pretrained model's outputs, as a share of the loss: about the share of decisions that change
(issue 16; docs/results-rates.md). With a tenth MPNet-base lost 1.2 to 1.8 points in two of three texts."""
LEARNING_DIVERGENCE = 0.1
"""The same where the rest of the run learns more than a cut takes."""
TOKEN_DIVERGENCE = 0.06
"""The same for a pretrained language model, in nats a token. Most of its loss cannot be learnt, so that a share of it says nothing.
Of what a cut takes a fine-tune brings 50 to 77% back, whatever the size: 0.06 are then 1.5 to 3% of perplexity
(docs/language-models.md)."""
UNSETTLED = 0.25
"""With a larger alignment of the weights' travel much is still to be learnt, of which the outputs know nothing yet: no default
size below `DEFAULT_RATIO` then."""

Tried = list[tuple[dict[str, int], Effect]]
"""Ranks by name, and what these cuts do on the kept batches."""


def largest_divergence(loss: float, of_tokens: bool, is_learning: bool = False) -> float:
    """What a default cut may change of the outputs.

    Args:
        of_tokens: whether the model is a language model. is_learning: whether the rest of the run learns more than a cut takes.
    """
    if is_learning:
        return LEARNING_DIVERGENCE * loss
    return min(LEARNING_DIVERGENCE * loss, TOKEN_DIVERGENCE) if of_tokens else DIVERGENCE * loss


def measured_size(
    layers: Mapping[str, nn.Module],
    spectra: Mapping[str, LayerSpectrum],
    parts: Mapping[str, Decomposition],
    config: CuttlefishConfig,
    kept: KeptBatches,
    alignment: float | None,
    training_loss: float | None,
    left: Mapping[str, str],
) -> tuple[float | None, str, Tried]:
    """The size (a `target_ratio`), a note, and what was measured; None, "" and nothing where nothing can be measured.

    `DENSE` where a bound holds for no size: that of the config, or the one for pretrained language models.

    Args:
        layers: name -> dense layer. spectra, parts: of the layers. kept: batches to try sizes on.
        alignment: of the weights' travel (`Heading`). training_loss: where the kept batches give none. left: see `plan_ranks`.
    """
    before = kept.effect(layers, {})
    loss = before.loss or training_loss
    bound = config.max_loss_increase
    if not len(kept) or not loss or (before.divergence is None and (bound is None or before.loss is None)):
        return None, "", []
    settled = alignment is None or alignment <= UNSETTLED
    is_learning = not settled or starts_at_random(spectra)
    cautious = before.of_tokens and not is_learning
    limit = largest_divergence(loss, before.of_tokens, is_learning)
    measured: dict[float, Effect] = {}
    tried: Tried = []

    def within(ratio: float) -> bool:
        if ratio == DENSE:
            return True
        sized = replace(config, target_ratio=ratio, max_loss_increase=None)
        plan = plan_ranks(spectra, sized, left=left)
        found = next((effect for ranks, effect in tried if ranks == dict(plan)), None)
        if found is None:
            cuts = {name: rough_cut(parts[name], rank) for name, rank in plan.items() if name in parts}
            found = kept.effect(layers, cuts, limit if bound is None else None)
            tried.append((dict(plan), found))
        measured[ratio] = found
        if bound is not None:
            # Where the labels are kept from the model, the divergence of its outputs stands for the rise of the loss.
            rise = found.divergence if before.loss is None or found.loss is None else found.loss - loss
            return rise is not None and rise <= bound * loss
        return found.divergence is not None and found.divergence <= limit

    if bound is not None:
        sizes: Sequence[float] = (*BOUNDED_SIZES, DENSE)
    elif cautious:
        sizes = (*TOKEN_SIZES, DENSE)
    else:
        sizes = [size for size in (LEARNING_SIZES if is_learning else SIZES) if settled or size >= DEFAULT_RATIO]
    size = _smallest(sizes, within)
    told = ", ".join(f"{ratio:g}: {_told(effect)}" for ratio, effect in sorted(measured.items()))
    allowed = f"loss {(1 + bound) * loss:.4g}" if bound is not None else f"outputs {limit:.3g}"
    chosen = "no size is within bounds" if size == DENSE else f"size {size:g}"
    note = f"{chosen}, measured on {len(kept)} batches (uncut: loss {loss:.4g}; allowed: {allowed}; {told})"
    return size, note, tried


def _told(effect: Effect) -> str:
    """What a note says of a cut. The loss of some of the batches is not to be compared with that of all of them."""
    if not effect.is_whole:
        return f"outputs >{effect.divergence or 0:.3g}"
    return f"loss {'?' if effect.loss is None else f'{effect.loss:.4g}'}, outputs {effect.divergence or 0:.3g}"


def _smallest(sizes: Sequence[float], within: Callable[[float], bool]) -> float:
    """The smallest size that is within bounds, by bisection; the largest where none of those tried is."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if within(sizes[middle]) else (middle + 1, high)
    return sizes[low]
