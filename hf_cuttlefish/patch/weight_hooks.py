"""Hooks on a weight itself (`weight.register_hook`): they act on its gradient, which is no more once it is two factors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from .optimizer import inner_optimizer
from .optimizer_parts import optimizers_in

logger = logging.getLogger(__name__)

LOST = (
    "A mask or a scaling of the gradient ends there. Where it has to hold, exclude these layers (exclude_modules); where it only "
    "looks on, register it on the factors after the switch"
)


def hooked(layers: Mapping[str, nn.Module], optimizer: Any = None) -> list[str]:
    """Names of the layers whose weight has gradient hooks that are not the optimizer's own (LOMO's, which finds the factors)."""
    own = optimizers_in(inner_optimizer(optimizer)) if optimizer is not None else []

    def is_own(hook: Callable[..., Any]) -> bool:
        return any(known is one for known in _known_to(hook) for one in own)

    return [
        name for name, la in layers.items() if any(not is_own(hook) for hook in _hooks(la.weight, "_backward_hooks"))
    ]


def check_weight_hooks(layers: Mapping[str, nn.Module], optimizer: Any = None, say: bool = True) -> None:
    """Warn of gradient hooks on target weights, which the switch loses; refuse those that step the weight in backward.

    Args:
        say: whether this process speaks for all.

    Raises:
        ValueError: hooks of `register_post_accumulate_grad_hook`, an optimizer in backward: the factors would not train.
    """
    stepping = [name for name, layer in layers.items() if _hooks(layer.weight, "_post_accumulate_grad_hooks")]
    if stepping:
        raise ValueError(
            f"{stepping[0]}.weight has a post-accumulate-grad hook ({len(stepping)} of {len(layers)} target weights have one), as an "
            "optimizer in backward has, and the factors that take its place would have none and not train: step the optimizer "
            "after backward, or exclude these layers"
        )
    names = hooked(layers, optimizer)
    if names and say:
        logger.warning(
            "Cuttlefish: the weights of %s have gradient hooks, which the switch will lose. %s.", _few(names), LOST
        )


def say_lost(layers: Mapping[str, nn.Module], optimizer: Any = None) -> None:
    """At the switch: name the layers whose gradient hooks have gone with their weights."""
    if names := hooked(layers, optimizer):
        logger.warning("Cuttlefish: the gradient hooks on the weights of %s are gone with them. %s.", _few(names), LOST)


def _hooks(weight: Any, table: str) -> list[Callable[..., Any]]:
    return list((getattr(weight, table, None) or {}).values())


def _known_to(hook: Callable[..., Any]) -> Iterator[Any]:
    """The object that a hook is a method of, and all that it has closed over."""
    yield getattr(hook, "__self__", None)
    for cell in getattr(hook, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty cell
            continue


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
