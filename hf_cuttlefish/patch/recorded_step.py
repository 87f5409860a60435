"""One recorded step: a CUDA graph with the tensors that it reads and writes, and its gradients in others' hands."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only


class GivenGradients:
    """Gradients that recorded steps have given to parameters. Their memory is the graphs', which write to it again.

        given = GivenGradients(); given.add(gradients); given.let_go(parameters); graph.replay(); given.give(parameter, gradient)

    A parameter gets a new tensor of that memory in each run, so that what somebody makes of it (another `data`) is not the graph's.
    """

    def __init__(self) -> None:
        self._memory: set[int] = set()
        self._given: list[weakref.ref[torch.Tensor]] = []

    def add(self, gradients: Iterable[torch.Tensor]) -> None:
        """Those that one more graph writes."""
        self._memory.update(place for g in gradients if (place := _memory_of(g)) is not None)

    def clear(self) -> None:
        """The graphs are gone; whoever holds a gradient keeps its memory."""
        self._memory.clear()
        self._given.clear()

    def give(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """gradient: as the graph wrote it."""
        parameter.grad = mine = gradient.detach()
        self._given.append(weakref.ref(mine))

    def let_go(self, parameters: Iterable[nn.Parameter]) -> None:
        """Before a graph runs: what somebody holds of the runs before it, and what these parameters hold, moves to memory of its own.

        A view of a gradient that somebody else holds is not seen.
        """
        held = [g for ref in self._given if (g := ref()) is not None]
        held += [g for p in parameters if (g := p.grad) is not None]
        self._given.clear()
        for gradient in held:
            if (fix := getattr(gradient, "_fix_weakref", None)) is not None:
                fix()  # older torch: what only a parameter held is not Python's to keep
            if _memory_of(gradient) in self._memory:
                gradient.data = gradient.clone()


@dataclass
class RecordedStep:
    """A step that was recorded.

    Attributes:
        inputs: tensors that it reads, filled before each run. result: what the function returned. parameters, gradients: that it writes.
        others: parameters that it gives no gradient.
    """

    graph: Any
    inputs: list[torch.Tensor]
    result: Any
    parameters: list[nn.Parameter]
    gradients: list[torch.Tensor]
    others: list[nn.Parameter]

    def run(self, tensors: list[torch.Tensor], given: GivenGradients) -> Any:
        """Replay with other inputs; gradients are added to those that are there, as backward does. given: of all graphs."""
        for mine, new in zip(self.inputs, tensors, strict=True):
            mine.copy_(new, non_blocking=True)
        # Those of the last micro-batch lie where this one may write.
        given.let_go([*self.parameters, *self.others])
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                given.give(parameter, gradient)
            else:
                parameter.grad.add_(gradient)
        return tree_map_only(torch.Tensor, torch.clone, self.result)


def _memory_of(tensor: torch.Tensor) -> int | None:
    """Where its numbers lie; None of one that has no memory of its own (sparse, or with others inside)."""
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    return tensor.untyped_storage().data_ptr()
