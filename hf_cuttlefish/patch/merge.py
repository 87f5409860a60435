"""Merge: low-rank pairs become dense layers again, in place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from ..layers.dense import is_quantized
from ..layers.kinds import kind_of
from ..layers.low_rank import LowRankLayer, low_rank_layers
from ..layers.vocabulary import with_tied
from ..measure.timing import slower_layers, time_inference
from ..measure.timing import table as timing_table
from .structure import write_structure
from .surgery import keep_hooks, swap

logger = logging.getLogger(__name__)


def merge_layers(
    model: nn.Module, where: str, example_inputs: Any, check: Callable[[nn.Module], None] = lambda model: None
) -> nn.Module:
    """As the public `merge` says. check: raises where the model may not be changed, once the arguments are known to be right."""
    if where not in ("all", "slower"):
        raise ValueError(f"where is {where!r}: it must be 'all' or 'slower'")
    if (example_inputs is None) == (where == "slower"):
        raise ValueError(
            "where='slower' times the layers at the shapes that you serve: give a batch of them as example_inputs"
            if example_inputs is None
            else "example_inputs are used with where='slower' only: give both or neither"
        )
    if example_inputs is not None and not isinstance(example_inputs, (Mapping, tuple, list, torch.Tensor)):
        raise TypeError(
            "example_inputs must be keyword arguments of the model's forward, a tensor or a tuple of positional ones, got "
            f"{type(example_inputs).__name__}"
        )
    check(model)
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no factorized layer to merge")
    if "" in layers:
        raise ValueError(f"this is a {type(model).__name__} and not a model that holds some: use layer.to_dense()")
    check_mergeable(layers)
    if where == "slower":
        layers = _slower(model, layers, example_inputs)
    dense = {id(layer): (layer, kind_of(keep_hooks(layer, layer.to_dense())).seat) for layer in layers.values()}
    swap(model, with_tied(model, dense))
    write_structure(model)
    return model


def check_mergeable(layers: Mapping[str, LowRankLayer]) -> None:
    """Raises ValueError, naming the layer, for factors that are quantized or hold an adapter."""
    for name, layer in layers.items():
        for child, own in zip((layer.down, layer.up), layer.child_classes, strict=True):
            if is_quantized(cast(torch.Tensor, child.weight)):
                raise ValueError(f"the factors of {name} are quantized, and have no product: merge before quantizing")
            if not isinstance(child, own):
                raise ValueError(
                    f"a factor of {name} is a {type(child).__name__}, and what it adds would be lost: with PEFT call "
                    "merge_and_unload() first"
                )


def _slower(model: nn.Module, layers: Mapping[str, LowRankLayer], inputs: Any) -> dict[str, LowRankLayer]:
    """The layers that are faster dense, with a log line that says so."""
    rows = time_inference(model, inputs)
    if not rows:
        raise ValueError(
            f"no factorized layer of {type(model).__name__} runs with these example_inputs: they say nothing of its speed"
        )
    slower = set(slower_layers(rows))
    logger.info(
        "Cuttlefish: merged %d of %d factorized layers, the ones that are faster dense at these shapes (%d never ran and stay "
        "pairs). Forward times, dense -> pair:\n%s",
        len(slower),
        len(layers),
        len(layers) - len(rows),
        "\n".join(timing_table(rows)),
    )
    return {name: layer for name, layer in layers.items() if name in slower}
