"""Every model class of transformers' auto mappings, tiny: factorize, forward, backward, save, load with AutoModel, merge.

    python benchmarks/compatibility.py                      # all of them; about an hour on 2 cores
    python benchmarks/compatibility.py --only falcon clip   # model types that contain one of these words
    python benchmarks/compatibility.py --write-docs         # docs/compatibility.md from the JSON file

Nothing is listed by hand: the classes come from the auto mappings, tiny configs from the names of the config's fields, and
inputs from the signature of `forward`. Each class runs in a process of its own, with a limit of time and memory.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_cuttlefish import CuttlefishConfig, LowRankLinear, estimate_ranks, factorize, merge
from hf_cuttlefish.decide.targets import find_targets

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
DOCS = ROOT / "docs" / "compatibility.md"

SECONDS, MEMORY = 240, 5 * 2**30
MOST_PARAMETERS = 30_000_000
"""Of a model that is still called tiny; larger builds are not tried."""
HIDDEN, MIDDLE, HEADS, VOCABULARY, LENGTH, BATCH = 32, 64, 4, 200, 8, 2

PASSES, REFUSED, FAILS, UPSTREAM, NOT_BUILT, NOT_RUN = "passes", "refused", "fails", "upstream", "not built", "not run"


# --- which classes ---


def model_classes() -> dict[str, tuple[str, str]]:
    """Class name -> (model type, auto class that loads it), each class once, in the order of the auto mappings."""
    found: dict[str, tuple[str, str]] = {}
    for auto_name, auto in vars(modeling_auto).items():
        if not (inspect.isclass(auto) and issubclass(auto, _BaseAutoModelClass) and auto is not _BaseAutoModelClass):
            continue
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or not hasattr(hf, auto_name):
            continue
        for model_type, names in mapping._model_mapping.items():
            for name in [names] if isinstance(names, str) else names:
                if name not in found:
                    found[name] = (model_type, auto_name)
    return found


# --- a tiny config, from the names of the fields of the default one ---

Rule = tuple[str, Callable[[int], int]]
SMALL: list[Rule] = [
    (r"vocab_size|vocab_size_or_config_json_file|.*_vocab_size", lambda v: min(v, VOCABULARY)),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|.*_key_value_heads", lambda v: 2 if v > 1 else 1),
    (r"(.*_)?(num_)?(attention_)?(n_)?heads?|n_head|num_attention_heads.*", lambda v: min(v, HEADS)),
    (r"(.*_)?(head_dim|d_kv|dim_head|attention_head_size|kv_channels)", lambda v: min(v, HIDDEN // HEADS)),
    (
        r"(.*_)?(num_|n_)?((hidden|encoder|decoder|residual|resnet|transformer|text|vision|conv_layer)_)?(layers?|blocks?|depth)"
        r"|(.*_)?num_hidden_layers|(.*_)?depths|n_layer|num_(encoder|decoder)_.*layers|encode_layers|(.*)num_hidden_groups",
        lambda v: min(v, 2),
    ),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|mlp_dim|feed_?forward_(size|dim)|hidden_dim|n_inner|inner_dim|d_inner"
        r"|ffn_hidden_size|feedforward_channels|ffn_size|mlp_hidden_dim|linear_size)",
        lambda v: min(v, MIDDLE),
    ),
    (r"(num_|n_|.*_num_)(local_|routed_|)experts|moe_num_experts", lambda v: min(v, 4)),
    (r"(num_|n_)?experts_per_tok|moe_topk|moe_k|top_?k|num_selected_experts|moe_top_k", lambda v: min(v, 2)),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_sizes|embed_dims?|projection_dim|dim|model_dim|encoder_dim"
        r"|hidden_channels|embedding_dim|hidden_size_per_layer_input|output_hidden_size|out_hidden_size|proj_dim"
        r"|attention_dim|emb_dim|out_features|fusion_hidden_size|decoder_dim|encoder_hidden_dim|embedding_size)",
        lambda v: min(v, HIDDEN),
    ),
    (r"(q|kv)_lora_rank|.*_lora_dim|qk_(nope|rope)_head_dim", lambda v: min(v, 8)),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions", lambda v: max(min(v, 512), 64)),
    (r"num_queries|num_query_tokens", lambda v: min(v, 12)),
    (r"conv_dim|conv_dims", lambda v: min(v, 16)),
]
WIDTHS = re.compile(
    r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_sizes|dims?|intermediate_size|ffn_dim|d_ff|head_dim|d_kv"
    r"|.*_dim|.*_dims|.*_channels|channels|.*hidden.*size.*|.*embedding_size|.*_hidden)"
)
COUNTS = re.compile(SMALL[4][0])


def small(name: str, value: int) -> int:
    """Fixed small sizes by the field's name."""
    for pattern, rule in SMALL:
        if re.fullmatch(pattern, name):
            return rule(value)
    return value


