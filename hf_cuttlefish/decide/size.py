"""How small: the smallest size whose measured effect on kept batches is within bounds. One decomposition gives every size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..config import CuttlefishConfig
from ..maths.factors import Decomposition, rough_cut
from ..measure.kept import Effect, KeptBatches
from .ranks import plan_ranks
from .rules import DEFAULT_RATIO, LayerSpectrum

SIZES = (0.3, 0.35, 0.4, 0.45, 0.5)
"""Default sizes to choose from: shares of the target layers' parameters."""
BOUNDED_SIZES = (0.1, 0.14, 0.18, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)
"""Sizes that `max_loss_increase` chooses from."""
DIVERGENCE = 0.1
"""Largest mean divergence of the cut model's outputs, as a share of the loss (issue 16; docs/results.md)."""
UNSETTLED = 0.25
"""With a larger alignment of the weights' travel much is still to be learnt, of which the outputs know nothing yet: no default
size below `DEFAULT_RATIO` then."""


def measured_size(
    layers: Mapping[str, nn.Module],
    spectra: Mapping[str, LayerSpectrum],
    parts: Mapping[str, Decomposition],
    config: CuttlefishConfig,
    kept: KeptBatches,
    alignment: float | None,
    training_loss: float | None,
    left: Mapping[str, str],
) -> tuple[float | None, str]:
    """The size (a `target_ratio`) and a note of what was measured; None and "" where nothing can be measured.

    Args:
        layers: name -> dense layer. spectra, parts: of the layers. kept: batches to try sizes on.
        alignment: of the weights' travel (`Heading`). training_loss: where the kept batches give none. left: see `plan_ranks`.
    """
    before = kept.effect(layers, {})
    loss = before.loss or training_loss
    bound = config.max_loss_increase
    if not len(kept) or not loss or (before.divergence is None and bound is None) or (bound and before.loss is None):
        return None, ""
    measured: dict[float, Effect] = {}

    def within(ratio: float) -> bool:
        sized = replace(config, target_ratio=ratio, max_loss_increase=None)
        plan = plan_ranks(spectra, sized, left=left)
        cuts = {name: rough_cut(parts[name], rank) for name, rank in plan.items() if name in parts}
        measured[ratio] = found = kept.effect(layers, cuts)
        if bound is not None:
            return found.loss is not None and found.loss - loss <= bound * loss
        return found.divergence is not None and found.divergence <= DIVERGENCE * loss

    sizes: Sequence[float] = BOUNDED_SIZES if bound is not None else SIZES
    if bound is None and alignment is not None and alignment > UNSETTLED:
        sizes = [size for size in sizes if size >= DEFAULT_RATIO]
    size = _smallest(sizes, within)
    told = ", ".join(
        f"{ratio:g}: loss {'?' if e.loss is None else f'{e.loss:.4g}'}, outputs {e.divergence or 0:.3g}"
        for ratio, e in sorted(measured.items())
    )
    return size, f"size {size:g}, measured on {len(kept)} batches (uncut: loss {loss:.4g}; {told})"


def _smallest(sizes: Sequence[float], within: Callable[[float], bool]) -> float:
    """The smallest size that is within bounds, by bisection; the largest where none of those tried is."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if within(sizes[middle]) else (middle + 1, high)
    return sizes[low]
