"""Frobenius decay: of a layer's whole weight, which is a product in the low-rank phase, in the place of weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..config import CuttlefishConfig
from ..decide.plan import RankPlan
from ..layers.kinds import kind_of, layer_at
from ..layers.low_rank import LowRankLayer, low_rank_layers
from ..maths.factors import frobenius_gradients
from .optimizer import inner_optimizer


class Run(Protocol):
    """What is asked of a run."""

    config: CuttlefishConfig
    plan: RankPlan | None

    @property
    def engine(self) -> Any: ...
    @property
    def layers(self) -> dict[str, nn.Module]: ...


class FrobeniusDecay:
    """Adds, before each step of the optimizer, the gradient of decay / 2 * ||W||_F^2 of every target layer: of its weight, then of its product.

        decay = FrobeniusDecay(run); ...; decay.stop()

    As in the paper's code for CNNs, after Khodak et al., arXiv 2105.01029. In the full-rank phase it is the weight decay of SGD.

    Raises:
        ValueError: an engine whose processes hold parts of the weights, or a weight that the optimizer decays, too.
    """

    def __init__(self, run: Run) -> None:
        self.run, self._handle = run, None
        if not run.config.frobenius_decay:
            return
        check_can_decay(run.engine, self._layers().values(), run.config.frobenius_decay)
        self._handle = inner_optimizer(run.engine.optimizer).register_step_pre_hook(self._add)

    def stop(self) -> None:
        """Add nothing more."""
        if self._handle is not None:
            self._handle.remove()

    def _layers(self) -> Mapping[str, nn.Module]:
        """The target layers as they are now, those that the plan has left dense among them."""
        if self.run.plan is None:
            return self.run.layers or low_rank_layers(self.run.engine.model)
        found = {name: layer_at(self.run.engine.model, name) for name in self.run.plan.decisions}
        return {name: layer for name, layer in found.items() if layer is not None}

    def _add(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer takes scaled gradients
        add_decay(self._layers().values(), self.run.config.frobenius_decay * (1.0 if scale is None else float(scale)))


@torch.no_grad()
def add_decay(layers: Iterable[nn.Module], decay: float) -> None:
    """Add decay times the gradient of ||W||_F^2 / 2 to the gradients of layers, dense and low rank, where they have some."""
    for layer in layers:
        if not isinstance(layer, LowRankLayer):
            weight = _parameter(layer)
            if weight.grad is not None:
                weight.grad.add_(weight, alpha=decay)
            continue
        kind, (down, up) = kind_of(layer), layer.factors
        by_up, by_down = frobenius_gradients(kind.matrix(up, "up"), kind.matrix(down, "down"))
        for part, factor, gradient in (("up", up, by_up), ("down", down, by_down)):
            if factor.grad is not None:
                factor.grad.add_(kind.tensor(gradient, part, factor.shape), alpha=decay)


def check_can_decay(engine: Any, layers: Iterable[nn.Module], decay: float) -> None:
    """Raises ValueError where `FrobeniusDecay` cannot work, or would come on top of weight decay."""
    if engine.fixed or not engine.holds_whole_weights:
        raise ValueError(
            f"frobenius_decay is {decay}, which needs whole weights in each process: {type(engine).__name__} has none; use DDP or one "
            "process, or leave it 0"
        )
    mine = {id(p) for m in layers for p in (m.factors if isinstance(m, LowRankLayer) else (_parameter(m),))}
    for group in inner_optimizer(engine.optimizer).param_groups:
        if group.get("weight_decay") and any(id(p) in mine for p in group["params"]):
            raise ValueError(
                f"frobenius_decay is {decay}, and the optimizer decays target weights, too (weight_decay={group['weight_decay']}): "
                "give them a group with weight_decay=0"
            )


def _parameter(layer: nn.Module) -> torch.Tensor:
    return layer.weight  # type: ignore[return-value]
