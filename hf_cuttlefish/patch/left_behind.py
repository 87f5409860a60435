"""What the switch leaves behind: dense weights that somebody still holds, so that what is done with them misses the model."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import nn

from ..layers.low_rank import LowRankLayer
from ..layers.parts import is_sharded

logger = logging.getLogger(__name__)


class LeftBehind:
    """The weights that a switch has replaced, which nobody should hold two steps later.

        left = LeftBehind(layers, low_rank_layers(model)); ...; left.say()

    Args:
        layers: name -> dense layer. pairs: name -> what stands for it now; layers without one have not been replaced.
    """

    def __init__(self, layers: Mapping[str, nn.Module], pairs: Mapping[str, LowRankLayer]) -> None:
        weights = {n: cast(torch.Tensor, layers[n].weight) for n in layers if n in pairs}
        self._weights = {n: weakref.ref(weight) for n, weight in weights.items()}
        self._factors = [(weakref.ref(f), _few_of(f)) for pair in pairs.values() for f in pair.factors]

    def __reduce__(self) -> tuple[object, ...]:
        """Copied and pickled without its references, which cannot be."""
        return type(self), ({}, {})

    @property
    def factors_rest(self) -> bool:
        """Whether no factor has moved since the switch, so that whatever steps does not know them.

        By some of their numbers: an optimizer that writes through `p.data` leaves no other trace.
        """
        now = [(ref(), few) for ref, few in self._factors]
        return all(factor is not None and torch.equal(_few_of(factor), few) for factor, few in now)

    def held(self) -> dict[str, torch.Tensor]:
        """Name -> weight that is still held, once what only waits to be freed is gone."""
        if any(ref() is not None for ref in self._weights.values()):
            gc.collect()
        return {name: weight for name, ref in self._weights.items() if (weight := ref()) is not None}

    def say(self) -> None:
        """Warn of weights that are held, of what holds them, and of what that comes to; no word where none is."""
        held = self.held()
        reached = [name for name, weight in held.items() if weight.grad is not None]
        strangers = _optimizers_with({id(weight) for weight in held.values()}) if held else []
        if strangers and self.factors_rest:
            logger.warning(
                "Cuttlefish: the dense weights of %s, which the switch has replaced, are held by an optimizer that Cuttlefish was not given "
                "(%s), and no factor has changed since: they are not in it. Give Cuttlefish the optimizer that steps, or make that "
                "one anew when step() returns True.",
                _few(list(held)),
                ", ".join(strangers),
            )
        elif reached:
            logger.warning(
                "Cuttlefish: gradients still reach the dense weights of %s, which the switch has replaced: code that has kept the "
                "layers or their parameters (in a closure, a list, an object that is no module) goes on with them, and what it "
                "trains is neither in the model nor saved. Let it take them from the model in each step, or exclude these layers.",
                _few(reached),
            )
        elif held:
            logger.warning(
                "Cuttlefish: the dense weights of %s, which the switch has replaced, are still held by %s, and take memory. "
                "A list of parameters from before the switch (to clip, penalize or average them) misses the factors: take "
                "model.parameters() anew in each step.",
                _few(list(held)),
                f"another optimizer ({', '.join(strangers)})"
                if strangers
                else "something (an output kept with its graph, a list)",
            )


def _few_of(factor: torch.Tensor) -> torch.Tensor:
    """Some of its numbers, spread over it; of a sharded one of this process's part."""
    here = cast(Any, factor).to_local() if is_sharded(factor) else factor
    flat = here.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 64)].clone()


def _optimizers_with(ids: Collection[int]) -> list[str]:
    """Class names of the live optimizers whose groups hold one of these parameters."""
    is_one: dict[type, bool] = {}  # there are hundreds of thousands of objects, of few classes
    found = []
    for o in gc.get_objects():
        kind = type(o)
        if kind not in is_one:
            is_one[kind] = issubclass(kind, torch.optim.Optimizer)
        if is_one[kind] and any(id(p) in ids for group in vars(o).get("param_groups", ()) for p in group["params"]):
            found.append(kind.__name__)
    return sorted(set(found))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
