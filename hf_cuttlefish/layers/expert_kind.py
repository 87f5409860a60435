"""The kind of experts: a 3-D parameter of an experts module, whose matrices are all cut at one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ..maths.factors import Factors
from .expert_taps import ExpertTap
from .experts import ExpertStack, LowRankExperts, stacks_of
from .kind import Kind
from .parts import shape_of
from .shadows import Shadow
from .stack_views import Pairs, StackView


class ExpertsKind(Kind):
    """A stack (E, out, in), or (E, in, out) where it is held transposed; its low-rank form is a pair for each expert."""

    dense = ExpertStack
    low_rank = LowRankExperts
    label = "stacks of experts"
    in_blocks = True
    weight_key = ""

    layer: ExpertStack | LowRankExperts

    @classmethod
    def parts(cls, module: nn.Module) -> dict[str, nn.Module]:
        return stacks_of(module)

    @property
    def seat(self) -> nn.Module | nn.Parameter:
        return self.layer.weight if isinstance(self.layer, ExpertStack) else self.layer

    def why_dense(self) -> str:
        if isinstance(self.layer, ExpertStack) and getattr(self.layer.owner, "_is_expert_parallel", False):
            return "its experts are divided among processes (expert parallelism)"
        return ""

    # --- the weight ---

    def matrix(self, tensor: torch.Tensor, part: str = "dense") -> torch.Tensor:
        return tensor.mT if part == "dense" and self.layer.transposed else tensor

    def tensor(self, matrix: torch.Tensor, part: str, shape: Sequence[int]) -> torch.Tensor:
        return self.matrix(matrix, part)

    def dense_shape(self, down: torch.Tensor, up: torch.Tensor) -> tuple[int, ...]:
        count, m, n = *up.shape[:2], down.shape[2]
        return (count, n, m) if self.layer.transposed else (count, m, n)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        if isinstance(self.layer, LowRankExperts):
            count, m, n = self.layer.count, self.layer.out_features, self.layer.in_features
        else:
            count, m, n = shape_of(self.layer.weight)
            m, n = (n, m) if self.layer.transposed else (m, n)
        dense = (count, n, m) if self.layer.transposed else (count, m, n)
        return {"dense": dense, "down": (count, rank, n), "up": (count, m, rank)}

    # --- its low-rank stand-in ---

    def stand_in(self, down: torch.Tensor | None, up: torch.Tensor | None, rank: int = 0) -> LowRankExperts:
        weight = cast(ExpertStack, self.layer).weight
        rank = down.shape[1] if down is not None else rank
        factors = self.filled("down", down, rank, weight), self.filled("up", up, rank, weight)
        return LowRankExperts(*factors, self.layer.transposed).train(self.layer.training)

    def standing_in(self, factors: Factors) -> Any:
        layer = cast(ExpertStack, self.layer)
        handles = _Handles()

        def pairs(module: nn.Module, weight: torch.Tensor) -> StackView:
            up, down = factors.up.to(weight), factors.down.to(weight)
            return StackView(Pairs(up, down), flipped=layer.transposed)

        handles.append(Shadow(layer.owner, layer.attribute, pairs))
        shift = factors.bias_shift
        if shift is not None and layer.bias is not None:
            handles.append(Shadow(layer.owner, f"{layer.attribute}_bias", lambda module, bias: bias + shift.to(bias)))
        return handles

    # --- what flows through it ---

    def tap(self, name: str, collector: Any) -> list[Any]:
        return ExpertTap(collector, name, cast(ExpertStack, self.layer)).handles()


class _Handles(list[Shadow]):
    """Several handles as one."""

    def remove(self, *_: Any) -> None:
        """Take all hooks away."""
        for handle in reversed(self):
            handle.remove()
