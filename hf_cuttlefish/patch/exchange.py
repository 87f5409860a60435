"""Exchange: layers give way to others, with what is tied to them and with their hooks, and take their places again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..layers.kinds import kind_of
from ..layers.vocabulary import with_tied
from .surgery import keep_hooks, places, swap


class Exchange:
    """Low-rank layers in the places of dense ones.

        exchange = Exchange(model, {"fc": model.fc}, {"fc": pair}); exchange.put(); ...; exchange.take_back()

    Args:
        layers: name -> dense layer of the model. pairs: name -> what stands for it.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], pairs: Mapping[str, nn.Module]) -> None:
        self.model, self.layers, self.pairs = model, layers, pairs
        self._tied: list[tuple[nn.Module, str, nn.Module]] = []

    def put(self) -> None:
        """The pairs take the layers' places. It may fail half-way: `take_back` follows then."""
        seats = {id(kind_of(layer).seat): (layer, self.pairs[name]) for name, layer in self.layers.items()}
        new = with_tied(self.model, seats)
        self._tied = [place for place in places(self.model, new) if id(place[2]) not in seats]
        swap(self.model, new)
        for _, _, tied in self._tied:
            keep_hooks(tied, new[id(tied)])
        for name, layer in self.layers.items():
            keep_hooks(layer, self.pairs[name])

    def take_back(self) -> None:
        """All is as it was before `put`, whatever that came to."""
        swap(self.model, {id(self.pairs[name]): kind_of(layer).seat for name, layer in self.layers.items()})
        for parent, name, tied in self._tied:
            parent._modules[name] = tied
        self._tied = []
