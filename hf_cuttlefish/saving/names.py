"""Names: what a file calls a tensor, and what the model calls it."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..decide.stored import conversions
from ..layers.kinds import kind_of, layer_at
from ..layers.low_rank import LowRankLayer

logger = logging.getLogger(__name__)

DISAGREE = "config.json and the tensors belong to different models"


def rename_biases(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """A shard may hold a layer's bias and neither of its factors: it goes to where the bias is now, and stays there."""
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(".bias")]:
        name = key.removeprefix(prefix).removesuffix(".bias").removesuffix(".up")
        if is_layer(module, name):
            new = f"{prefix}{name}{'.up' if is_low_rank(module, name) else ''}.bias"
            if new != key:
                state_dict[new] = state_dict.pop(key)


def rank_of(layer: nn.Module, key: str, part: str, shape: Sequence[int]) -> int:
    """The rank that a factor of this layer has in this shape: (rank, in) for "down" of a linear layer, (out, rank) for "up"."""
    found, wanted = kind_of(layer).rank_of(part, shape), len(kind_of(layer).shapes(1)[part])
    if not found:
        number = {2: "two", 3: "three", 4: "four"}.get(wanted, wanted)
        raise ValueError(f"{key} has the shape {tuple(shape)}: a factor has {number} dimensions; nothing is loaded")
    return found


def rename_keys(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """Undo the legacy names and layouts that `save_pretrained` writes for some models (ViT, DeiT, BEiT, Swin, experts).

    transformers 5 does so on `from_pretrained`, but a Trainer's resume loads the raw names and drops the weights
    (huggingface/transformers issues 43701 and 48805).
    """
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    keys = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    strange = [key for key in keys if key not in own and not names_factor(module, key)]
    left = []
    for old, new in renamed_keys(module, strange):
        if new != old and prefix + new not in state_dict and (new in own or names_factor(module, new)):
            state_dict[prefix + new] = state_dict.pop(prefix + old)
        else:
            left.append((old, new))
    for olds, values in _converted(module, left, {old: state_dict[prefix + old] for old, _ in left}):
        if not values or any(_shape(module, own, name) != value.shape for name, value in values.items()):
            logger.warning(
                "Cuttlefish: %s and %d more of the checkpoint's tensors are not loaded, because the others that they "
                "belong together with are in another file; load it with from_pretrained first.",
                olds[0],
                len(olds) - 1,
            )
            continue
        for old in olds:
            del state_dict[prefix + old]
        state_dict.update({prefix + name: value for name, value in values.items()})


def _shape(module: nn.Module, own: Mapping[str, torch.Size], name: str) -> torch.Size | None:
    """Of the parameter of that name: one that the model has, or that it has factors of."""
    layer = layer_at(module, name)
    if isinstance(layer, LowRankLayer) and not kind_of(layer).weight_key:
        return torch.Size(kind_of(layer).shapes(1)["dense"])
    return own.get(name)


def renamed_keys(module: nn.Module, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each key of a file with the name that `from_pretrained` gives it in this model."""
    renamings = [t for t in conversions(module) if hasattr(t, "rename_source_key") and not hasattr(t, "operations")]
    for key in keys:
        new = key
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        yield key, new


def _converted(
    module: nn.Module, keys: Iterable[tuple[str, str]], tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
    """What `from_pretrained` puts together (experts to one stack): (keys of a file, resulting tensors by name)."""
    converters = [t for t in conversions(module) if hasattr(t, "operations")]
    groups: dict[str, tuple[Any, list[str]]] = {}
    for old, new in sorted(keys, key=lambda pair: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", pair[1])]):
        for converter in converters:
            name, pattern = converter.rename_source_key(new)
            if pattern is not None:
                own, olds = groups.setdefault(name, (copy.deepcopy(converter), []))
                own.add_tensor(name, old, pattern, tensors[old])
                olds.append(old)
                break
    for name, (converter, olds) in groups.items():
        try:
            values = converter.convert(name, model=module, config=module.config)
            if isinstance(values, tuple):
                values, _ = values  # transformers 5.0 gives its errors beside
        except Exception:  # whatever a conversion makes of an incomplete set
            values = {}
        yield olds, {key: value[0] if isinstance(value, list) else value for key, value in values.items()}


def names_factor(module: nn.Module, key: str) -> bool:
    """Whether a key names a tensor of a layer that is, or could be, factorized."""
    for ending in (".down.weight", ".up.weight", ".up.bias"):
        if key.endswith(ending):
            return is_layer(module, key.removesuffix(ending))
    for ending in (".weight", ".bias"):  # of the dense layer
        if key.endswith(ending):
            return is_low_rank(module, key.removesuffix(ending))
    return is_low_rank(module, key)  # a stack of experts, dense


def is_layer(module: nn.Module, name: str) -> bool:
    """Whether there is such a layer under this name."""
    return layer_at(module, name) is not None


def is_low_rank(module: nn.Module, name: str) -> bool:
    """Whether the layer of this name is low rank: its bias is that of `up`."""
    return isinstance(layer_at(module, name), LowRankLayer)
