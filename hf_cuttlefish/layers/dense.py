"""What stands against factorizing a weight: a rank out of range, packed numbers, values that are not there."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .parts import is_sharded


def check_rank(rank: int, in_features: int, out_features: int, name: str = "the layer") -> None:
    """Raises TypeError or ValueError, naming the layer, unless 1 <= rank <= min(in_features, out_features)."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"the rank of {name} must be a whole number, got {rank!r}")
    if not 1 <= rank <= min(in_features, out_features):
        raise ValueError(
            f"the rank of {name} is {rank}: it must lie between 1 and min(in_features, out_features) = "
            f"min({in_features}, {out_features})"
        )


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is held in whole numbers or in floats of 8 bits, which no matrix product takes as they are.

    torchao's tensors say that they are floats; what holds other tensors inside and is not sharded is taken for packed.
    """
    packed = is_traceable_wrapper_subclass(weight) and not is_sharded(weight)
    return packed or not weight.is_floating_point() or weight.element_size() < 2


def bias_of(layer: nn.Module) -> nn.Parameter | None:
    """The bias of a layer, or None."""
    return cast("nn.Parameter | None", getattr(layer, "bias", None))


def said_of_more(layer: nn.Module, own: Container[str] = ("weight", "bias")) -> str:
    """What somebody has put on this very layer, which its low-rank stand-in would be without; "" for nothing.

    Args:
        own: names of the tensors that its kind has.
    """
    tables: tuple[Mapping[str, object], ...] = (layer._parameters, layer._buffers, layer._modules)
    more = [name for table in tables for name, held in table.items() if held is not None]
    if layer._parameters.get("weight") is not None and (more := [n for n in more if n not in own]):
        return f"somebody has put {', '.join(more)} on it, which would be lost"
    if (forward := vars(layer).get("forward")) is not None and not _is_of_engine(layer, forward):
        return "somebody has replaced its forward, which would be lost"
    return ""


def _is_of_engine(layer: nn.Module, forward: object) -> bool:
    """Whether a forward moves or gathers tensors around the class's own (tensor parallelism, Accelerate's hooks), or is that one.

    Accelerate leaves the class's own behind when it takes its hooks away.
    """
    own = type(layer).forward
    held: Any = getattr(forward, "_torchdynamo_orig_callable", forward)  # compiled by itself: the pair runs uncompiled
    if getattr(held, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
        held = getattr(held, "__wrapped__", held)  # torch's own methods are wrapped once more
    is_own = getattr(held, "__func__", held) is own
    maker = str(getattr(forward, "__module__", "")).partition(".")[0]
    return is_own or hasattr(layer, "_hf_hook") or maker in ("transformers", "accelerate")


def is_meta(module: nn.Module) -> bool:
    """Whether the layer's weight has no values (meta device)."""
    return isinstance(module.weight, torch.Tensor) and module.weight.is_meta


def check_weight(module: nn.Module, name: str = "the layer") -> None:
    """Raises ValueError for a layer whose weight is no Parameter of its own, has no values or some that are not finite."""
    weight = module.weight
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
