"""The low-rank layer: two small maps in the place of a large one; and the linear one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from ..maths.factors import factor_weight
from .dense import check_rank
from .parts import shape_of

if TYPE_CHECKING:
    from typing_extensions import Self

ORIGINS: dict[str, type[nn.Linear | Conv1D]] = {"Linear": nn.Linear, "Conv1D": Conv1D}
"""Dense classes of a `LowRankLinear`, by its `origin`."""


class LowRankLayer(nn.Module):
    """What stands for a dense layer: a child `down` and a child `up`, each with its factor as `weight`.

    Attributes:
        origin: the word of the dense layer's kind in `layers.kinds.KINDS`. rank: inner size.
        in_features, out_features: of the matrix that this one stands for, or of each of a stack of `count` matrices.
        child_classes: of `down` and `up`; anything else was put there by somebody else (an adapter).
    """

    down: nn.Module
    up: nn.Module
    origin: str
    count: int = 1
    child_classes: ClassVar[tuple[type[nn.Module], type[nn.Module]]] = (nn.Linear, nn.Linear)

    def to_dense(self) -> nn.Module:
        """The dense layer of the class this one came from, with the factors' product (computed in fp32 or better)."""
        raise NotImplementedError

    def product(self) -> torch.Tensor:
        """up @ down, (out_features, in_features), computed in fp32 or better and returned in the factors' dtype."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """As of any module. Trainer asks before each step: where nothing changes, plain children are not asked in turn."""
        down, up = self._modules["down"], self._modules["up"]
        are_plain = (
            type(down) is type(up) is nn.Linear and not (down._modules or up._modules) and len(self._modules) == 2
        )
        if are_plain and self.training is mode and down.training is up.training is mode:  # type: ignore[union-attr]
            return self
        return super().train(mode)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The Parameters of `down` and `up`."""
        return cast(nn.Parameter, self.down.weight), cast(nn.Parameter, self.up.weight)

    @property
    def rank(self) -> int:
        """Inner size of the pair."""
        raise NotImplementedError

    @property
    def in_features(self) -> int:
        """Of the matrix that this one stands for."""
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        """Of the matrix that this one stands for."""
        raise NotImplementedError

    @property
    def bias(self) -> nn.Parameter | None:
        """Of `up`: the dense layer's own Parameter, or None."""
        return cast("nn.Parameter | None", getattr(self.up, "bias", None))


