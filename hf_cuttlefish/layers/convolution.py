"""Convolutions: k x k into r filters, then 1 x 1 to the outputs, as the paper factorizes them (arXiv 2305.02538, section 2).

The weight (out, in / groups, k, k) is unrolled into a matrix (out, in * k * k); that of a grouped convolution is a stack of one
matrix a group. `down` has the stride, padding and dilation, so both factors run at the output's resolution, and a pair has the
same share of the dense layer's FLOPs as of its parameters: one break-even rank is that of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional

from ..maths.factors import Factors
from .kind import Kind
from .low_rank import LowRankLayer
from .parts import shape_of

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class LowRankConv2d(LowRankLayer):
    """up(down(x)), in the place of an `nn.Conv2d`: `down` has its kernel and r filters (a group), `up` is 1 x 1 and has its bias.

    Both are ordinary `nn.Conv2d` children. What models ask a convolution for (its stride, MobileNet) is answered as by the dense one.

        layer = LowRankConv2d(nn.Conv2d(64, 128, 3, padding=1), rank=16)
        layer(torch.ones(1, 64, 8, 8)).shape  # (1, 128, 8, 8)

    Args:
        like: the dense convolution, of which all but the weight is taken. rank: filters of `down` in each group.
    """

    child_classes = (nn.Conv2d, nn.Conv2d)
    origin = "Conv2d"

    def __init__(self, like: nn.Conv2d, rank: int) -> None:
        super().__init__()
        for name in GEOMETRY:
            setattr(self, name, getattr(like, name))
        made: dict[str, Any] = {"device": "meta", "dtype": like.weight.dtype, "groups": like.groups, "bias": False}
        self.down: nn.Conv2d = nn.Conv2d(
            like.in_channels,
            like.groups * rank,
            cast("tuple[int, int]", like.kernel_size),
            cast("tuple[int, int]", like.stride),
            cast("str | tuple[int, int]", like.padding),
            cast("tuple[int, int]", like.dilation),
            padding_mode=like.padding_mode,
            **made,
        )
        self.up: nn.Conv2d = nn.Conv2d(like.groups * rank, like.out_channels, 1, **made)
        self.up.bias = like.bias
        for child in (self.down, self.up):
            empty = torch.full(child.weight.shape, torch.nan, dtype=like.weight.dtype, device=like.weight.device)
            child.weight = nn.Parameter(empty, requires_grad=like.weight.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(examples, in, height, width) -> (examples, out, height', width')."""
        return self.up(self.down(x))

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.down.groups

    @property
    def rank(self) -> int:
        return self.down.out_channels // self.down.groups

    @property
    def in_features(self) -> int:
        return self.down.weight.shape[1:].numel()

    @property
    def out_features(self) -> int:
        return self.up.out_channels // self.down.groups

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight (out, in / groups, k, k), differentiable; read-only."""
        down, up = Conv2dKind(self).matrix(self.down.weight, "down"), Conv2dKind(self).matrix(self.up.weight, "up")
        return (up @ down).reshape(self.up.out_channels, *self.down.weight.shape[1:])

    @torch.no_grad()
    def product(self) -> torch.Tensor:
        kind, exact = Conv2dKind(self), torch.promote_types(self.up.weight.dtype, torch.float32)
        up, down = kind.matrix(self.up.weight, "up").to(exact), kind.matrix(self.down.weight, "down").to(exact)
        return (up @ down).to(self.up.weight.dtype)

    def to_dense(self) -> nn.Conv2d:
        down = self.down
        dense = nn.Conv2d(
            down.in_channels,
            self.up.out_channels,
            cast("tuple[int, int]", down.kernel_size),
            cast("tuple[int, int]", down.stride),
            cast("str | tuple[int, int]", down.padding),
            cast("tuple[int, int]", down.dilation),
            down.groups,
            bias=False,
            padding_mode=down.padding_mode,
            device="meta",
        )
        weight = self.product().reshape(dense.weight.shape)
        dense.weight = nn.Parameter(weight, requires_grad=self.up.weight.requires_grad)
        dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.down.in_channels}, {self.up.out_channels}, rank={self.rank}"


@dataclass(frozen=True)
class ConvForm:
    """A convolution without its weights. geometry: values of `GEOMETRY`. channels_last: how its weight lies in memory."""

    geometry: tuple[Any, ...]
    bias: bool
    channels_last: bool

    def build(self, rank: int | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The layer with random weights: dense, or low rank."""
        geometry = dict(zip(GEOMETRY, self.geometry, strict=True))
        layer: nn.Module = nn.Conv2d(**geometry, bias=self.bias, device=device, dtype=dtype)
        if rank is not None:
            layer = LowRankConv2d(cast(nn.Conv2d, layer), rank)
            for factor in layer.factors:
                nn.init.normal_(factor, std=0.02)
        return layer.to(memory_format=torch.channels_last) if self.channels_last else layer  # type: ignore[call-overload]

    def input(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """A random input of that shape in fp32, laid out as the layer's are."""
        x = torch.randn(*shape, device=device)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x


class Conv2dKind(Kind):
    """nn.Conv2d. A token is a position of the output, and its input the patch that it sees."""

    dense: ClassVar[type[nn.Module]] = nn.Conv2d
    low_rank = LowRankConv2d
    label = "nn.Conv2d"
    in_blocks = has_maps = True

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution whose kernel, stride, padding, dilation and groups count."""
        return cast(nn.Conv2d, self.layer.down if isinstance(self.layer, LowRankConv2d) else self.layer)

    def why_dense(self) -> str:
        (m, n), groups = self.size, self.conv.groups
        if min(m, n) == 1 and groups > 1:
            return "a depthwise convolution has one filter for each channel, and a pair would be larger"
        return super().why_dense()

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        pair, groups = isinstance(self.layer, LowRankConv2d), self.conv.groups
        patch = tuple(shape_of(self.conv.weight)[1:])
        out = cast(nn.Conv2d, self.layer.up if pair else self.layer).out_channels
        return {"dense": (out, *patch), "down": (groups * rank, *patch), "up": (out, rank, 1, 1)}

    def matrix(self, tensor: torch.Tensor, part: str = "dense") -> torch.Tensor:
        flat, groups = tensor.flatten(1), self.conv.groups
        return flat if groups == 1 else flat.unflatten(0, (groups, -1))

    def stand_in(self, down: torch.Tensor | None, up: torch.Tensor | None, rank: int = 0) -> LowRankConv2d:
        rank = down.shape[-2] if down is not None else rank
        layer, like = LowRankConv2d(self.conv, rank), cast(torch.Tensor, self.layer.weight)
        layer.down.weight, layer.up.weight = self.filled("down", down, rank, like), self.filled("up", up, rank, like)
        return layer.train(self.layer.training)

    def answer(self, x: torch.Tensor, factors: Factors) -> torch.Tensor:
        conv, like = self.conv, self.conv.weight
        down, up = (t.to(like) for t in self.tensors(factors))
        bias = conv.bias
        if factors.bias_shift is not None and bias is not None:
            bias = bias + factors.bias_shift.reshape(-1).to(bias)
        hidden = functional.conv2d(self._padded(x), down, None, conv.stride, 0, conv.dilation, conv.groups)
        return functional.conv2d(hidden, up, bias, groups=conv.groups)

    def form(self) -> ConvForm:
        weight = self.conv.weight
        last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        geometry = tuple(getattr(self.layer, name) for name in GEOMETRY)
        return ConvForm(geometry, self.layer.bias is not None, last)

    def features_last(self, output: torch.Tensor) -> torch.Tensor:
        return _in_batch(output).movedim(1, -1)

    def rows(self, tensor: torch.Tensor, side: str, pick: slice) -> torch.Tensor:
        tensor, conv = _in_batch(tensor), self.conv
        if side == "output":
            example, row, column = self._places(len(tensor), tensor.shape[-2:], pick, tensor.device)
            return self._by_group(tensor[example, :, row, column])
        tensor = self._padded(tensor)
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        size = [(s - r - 1) // t + 1 for s, r, t in zip(tensor.shape[-2:], reach, conv.stride, strict=True)]
        example, row, column = self._places(len(tensor), size, pick, tensor.device)
        down = torch.arange(conv.kernel_size[0], device=tensor.device) * conv.dilation[0]
        across = torch.arange(conv.kernel_size[1], device=tensor.device) * conv.dilation[1]
        rows = (row * conv.stride[0])[:, None, None] + down[:, None]
        columns = (column * conv.stride[1])[:, None, None] + across
        patches = tensor[
            example[:, None, None], :, rows, columns
        ]  # (tokens, k, k, in): no more than the sample is unfolded
        return self._by_group(patches.permute(0, 3, 1, 2).flatten(1))

    def _places(self, examples: int, size: Sequence[int], pick: slice, device: torch.device) -> Any:
        """(example, row, column) of the picked positions of an output of that height and width."""
        height, width = size
        numbers = torch.arange(examples * height * width, device=device)[pick]
        return numbers // (height * width), numbers // width % height, numbers % width

    def _by_group(self, rows: torch.Tensor) -> torch.Tensor:
        """(tokens, features), or (groups, tokens, features of one)."""
        groups = self.conv.groups
        return rows if groups == 1 else rows.unflatten(1, (groups, -1)).movedim(1, 0)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """The input with the convolution's own padding around it."""
        around, mode = self.conv._reversed_padding_repeated_twice, self.conv.padding_mode
        if not any(around):
            return x
        return functional.pad(x, around, mode="constant" if mode == "zeros" else mode)


def _in_batch(x: torch.Tensor) -> torch.Tensor:
    return x if x.ndim == 4 else x[None]
