"""Save and load: factorized folders load with `from_pretrained`, and checkpoints of either structure resume.

A factorized model's config.json says {"quantization_config": {"quant_method": "cuttlefish", "ranks": {...}}}; the class
registered here gives the freshly built model that structure before its weights are read. Nothing but JSON and
safetensors is read, and no rank is believed before it is held against the layer's own size.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import optimizer as optimizers
from .layers import DENSE_TYPES, LowRankLinear
from .patching import QUANT_METHOD, STRUCTURE_VERSION, low_rank_layers, restructure, write_structure

logger = logging.getLogger(__name__)

_OPTIMIZERS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class CuttlefishStructure(QuantizationConfigMixin):
    """The note in config.json: {module name: rank}, with a version.

    Raises:
        ValueError: a newer version, or ranks that are no {name: whole number of at least 1}.
    """

    def __init__(self, ranks: Any = None, version: Any = STRUCTURE_VERSION, quant_method: str = QUANT_METHOD, **other: Any):
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"config.json: the factorized structure has version {version!r}, not a whole number")
        if version > STRUCTURE_VERSION:
            raise ValueError(
                f"config.json: the factorized structure has version {version}, and this hf_cuttlefish reads up to "
                f"{STRUCTURE_VERSION}: upgrade with `pip install -U hf-cuttlefish`"
            )
        if not isinstance(ranks, Mapping) or not ranks:
            raise ValueError(f"config.json: the factorized structure needs ranks {{module name: rank}}, got {ranks!r:.80}")
        for name, rank in ranks.items():
            if not isinstance(name, str) or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"config.json: rank of {name!r} is {rank!r}: it must be a whole number of at least 1")
        if other:
            raise ValueError(f"config.json: the factorized structure has unknown fields {sorted(other)}")
        self.quant_method = quant_method
        self.version = version
        self.ranks = dict(ranks)


class CuttlefishLoader(HfQuantizer):
    """Builds the structure for `from_pretrained`. Registered as a quantizer: that is the door transformers offers."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        ranks = names_in(model, self.quantization_config.ranks)
        if not ranks:
            raise ValueError(
                f"config.json names {len(self.quantization_config.ranks)} factorized layers, such as "
                f"{next(iter(self.quantization_config.ranks))!r}, and {type(model).__name__} has none of them"
            )
        restructure(model, ranks)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # From here on it is an ordinary model: nothing about it is quantized.
        for holder, key in ((model, "hf_quantizer"), (model, "quantization_method"), (model, "is_quantized")):
            if key in vars(holder):
                delattr(holder, key)
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None and "_is_quantized" in vars(config):
                del config._is_quantized
        write_structure(model)
        flags = [getattr(p, "_is_hf_initialized", False) for p in model.parameters()]
        for name, layer in low_rank_layers(model).items():
            for child in ("down", "up"):
                weight = getattr(layer, child).weight
                if any(flags) and not getattr(weight, "_is_hf_initialized", False):
                    raise ValueError(
                        f"config.json says that {name} is factorized at rank {layer.rank}, but the weights hold no "
                        f"{name}.{child}.weight: config.json and the tensors belong to different models"
                    )
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Make `from_pretrained` know factorized folders. Done once, at import of the package."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(CuttlefishStructure)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(CuttlefishLoader)


def names_in(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks under the names that this class has for the layers: the base model's prefix stripped or added.

    Layers of a head that this class does not have are left out.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    modules = dict(model.named_modules())
    found = {}
    for name, rank in ranks.items():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if type(modules.get(candidate)) in DENSE_TYPES.values() or isinstance(modules.get(candidate), LowRankLinear):
                found[candidate] = rank
                break
    return found


def follow_checkpoints(model: nn.Module, optimizer: Any = None) -> None:
    """Let `model.load_state_dict` take dense and factorized weights alike: the structure follows the weights.

    This is what makes a Trainer resume a checkpoint made after the switch, and load the best model from before it. An
    optimizer that exists already (given to the Trainer by the user) follows too.
    """
    if optimizer is not None:
        _OPTIMIZERS[model] = optimizer
    if not getattr(model, "_cuttlefish_follows", False):
        model.register_load_state_dict_pre_hook(_follow)
        model._cuttlefish_follows = True  # type: ignore[assignment]


def _follow(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    if prefix:  # called on a child by a parent's load: names would not be ours
        return
    _rename(module, state_dict)
    wanted: dict[str, int | None] = {}
    for key, tensor in state_dict.items():
        name, _, ending = key.rpartition(".down.weight")
        if name and not ending and tensor.ndim == 2 and _is_layer(module, name):
            wanted[name] = tensor.shape[0]
        elif key.endswith(".weight") and isinstance(_get(module, key.removesuffix(".weight")), LowRankLinear):
            wanted[key.removesuffix(".weight")] = None
    changes = restructure(module, wanted) if wanted else {}
    optimizer = _OPTIMIZERS.get(module)
    if changes and optimizer is not None:
        optimizers.follow(optimizer, changes.values())


def _rename(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Undo the legacy names that `save_pretrained` writes for some models (ViT, DeiT, BEiT, Swin).

    transformers 5 renames on `from_pretrained`, but a Trainer's resume loads the raw names and drops the weights
    (huggingface/transformers issues 43701 and 48805).
    """
    own = set(module.state_dict().keys())
    strange = [key for key in state_dict if key not in own and not _names_factor(module, key)]
    if not strange:
        return
    for old, new in _module_names(module, strange):
        if new != old and new not in state_dict and (new in own or _names_factor(module, new)):
            state_dict[new] = state_dict.pop(old)


def _module_names(module: nn.Module, keys: Iterable[str]) -> Iterable[tuple[str, str]]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before these existed, names were the same on both sides
        return
    if not hasattr(module, "config"):
        return
    renamings = [t for t in get_model_conversion_mapping(module) if type(t) is WeightRenaming]
    for key in keys:
        new = key
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        yield key, new


def _names_factor(module: nn.Module, key: str) -> bool:
    for ending in (".down.weight", ".up.weight", ".up.bias"):
        if key.endswith(ending):
            return _is_layer(module, key.removesuffix(ending))
    for ending in (".weight", ".bias"):
        if key.endswith(ending):
            return isinstance(_get(module, key.removesuffix(ending)), LowRankLinear)
    return False


def _is_layer(module: nn.Module, name: str) -> bool:
    found = _get(module, name)
    return isinstance(found, LowRankLinear) or type(found) in DENSE_TYPES.values()


def _get(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        found = module._modules.get(part)
        if found is None:
            return None
        module = found
    return module
