"""The low-rank vocabulary: a narrow table with a map to the model's width, and the output layer that is tied to it."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from .dense import check_rank
from .low_rank import LowRankLayer


class LowRankEmbedding(LowRankLayer, nn.Embedding):
    """y = scale * up(down[ids]), in the place of an `nn.Embedding` of (num_embeddings, embedding_dim).

    `down` is a table of (num_embeddings, rank), an ordinary `nn.Embedding`; `up` maps rank -> embedding_dim without a bias.
    `weight` is the narrow table's own Parameter, so that transformers resizes this layer as it does any other.

        layer = LowRankEmbedding(30522, 384, rank=96)
        layer(torch.zeros(2, 7, dtype=torch.long)).shape  # (2, 7, 384)

    Args:
        num_embeddings, embedding_dim: sizes of the table that this one stands for.
        rank: width of the narrow table, 1 <= rank <= min(num_embeddings, embedding_dim).
        padding_idx: as of nn.Embedding: the row that gets no gradient.
        scale: by what the embeddings are multiplied (Gemma, BART and others).

    Raises:
        TypeError, ValueError: rank outside its range.
    """

    origin = "Embedding"
    child_classes = (nn.Embedding, nn.Linear)
    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = sparse = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_rank(rank, num_embeddings, embedding_dim)
        self.down: nn.Embedding = nn.Embedding(num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.up: nn.Linear = nn.Linear(rank, embedding_dim, bias=False, device=device, dtype=dtype)
        self.scale = scale
        self.shell: tuple[nn.Embedding] = (nn.Embedding(1, 1, device="meta"),)  # a tuple: no child

    def to_dense(self) -> nn.Embedding:
        """The table of the class this one came from, with the factors' product (computed in fp32 or better)."""
        dense = copy.copy(self.shell[0])
        dense._parameters = {"weight": nn.Parameter(self.product().mT.contiguous(), self.up.weight.requires_grad)}
        dense._buffers = {
            name: torch.full(buffer.shape, self.scale, dtype=buffer.dtype, device=self.weight.device)
            for name, buffer in self.shell[0]._buffers.items()
            if buffer is not None
        }
        dense.num_embeddings, dense.embedding_dim, dense.padding_idx = *dense.weight.shape, self.padding_idx
        return dense.train(self.training)

    @torch.no_grad()
    def product(self) -> torch.Tensor:
        """up @ down, (embedding_dim, num_embeddings), the scale aside, computed in fp32 or better."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        kind = self.weight.device.type if not self.weight.is_meta else "cpu"
        with torch.autocast(device_type=kind, enabled=False):
            return (self.up.weight.to(exact) @ self.weight.to(exact).mT).to(self.weight.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) token numbers -> (..., embedding_dim)."""
        wide = self.up(self.down(input))
        return wide if self.scale == 1.0 else wide * self.scale

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """Of `down`, (num_embeddings, rank)."""
        return cast(nn.Parameter, self.down.weight)

    @property
    def rank(self) -> int:
        """Width of the narrow table."""
        return self.up.in_features

    @property
    def in_features(self) -> int:
        """Tokens: a table is a linear map of one-hot vectors."""
        return self.num_embeddings

    @property
    def out_features(self) -> int:
        """Width of an embedding."""
        return self.up.out_features

    @property
    def embedding_dim(self) -> int:  # type: ignore[override]
        """Width of an embedding."""
        return self.up.out_features

    @property
    def num_embeddings(self) -> int:
        """Tokens."""
        return self.down.num_embeddings

    @num_embeddings.setter
    def num_embeddings(self, value: int) -> None:
        self.down.num_embeddings = value

    @property
    def padding_idx(self) -> int | None:
        """The row that gets no gradient, or None."""
        return self.down.padding_idx

    @padding_idx.setter
    def padding_idx(self, value: int | None) -> None:
        self.down.padding_idx = value

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, scale={self.scale:.4g}"


class LowRankOutput(nn.Linear):
    """logits = down (up^T h) + bias: the output layer that is tied to a `LowRankEmbedding`, whose factors are its own.

        output = LowRankOutput(LowRankEmbedding(30522, 384, rank=96), bias=None)
        output(torch.ones(2, 384)).shape  # (2, 30522)

    Args:
        embedding: `down` and `up` are its objects.
        bias: of the dense output layer, (num_embeddings,), or None.
    """

    def __init__(self, embedding: LowRankEmbedding, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.down, self.up = embedding.down, embedding.up
        self.register_parameter("bias", bias)

    def to_dense(self, table: nn.Embedding) -> nn.Linear:
        """An output layer tied to the dense table."""
        dense = nn.Linear(1, 1, bias=False, device="meta")
        dense.out_features, dense.in_features = table.weight.shape
        dense.weight, dense.bias = table.weight, self.bias
        return dense.train(self.training)

    def resized(self, tokens: int) -> LowRankOutput:
        """The same layer for another number of tokens, after its table: biases of new ones are zero."""
        self.out_features = tokens
        if self.bias is not None:
            self.bias.data = functional.pad(self.bias.data, (0, tokens - len(self.bias)))
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., embedding_dim) -> (..., num_embeddings)."""
        return functional.linear(functional.linear(input, self.up.weight.mT), self.down.weight, self.bias)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """Of `down`, (num_embeddings, rank)."""
        return cast(nn.Parameter, self.down.weight)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.up.in_features}, tied"


def scale_of(table: nn.Embedding) -> float:
    """By what a table's class multiplies its rows: what it names so, or 1."""
    for name in ("scalar_embed_scale", "embed_scale"):
        scale = getattr(table, name, None)
        if isinstance(scale, (int, float)) or (isinstance(scale, torch.Tensor) and not scale.is_meta):
            return float(scale)
    return 1.0


def shell_of(table: nn.Embedding) -> nn.Embedding:
    """The table's class and settings, without its weight and hooks."""
    shell = copy.copy(table)
    for name, value in vars(nn.Module()).items():
        if name not in ("_buffers", "_modules", "training"):
            shell.__dict__[name] = copy.copy(value)
    shell._parameters = {"weight": None}
    return shell
