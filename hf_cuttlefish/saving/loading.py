"""Load: factorized folders load with `from_pretrained`.

A factorized model's config.json says {"quantization_config": {"quant_method": "cuttlefish", "ranks": {...}}}; the class
registered here gives the freshly built model that structure before its weights are read. Nothing but JSON and
safetensors is read, and no rank is believed before it is held against the layer's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..decide.stored import spared
from ..engines.find import extend_parallel_plan, settle_loaded
from ..layers.kinds import layer_at
from ..layers.low_rank import low_rank_layers
from ..layers.parts import is_sharded
from ..patch.structure import QUANT_METHOD, STRUCTURE_VERSION, configs_of, restructure, write_structure
from .names import DISAGREE, is_layer, rank_of, renamed_keys


class CuttlefishStructure(QuantizationConfigMixin):
    """The note in config.json: {module name: rank}, with a version.

    Raises:
        ValueError: a newer version, or ranks that are no {name: whole number of at least 1}.
    """

    def __init__(
        self,
        ranks: Any = None,
        version: Any = 1,
        quant_method: str = QUANT_METHOD,
        inside: bool = False,
        **other: Any,
    ):
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"config.json: the factorized structure has version {version!r}, not a whole number")
        if version > STRUCTURE_VERSION:
            raise ValueError(
                f"config.json: the factorized structure has version {version}, and this hf_cuttlefish reads up to "
                f"{STRUCTURE_VERSION}: upgrade with `pip install -U hf-cuttlefish`"
            )
        if not isinstance(ranks, Mapping) or not ranks:
            raise ValueError(
                f"config.json: the factorized structure needs ranks {{module name: rank}}, got {ranks!r:.80}"
            )
        for name, rank in ranks.items():
            if not isinstance(name, str) or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"config.json: rank of {name!r} is {rank!r}: it must be a whole number of at least 1")
        if other:
            raise ValueError(f"config.json: the factorized structure has unknown fields {sorted(other)}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version = version
        self.ranks = dict(ranks)
        self.inside = inside is True  # the note is that of a model inside, whose names are its own

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        return {"quant_method": self.quant_method, "version": self.version, "ranks": dict(self.ranks)}


class CuttlefishLoader(HfQuantizer):
    """Builds the structure for `from_pretrained`. Registered as a quantizer: that is the door transformers offers."""

    requires_calibration = False
    quantization_config: CuttlefishStructure

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        note = self.quantization_config
        ranks = names_inside(model) if note.inside else names_in(model, note.ranks)
        if not ranks:
            raise ValueError(
                f"config.json names {len(self.quantization_config.ranks)} factorized layers, such as "
                f"{next(iter(self.quantization_config.ranks))!r}, and {type(model).__name__} has none of them"
            )
        _check_files(model, ranks, checkpoint_files or ())
        restructure(model, ranks)
        # transformers 5.16 takes what goes by another name in the file for quantized numbers, and does not cast it.
        if not hasattr(HfQuantizer, "get_new_dtype"):
            self.pre_quantized = False
        for layer in low_rank_layers(model).values():
            # Until the weights are loaded: the _init_weights of xLSTM and OneFormer fill the bias of every nn.Linear of
            # theirs without asking whether it has one.
            if "bias" in layer.down._parameters:
                vars(layer.down)["bias"] = torch.empty(0)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """How names and layouts change on the way in, and on the way out again: factors are left as they are.

        Older transformers (5.16) names no model here.
        """
        return spared(super().update_weight_conversions(weight_conversions, *model))

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Before the model is made parallel: rules for the factors, as transformers asks for."""
        extend_parallel_plan(model, plan)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # From here on it is an ordinary model: nothing about it is quantized.
        for holder, key in ((model, "hf_quantizer"), (model, "quantization_method"), (model, "is_quantized")):
            if key in vars(holder):
                delattr(holder, key)
        for module in model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and "_is_quantized" in vars(config):
                del config._is_quantized
        stacks = [name for name, layer in low_rank_layers(model).items() if layer.origin == "Experts"]
        if stacks and any(map(is_sharded, model.parameters())):
            raise ValueError(
                f"{stacks[0]} holds factors of experts, which tensor parallelism cannot divide: load the folder without tp_plan, or "
                "merge it (`hf-cuttlefish merge FOLDER OUT`)"
            )
        for layer in low_rank_layers(model).values():
            vars(layer.down).pop("bias", None)
        settle_loaded(model)
        write_structure(model)
        flags = [getattr(p, "_is_hf_initialized", False) for p in model.parameters()]
        for name, layer in low_rank_layers(model).items():
            for child in ("down", "up"):
                weight = getattr(layer, child).weight
                missing = not getattr(weight, "_is_hf_initialized", False) and not weight.is_meta  # meta: left on disk
                if any(flags) and missing:
                    raise ValueError(
                        f"config.json says that {name} is factorized at rank {layer.rank}, but the weights hold no "
                        f"{name}.{child}.weight: {DISAGREE}"
                    )
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a Trainer may train the model."""
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
    find = _finder(model)
    return {own: rank for name, rank in ranks.items() if (own := find(name)) is not None}


def names_inside(model: nn.Module) -> dict[str, int]:
    """Ranks that the configs of the models inside it note, under the names that this model has for the layers."""
    found: dict[str, int] = {}
    for prefix, config in configs_of(model):
        note = getattr(config, "quantization_config", None)
        if prefix and isinstance(note, dict) and note.get("quant_method") == QUANT_METHOD:
            inner = CuttlefishStructure(**note).ranks
            found |= {f"{prefix}.{name}": rank for name, rank in names_in(model.get_submodule(prefix), inner).items()}
    return found


def _finder(model: nn.Module) -> Callable[[str], str | None]:
    """A function that gives a saved layer's name in this model (see `names_in`), or None."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."

    def find(name: str) -> str | None:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if is_layer(model, candidate)), None)

    return find


def _check_files(model: nn.Module, ranks: Mapping[str, int], files: Iterable[str]) -> None:
    """Hold config.json's ranks against the names and shapes in the files' headers, before anything is allocated.

    Raises ValueError for another rank, or factors of a layer that config.json does not name. Factors that are missing
    are found after the loading, under whatever name they may come.
    """
    find = _finder(model)
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with _opened(file) as opened:
            keys = [key for key in opened.keys() if key.endswith((".down.weight", ".up.weight"))]  # noqa: SIM118 (no dict)
            for key, renamed in renamed_keys(model, keys):
                layer, _, part = renamed.removesuffix(".weight").rpartition(".")
                name = find(layer)
                if name is None:
                    continue
                found = rank_of(cast(nn.Module, layer_at(model, name)), key, part, opened.get_slice(key).get_shape())
                if name not in ranks:
                    raise ValueError(
                        f"the weights hold factors of {name} (rank {found}), and config.json does not say that it is "
                        f"factorized: {DISAGREE}"
                    )
                if found != ranks[name]:
                    raise ValueError(
                        f"config.json says that {name} has rank {ranks[name]}, and the weights hold rank {found}: "
                        f"{DISAGREE}"
                    )


def _opened(file: str) -> Any:
    """The open file; its header is held against its length before anything is read."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or was cut off: {error!s:.200}") from error
