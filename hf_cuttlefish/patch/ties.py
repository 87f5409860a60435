"""Tie: what transformers ties by the names of parameters, under the names that a low-rank vocabulary has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layers.embedding import LowRankEmbedding, LowRankOutput

NOTES = ("_tied_weights_keys", "all_tied_weights_keys")
"""Where a model notes what it ties: {name of a parameter: name of the one that it is}."""


class Ties:
    """The notes as they are now, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self._notes = [(part, {n: vars(part)[n] for n in NOTES if n in vars(part)}) for part in _parts(model)]

    def put_back(self) -> None:
        """Let all models note again what they did."""
        for part, notes in self._notes:
            for name in NOTES:
                vars(part).pop(name, None)
            vars(part).update(notes)


def retie(model: nn.Module) -> None:
    """Note the ties of the model and of each model inside it under the names that its modules have now.

    A table's `weight` is two parameters once it is low rank. The notes of the class stay as they are.
    """
    for part in _parts(model):
        for name in NOTES:
            keys = getattr(part, name, None)
            if isinstance(keys, Mapping) and (new := _renamed(part, keys)) != dict(keys):
                if new == getattr(type(part), name, None):
                    delattr(part, name)
                else:
                    setattr(part, name, new)


def _parts(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _renamed(model: nn.Module, keys: Mapping[str, str]) -> dict[str, str]:
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))

    def is_low_rank(name: str) -> bool:
        return isinstance(modules.get(name), (LowRankEmbedding, LowRankOutput))

    found: dict[str, str] = {}
    for target, source in keys.items():
        name = target.removesuffix(".weight")
        owner, _, child = name.rpartition(".")
        was_low_rank = child in ("down", "up") and isinstance(modules.get(owner), (nn.Linear, nn.Embedding))
        if name != target and is_low_rank(name):
            for part in ("down", "up"):
                found[f"{name}.{part}.weight"] = f"{source.removesuffix('.weight')}.{part}.weight"
        elif not was_low_rank or is_low_rank(owner):
            found[target] = source
        elif child == "down":  # dense again
            found[f"{owner}.weight"] = f"{source.removesuffix('.down.weight')}.weight"
    return found