def divided(name: str, value: int) -> int:
    """Every width through 16, so that what divides what stays as it is; few layers."""
    if re.fullmatch(r"(.*_)?vocab_size", name) or COUNTS.fullmatch(name):
        return small(name, value)
    if WIDTHS.fullmatch(name) and value % 16 == 0 and value >= 128:
        return value // 16
    return value


def halved(name: str, value: int) -> int:
    """Heads and widths through 4; few layers."""
    if re.fullmatch(r"(.*_)?vocab_size", name) or COUNTS.fullmatch(name):
        return small(name, value)
    width = WIDTHS.fullmatch(name) and not re.fullmatch(r"(.*_)?head_dim", name)
    heads = re.fullmatch(r"(.*_)?(num_)?(attention_|key_value_)?heads?", name)
    return value // 4 if (width or heads) and value % 4 == 0 and (value >= 64 or heads) else value


def short(name: str, value: int) -> int:
    """Nothing but few layers and few tokens."""
    return small(name, value) if re.fullmatch(r"(.*_)?vocab_size", name) or COUNTS.fullmatch(name) else value


def untouched(name: str, value: int) -> int:
    """The default config as it is."""
    return value


RECIPES: dict[str, Callable[[str, int], int]] = {f.__name__: f for f in (small, divided, halved, short, untouched)}


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


# --- inputs, from the signature of forward ---


