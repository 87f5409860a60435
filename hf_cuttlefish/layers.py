"""The low-rank layer: two small linear maps in the place of one large one."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

DENSE_TYPES: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv1D": Conv1D}
"""Classes that can be factorized, by the name that a `LowRankLinear` remembers as its `origin`."""


class LowRankLinear(nn.Module):
    """y = up(down(x)) + bias, in the place of an `nn.Linear` (or GPT-2's `Conv1D`) of shape (out_features, in_features).

    `down` maps in_features -> rank without a bias, `up` maps rank -> out_features and holds the bias. Both are ordinary
    `nn.Linear` children, so that initialization, PEFT, quantizers and exporters understand them.

    Args:
        in_features, out_features: sizes of the layer that this one stands for.
        rank: inner size, 1 <= rank <= min(in_features, out_features).
        bias: whether `up` has a bias.
        origin: "Linear" or "Conv1D", the dense class that `merge` gives back.

    Raises:
        ValueError: rank or origin outside their range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        origin: str = "Linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        if origin not in DENSE_TYPES:
            raise ValueError(f"origin is {origin!r}: it must be one of {sorted(DENSE_TYPES)}")
        self.origin = origin
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int) -> LowRankLinear:
        """The best rank-`rank` stand-in of a dense layer (plain SVD, sqrt of the singular values on both sides).

        The bias is the same Parameter object; dtype, device, requires_grad and training mode are kept.

        Raises:
            TypeError: `linear` is no nn.Linear or Conv1D. ValueError: rank out of range, or weights that are not finite.
        """
        from .factorization import factor_weight

        factors = factor_weight(dense_weight(linear), rank)
        return cls.standing_for(linear, factors.down, factors.up)

    @classmethod
    def standing_for(cls, linear: nn.Module, down: torch.Tensor | None, up: torch.Tensor | None, rank: int = 0) -> LowRankLinear:
        """A layer with the given factors, down (rank, in) and up (out, rank), and everything else taken from `linear`.

        With no factors the weights are left empty, to be loaded (then `rank` is needed).
        """
        weight, bias = dense_weight(linear), linear.bias
        out_features, in_features = weight.shape
        rank = down.shape[0] if down is not None else rank
        layer = cls(in_features, out_features, rank, False, dense_origin(linear), device="meta", dtype=weight.dtype)
        for child, value in ((layer.down, down), (layer.up, up)):
            data = torch.empty(child.weight.shape, dtype=weight.dtype, device=weight.device)
            if value is not None:
                data.copy_(value)
            child.weight = nn.Parameter(data, requires_grad=linear.weight.requires_grad)
        layer.up.bias = bias
        return layer.train(linear.training)

    def to_dense(self) -> nn.Module:
        """The dense layer of the class this one came from, its weight the product of the factors (computed in fp32 or better)."""
        weight = self.product()
        if self.origin == "Conv1D":
            dense: nn.Module = Conv1D.__new__(Conv1D)
            nn.Module.__init__(dense)
            dense.nf, dense.nx = self.out_features, self.in_features
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=self.up.weight.requires_grad)
        dense.bias = self.bias
        return dense.train(self.training)

    @torch.no_grad()
    def product(self) -> torch.Tensor:
        """up @ down, (out_features, in_features), computed in fp32 or better and returned in the factors' dtype."""
        exact = torch.promote_types(self.up.weight.dtype, torch.float32)
        device_type = self.up.weight.device.type
        with torch.autocast(device_type=device_type if device_type != "meta" else "cpu", enabled=False):
            return (self.up.weight.to(exact) @ self.down.weight.to(exact)).to(self.up.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The product up @ down, (out_features, in_features), differentiable, made anew at each access; read-only."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.up.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, origin={self.origin}"


def check_rank(rank: int, in_features: int, out_features: int, name: str = "the layer") -> None:
    """Raises TypeError or ValueError, naming the layer, unless 1 <= rank <= min(in_features, out_features)."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"the rank of {name} must be a whole number, got {rank!r}")
    if not 1 <= rank <= min(in_features, out_features):
        raise ValueError(
            f"the rank of {name} is {rank}: it must lie between 1 and min(in_features, out_features) = "
            f"min({in_features}, {out_features})"
        )


def dense_origin(module: nn.Module) -> str:
    """"Linear" or "Conv1D"; raises TypeError for any other class (subclasses too: they may compute something else)."""
    for name, cls in DENSE_TYPES.items():
        if type(module) is cls:
            return name
    raise TypeError(f"only {', '.join(c.__name__ for c in DENSE_TYPES.values())} can be factorized, got {type(module).__name__}")


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of an nn.Linear or Conv1D as (out_features, in_features), a view, detached."""
    weight = module.weight.detach()
    return weight.T if dense_origin(module) == "Conv1D" else weight
