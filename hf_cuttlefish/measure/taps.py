"""Tap: the hook of one layer, which sees its inputs and outputs and, when it arrives, its outputs' gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layers.dense import dense_weight

if TYPE_CHECKING:
    from .moments import MomentCollector


class Tap:
    """Forward hook of one layer: samples its tokens now and adds them to the sums when the gradient arrives.

    What the layer gave is handed on as a copy: models that work in place on it (Longformer divides its query) change the copy,
    and the gradient that arrives is that of what the layer gave.
    """

    def __init__(self, collector: MomentCollector, name: str) -> None:
        self.collector, self.name = collector, name
        self._weight: torch.Tensor | None = None

    def keep_weight(self, module: nn.Module, args: tuple) -> None:
        """Before the forward, under ZeRO-3: it is whole only now, and the gradient comes before it is gathered again."""
        m, n = dense_weight(module).shape
        if torch.is_grad_enabled() and m > n:
            self._weight = dense_weight(module)

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor | None:
        collector, name = self.collector, self.name
        if not collector.is_mine(name, module):
            return None  # a pair shares the hook table of the layer that it replaced
        given = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
        if given is None or not isinstance(output, torch.Tensor) or not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            if name not in collector.frozen:
                return None
            # Nothing below is trained, so that no gradient would come by: let one.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        seen = collector.batches
        seen.called(len(given))
        m, n = dense_weight(collector.layers[name]).shape
        x = given.detach().reshape(-1, given.shape[-1])
        stride = -(-len(x) // collector.max_tokens) if len(x) else 1
        first = (seen.count + 1) % stride  # other tokens in each batch, and no random number drawn
        x = collector.whole_flow(name, x[first::stride].clone(), "input")
        y = None
        if m <= n:
            y = output.detach().reshape(-1, output.shape[-1])[first::stride]
            y = collector.whole_flow(name, y.clone() if stride > 1 else y, "output")

        number, rows = seen.number, seen.rows
        kept, self._weight = self._weight, None

        def arrived(grad: torch.Tensor) -> None:
            seen.arrived()
            grad = collector.whole_flow(name, grad.detach(), "output")
            by = seen.factors(number, grad, rows)[first::stride, None]
            weight = collector.weight_of(name) if kept is None else kept
            collector.add(name, x, y, grad.reshape(-1, m)[first::stride].float() * by, stride, weight)

        output.register_hook(arrived)
        return output.clone()
