"""Save and load: factorized folders load with `from_pretrained`, and checkpoints of either structure resume.

A factorized model's config.json says {"quantization_config": {"quant_method": "cuttlefish", "ranks": {...}}}; the class
registered here gives the freshly built model that structure before its weights are read. Nothing but JSON and
safetensors is read, and no rank is believed before it is held against the layer's own size.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import optimizer as optimizers
from . import redundancy
from .flattened import INSIDE, check_structure
from .layers import DENSE_TYPES, LowRankLinear, dense_origin, dense_weight, is_divided
from .patching import (
    QUANT_METHOD,
    STRUCTURE_VERSION,
    check_mergeable,
    low_rank_layers,
    restructure,
    write_structure,
)
from .selection import conversions
from .tensor_plan import cut, extend, settle
from .wrapper import check_not_wrapped, unwrap

logger = logging.getLogger(__name__)

_OPTIMIZERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_DISAGREE = "config.json and the tensors belong to different models"


class CuttlefishStructure(QuantizationConfigMixin):
    """The note in config.json: {module name: rank}, with a version.

    Raises:
        ValueError: a newer version, or ranks that are no {name: whole number of at least 1}.
    """

    def __init__(
        self, ranks: Any = None, version: Any = STRUCTURE_VERSION, quant_method: str = QUANT_METHOD, **other: Any
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


class CuttlefishLoader(HfQuantizer):
    """Builds the structure for `from_pretrained`. Registered as a quantizer: that is the door transformers offers."""

    requires_calibration = False
    quantization_config: CuttlefishStructure

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        ranks = names_in(model, self.quantization_config.ranks)
        if not ranks:
            raise ValueError(
                f"config.json names {len(self.quantization_config.ranks)} factorized layers, such as "
                f"{next(iter(self.quantization_config.ranks))!r}, and {type(model).__name__} has none of them"
            )
        _check_files(model, ranks, checkpoint_files or ())
        restructure(model, ranks)
        for layer in low_rank_layers(model).values():
            # Until the weights are loaded: the _init_weights of xLSTM and OneFormer fill the bias of every nn.Linear of
            # theirs without asking whether it has one.
            vars(layer.down)["bias"] = torch.empty(0)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Before the model is made parallel: rules for the factors, as transformers asks for."""
        extend(model, plan)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # From here on it is an ordinary model: nothing about it is quantized.
        for holder, key in ((model, "hf_quantizer"), (model, "quantization_method"), (model, "is_quantized")):
            if key in vars(holder):
                delattr(holder, key)
        for module in model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and "_is_quantized" in vars(config):
                del config._is_quantized
        for layer in low_rank_layers(model).values():
            vars(layer.down).pop("bias", None)
        settle(model)
        write_structure(model)
        flags = [getattr(p, "_is_hf_initialized", False) for p in model.parameters()]
        for name, layer in low_rank_layers(model).items():
            for child in ("down", "up"):
                weight = getattr(layer, child).weight
                missing = not getattr(weight, "_is_hf_initialized", False) and not weight.is_meta  # meta: left on disk
                if any(flags) and missing:
                    raise ValueError(
                        f"config.json says that {name} is factorized at rank {layer.rank}, but the weights hold no "
                        f"{name}.{child}.weight: {_DISAGREE}"
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


def follow_checkpoints(model: nn.Module, optimizer: Any = None) -> None:
    """Let `model.load_state_dict` take dense and factorized weights alike: the structure follows the weights.

    This is what makes a Trainer resume a checkpoint made after the switch, and load the best model from before it. An
    optimizer that exists already (given to the Trainer by the user) follows too.
    """
    if optimizer is not None:
        _OPTIMIZERS[model] = weakref.ref(optimizer)
    if not getattr(model, "_cuttlefish_follows", False):
        model.register_load_state_dict_pre_hook(_follow)
        model._cuttlefish_follows = True  # type: ignore[assignment]
    write_structure(model)  # a dense model made from a factorized one's config must not be saved with its note


def save_merged(model: PreTrainedModel, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a factorized model as the dense model that it stands for, in a folder that loads without hf_cuttlefish.

    The model itself stays factorized, on its device, and may go on training. Peak memory: the model, and on the CPU the
    dense weights of its factorized layers; they are multiplied out one layer at a time, so that a device holds one of them.

    Args:
        model: bare, or as DDP or torch.compile has wrapped it.
        folder: made if it is missing.
        kwargs: as of `save_pretrained`: max_shard_size, is_main_process, push_to_hub, ...

    Raises:
        TypeError: the model has no `save_pretrained` of transformers (for a PEFT model merge its adapters first).
        ValueError: it has no factorized layer, a layer is on the meta device, a factor is quantized or holds an adapter, or an
            engine has sharded the model.
        NotADirectoryError: the folder is a file.
    """
    model = unwrap(model)  # type: ignore[assignment]
    check_not_wrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_merged saves models of transformers, got {type(model).__name__}; of a PEFT model give "
            "model.merge_and_unload(), of any other module use merge(copy.deepcopy(model))"
        )
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no factorized layer to merge: use save_pretrained")
    check_mergeable(layers)
    for name, layer in layers.items():
        if layer.up.weight.is_meta or layer.down.weight.is_meta:
            raise ValueError(
                f"{name} is on the meta device (left on disk): load the model into memory before merging it"
            )
    if os.path.isfile(folder):
        raise NotADirectoryError(f"{os.fspath(folder)} is a file: give a folder")
    dense: dict[int, nn.Module] = {}
    for layer in layers.values():
        dense[id(layer)] = twin = layer.to_dense()
        twin.weight = nn.Parameter(twin.weight.detach().cpu(), requires_grad=False)
    merged = cast(PreTrainedModel, _twin(model, dense, {}))
    write_structure(merged)
    merged.save_pretrained(folder, **kwargs)


def _twin(module: nn.Module, new: Mapping[int, nn.Module], known: dict[int, Any]) -> nn.Module:
    """A module of the same tensors, whose structure and configs are its own, with the modules in `new` exchanged (by id)."""
    if id(module) in new:
        return new[id(module)]
    if id(module) not in known:
        known[id(module)] = twin = copy.copy(module)
        children = {n: None if c is None else _twin(c, new, known) for n, c in module._modules.items()}
        twin.__dict__["_modules"] = children
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                twin.__dict__[key] = copy.deepcopy(value, known)
    return known[id(module)]


def _finder(model: nn.Module) -> Callable[[str], str | None]:
    """A function that gives a saved layer's name in this model (see `names_in`), or None."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."

    def find(name: str) -> str | None:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if _is_layer(model, candidate)), None)

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
            for key, renamed in _renamed(model, keys):
                layer, _, part = renamed.removesuffix(".weight").rpartition(".")
                name = find(layer)
                if name is None:
                    continue
                found = _rank_of(key, part, opened.get_slice(key).get_shape())
                if name not in ranks:
                    raise ValueError(
                        f"the weights hold factors of {name} (rank {found}), and config.json does not say that it is "
                        f"factorized: {_DISAGREE}"
                    )
                if found != ranks[name]:
                    raise ValueError(
                        f"config.json says that {name} has rank {ranks[name]}, and the weights hold rank {found}: "
                        f"{_DISAGREE}"
                    )


