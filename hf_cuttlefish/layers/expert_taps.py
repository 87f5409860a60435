"""Taps of experts: what each expert of a stack is multiplied by, what comes out, and, when it arrives, the gradient of that.

During the steps that gather, the experts' own code multiplies by a view that does as the parameter would and shows its tokens (see
stack_views.py). Tokens are sampled evenly for each expert, so that memory is bounded whatever the router does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .experts import ExpertStack
from .shadows import Shadow
from .stack_views import Part, StackView, Watched

TOKENS = 8
"""Tokens of a stack and micro-batch that enter at most, as a multiple of a linear layer's; each expert may have an equal share."""


class ExpertTap:
    """Shows a stack's tokens to a collector of moments (`MomentCollector`), which knows it by this name."""

    def __init__(self, collector: Any, name: str, stack: ExpertStack) -> None:
        self.collector, self.name, self.stack = collector, name, stack
        m, n = stack.weight.shape[:0:-1] if stack.transposed else stack.weight.shape[1:]
        self._needs_outputs = m <= n
        self._most = max(16, TOKENS * collector.max_tokens // len(stack.weight))

    def handles(self) -> list[Any]:
        """Of what watches from now on."""
        return [Shadow(self.stack.owner, self.stack.attribute, self._view, self._ended)]

    def _view(self, module: nn.Module, weight: torch.Tensor) -> StackView | None:
        mine = module is self.stack.owner or weight.device == self.stack.weight.device
        if not mine or not torch.is_grad_enabled():
            return None
        if not weight.requires_grad and self.name not in self.collector.frozen:
            return None
        self.collector.batches.called(1)
        return StackView(
            Watched(weight.mT if self.stack.transposed else weight, self._seen), flipped=self.stack.transposed
        )

    def _ended(self, module: nn.Module, output: Any) -> None:
        """Examples are weighted by the gradient of what the experts give together, whose rows are the batch's."""
        if isinstance(output, torch.Tensor) and output.requires_grad:
            batches = self.collector.batches
            number, rows = batches.number, batches.rows
            output.register_hook(lambda grad: _note(batches, number, grad.detach(), rows))

    def _seen(self, x: torch.Tensor, y: torch.Tensor, part: Part) -> torch.Tensor:
        if not torch.is_grad_enabled() or not y.requires_grad:
            return y
        batches = self.collector.batches
        number, count = batches.number, batches.count
        tokens, outputs = _as_rows(x.detach(), part), _as_rows(y.detach(), part)
        kept = []
        for expert, at in _tokens_of_experts(part, tokens, len(self.stack.weight)):
            stride = -(-len(at) // self._most)
            at = at[(count + 1) % stride :: stride]
            kept.append((expert, at, stride, tokens[at], outputs[at] if self._needs_outputs else None))

        def arrived(grad: torch.Tensor) -> None:
            batches.arrived()
            collector, weight = self.collector, self.collector.weight_of(self.name)
            gradients = _as_rows(grad.detach(), part)
            by = batches.mean_factor(number, grad.device)
            for expert, at, stride, given, made in kept:
                collector.add_to(self.name, expert, given, made, gradients[at].float() * by, stride, weight[expert])

        y.register_hook(arrived)
        return y.clone()  # models add their bias in place


def _note(batches: Any, number: int, grad: torch.Tensor, rows: int) -> None:
    batches.arrived()
    batches.factors(number, grad, rows)


def _as_rows(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """Tokens as (tokens, features); those of a whole stack one expert after the other."""
    tensor = tensor.mT if part.columns else tensor
    return tensor.reshape(-1, tensor.shape[-1])


def _tokens_of_experts(part: Part, tokens: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, numbers of its tokens), for experts that have some."""
    count = len(tokens)
    numbers = torch.arange(count, device=tokens.device)
    if part.offsets is not None:
        ends = part.offsets.tolist()
    elif part.index is None:
        ends = [count // experts * (i + 1) for i in range(experts)]
    elif isinstance(part.index, torch.Tensor) and part.index.ndim == 1:
        numbers = torch.argsort(part.index, stable=True)
        ends = torch.bincount(part.index, minlength=experts).cumsum(0).tolist()
    else:
        yield int(part.index), numbers
        return
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            yield expert, numbers[start:end]