def batches(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Batches that the model may take, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    needed = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    named = [model.main_input_name] if isinstance(model.main_input_name, str) else list(model.main_input_name)
    mains = [n for n in named if n in parameters] or list(parameters)[:1]
    common = ["input_ids", "pixel_values", "input_values", "input_features", "attention_mask", "decoder_input_ids"]
    common = [n for n in common if n in parameters]
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in parameters and model.config.is_encoder_decoder else []
    sets = [[*mains, *needed, *decoder], [*mains, *needed, *decoder, "attention_mask"], [*common, *needed], needed]
    sets += [[n, *needed] for n in ("input_ids", "pixel_values") if n in parameters]
    sets += [[*common, *(n for n in ("bbox", "token_type_ids") if n in parameters), *needed]]
    seen = set()
    for names in sets:
        names = [n for n in dict.fromkeys(names) if n in parameters]
        if not names or tuple(names) in seen:
            continue
        seen.add(tuple(names))
        choices = [list(values(model, n)) for n in names]
        for combination in itertools.islice(itertools.product(*choices), 12):
            yield {n: v.clone() for n, v in zip(names, combination, strict=True) if v is not None}


def values(model: Any, name: str) -> Iterator[torch.Tensor | None]:
    """What an argument of this name may be."""
    config = model.config
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    if name in ("input_ids", "decoder_input_ids", "text_input_ids", "labels"):
        ids = ordinary_tokens(config)
        if type(model).__name__.endswith("ForMultipleChoice"):
            yield ids[torch.randint(len(ids), (BATCH, 2, LENGTH), generator=generator)]
        yield ids[torch.randint(len(ids), (BATCH, LENGTH), generator=generator)]
        books = next(
            (v for c in configs(config) for k in ("num_codebooks", "num_quantizers") if (v := getattr(c, k, 0))), 0
        )
        if books:
            yield torch.randint(1, 4, (BATCH, LENGTH, books), generator=generator)
            yield torch.randint(1, 4, (BATCH, books, LENGTH), generator=generator)
            yield torch.randint(1, 4, (BATCH * books, LENGTH), generator=generator)
    elif name.endswith("attention_mask"):
        yield torch.ones(BATCH, LENGTH, dtype=torch.long)
    elif name == "token_type_ids":
        yield torch.zeros(BATCH, LENGTH, dtype=torch.long)
    elif name.endswith("pixel_values") or name in ("pixel_values_videos", "images"):
        channels = first(config, "num_channels", "in_channels", "in_chans", default=3)
        for size in dict.fromkeys([first_size(config), 64, 224]):
            yield noise(channels, size, size)
            yield noise(first(config, "num_frames", "frames", default=2), channels, size, size)
    elif name in ("input_features", "spectrogram", "fbank", "input_values", "audio_values", "speech", "waveform"):
        bins = first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "mel_dim", default=80)
        frames = first(config, "max_length", "max_source_positions", default=64)
        if name in ("input_values", "audio_values", "waveform"):
            yield noise(4000)
            yield noise(1, 4000)
        for length in dict.fromkeys([64, 2 * frames, frames]):
            yield noise(bins, length)
            yield noise(length, bins)
    elif name == "bbox":
        yield torch.tensor([1, 2, 30, 40]).expand(BATCH, LENGTH, 4)
    elif name in ("inputs_embeds", "hidden_states", "encoder_hidden_states"):
        yield noise(LENGTH, first(config, "hidden_size", "d_model", default=HIDDEN))
    elif name in ("past_values", "future_values"):
        yield noise(first(config, "context_length", "prediction_length", default=32) + 8)
        yield noise(first(config, "context_length", default=32), first(config, "num_input_channels", default=1))
    elif name == "past_time_features":
        yield noise(first(config, "context_length", default=32) + 8, first(config, "num_time_features", default=1))
    elif name == "past_observed_mask":
        yield torch.ones(BATCH, first(config, "context_length", default=32) + 8)
    elif name in ("input_points", "input_boxes"):
        yield torch.tensor([[[5.0, 5.0]]]).expand(BATCH, 1, 1, 2)
    elif name == "task_inputs":
        yield torch.ones(BATCH, 77, dtype=torch.long)
    elif name == "pixel_mask":
        yield None
    else:
        yield None
        yield noise(LENGTH, first(config, "hidden_size", "d_model", default=HIDDEN))


def configs(config: Any) -> Iterator[Any]:
    """The config and the ones inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, hf.PreTrainedConfig):
            yield from configs(value)


def first(config: Any, *names: str, default: int) -> int:
    """The first of the fields that the config or one inside it has as a number."""
    for name in names:
        for part in configs(config):
            value = getattr(part, name, None)
            if type(value) is int and value > 0:
                return value
    return default


def first_size(config: Any) -> int:
    """Pixels of a side."""
    for part in configs(config):
        size = getattr(part, "image_size", None)
        size = size[0] if isinstance(size, (list, tuple)) and size else size
        if type(size) is int and size > 0:
            return size
    return 64


def ordinary_tokens(config: Any) -> torch.Tensor:
    """Token ids that stand for no image, sound, padding or end."""
    special = {
        v
        for part in configs(config)
        for k, v in vars(part).items()
        if re.search(r"token|_id$|_idx$", k) and type(v) is int
    }
    vocabulary = min(
        [getattr(part, "vocab_size", None) or 64 for part in configs(config) if hasattr(part, "vocab_size")] or [64]
    )
    ids = [i for i in range(3, min(vocabulary, 100)) if i not in special]
    return torch.tensor(ids or [1])


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """Every floating-point tensor of an output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, (tuple, list, dict)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def run(model: Any, batch: dict[str, torch.Tensor], gradients: bool = False) -> list[torch.Tensor]:
    """What the model returns, with the same random numbers each time (masked autoencoders, samplers)."""
    torch.manual_seed(5)
    with torch.set_grad_enabled(gradients):
        return list(tensors(model(**{n: v.clone() for n, v in batch.items()})))


