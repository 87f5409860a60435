"""Where: which layers of a model are targets. Found by structure, with no list of architectures."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import cast

import regex  # type: ignore[import-untyped]  # re, with a time limit; transformers brings it
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..config import CuttlefishConfig
from ..layers.dense import check_rank, is_quantized
from ..layers.kinds import KINDS, find_layers, is_dense, kind_of, labels
from ..layers.low_rank import LowRankLayer, low_rank_layers
from .stored import lost_when_saved
from .vocabulary import embeddings_of, find_vocabulary

COMPUTED = "the weight is computed from other parameters"

PATTERN_SECONDS = 1.0
"""A regular expression that takes longer on one name is refused."""


def find_targets(model: nn.Module, config: CuttlefishConfig | None = None) -> dict[str, nn.Module]:
    """The layers to watch and to factorize: name -> layer of one of the `KINDS`, in the order of `named_modules`.

    "all" takes every layer of a kind that says so inside a repeated block (a child of an nn.ModuleList, or a block in an nn.Sequential
    with others of its class, or one of several that are numbered, as `b1` and `b2`) of the base model, and the convolutions of an nn.Sequential of layers (VGG), but no convolution that is
    the model's first layer; "all-linear" takes the linear ones alone. Never taken, whatever the pattern says: embeddings and output
    embeddings, a PreTrainedModel's head (what lies outside its base model), tied weights, weights computed from other parameters, layers
    inside a low-rank one. A module registered under several names is taken once, under its first name. With `embeddings` also the
    tables of tokens and their output layers. (`factorize(model, {name: rank})` obeys for a layer of a head, too.)

    Args:
        model: any module.
        config: its target_modules, exclude_modules, embeddings and rank_pattern are read.

    Raises:
        ValueError: a pattern that matches no layer that could be factorized, with the closest names; PEFT's adapters.
        TypeError: the model is no module, or a target is quantized (packed weights cannot be factorized).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    adapted = next((n for n, m in model.named_modules() if type(m).__module__.startswith("peft.") and n), None)
    if adapted is not None:
        raise ValueError(
            f"{adapted} belongs to PEFT, which trains adapters beside frozen weights: factorize first and add the adapters "
            "then, or merge_and_unload() them before"
        )
    config = config or CuttlefishConfig()
    candidates = dict(_candidates(model))
    for name in lost_when_saved(model, candidates):
        del candidates[name]
    if not config.names_targets:
        chosen = _in_blocks(model, candidates, linear=config.target_modules == "all-linear")
    else:
        chosen = _matching(model, candidates, config.target_modules, "target_modules")
    if config.embeddings:
        vocabulary = find_vocabulary(model)
        order = {id(module): i for i, module in enumerate(model.modules())}
        chosen = dict(sorted({**vocabulary, **chosen}.items(), key=lambda item: order.get(id(item[1]), len(order))))
        candidates |= vocabulary
    if config.exclude_modules:
        excluded = _matching(model, candidates, config.exclude_modules, "exclude_modules")
        chosen = {name: module for name, module in chosen.items() if name not in excluded}
        if not chosen:
            raise ValueError(f"exclude_modules={config.exclude_modules!r} leaves no target layer")
    for pattern in config.rank_pattern:
        if not any(matches(pattern, name) for name in chosen):
            raise ValueError(f"rank_pattern {pattern!r} matches none of the target layers; {_closest(pattern, chosen)}")
    for name, module in chosen.items():
        _check_target(name, module, config)
    return chosen


def _in_blocks(model: nn.Module, candidates: dict[str, nn.Module], linear: bool) -> dict[str, nn.Module]:
    """The candidates (linear ones alone) inside a repeated block; raises ValueError where there are none."""
    inside = _block_names(model)
    first = next((module for _, module in find_layers(model)), None)
    # A layer with one input or output (the gate of a shared expert) has no rank at which it would be smaller.
    chosen = {
        name: module
        for name, module in candidates.items()
        if (name in inside or (name.rpartition(".")[0] in inside and is_part(module)))
        and min(kind_of(module).size) > 1
        and kind_of(module).in_blocks
        and (kind_of(module).is_linear or not (linear or module is first))
    }
    if not chosen:
        raise ValueError(
            f"target_modules={'all-linear' if linear else 'all'!r} finds no {labels('or', linear, True)} inside a repeated block of "
            f"{type(model).__name__}: {_why_none(model)}"
        )
    return chosen


def is_part(layer: nn.Module) -> bool:
    """Whether a layer is a parameter of a larger module, by whose name it is meant, too."""
    return not isinstance(kind_of(layer).seat, nn.Module)


