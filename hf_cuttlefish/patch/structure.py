"""Structure: the note of ranks in a config, and a model shaped for weights about to be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..layers.dense import check_rank, is_quantized
from ..layers.kinds import find_layers, is_dense, kind_of
from ..layers.low_rank import LowRankLayer, low_rank_layers
from ..layers.sizes import plain_name
from ..layers.vocabulary import with_tied
from .edits import Edit
from .surgery import Ties, keep_hooks, retie, swap

QUANT_METHOD = "cuttlefish"


STRUCTURE_VERSION = 2
"""Of the note: 1 names linear layers alone, 2 layers of other kinds, too."""


Exchanges = dict[str, tuple[nn.Module, nn.Module]]
"""Name -> (old module, new module)."""


def restructure(model: nn.Module, ranks: Mapping[str, int | None]) -> Exchanges:
    """Give layers the structure that weights about to be loaded have: a rank, or None for dense. Values are to come.

    Returns name -> (old module, new module), for an optimizer that has to follow.

    Raises:
        ValueError: a name that is no such layer, or a rank out of range; nothing is changed then.
    """
    changes = plan_structure(model, ranks)
    exchange(model, changes)
    return changes


def plan_structure(model: nn.Module, ranks: Mapping[str, int | None]) -> Exchanges:
    """The new modules that `restructure` puts in; nothing is changed. Raises as it does."""
    modules = dict(model.named_modules(remove_duplicate=False)) | dict(find_layers(model, remove_duplicate=False))
    changes: Exchanges = {}
    seen: set[int] = set()
    for name, rank in ranks.items():
        module = modules.get(name)
        new: nn.Module
        if isinstance(module, LowRankLayer):
            if rank == module.rank or id(module) in seen:
                continue
            dense = module.to_dense()
            new = dense if rank is None else kind_of(dense).stand_in(None, None, _checked(rank, dense, name))
        elif module is not None and is_dense(module):
            if rank is None or id(module) in seen:
                continue
            new = kind_of(module).stand_in(None, None, _checked(rank, module, name))
        else:
            kind = "there is no such module" if module is None else f"it is a {type(module).__name__}"
            raise ValueError(f"the weights hold factors of {name!r}, but in this {type(model).__name__} {kind}")
        seen.add(id(module))
        changes[name] = (module, new)
    return changes


def exchange(model: nn.Module, changes: Exchanges) -> None:
    """Put the new modules in, with the old ones' hooks, and note the structure."""
    for old, new in changes.values():
        keep_hooks(old, new)
    swap(model, with_tied(model, {id(kind_of(old).seat): (old, kind_of(new).seat) for old, new in changes.values()}))
    write_structure(model)


class NoteStructure(Edit):
    """The ranks are noted in the config of the model, and of each model inside it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._notes = [(config, getattr(config, "quantization_config", None)) for _, config in configs_of(model)]
        self._ties = Ties(model)

    def apply(self) -> None:
        write_structure(self.model)

    def undo(self) -> None:
        self._ties.put_back()
        for config, note in self._notes:
            if note is not None:
                config.quantization_config = note
            elif hasattr(config, "quantization_config"):
                del config.quantization_config


def write_structure(model: nn.Module) -> None:
    """Note the ranks in `model.config`, where `from_pretrained` finds them; remove the note if no layer is factorized.

    Models inside the model that have a config of their own (CLIP's text model) get theirs, so that they load alone too. What
    transformers ties is noted in the same way.
    """
    retie(model)
    for prefix, config in configs_of(model):
        layers = low_rank_layers(model.get_submodule(prefix))
        if layers:
            ranks = {plain_name(name): layer.rank for name, layer in layers.items()}
            version = max(kind_of(layer).note_version for layer in layers.values())
            config.quantization_config = {"quant_method": QUANT_METHOD, "version": version, "ranks": ranks}
        elif _method_of(getattr(config, "quantization_config", None)) == QUANT_METHOD:
            del config.quantization_config


def configs_of(model: nn.Module) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The config of the model and of each model inside it, with the name of the module that it describes, each once.

    PEFT's and sentence-transformers' models hand out the config of the model inside them, whose names it has to hold.
    """
    seen: set[int] = set()
    inside = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    for name, module in [*inside, ("", model)]:
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield name, config


def check_free(model: nn.Module) -> None:
    """Raises ValueError for a model that holds packed weights, whose config has no room for a second structure.

    The weights are asked: a model that was dequantized while it was loaded keeps the note in its config, and is welcome.
    """
    for prefix, config in configs_of(model):
        note = getattr(config, "quantization_config", None)
        if note is None or _method_of(note) == QUANT_METHOD:
            continue
        packed = next(_packed(model.get_submodule(prefix)), None)
        if packed is not None:
            raise ValueError(
                f"the model is quantized ({_method_of(note)!s}: {packed}), and its config has room for one structure: "
                "factorize it before it is quantized, or load it dequantized"
            )


def _packed(model: nn.Module) -> Iterator[str]:
    """Names of weights that are not held as floating-point numbers of 16 bits or more."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 1 and is_quantized(parameter):
            yield name
    for name, buffer in model.named_buffers():
        if "weight" in name.rpartition(".")[2] and is_quantized(buffer):
            yield name


def _checked(rank: int, dense: nn.Module, name: str) -> int:
    out_features, in_features = kind_of(dense).size
    check_rank(rank, in_features, out_features, name)
    return rank


def _method_of(config: Any) -> Any:
    return config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
