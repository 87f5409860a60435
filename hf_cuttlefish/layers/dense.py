"""The dense layers that can be factorized: their classes, weights as (out, in), and what stands against it."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from .parts import is_sharded, shape_of

DenseLayer = nn.Linear | Conv1D


DENSE_TYPES: dict[str, type[DenseLayer]] = {"Linear": nn.Linear, "Conv1D": Conv1D}
"""Classes that can be factorized, by the name that a `LowRankLinear` remembers as its `origin`."""


def check_rank(rank: int, in_features: int, out_features: int, name: str = "the layer") -> None:
    """Raises TypeError or ValueError, naming the layer, unless 1 <= rank <= min(in_features, out_features)."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"the rank of {name} must be a whole number, got {rank!r}")
    if not 1 <= rank <= min(in_features, out_features):
        raise ValueError(
            f"the rank of {name} is {rank}: it must lie between 1 and min(in_features, out_features) = "
            f"min({in_features}, {out_features})"
        )


def dense_origin(module: nn.Module) -> str:
    """ "Linear" or "Conv1D"; raises TypeError for any other class (subclasses too: they may compute something else)."""
    for name, cls in DENSE_TYPES.items():
        if type(module) is cls:
            return name
    raise TypeError(
        f"only {', '.join(c.__name__ for c in DENSE_TYPES.values())} can be factorized, got {type(module).__name__}"
    )


def check_layer(module: nn.Module, name: str = "the layer") -> None:
    """Raises unless the layer can be factorized: TypeError for its class, ValueError for what its weight is."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and is_quantized(weight):
        raise ValueError(
            f"{name} is quantized ({weight.dtype}): only floating-point weights can be factorized; exclude it"
        )
    try:
        dense_origin(module)
    except TypeError as error:
        raise TypeError(f"{name} is a {type(module).__name__}: only nn.Linear and Conv1D can be factorized") from error
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"{name}.weight is computed from other parameters (weight_norm, pruning or the like): make it a plain "
            "parameter first, or exclude the layer"
        )
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: load its weights before factorizing it")
    # A process that holds a part of the weight can't speak for all; the one that works out the factors sees it whole.
    if not hasattr(weight, "full_tensor") and not torch.isfinite(weight).all():
        raise ValueError(
            f"{name}.weight holds NaN or Inf: the model is unchanged; look at the loss and the learning rate"
        )


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is held in whole numbers or in floats of 8 bits, which no matrix product takes as they are.

    torchao's tensors say that they are floats; what holds other tensors inside and is not sharded is taken for packed.
    """
    packed = is_traceable_wrapper_subclass(weight) and not is_sharded(weight)
    return packed or not weight.is_floating_point() or weight.element_size() < 2


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of an nn.Linear or Conv1D as (out_features, in_features), a view, detached.

    NaN, which no calculation takes for a weight, in its shape, while its values are sharded away (ZeRO-3).
    """
    origin = dense_origin(module)
    parameter = cast(torch.Tensor, module.weight)
    weight = parameter.detach()
    if weight.shape != shape_of(parameter):
        weight = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(shape_of(parameter))
    return weight.T if origin == "Conv1D" else weight


def is_meta(module: nn.Module) -> bool:
    """Whether the layer's weight has no values (meta device)."""
    return isinstance(module.weight, torch.Tensor) and module.weight.is_meta
