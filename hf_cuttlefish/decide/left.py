"""Leave dense: layers for which something is missing that a cut would need, each with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ..config import CuttlefishConfig
from ..maths.factors import LayerMoments, Moments
from .ranks import rank_by_hand

FROZEN = "frozen: what a cut costs could not be trained back (name it in target_modules to cut it all the same)"
UNRECOVERED = (
    "even at the largest size a cut changes what the model says by more than the rest of the run would bring back (set target_ratio "
    "to cut it all the same)"
)
UNBOUNDED = "no size keeps within max_loss_increase (a larger one would)"
UNSEEN = "no gradient was seen at its output, so what it is worth is not known"


def left_frozen(layers: Mapping[str, nn.Module], config: CuttlefishConfig) -> dict[str, str]:
    """Target layers that are not trained, and that the user has not named: name -> reason.

    Frozen towers, teachers inside a model and the lower half of a partly frozen encoder stay as they are.
    """
    if config.names_targets:
        return {}
    frozen = (name for name, layer in layers.items() if not layer.weight.requires_grad)
    return {name: FROZEN for name in frozen if rank_by_hand(name, config) is None}


def left_blind(
    layers: Mapping[str, nn.Module], config: CuttlefishConfig, statistics: Mapping[str, Moments]
) -> dict[str, str]:
    """Stacks of which more than half of the matrices saw too few tokens: name -> reason, with their numbers."""
    left = {}
    for name in layers:
        each = statistics.get(name)
        if each is None or isinstance(each, LayerMoments) or rank_by_hand(name, config) is not None:
            continue
        blind = [i for i, moments in enumerate(each) if moments is None]
        if 2 * len(blind) > len(each):
            left[name] = f"{len(blind)} of {len(each)} experts saw too few tokens ({', '.join(map(str, blind))})"
    return left


def left_unseen(layers: Mapping[str, nn.Module], config: CuttlefishConfig, seen: Collection[str]) -> dict[str, str]:
    """Target layers of which statistics were to be gathered and none came: name -> reason. seen: those that have some."""
    return {name: UNSEEN for name in layers if name not in seen and rank_by_hand(name, config) is None}
