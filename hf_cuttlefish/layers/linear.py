"""Linear layers: nn.Linear, and GPT-2's Conv1D, which holds the same matrix transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..maths.factors import Factors
from .kind import Kind
from .low_rank import LowRankLinear
from .parts import shape_of


class LinearKind(Kind):
    """nn.Linear: its weight is the matrix."""

    dense: ClassVar[type[nn.Module]] = nn.Linear
    low_rank = LowRankLinear
    label = "nn.Linear"
    is_linear = in_blocks = True
    note_version = 1

    def stand_in(self, down: torch.Tensor | None, up: torch.Tensor | None, rank: int = 0) -> LowRankLinear:
        return LowRankLinear.standing_for(cast(nn.Linear, self.layer), down, up, rank)

    def standing_in(self, factors: Factors) -> Any:
        """As of any kind, but the layer's own product is not worked out first; where somebody else has its forward, it is."""
        if "forward" in vars(self.layer):
            return super().standing_in(factors)
        return _instead(self.layer, lambda x: self.answer(x, factors))

    def answer(self, x: torch.Tensor, factors: Factors) -> torch.Tensor:
        like, bias = cast(torch.Tensor, self.layer.weight), cast("torch.Tensor | None", self.layer.bias)
        if factors.bias_shift is not None and bias is not None:
            bias = bias + factors.bias_shift.to(bias)
        return functional.linear(functional.linear(x, factors.down.to(like)), factors.up.to(like), bias)


def _instead(layer: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Another forward of one layer, until the handle that this returns is removed."""

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return run(next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)))

    # Nothing of Python's runs when it is removed, so that nothing can fail or be interrupted in it.
    handle = SimpleNamespace(remove=partial(vars(layer).pop, "forward", None))
    try:
        vars(layer)["forward"] = forward
        return handle
    except BaseException:
        handle.remove()
        raise


class Conv1DKind(LinearKind):
    """GPT-2's Conv1D: its weight is the matrix transposed, and so is what an optimizer keeps of it."""

    dense: ClassVar[type[nn.Module]] = Conv1D
    label = "Conv1D"

    def matrix(self, tensor: torch.Tensor, part: str = "dense") -> torch.Tensor:
        return tensor.mT if part == "dense" else tensor

    def tensor(self, matrix: torch.Tensor, part: str, shape: Sequence[int]) -> torch.Tensor:
        return matrix.mT if part == "dense" else matrix

    def dense_shape(self, down: torch.Tensor, up: torch.Tensor) -> tuple[int, ...]:
        return (down.shape[1], len(up))

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        if isinstance(self.layer, LowRankLinear):
            m, n = self.layer.out_features, self.layer.in_features
        else:
            n, m = shape_of(cast(torch.Tensor, self.layer.weight))
        return {"dense": (n, m), "down": (rank, n), "up": (m, rank)}