def _opened(file: str) -> Any:
    """The open file; its header is held against its length before anything is read."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or was cut off: {error!s:.200}") from error


def _follow(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Before the tensors of a whole file, or of one shard, which may hold one factor of a layer and not the other."""
    if prefix.endswith(f"{INSIDE[0]}."):
        check_structure(module, [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)])
        return
    _rename(module, state_dict, prefix)
    shapes: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in state_dict.items():
        name, part = _split(module, key.removeprefix(prefix)) if key.startswith(prefix) else (None, "")
        if name is None:
            continue
        if is_divided(next(module.get_submodule(name).parameters())):
            _check_divided(name, module.get_submodule(name), part)
            continue
        shapes.setdefault(name, {})[part] = tensor.shape
    wanted: dict[str, int | None] = {}
    for name, parts in shapes.items():
        rank, layer = _structure(name, parts), module.get_submodule(name)
        if rank == (layer.rank if isinstance(layer, LowRankLinear) else None):
            continue
        _check_shapes(name, layer, rank, parts)
        wanted[name] = rank
    changes = restructure(module, wanted) if wanted else {}
    _rename_biases(module, state_dict, prefix)
    optimizer = _OPTIMIZERS[module]() if module in _OPTIMIZERS else None
    if changes and optimizer is not None:
        follow = redundancy.follow if optimizers.is_redundant(optimizer) else optimizers.follow
        follow(optimizer, changes.values())
    cut(module, state_dict, prefix)


