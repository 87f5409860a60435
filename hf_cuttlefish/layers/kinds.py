"""The table of kinds: every kind of layer that can be factorized, and the layers of a model by it.

The one place where kinds are named; whoever wants to know something of a layer asks `kind_of(layer)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .convolution import Conv2dKind
from .dense import check_weight, is_quantized
from .expert_kind import ExpertsKind
from .kind import Kind
from .linear import Conv1DKind, LinearKind
from .low_rank import LowRankLayer
from .vocabulary import EmbeddingKind

KINDS: dict[str, type[Kind]] = {
    "Linear": LinearKind,
    "Conv1D": Conv1DKind,
    "Conv2d": Conv2dKind,
    "Experts": ExpertsKind,
    "Embedding": EmbeddingKind,
}
"""Word -> kind; a low-rank layer remembers the word as its `origin`."""


def kind_of(layer: nn.Module) -> Kind:
    """The kind of a layer, dense or low rank, to be asked about it.

        kind_of(nn.Linear(3, 4)).size  # (4, 3)

    Raises TypeError for any other module (subclasses of dense classes too: they may compute something else).
    """
    found = _find(layer)
    if found is None:
        raise TypeError(f"only {labels()} can be factorized, got {type(layer).__name__}")
    return found(layer)


def _find(layer: nn.Module | None) -> type[Kind] | None:
    if isinstance(layer, LowRankLayer):
        return KINDS[layer.origin]
    return next((kind for kind in KINDS.values() if kind.takes(layer)), None)


def is_dense(module: nn.Module | None) -> bool:
    """Whether a module is a dense layer of a class that can be factorized."""
    return not isinstance(module, LowRankLayer) and _find(module) is not None


def labels(join: str = "and", linear: bool = False, in_blocks: bool = False) -> str:
    """The dense classes (linear ones alone, those that "all" takes alone), as users call them: "nn.Linear, Conv1D and nn.Conv2d"."""
    kinds = [k for k in KINDS.values() if (k.is_linear or not linear) and (k.in_blocks or not in_blocks)]
    *first, last = dict.fromkeys(kind.label for kind in kinds)
    return f"{', '.join(first)} {join} {last}" if first else last


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a dense layer as (out, in), or a stack (count, out, in); see `Kind.weight`. Raises as `kind_of`."""
    return kind_of(layer).weight


def find_layers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Name -> layer, dense and low rank, in the order of `named_modules`; layers that are parameters after the module that has them."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if _find(module) is not None:
            yield name, module
        for kind in KINDS.values():
            for part, layer in kind.parts(module).items():
                yield (f"{name}.{part}" if name else part), layer


def layer_at(model: nn.Module, name: str) -> nn.Module | None:
    """The layer of this name, dense or low rank; None where there is none."""
    *path, last = name.split(".")
    owner: nn.Module = model
    for part in path:
        found = owner._modules.get(part)
        if found is None:
            return None
        owner = found
    module = owner._modules.get(last)
    if _find(module) is not None:
        return module
    return next((parts[last] for kind in KINDS.values() if last in (parts := kind.parts(owner))), None)


def check_layer(module: nn.Module, name: str = "the layer", linear: bool = False) -> None:
    """Raises unless the layer can be factorized: TypeError for its class, ValueError for what its weight is. linear: of these alone."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and is_quantized(weight):
        raise ValueError(
            f"{name} is quantized ({weight.dtype}): only floating-point weights can be factorized; exclude it"
        )
    if not is_dense(module) or (linear and not kind_of(module).is_linear):
        raise TypeError(f"{name} is a {type(module).__name__}: only {labels(linear=linear)} can be factorized")
    check_weight(module, name)
    if why := kind_of(module).why_dense():
        raise ValueError(f"{name} cannot be factorized: {why}")
