"""Follow: a model takes dense and factorized weights alike; its structure follows what is loaded."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..engines.base import Engine
from ..engines.find import follow_in_optimizer, has_fixed, restructure_under_engines, shard_loaded, takes_as_it_is
from ..layers.kinds import kind_of, layer_at
from ..layers.low_rank import LowRankLayer
from ..layers.vocabulary import follower_names
from ..patch.optimizer import unwrapped
from ..patch.structure import write_structure
from .names import is_layer, rank_of, rename_biases, rename_keys

logger = logging.getLogger(__name__)

_OPTIMIZERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def follow_checkpoints(model: nn.Module, optimizer: Any = None) -> None:
    """Let `model.load_state_dict` take dense and factorized weights alike: the structure follows the weights.

        follow_checkpoints(model, optimizer)
        model.load_state_dict(weights_of_the_low_rank_phase)

    This is what makes a Trainer resume a checkpoint made after the switch, and load the best model from before it. An
    optimizer that exists already (given to the Trainer by the user) follows too.
    """
    if optimizer is not None:
        _OPTIMIZERS[model] = weakref.ref(optimizer)
    if not getattr(model, "_cuttlefish_follows", False):
        model.register_load_state_dict_pre_hook(_follow)
        model._cuttlefish_follows = True  # type: ignore[assignment]
    write_structure(model)  # a dense model made from a factorized one's config must not be saved with its note


def note_optimizer(engine: Engine) -> None:
    """The optimizer of a run: where weights of another structure are loaded on the way (an average, a rollback), it follows too."""
    if engine.holds_whole_weights and not engine.fixed and engine.optimizer is not None:
        _OPTIMIZERS[engine.model] = weakref.ref(engine.optimizer)


def _follow(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Before the tensors of a whole file, or of one shard, which may hold one factor of a layer and not the other."""
    if takes_as_it_is(module, state_dict, prefix):
        return
    # What the weights have: the rank of each layer that they name.
    rename_keys(module, state_dict, prefix)
    shapes: dict[str, dict[str, torch.Size]] = {}
    followers = follower_names(module)
    for key, tensor in state_dict.items():
        name, part = _split(module, key.removeprefix(prefix)) if key.startswith(prefix) else (None, "")
        if name is None or name in followers:
            continue
        if has_fixed(name, cast(nn.Module, layer_at(module, name)), part):
            continue
        shapes.setdefault(name, {})[part] = tensor.shape
    wanted: dict[str, int | None] = {}
    for name, parts in shapes.items():
        layer = cast(nn.Module, layer_at(module, name))
        rank = _structure(name, layer, parts)
        if rank == (layer.rank if isinstance(layer, LowRankLayer) else None):
            continue
        _check_shapes(name, layer, rank, parts)
        wanted[name] = rank
    # The model takes that structure, and so do its engine and its optimizer.
    changes = restructure_under_engines(module, wanted) if wanted else {}
    rename_biases(module, state_dict, prefix)
    optimizer = _OPTIMIZERS[module]() if module in _OPTIMIZERS else None
    if changes and optimizer is not None:
        _say_anew(optimizer, changes)
        follow_in_optimizer(optimizer, changes.values())
    shard_loaded(module, state_dict, prefix)


def _say_anew(optimizer: Any, changes: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
    """In the middle of a run, as from an average of the weights or by a rollback: which layers lose their optimizer state."""
    state = getattr(unwrapped(optimizer), "state", None) or {}
    names = [name for name, (old, _) in changes.items() if any(p in state for p in old.parameters())]
    if names:
        logger.warning(
            "Cuttlefish: weights of another structure were loaded into a model in training (saved on the other side of the switch): "
            "%s and %d more are %s now, and their optimizer state starts anew.",
            names[0],
            len(names) - 1,
            "low rank" if isinstance(changes[names[0]][1], LowRankLayer) else "dense",
        )


def _split(module: nn.Module, key: str) -> tuple[str | None, str]:
    """The layer whose weight the key names, and which part: "down", "up" or "dense". (None, "") for any other key."""
    for part in ("down", "up"):
        name = key.removesuffix(f".{part}.weight")
        if name != key and is_layer(module, name):
            return name, part
    for name in (key.removesuffix(".weight"), key):
        layer = layer_at(module, name)
        if layer is not None and name + kind_of(layer).weight_key == key:
            return name, "dense"
    return None, ""


def _structure(name: str, layer: nn.Module, parts: Mapping[str, torch.Size]) -> int | None:
    """The rank that one layer's tensors have, None for dense. Raises ValueError where they contradict each other."""
    ranks = {
        None if part == "dense" else rank_of(layer, f"{name}.{part}.weight", part, shape)
        for part, shape in parts.items()
    }
    if len(ranks) > 1:
        shapes = {part: tuple(shape) for part, shape in parts.items()}
        raise ValueError(f"the weights of {name} do not fit together: {shapes}")
    return ranks.pop()


def _check_shapes(name: str, layer: nn.Module, rank: int | None, parts: Mapping[str, torch.Size]) -> None:
    """Raises ValueError, before the layer is touched, for tensors that belong to a layer of another size."""
    kind = kind_of(layer)
    fitting = kind.shapes(rank or 1)
    for part, shape in parts.items():
        if tuple(shape) != fitting[part]:
            tensor = name + kind.weight_key if part == "dense" else f"{name}.{part}.weight"
            raise ValueError(
                f"{tensor} has the shape {tuple(shape)}, and this model needs {fitting[part]}; nothing is loaded"
            )
