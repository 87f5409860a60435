"""A tiny model of a class: its config by the recipes, and the first batch with which it runs."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .inputs import batches, configs, run
from .outcomes import shorten
from .recipes import HEADS, HIDDEN, RECIPES, VOCABULARY, small, untouched

MOST_PARAMETERS = 30_000_000
"""Of a model that is still called tiny; larger builds are not tried."""


def tiny_config(config_class: type, recipe: Callable[[str, int], int], default: Any = None) -> Any:
    """A config of the class with its numbers changed by the recipe; configs inside it likewise."""
    return config_class(**tiny_fields(default or config_class(), recipe))


def tiny_fields(config: Any, recipe: Callable[[str, int], int]) -> dict[str, Any]:
    """Only the fields that the recipe changes, by name."""
    allowed = {name for cls in type(config).__mro__ for name in getattr(cls, "__annotations__", {})}
    allowed |= set(inspect.signature(type(config).__init__).parameters)
    fields: dict[str, Any] = {}
    layers = getattr(config, "num_hidden_layers", None)
    lists = {n: v for n, v in vars(config).items() if isinstance(v, (list, tuple)) and v and n in allowed}
    flat = {n: v for n, v in lists.items() if all(isinstance(k, (str, int, float)) for k in v)}
    per_layer = {n: v for n, v in flat.items() if type(layers) is int and len(v) == layers > 4}
    kinds = [len(dict.fromkeys(v)) for n, v in per_layer.items() if all(isinstance(k, str) for k in v)]
    most = max([2, *kinds])  # one layer of each kind that the config mixes, two layers at least
    for name, value in vars(config).items():
        if isinstance(value, hf.PreTrainedConfig):
            # A dictionary cannot say its class where a composite takes any model; the model type in it can.
            fields[name] = {"model_type": value.model_type, **tiny_fields(value, recipe)}
            continue
        if name not in allowed or name.startswith("_") or isinstance(value, bool) or recipe is untouched:
            continue
        if name in per_layer:
            few = list(dict.fromkeys(value)) if all(isinstance(v, str) for v in value) else list(value)
            few = [recipe(name, v) if type(v) is int else v for v in (few * most)[:most]]
            fields[name] = type(value)(few)
        elif isinstance(value, int):
            new = recipe(name, value)
            fields[name] = max(new, most) if name == "num_hidden_layers" and new < value else new
        elif name in lists and all(type(v) is int for v in value):
            fields[name] = type(value)(recipe(name, v) for v in value)
        if name in fields and fields[name] == value:
            del fields[name]
    if (
        getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", 0)
        and "num_key_value_heads" in fields
    ):
        fields["num_key_value_heads"] = fields.get("num_attention_heads", config.num_attention_heads)
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if recipe is small and isinstance(rope, dict) and rope.get("mrope_section") and name in allowed:
            eighth = HIDDEN // HEADS // 8
            fields[name] = {**rope, "mrope_section": [2 * eighth, eighth, eighth]}
    if getattr(config, "pad_token_id", 0) is None:
        fields["pad_token_id"] = 0
    if getattr(config, "vocab_size", 0) is None:
        fields["vocab_size"] = VOCABULARY
    vocabulary = fields.get("vocab_size", getattr(config, "vocab_size", None))
    if isinstance(vocabulary, int):
        for i, name in enumerate(sorted(vars(config))):
            value = vars(config)[name]
            is_id = re.fullmatch(r".*(token_id|token_index|_idx|_token)", name) and type(value) is int
            if is_id and name in allowed and value >= vocabulary:
                fields[name] = vocabulary - 1 - i % 60
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", 16)
    smaller = 8 * patch if type(patch) is int and patch >= 8 else 64
    if type(size) is int and size > (smaller if recipe is small else 256) and "image_size" in allowed:
        fields["image_size"] = smaller
    return fields


def build(model_class: type, config: Any, seed: int = 0) -> Any:
    """The model in eval mode, with noise on every parameter: zero biases and idle blocks would hide a fault."""
    torch.manual_seed(seed)
    for part in configs(config):
        part.use_cache = False
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def build_tiny(model_class: type, model_type: str) -> tuple[Any, dict[str, torch.Tensor] | None, Any]:
    """The first tiny model that runs and its batch; a model without a batch if none runs; (None, None, why) if none builds."""
    reasons: list[str] = []
    tried: list[str] = []
    without_batch: tuple[Any, None, Any] | None = None
    for recipe_name, recipe in RECIPES.items():
        try:
            config_class = getattr(model_class, "config_class", None) or CONFIG_MAPPING[model_type]
            config = tiny_config(config_class, recipe)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            if size > MOST_PARAMETERS:
                reasons.append(f"{recipe_name}: {size / 1e6:.0f} million parameters")
                continue
            model = build(model_class, copy.deepcopy(config))
        except Exception as error:
            reasons.append(f"{recipe_name}: {shorten(error)}")
            continue
        for batch in batches(model):
            try:
                if found := run(model, batch):
                    if any(t.isnan().any() for t in found):
                        tried.append("dense outputs hold NaN")
                        continue
                    return model, batch, {"recipe": recipe_name, "config": config}
                tried.append("forward returns no floating-point tensor")
            except Exception as error:
                tried.append(shorten(error))
        if without_batch is None:
            without_batch = model, None, {"recipe": recipe_name, "config": config}
    if without_batch:
        reason = "; ".join(list(dict.fromkeys(tried))[:4]) or "no argument of forward is known"
        without_batch[2]["forward"] = reason
    return without_batch or (None, None, "; ".join(reasons[:2]))
