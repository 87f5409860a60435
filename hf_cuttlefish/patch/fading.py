"""Fade: what the cut took from each layer is still added after the switch, a little less with each step, until nothing is left.

A cut at once changes the outputs of all layers in one step, and what has to be relearnt then is relearnt at a falling rate. With
y = up(down(x)) + b + a (W x - up(down(x)) - s), where a falls from 1 to 0 and s is what the cut added to the bias, the model
goes on as it was and becomes low rank gradually (docs/how-it-works.md has what it gains).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..layers.kinds import kind_of
from ..layers.low_rank import LowRankLayer, low_rank_layers
from ..measure.eager import has_compiled
from ..processes import Processes
from .edits import Edit
from .modules import Change

SHARE = 0.3
"""Of the steps that are left after the switch (issue 16)."""
LEAST = 10
"""With fewer steps there is nothing to do gradually."""
PREFIX = "fading/"


class Fading(Edit):
    """What the cut took, added to the low-rank layers' outputs while they train, and less with each step.

        fading = Fading(steps=50); fading.change = change; fading.apply(); ...; fading.step(); ...; fading.stop()

    In evaluation the layers are what is saved: pairs alone. Memory: a dense weight a layer, in the precision of its outputs.

    Args:
        steps: after which nothing is left.

    Attributes:
        change: the switch whose cut is meant. left: the share that is added, 1 to 0.
    """

    change: Change

    def __init__(self, steps: int) -> None:
        self.steps, self.left = steps, 1.0
        self._lost: dict[str, Lost] = {}

    @property
    def is_on(self) -> bool:
        return bool(self._lost)

    @torch.no_grad()
    def apply(self) -> None:
        change = self.change
        for name, layer in change.layers.items():
            pair = change.pairs[name]
            if kind_of(layer).count == 1 and kind_of(layer).takes_gradients:
                self._begin(name, pair, _lost_part(layer, pair, change.shifts[name]))

    def undo(self) -> None:
        self.stop()

    def finish(self) -> None:
        del self.change  # with the dense layers

    def step(self, done: int) -> bool:
        """So many steps have been taken after the switch. Whether that was the last one of the fading."""
        self.left = max(0.0, 1 - done / self.steps)
        if self.left > 0 or not self.is_on:
            return False
        self.stop()
        return True

    def stop(self) -> None:
        """Pairs alone from here on."""
        for lost in self._lost.values():
            lost.handle.remove()
        self._lost.clear()

    def _begin(self, name: str, pair: nn.Module, part: nn.Module) -> None:
        lost = self._lost[name] = Lost(self, part)
        lost.handle = pair.register_forward_hook(lost, with_kwargs=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is still added, as a flat dictionary of tensors on the CPU."""
        return {
            f"{PREFIX}{name}/{key}": value.detach().cpu().contiguous()
            for name, lost in self._lost.items()
            for key, value in lost.part.state_dict().items()
        }

    @torch.no_grad()
    def load_state_dict(
        self, model: nn.Module, flat: Mapping[str, torch.Tensor] | None, processes: Processes | None = None
    ) -> None:
        """Go on with what `state_dict` gave, for a model that has switched; only the main process needs to have it.

        Raises ValueError for tensors that do not fit the model's layers.
        """
        processes = processes or Processes.alone()
        described = processes.from_main(lambda: _described(flat or {}))
        layers = low_rank_layers(model)
        for name, parts in described.items():
            if name not in layers:
                raise ValueError(f"the saved statistics hold what a cut took from {name!r}, which is no low-rank layer")
            part: Any = layers[name].to_dense()
            device = part.weight.device
            part.bias = None  # the pair's own
            for key, (shape, dtype) in parts.items():
                value = torch.empty(shape, dtype=dtype, device=device)
                if key == "weight" and value.shape != part.weight.shape:
                    raise ValueError(
                        f"the saved statistics of {name} have the shape {shape}, and it needs {tuple(part.weight.shape)}"
                    )
                if processes.is_main:
                    value.copy_(cast(Mapping[str, torch.Tensor], flat)[f"{PREFIX}{name}/{key}"])
                processes.broadcast_(value)
                setattr(part, key, nn.Parameter(value, requires_grad=False))
            self._begin(name, layers[name], part)


class Lost:
    """The hook of one layer: adds what the cut took, as long as something of it is left."""

    handle: Any = None

    def __init__(self, fading: Fading, part: nn.Module) -> None:
        self.fading, self.part = fading, part

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor | None:
        if not module.training or not self.fading.left:
            return None
        if self.part.weight.dtype != output.dtype:  # under autocast, once
            self.part.to(output.dtype)
        return torch.add(output, self.part(*args, **kwargs), alpha=self.fading.left)


def _lost_part(layer: Any, pair: LowRankLayer, shift: torch.Tensor | None) -> nn.Module:
    """A dense layer of the weight that the cut took, whose bias takes back what the cut added to it."""
    part: Any = pair.to_dense()
    part.weight = nn.Parameter(layer.weight.detach() - part.weight, requires_grad=False)
    part.bias = None if shift is None else nn.Parameter(-shift.to(part.weight), requires_grad=False)
    return part


def _described(flat: Mapping[str, torch.Tensor]) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Layer -> parameter -> (shape, dtype)."""
    found: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for key, value in flat.items():
        if key.startswith(PREFIX):
            name, _, part = key.removeprefix(PREFIX).rpartition("/")
            found.setdefault(name, {})[part] = (tuple(value.shape), value.dtype)
    return found


def fading_steps(engine: Any, wanted: int | None, left: int) -> int:
    """Over how many steps to fade; 0 for not at all.

    Args:
        wanted: by the config, or None. left: steps of the run that are left.
    """
    alone = engine.holds_whole_weights and not engine.fixed and engine.replicas == 1
    if not alone or has_compiled():
        return 0
    if wanted is not None:
        return min(wanted, left)
    steps = round(SHARE * left)
    return steps if steps >= LEAST else 0
