"""FLOPs: of a token, or of an image, where each convolution works at every position of its feature map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..decide.plan import RankPlan
from ..layers.kinds import kind_of, layer_at

FLOPS_PER_PARAMETER = 2
"""One multiplication and one addition a token, for each weight of a linear layer."""


DEFAULT_SIDE = 224
"""Pixels of an image's side where the model's config names none (transformers' ResNet)."""


@dataclass(frozen=True)
class Flops:
    """What each parameter of a layer costs.

        Flops({"conv1": 2 * 56 * 56}, "image of 3 x 224 x 224").header  # "MFLOPs an image of 3 x 224 x 224"

    Attributes:
        known: layer -> FLOPs for each of its parameters; 2 where it is not there. per: of what: a "token", an "image of ...".
    """

    known: dict[str, int] = field(default_factory=dict)
    per: str = "token"

    @property
    def key(self) -> str:
        """What JSON calls them: "flops_per_token"."""
        return f"flops_per_{self.per.partition(' ')[0]}"

    @property
    def header(self) -> str:
        """What a table calls them, in millions."""
        return f"MFLOPs {'an' if self.per[0] in 'aei' else 'a'} {self.per}"

    def each(self, name: str) -> int:
        """For one parameter of a layer."""
        return self.known.get(name, FLOPS_PER_PARAMETER)

    def total(self, plan: RankPlan, before: bool = False) -> int:
        """Of the layers of a plan, as it makes them or as they were."""
        return sum(
            self.each(name) * (d.parameters_before if before else d.parameters_after)
            for name, d in plan.decisions.items()
        )


@torch.no_grad()
def flops_of_example(model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> dict[str, int]:
    """FLOPs of one example for each parameter of each layer's weight, dense or as a pair: name -> number.

        flops_of_example(model, find_targets(model), {"pixel_values": torch.zeros(1, 3, 224, 224)})

    One forward in eval mode; the model does not change. A convolution's parameters work once at each position of its output, a
    linear layer's once a token. Layers that the forward does not call are left out.

    Args:
        model: on its device. layers: name -> layer of the model. batch: keyword arguments of its forward, examples first.
    """
    device, training = next(model.parameters()).device, model.training
    here = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    examples = max(1, next(len(value) for value in here.values() if isinstance(value, torch.Tensor)))
    found: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = found.get(name, 0) + kind_of(module).flops_per_parameter(output)

        return see

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        model.eval()(**here)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: flops // examples for name, flops in found.items()}


def blank_image(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """A batch of one black image of the size that the model's config names; None for a model that reads no images."""
    if getattr(model, "main_input_name", None) != "pixel_values":
        return None
    config: Any = model.config
    side = getattr(config, "image_size", None) or DEFAULT_SIDE
    height, width = side if isinstance(side, list | tuple) else (side, side)
    parameter = next(model.parameters())
    size = (1, getattr(config, "num_channels", None) or 3, height, width)
    return {"pixel_values": torch.zeros(size, dtype=parameter.dtype, device=parameter.device)}


def flops_of(model: nn.Module, names: Iterable[str], example: Mapping[str, Any] | None = None) -> Flops:
    """Of an example where some of the named layers work on maps, and of a token where none does.

    example: keyword arguments of the forward, examples first; None: a black image where the model reads images, and else the
    FLOPs of one position.

    Raises ValueError for an `example` that is no batch of the model.
    """
    layers = {name: layer for name in names if (layer := layer_at(model, name)) is not None}
    batch = blank_image(model) if example is None else example
    if not any(kind_of(layer).has_maps for layer in layers.values()):
        return Flops()
    if batch is None:
        return Flops(per="position")
    size = next((" x ".join(map(str, v.shape[1:])) for v in batch.values() if getattr(v, "ndim", 0) == 4), "")
    try:
        return Flops(flops_of_example(model, layers, batch), f"image of {size}" if size else "example")
    except (RuntimeError, TypeError, ValueError) as error:
        if example is None:
            return Flops(per="position")
        raise ValueError(f"the example does not fit {type(model).__name__}: {error!s:.200}") from error
