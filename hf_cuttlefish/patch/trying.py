"""Try: pairs with random factors in the places of layers for a while, so that whole steps can be measured. Nothing stays changed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..layers.kinds import dense_weight, kind_of
from ..layers.low_rank import LowRankLayer
from ..measure.whole_steps import Candidate
from .exchange import Exchange
from .running import RunMultiplied


class TriedPairs:
    """Candidates that are made of the model itself: some of its layers give way to pairs. Each pair is made once.

        tried = TriedPairs(model, layers, plan); tried.put(candidate); ...; tried.take_back()

    Args:
        layers: name -> dense layer. ranks: name -> planned rank.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> None:
        self.model, self.layers = model, {name: layers[name] for name in ranks}
        self.pairs = {name: random_pair(layers[name], rank) for name, rank in ranks.items()}
        self._form = RunMultiplied(model)
        self._exchange: Exchange | None = None

    def put(self, candidate: Candidate) -> None:
        """Let a candidate take its place."""
        layers = {name: layer for name, layer in self.layers.items() if name in candidate.layers}
        self._exchange = Exchange(self.model, layers, {name: self.pairs[name] for name in layers})
        self._exchange.put()
        if candidate.multiplied:
            self._form.start()

    def take_back(self) -> None:
        """The model is as it was."""
        self._form.stop()
        if self._exchange is not None:
            self._exchange.take_back()
            self._exchange = None


@torch.no_grad()
def random_pair(layer: nn.Module, rank: int) -> LowRankLayer:
    """A pair in the place of a dense layer, whose product has numbers as large as the layer's weight. Draws from no random state."""
    pair = kind_of(layer).stand_in(None, None, rank)
    size = float(dense_weight(layer).float().square().mean().sqrt())
    generator = torch.Generator(pair.factors[0].device).manual_seed(0)
    for factor in pair.factors:
        factor.normal_(0.0, math.sqrt(size / math.sqrt(rank)), generator=generator)
    return pair
