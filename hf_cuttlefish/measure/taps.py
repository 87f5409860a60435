"""Tap: the hook of one layer, which sees its inputs and outputs and, when it arrives, its outputs' gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..layers.kind import Kind, note_norm
from ..layers.kinds import dense_weight, kind_of
from ..layers.parts import is_sharded

if TYPE_CHECKING:
    from .moments import MomentCollector


class Tap:
    """Forward hook of one layer: samples its tokens now and adds them to the sums when the gradient arrives.

    Models may work in place on what the layer gave (Longformer divides its query). The sample is a copy made before, and the
    gradient that arrives is that of what was there before (`_hook_before_changes`).
    """

    def __init__(self, collector: MomentCollector, name: str) -> None:
        self.collector, self.name = collector, name
        self._weight: torch.Tensor | None = None
        kind = kind_of(collector.layers[name])
        self._known: tuple[Kind, int, int] = (kind, *kind.size)  # looked up once: the host has to be spared

    def keep_weight(self, module: nn.Module, args: tuple) -> None:
        """Before the forward, under ZeRO-3: it is whole only now, and the gradient comes before it is gathered again."""
        _, m, n = self._known
        if torch.is_grad_enabled() and m > n:
            self._weight = dense_weight(module)

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor | None:
        collector, name = self.collector, self.name
        if not collector.is_mine(name, module):
            return None  # a pair shares the hook table of the layer that it replaced
        given = args[0] if args else None
        if not isinstance(given, torch.Tensor):
            given = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
        if given is None or not isinstance(output, torch.Tensor) or not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            if name not in collector.frozen:
                return None
            # Nothing below is trained, so that no gradient would come by: let one.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        seen = collector.batches
        seen.called(given.size(0))
        kind, m, n = self._known
        places = kind.features_last(output).shape[:-1]
        tokens = places.numel()
        stride = -(-tokens // collector.max_tokens) if tokens else 1
        first = (seen.count + 1) % stride  # other tokens in each batch, and no random number drawn
        pick = slice(first, None, stride)
        x = collector.sample_of(name, kind, given, pick)
        y = None
        if m <= n and not (kind.is_linear and collector.spares_launches):
            y = collector.whole_flow(name, kind.rows(output.detach(), "output", pick).clone(), "output")

        number, rows, shape = seen.number, seen.rows, output.shape
        kept, self._weight = self._weight, None
        spread = number, places, first, stride

        def arrived(grad: torch.Tensor) -> None:
            seen.arrived()
            grad = collector.whole_flow(name, grad.detach().view(shape), "output")
            by = seen.spread.get(spread)  # the same for most layers
            if by is None:
                by = seen.factors(number, kind.features_last(grad), rows, pick)
            weight = collector.weight_of(name) if kept is None else kept
            collector.add(name, x, y, kind.rows(grad, "output", pick), stride, weight, by)

        output = _hook_before_changes(output, arrived)
        if collector.has_norms:
            collector.latest = (name, weakref.ref(output))
        return output


def _hook_before_changes(output: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Let a hook see the gradient of what is in a tensor now, whatever is done to it in place; returns what is to be handed on.

    The gradient comes in the tensor's shape or flat. A tensor keeps its node, and with it the hook, when it is changed in place
    (torch's notes on autograd, "Behavior of Tensor hooks when Tensor is modified in-place"). A view gets a new one; what it is a
    view of keeps its own: that of nn.Linear's product, which has the same numbers in the same order.
    """
    if not output._is_view():
        output.register_hook(hook)
        return output
    base = cast(torch.Tensor, output._base)
    same = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    if same and base.requires_grad and not is_sharded(output):
        base.register_hook(hook)
        return output
    output.register_hook(hook)
    return output.clone()


class ForwardTap:
    """Forward hook of a layer whose kind takes no gradients: it adds to the sums what it sees in training forwards."""

    def __init__(self, collector: MomentCollector, name: str) -> None:
        self.collector, self.name = collector, name

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
        if given is None or not torch.is_grad_enabled() or not self.collector.is_mine(self.name, module):
            return
        with torch.no_grad():
            kind_of(self.collector.layers[self.name]).see(self.collector.sums_of(self.name), given.detach())


class NormTap:
    """Forward pre-hook of a batch norm: notes the layer whose output it reads, whose mean its running mean can hold."""

    def __init__(self, collector: MomentCollector, norm: nn.Module) -> None:
        self.collector, self.norm = collector, norm

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if self.collector.latest is None or not args:
            return
        name, output = self.collector.latest
        if output() is args[0]:
            note_norm(self.collector.layers[name], self.norm)