# --- the check of one class ---


class CheckFailed(Exception):
    """A step did not do what it has to; the message says which."""


def check(name: str, model_type: str, auto_name: str) -> dict[str, Any]:
    """The result of one class: {"status", "reason", ...}. Raises nothing."""
    result: dict[str, Any] = {"class": name, "model_type": model_type, "auto": auto_name}
    model_class = find_class(name, model_type)
    try:
        own = getattr(model_class, "config_class", None)
    except ImportError as error:  # a stand-in for a class that needs a package
        return {**result, "status": NOT_BUILT, "reason": shorten(error)}
    result["model_type"] = getattr(own, "model_type", "") or model_type  # not that of an alias
    model, batch, note = build_tiny(model_class, model_type)
    if model is None:
        return {**result, "status": NOT_BUILT, "reason": note}
    result |= {"recipe": note["recipe"], "parameters": sum(p.numel() for p in model.parameters())}
    step = "select"
    try:
        try:
            shapes = {n: tuple(layer.weight.shape) for n, layer in find_targets(model).items()}
        except (ValueError, TypeError) as error:
            return {**result, "status": REFUSED, "reason": shorten(error)}
        result["layers"] = len(shapes)
        step = "plan"
        config = CuttlefishConfig(rank_rule="energy", rank_multiple=1)
        # From the config as it was: building MaskFormer changes the one that it is given.
        again = build(model_class, copy.deepcopy(note["config"]))
        plans = [estimate_ranks(m, config).to_json() for m in (model, again)]
        del again
        require(plans[0] == plans[1], "another plan from the same seed")
        if batch is not None:
            step = "full rank"
            dense = run(model, batch)
            exact = copy.deepcopy(model)
            factorize(exact, {n: min(shape) for n, shape in shapes.items()})
            compare(run(exact, batch), dense, 2e-3, "at full rank")
            del exact
        step = "factorize"
        before = sum(p.numel() for p in model.parameters())
        ranks = {n: max(1, min(min(shape) // 4, 4)) for n, shape in shapes.items()}
        factorize(model, ranks)
        saved = sum(m * n - ranks[name] * (m + n) for name, (m, n) in shapes.items())
        require(before - sum(p.numel() for p in model.parameters()) == saved, "the parameter count is not the plan's")
        expected: list[torch.Tensor] | None = None
        if batch is not None:
            step = "backward"
            expected = run(model, batch)
            require(all(bool(t.isfinite().all()) for t in expected) or not finite(dense), "outputs are not finite")
            result["trained"] = backward(model, batch)
        step = "save and load"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded, result["loaded_by"] = load(model_class, auto_name, folder)
            require(
                ranks_of(loaded) == ranks_of(model),
                f"{len(ranks_of(loaded))} factorized layers loaded, {len(ranks_of(model))} saved",
            )
            same_weights(model, loaded)
            if batch is not None and expected is not None:
                compare(run(loaded, batch), expected, 1e-4, "after loading")
        step = "merge"
        merge(loaded)
        require(
            not ranks_of(loaded) and not hasattr(loaded.config, "quantization_config"), "something stays factorized"
        )
        require(sum(p.numel() for p in loaded.parameters()) == before, "another parameter count after merging")
        if batch is not None and expected is not None:
            compare(run(loaded, batch), expected, 2e-3, "after merging")
    except Exception as error:
        upstream = control(model_class, copy.deepcopy(note["config"]), batch, step, auto_name)
        status = UPSTREAM if upstream else FAILS
        return {
            **result,
            "status": status,
            "reason": f"{step}: {shorten(error)}",
            **({"control": upstream} if upstream else {}),
        }
    if batch is None:
        return {**result, "status": NOT_RUN, "reason": note["forward"]}
    return {**result, "status": PASSES, "reason": ""}


def find_class(name: str, model_type: str) -> type:
    """A model class by its name; some (Voxtral's text model) are in their own module alone."""
    if hasattr(hf, name):
        return getattr(hf, name)
    package = CONFIG_MAPPING[model_type].__module__.rpartition(".configuration_")
    return getattr(importlib.import_module(f"{package[0]}.modeling_{package[2]}"), name)


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


def backward(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Layers whose two factors get a finite gradient that is not zero. Raises where none does though it could."""
    try:
        loss = mean_square(model, batch)
    except AssertionError:  # Reformer goes backward in training mode alone
        loss = mean_square(model.train(), batch)
        model.eval()
    if loss is None:
        return 0  # the class runs its forward without gradients
    trained = 0
    for name, layer in low_rank(model).items():
        grads = [layer.down.weight.grad, layer.up.weight.grad]
        present = [g for g in grads if g is not None]
        require(len(present) in (0, 2), f"only one factor of {name} has a gradient")
        require(all(bool(g.isfinite().all()) for g in present) or not math.isfinite(float(loss)), f"gradient of {name}")
        trained += len(present) == 2 and all(bool(g.any()) for g in present)
    model.zero_grad()
    return trained


def mean_square(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """A loss from whatever the model returns, after its backward; None where nothing needs a gradient."""
    losses = [t.float().square().mean() for t in run(model, batch, gradients=True) if t.requires_grad]
    if not losses:
        return None
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.detach()


def control(model_class: type, config: Any, batch: dict[str, torch.Tensor] | None, step: str, auto_name: str) -> str:
    """What the same step does to the dense model, untouched by us: what goes wrong there, or "" if nothing does."""
    try:
        model = build(model_class, config)
        if step == "plan":
            return ""
        if batch is not None:
            dense = run(model, batch)
            compare(run(model, batch), dense, 1e-4, "in a second forward")
            if step in ("full rank", "merge"):  # how much rounding is multiplied by this model
                moved = copy.deepcopy(model)
                with torch.no_grad():
                    for parameter in moved.parameters():
                        parameter.mul_(1 + 1e-6)
                compare(run(moved, batch), dense, 2e-3, "after a change of 1e-6")
            if step == "backward":
                mean_square(model, batch)
        if step in ("save and load", "merge"):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                loaded, _ = load(model_class, auto_name, folder)
                same_weights(model, loaded)
                if batch is not None:
                    compare(run(loaded, batch), dense, 1e-4, "dense, after loading")
    except Exception as error:
        return shorten(error)
    return ""


def load(model_class: type, auto_name: str, folder: str) -> tuple[Any, str]:
    """The saved model, and what loaded it: the auto class where it gives this class, else the class itself."""
    try:
        model = getattr(hf, auto_name).from_pretrained(folder)
        by = auto_name
    except Exception:  # AutoBackbone takes no folder; a failure of ours comes again in the next line
        model, by = None, ""
    if type(model) is not model_class:  # one auto class can stand for several classes
        model, by = model_class.from_pretrained(folder), model_class.__name__  # type: ignore[attr-defined]
    return model.float().eval(), by


def low_rank(model: nn.Module) -> dict[str, LowRankLinear]:
    """The factorized layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Their ranks."""
    return {n: m.rank for n, m in low_rank(model).items()}


def same_weights(model: nn.Module, other: nn.Module) -> None:
    """Raises unless both hold the same parameters, bit for bit."""
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        require(name in theirs, f"{name} is missing after loading")
        require(torch.equal(parameter, theirs[name]), f"{name} has other values after loading")


def finite(outputs: list[torch.Tensor]) -> bool:
    """Whether no output is NaN or Inf."""
    return all(bool(t.isfinite().all()) for t in outputs)


def compare(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float, when: str) -> None:
    """Raises where an output differs by more than a share of its largest value."""
    require(len(actual) == len(expected), f"another number of outputs {when}")
    for x, y in zip(actual, expected, strict=True):
        require(x.shape == y.shape, f"another shape of an output {when}")
        x, y = x.nan_to_num(), y.nan_to_num()
        far = float((x - y).abs().max()) / (1e-6 + float(y.abs().max()))
        require(far <= tolerance, f"outputs differ by {far:.1e} of their size {when}")


def require(condition: bool, message: str) -> None:
    """Raises CheckFailed with the message unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


def shorten(error: BaseException) -> str:
    """One line of an error, without addresses."""
    kind = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
    text = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(str(error).split()))
    return (kind + text)[:300]


# --- all classes, each in a process of its own ---


def child(name: str, model_type: str, auto_name: str, connection: Any) -> None:
    """Runs in a fork of the parent, which has imported everything already."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        result = check(name, model_type, auto_name)
    except BaseException as error:
        result = {"class": name, "model_type": model_type, "auto": auto_name, "status": FAILS, "reason": shorten(error)}
    connection.send(result)
    connection.close()


def run_all(classes: dict[str, tuple[str, str]], workers: int, done: Callable[[dict[str, Any]], None]) -> None:
    """Each class in a process of its own, `workers` at a time; calls `done` with each result."""
    context = multiprocessing.get_context("fork")
    waiting = list(classes.items())
    running: list[tuple[Any, Any, float, tuple[str, tuple[str, str]]]] = []
    while waiting or running:
        while waiting and len(running) < workers:
            item = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(item[0], *item[1], theirs))
            process.start()
            theirs.close()
            running.append((process, ours, time.monotonic(), item))
        multiprocessing.connection.wait([entry[1] for entry in running], timeout=1.0)
        for entry in list(running):
            process, ours, started, (name, (model_type, auto_name)) = entry
            result: dict[str, Any] = {"class": name, "model_type": model_type, "auto": auto_name}
            late = time.monotonic() - started > SECONDS
            if ours.poll():
                try:
                    result = ours.recv()
                except EOFError:
                    process.join()
                    result |= {"status": FAILS, "reason": f"the process died with exit code {process.exitcode}"}
            elif late:
                process.kill()
                result |= {"status": FAILS, "reason": f"no end within {SECONDS} seconds"}
            else:
                continue
            process.join()
            ours.close()
            running.remove(entry)
            result["seconds"] = round(time.monotonic() - started, 1)
            done(result)


# --- the document ---


def write_docs(results: list[dict[str, Any]], versions: dict[str, str], classes: int) -> str:
    """docs/compatibility.md from the results alone."""
    by_status = Counter(r["status"] for r in results)
    tested = [r for r in results if r["status"] in (PASSES, REFUSED, FAILS, UPSTREAM)]
    able = len(tested) - by_status[REFUSED]
    part = "" if len(results) == classes else f", drawn at random from {classes:,},"
    lines = [
        "# Compatibility",
        "",
        "Every model class of transformers' auto mappings, built tiny from its config with random weights, in fp32 on a CPU: the "
        "same plan twice from one seed, full rank equal to dense, factorize, forward, backward, save, AutoModel load with equal "
        "outputs, merge. Written by",
        "`python benchmarks/compatibility.py`; every class with its result is in "
        "`benchmarks/results/compatibility.json`.",
        "",
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}: {len(results):,} classes{part} of "
        f"{len({r['model_type'] for r in results})} model types. {len(tested)} build and run; {by_status[REFUSED]} of these have "
        f"nothing to factorize, and of the other {able}, {by_status[PASSES]} pass ({by_status[PASSES] / max(able, 1):.1%}).",
        "",
        "| auto class | classes | pass | refused | fail | dense fails too | not run | not built |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for auto in [*dict.fromkeys(r["auto"] for r in results), "all"]:
        mine = [r for r in results if auto in (r["auto"], "all")]
        count = Counter(r["status"] for r in mine)
        numbers = [count[s] for s in (PASSES, REFUSED, FAILS, UPSTREAM, NOT_RUN, NOT_BUILT)]
        lines.append(f"| {auto} | {len(mine)} | {' | '.join(map(str, numbers))} |")
    lines += [
        "",
        "*Refused*: nothing to factorize, said by an error before anything is changed. *Dense fails too*: the dense model, saved and "
        "loaded or run twice without us, does not give its own outputs back either. *Not run*: it builds, but none of our "
        "generic batches fits its forward; all steps but forward and backward pass. *Not built*: no tiny config works without "
        "weights or packages from elsewhere.",
    ]
    for status, title in ((REFUSED, "Refused"), (FAILS, "Fails"), (UPSTREAM, "Dense fails too"), (NOT_RUN, "Not run")):
        groups: dict[str, list[str]] = {}
        for r in results:
            if r["status"] == status:
                reason = re.sub(rf"\b{re.escape(r['class'])}\b", "the model", r.get("control") or r["reason"])
                groups.setdefault(generic(reason), []).append(r["class"])
        if groups and status != NOT_RUN:
            lines += ["", f"## {title}", "", "| why | classes |", "|---|---|"]
            ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
            lines += [f"| {reason.replace('|', '/')} | {', '.join(names)} |" for reason, names in ordered]
        elif groups:
            names = sorted(name for group in groups.values() for name in group)
            lines += ["", f"## {title}", "", ", ".join(names) + "."]
    lines += ["", "## Passes", ""]
    lines.append(", ".join(sorted({r["model_type"] for r in results if r["status"] == PASSES})) + ".")
    return "\n".join(lines) + "\n"


def generic(reason: str) -> str:
    """A reason without the numbers that differ from class to class."""
    return re.sub(r"(?<![A-Za-z])\d+\.?\d*(e[-+]?\d+)?", "N", reason)[:200]


def main(arguments: list[str] | None = None) -> int:
    """1 if a class fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="model types or classes that contain one of these words")
    parser.add_argument("--every", type=int, default=1, help="every Nth class only")
    parser.add_argument("--again", nargs="+", default=[], help="run the classes with one of these statuses again")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write-docs", action="store_true", help="only write the document from the results")
    options = parser.parse_args(arguments)
    known: dict[str, Any] = {}
    if options.out.exists():
        known = {r["class"]: r for r in json.loads(options.out.read_text("utf-8"))["results"]}
    versions = {"torch": torch.__version__.split("+")[0], "transformers": hf.__version__}
    classes = model_classes()
    if not options.write_docs:
        warnings.simplefilter("ignore")
        hf.utils.logging.set_verbosity_error()
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        order = {name: i for i, name in enumerate(classes)}
        words = [w.lower() for w in options.only]
        shuffled = random.Random(0).sample(
            list(classes.items()), len(classes)
        )  # so that a part of a run is a fair sample
        chosen = {
            name: place
            for name, place in shuffled[:: 1 if options.again else options.every]
            if (not words or any(w in place[0].lower() or w in name.lower() for w in words))
            and (known[name]["status"] in options.again if name in known else not options.again)
        }

        def done(result: dict[str, Any]) -> None:
            known[result["class"]] = result
            print(f"{len(known)} {result['class']}: {result['status']} {result['reason'][:150]}", flush=True)
            save()

        last = [0.0]

        def save(now: bool = False) -> None:
            if now or time.monotonic() - last[0] > 20:
                last[0] = time.monotonic()
                ordered = sorted(known.values(), key=lambda r: order.get(r["class"], len(order)))
                text = ",\n".join(json.dumps(r) for r in ordered)
                partial = options.out.with_suffix(".partial")
                head = f'"versions": {json.dumps(versions)}, "classes": {len(classes)}'
                partial.write_text(f'{{{head}, "results": [\n{text}\n]}}\n', "utf-8")
                os.replace(partial, options.out)

        check(
            "LlamaForCausalLM", "llama", "AutoModelForCausalLM"
        )  # what is imported and cached here, forks have at once
        run_all(chosen, options.workers, done)
        save(now=True)
    if options.out == RESULTS:
        DOCS.write_text(write_docs(list(known.values()), versions, len(classes)), "utf-8")
    failed = [r["class"] for r in known.values() if r["status"] == FAILS]
    print(Counter(r["status"] for r in known.values()), "failed:", failed[:20])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