class Form(Protocol):
    """Another form of running (`multiplied`); what is saved, merged and seen by hooks does not change."""

    def run(self, layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor | None:
        """What the layer makes of x, or None where it is to run as a pair."""


class LowRankLinear(LowRankLayer):
    """y = up(down(x)) + bias, in the place of an `nn.Linear` (or GPT-2's `Conv1D`) of (out_features, in_features).

    `down` maps in_features -> rank without a bias, `up` maps rank -> out_features and holds the bias. Both are ordinary
    `nn.Linear` children, so that initialization, PEFT, quantizers and exporters understand them.

        layer = LowRankLinear.from_linear(nn.Linear(768, 3072), rank=128)
        layer(torch.ones(4, 768)).shape  # (4, 3072)

    Args:
        in_features, out_features: sizes of the layer that this one stands for.
        rank: inner size, 1 <= rank <= min(in_features, out_features).
        bias: whether `up` has a bias.
        origin: "Linear" or "Conv1D", the dense class that `merge` gives back.

    Raises:
        ValueError: rank or origin outside their range.
    """

    form: Form | None = None
    """Set on a layer while a forward of its model runs in another form."""

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
        if origin not in ORIGINS:
            raise ValueError(f"origin is {origin!r}: it must be one of {sorted(ORIGINS)}")
        self.origin = origin
        self.down: nn.Linear = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up: nn.Linear = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear | Conv1D, rank: int) -> LowRankLinear:
        """The best rank-`rank` stand-in of a dense layer (plain SVD, sqrt of the singular values on both sides).

        The bias is the same Parameter object; dtype, device, requires_grad and training mode are kept.

        Raises:
            TypeError: `linear` is no nn.Linear or Conv1D, or the rank is no whole number.
            ValueError: rank out of range, or weights that are quantized, not finite or on the meta device.
        """
        from .kinds import check_layer, dense_weight  # whose table names this class

        check_layer(linear, linear=True)
        weight = dense_weight(linear)
        check_rank(rank, weight.shape[1], weight.shape[0])
        factors = factor_weight(weight, rank)
        return cls.standing_for(linear, factors.down, factors.up)

    @classmethod
    def standing_for(
        cls, linear: nn.Linear | Conv1D, down: torch.Tensor | None, up: torch.Tensor | None, rank: int = 0
    ) -> LowRankLinear:
        """A layer with the given factors, down (rank, in) and up (out, rank), and everything else taken from `linear`.

        With no factors (then `rank` is needed) the weights are NaN until they are loaded: what is forgotten shows.
        """
        origin = {dense: word for word, dense in ORIGINS.items()}[type(linear)]
        shape, weight = shape_of(linear.weight), linear.weight
        out_features, in_features = shape[::-1] if origin == "Conv1D" else shape
        rank = down.shape[0] if down is not None else rank
        layer = cls(in_features, out_features, rank, False, origin, device="meta", dtype=weight.dtype)
        for child, value in ((layer.down, down), (layer.up, up)):
            data = torch.empty(child.weight.shape, dtype=weight.dtype, device=weight.device)
            data.fill_(torch.nan) if value is None else data.copy_(value)
            child.weight = nn.Parameter(data, requires_grad=weight.requires_grad)
        layer.up.bias = linear.bias
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear | Conv1D:
        """The dense layer of the class this one came from, with the factors' product (computed in fp32 or better)."""
        weight = self.product()
        if self.origin == "Conv1D":
            dense: nn.Linear | Conv1D = Conv1D.__new__(Conv1D)
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
        return _multiply(self.up.weight.to(exact), self.down.weight.to(exact)).to(self.up.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.form is not None and (y := self.form.run(self, x)) is not None:
            return y
        return self.up(self.down(x))

    @property
    def rank(self) -> int:
        """Inner size of the pair."""
        return self.down.out_features

    @property
    def in_features(self) -> int:
        """Of the layer that this one stands for."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Of the layer that this one stands for."""
        return self.up.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The product up @ down, (out_features, in_features), differentiable; read-only.

        Multiplied out only when its values are asked for: T5 asks for `wo.weight.dtype` three times in each forward.
        """
        if torch.compiler.is_compiling():  # the compiler drops a product of which nothing but the dtype is used
            return _multiply(self.up.weight, self.down.weight)
        return _Product(self.up.weight, self.down.weight)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, origin={self.origin}"
        )


class _Product(torch.Tensor):
    """What `LowRankLinear.weight` gives: a dtype, a shape and a device, and up @ down in any operation."""

    _is_hf_initialized = True
    """Keeps the `_init_weights` of models such as ModernBERT from filling a throw-away product."""

    _factors: tuple[torch.Tensor, torch.Tensor]

    @staticmethod
    def __new__(cls, up: torch.Tensor, down: torch.Tensor) -> _Product:
        product = torch.Tensor._make_wrapper_subclass(
            cls, (up.shape[0], down.shape[1]), dtype=up.dtype, device=up.device
        )
        product._factors = (up, down)
        return product

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _NEED_NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, lambda product: _multiply(*product._factors), (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return cls.__torch_function__(func, types, args, kwargs)


_NEED_NO_VALUES = {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "shape", "device", "ndim", "is_meta")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "element_size")),
}


def _multiply(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """up @ down in the factors' own dtype, whatever autocast says."""
    device_type = up.device.type if up.device.type != "meta" else "cpu"
    with torch.autocast(device_type=device_type, enabled=False):
        return up @ down


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The factorized layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