def _check_divided(name: str, layer: nn.Module, part: str) -> None:
    """Raises ValueError unless what DeepSpeed loads, which tells no shapes, is of the layer's structure, which it has fixed."""
    if isinstance(layer, LowRankLinear) is (part == "dense"):
        kinds = ("dense", "factorized") if part == "dense" else ("factorized", "dense")
        raise ValueError(
            f"{name} is {kinds[0]} in the checkpoint and {kinds[1]} in the model, whose parameters DeepSpeed ZeRO-3 has divided: "
            "resume with --resume_from_checkpoint as a training argument, so that CuttlefishCallback can change the model before"
        )


def _rename_biases(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """A shard may hold a layer's bias and neither of its factors: it goes to where the bias is now, and stays there."""
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(".bias")]:
        name = key.removeprefix(prefix).removesuffix(".bias").removesuffix(".up")
        if _is_layer(module, name):
            new = f"{prefix}{name}{'.up' if isinstance(_get(module, name), LowRankLinear) else ''}.bias"
            if new != key:
                state_dict[new] = state_dict.pop(key)


def _split(module: nn.Module, key: str) -> tuple[str | None, str]:
    """The layer whose weight the key names, and which part: "down", "up" or "dense". (None, "") for any other key."""
    for part, ending in (("down", ".down.weight"), ("up", ".up.weight"), ("dense", ".weight")):
        name = key.removesuffix(ending)
        if name != key and _is_layer(module, name):
            return name, part
    return None, ""


def _structure(name: str, parts: Mapping[str, torch.Size]) -> int | None:
    """The rank that one layer's tensors have, None for dense. Raises ValueError where they contradict each other."""
    ranks = {
        None if part == "dense" else _rank_of(f"{name}.{part}.weight", part, shape) for part, shape in parts.items()
    }
    if len(ranks) > 1:
        shapes = {part: tuple(shape) for part, shape in parts.items()}
        raise ValueError(f"the weights of {name} do not fit together: {shapes}")
    return ranks.pop()


def _rank_of(key: str, part: str, shape: Sequence[int]) -> int:
    """The rank that a factor of this shape has: (rank, in) for "down", (out, rank) for "up"."""
    if len(shape) != 2:
        raise ValueError(f"{key} has the shape {tuple(shape)}: a factor has two dimensions; nothing is loaded")
    return shape[0 if part == "down" else 1]


def _check_shapes(name: str, layer: nn.Module, rank: int | None, parts: Mapping[str, torch.Size]) -> None:
    """Raises ValueError, before the layer is touched, for tensors that belong to a layer of another size."""
    if isinstance(layer, LowRankLinear):
        m, n, transposed = layer.out_features, layer.in_features, layer.origin == "Conv1D"
    else:
        (m, n), transposed = dense_weight(layer).shape, dense_origin(layer) == "Conv1D"
    fitting = {"down": (rank, n), "up": (m, rank), "dense": (n, m) if transposed else (m, n)}
    for part, shape in parts.items():
        if tuple(shape) != fitting[part]:
            tensor = f"{name}.weight" if part == "dense" else f"{name}.{part}.weight"
            raise ValueError(
                f"{tensor} has the shape {tuple(shape)}, and this model needs {fitting[part]}; nothing is loaded"
            )


def _rename(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """Undo the legacy names and layouts that `save_pretrained` writes for some models (ViT, DeiT, BEiT, Swin, experts).

    transformers 5 does so on `from_pretrained`, but a Trainer's resume loads the raw names and drops the weights
    (huggingface/transformers issues 43701 and 48805).
    """
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    keys = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
    strange = [key for key in keys if key not in own and not _names_factor(module, key)]
    left = []
    for old, new in _renamed(module, strange):
        if new != old and prefix + new not in state_dict and (new in own or _names_factor(module, new)):
            state_dict[prefix + new] = state_dict.pop(prefix + old)
        else:
            left.append((old, new))
    for olds, values in _converted(module, left, {old: state_dict[prefix + old] for old, _ in left}):
        if not values or any(own.get(name) != value.shape for name, value in values.items()):
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


def _renamed(module: nn.Module, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
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