def _check_target(name: str, module: nn.Module, config: CuttlefishConfig) -> None:
    """Raises ValueError for a rank of rank_pattern that the layer cannot have, TypeError for a quantized layer."""
    for pattern, rank in config.rank_pattern.items():
        if matches(pattern, name):
            out_features, in_features = kind_of(module).size
            check_rank(rank, in_features, out_features, name)
            break
    if is_quantized(cast(torch.Tensor, module.weight)):
        raise TypeError(
            f"{name} holds {module.weight.dtype} weights: a quantized layer cannot be factorized; exclude it"
        )


def matches(pattern: str, name: str) -> bool:
    """PEFT's rule for rank_pattern keys: the pattern, as a regular expression, matches the whole name or its ending."""
    return _is_match(rf"(.*\.)?({pattern})", name)


def skipped_parameters(model: nn.Module) -> dict[str, int]:
    """Dense 3-D expert weights, factors aside: parameter name -> number of elements. For the report."""
    factors = {id(factor) for layer in low_rank_layers(model).values() for factor in layer.factors}
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name.lower() and id(parameter) not in factors
    }


def notes_of_dense(model: nn.Module) -> list[str]:
    """A note for each reason why layers are no targets though others like them are, of kinds that "all" takes.

    Depthwise convolutions anywhere; in repeated blocks other convolutions (1d, 3d, transposed), and weights that are computed.
    """
    reasons: dict[str, list[str]] = {}
    inside = _block_names(model)
    for name, layer in find_layers(model):
        if not is_dense(layer) or not kind_of(layer).in_blocks:
            continue
        why = kind_of(layer).why_dense()
        if not why and name in inside and layer._parameters.get("weight") is None:
            why = COMPUTED
        if why:
            reasons.setdefault(why, []).append(name)
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and name in inside and not is_dense(module):
            kind = type(module).__name__
            why = (
                COMPUTED
                if hasattr(module, "parametrizations")
                else f"{kind} is no kind of layer that can be factorized"
            )
            reasons.setdefault(why, []).append(name)
    return [
        f"{len(names)} layers stay dense ({names[0]}{', ...' if names[1:] else ''}): {why}"
        for why, names in reasons.items()
    ]


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of a class that can be factorized, in no head, whose weight is their own and no (output) embedding."""
    prefix = _base_prefix(model)
    banned = {id(m) for m in embeddings_of(model)}
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    tied = _tied_names(model)
    inner = {id(child) for m in model.modules() if isinstance(m, LowRankLayer) for child in m.children()}
    for name, module in find_layers(model):
        if not is_dense(module) or kind_of(module).is_vocabulary or kind_of(module).why_dense():
            continue
        if id(module) in banned or id(module) in inner:
            continue
        weight = module._parameters.get("weight")  # None where weight_norm or pruning computes it
        shared = any(owners[id(module._parameters.get(part))] > 1 for part in ("weight", "bias"))
        if weight is None or shared or f"{name}{kind_of(module).weight_key}" in tied:
            continue
        if name and (not prefix or name.startswith(prefix + ".")):
            yield name, module


def _tied_names(model: nn.Module) -> set[str]:
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return set(keys) | set(keys.values()) if isinstance(keys, dict) else set(keys)


def _block_names(model: nn.Module) -> set[str]:
    """Names of all modules that lie inside a repeated block of the base model."""
    prefix = _base_prefix(model)
    blocks = _bare_layers(model)
    for name, module in model.named_modules():
        if prefix and not (name + ".").startswith(prefix + "."):
            continue
        blocks += [f"{name}.{child}." if name else f"{child}." for child in _blocks_in(module)]
    return {
        name
        for name, _ in model.named_modules()
        if any(name.startswith(b) or name == b[:-1] for b in _outermost(blocks))
    }


def _bare_layers(model: nn.Module) -> list[str]:
    """Names, with a dot, of the convolutions in an nn.Sequential of layers that has several (VGG)."""
    return [
        f"{name}.{child}." if name else f"{child}."
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential) and sum(isinstance(layer, nn.Conv2d) for layer in module) >= 3
        for child, layer in module._modules.items()
        if isinstance(layer, nn.Conv2d)
    ]


def _outermost(blocks: list[str]) -> list[str]:
    known = set(blocks)

    def nested(block: str) -> bool:
        parts = block[:-1].split(".")
        return any(".".join(parts[:i]) + "." in known for i in range(1, len(parts)))

    return [b for b in blocks if not nested(b)]


def has_children(module: nn.Module | None) -> bool:
    """Whether a module is put together of others."""
    return module is not None and next(iter(module.children()), None) is not None


def _blocks_in(module: nn.Module) -> list[str]:
    """The children of a container that are repeated blocks; none of any other module."""
    together = {name: child for name, child in module._modules.items() if child is not None and has_children(child)}
    kinds = Counter(type(child) for child in together.values())
    if isinstance(module, nn.ModuleList):
        # A list of bare layers is a list of heads or of stems, not of blocks.
        return list(module._modules) if together else []
    if isinstance(module, nn.Sequential):
        # A bare layer beside blocks is a stem or a head.
        return list(together) if kinds and max(kinds.values()) >= 2 else []
    # Blocks that are numbered by hand (b1, b2, ...; denselayer1, ...), each of several layers: one alone may be a stem.
    numbered = Counter((type(m), stem) for n, m in together.items() if (stem := n.rstrip("0123456789")) not in ("", n))
    several = {key for key, count in numbered.items() if count >= 2}
    return [n for n, m in together.items() if (type(m), n.rstrip("0123456789")) in several and _has_several(m)]


def _has_several(module: nn.Module) -> bool:
    return sum(min(kind_of(layer).size) > 1 for _, layer in find_layers(module)) >= 2


def _base_prefix(model: nn.Module) -> str:
    """Name of the base model inside a PreTrainedModel with a head; "" where there is no such split."""
    prefix = getattr(model, "base_model_prefix", "") or ""
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _matching(
    model: nn.Module, candidates: dict[str, nn.Module], wanted: str | list[str], field: str
) -> dict[str, nn.Module]:
    def hit(pattern: str, name: str, is_regex: bool) -> bool:
        return _is_match(pattern, name) if is_regex else name == pattern or name.endswith("." + pattern)

    is_regex = isinstance(wanted, str)
    patterns = [wanted] if isinstance(wanted, str) else wanted
    found: set[str] = set()
    for pattern in patterns:
        names = {
            name
            for name, module in candidates.items()
            if hit(pattern, name, is_regex) or (is_part(module) and hit(pattern, name.rpartition(".")[0], is_regex))
        }
        if not names:
            others = [name for name, _ in model.named_modules() if name and hit(pattern, name, is_regex)]
            if others and field == "exclude_modules":
                continue  # never taken anyway
            if others:
                kind = type(model.get_submodule(others[0])).__name__
                raise ValueError(
                    f"{field} {pattern!r} matches only modules that cannot be factorized, such as {others[0]} "
                    f"({kind}): embeddings, heads, tied weights, norms, containers and already factorized layers stay "
                    "as they are"
                )
            if is_regex and (endings := _as_endings(pattern, candidates)):
                raise ValueError(
                    f"{field} is the str {pattern!r}, which is a regular expression that has to match whole names, and matches "
                    f"none; a list holds endings of names: did you mean {field}={endings!r}?"
                )
            raise ValueError(f"{field} {pattern!r} matches no module; {_closest(pattern, candidates)}")
        found |= names
    return {name: module for name, module in candidates.items() if name in found}


def _as_endings(text: str, names: Iterable[str]) -> list[str]:
    """The text as a list of name endings (one, or several with commas, blanks or bars between), if all of them fit."""
    endings = [part for part in re.split(r"[\s,|]+", text.strip("()[] ")) if part]
    names = list(names)
    fits = all(any(name == e or name.endswith("." + e) for name in names) for e in endings)
    return endings if fits else []


def _is_match(pattern: str, name: str) -> bool:
    """Whether the pattern matches the whole name. It may come from a file, and some patterns take years to say no."""
    try:
        return regex.fullmatch(pattern, name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(
            f"the pattern {pattern!r:.200} takes more than {PATTERN_SECONDS} s on {name!r:.200}: write it without repeats "
            "inside repeats, or list name endings"
        ) from error


def _closest(pattern: str, names: Iterable[str]) -> str:
    endings: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in (1, 2):
            endings.setdefault(".".join(parts[-length:]), None)
    plain = re.sub(r"[\\^$*+?()\[\]{}|]|\.\*", "", pattern).strip(".")
    close = difflib.get_close_matches(plain, list(endings) + list(names), n=3, cutoff=0.3) or list(endings)[:6]
    return f"close names: {', '.join(close)}" if close else "no layer of it can be factorized"


def _why_none(model: nn.Module) -> str:
    done = len(low_rank_layers(model))
    if done:
        return f"{done} layers are already factorized"
    if "_orig_mod" in model._modules:
        return "it is what torch.compile has made: pass the model that was compiled"
    if notes := notes_of_dense(model):
        return "; ".join(notes)
    dense = tuple(kind.dense for kind in KINDS.values() if not kind.is_vocabulary)
    kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, dense) and type(m) not in dense})
    if kinds:
        return f"its layers are of the classes {', '.join(kinds)}, which may compute something else and stay dense"
    return "name the layers with target_modules=[...]"
