"""Stack views: what a model's own code takes for a stack of matrices, and what is multiplied by instead.

The experts of a mixture are rows of one 3-D Parameter. Models multiply by it in a few ways only: by one matrix (`F.linear(x, w[e])`,
`x @ w[e]`), by one a token (`torch.bmm(w[ids], x)`), by all (`torch.bmm(x, w)`), or in groups of sorted tokens (`grouped_mm`). A view
answers each of these by torch's protocol for objects that are no tensors, so that the model's code runs as it is: routers, gates, biases
and layouts stay its own. Any other use sees the product, multiplied out, with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens times matrices, as the model asked for it: (x, matrices (E, out, in)) -> y."""


@dataclass(frozen=True)
class Part:
    """Which matrices of a stack multiply which tokens.

    Attributes:
        index: one matrix (a number), one a token (S,), or None for all.
        offsets: (E,), where each matrix's tokens end among those sorted by matrix; None: (E, T, in), T tokens for each.
        columns: whether tokens are columns (..., in, T) and not rows (..., T, in).
    """

    index: Any = None
    offsets: torch.Tensor | None = None
    columns: bool = False


@dataclass(frozen=True)
class Pairs:
    """A stack of products that is multiplied by in two steps: up (E, out, r), down (E, r, in)."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        return self.up.shape[0], self.up.shape[1], self.down.shape[2]

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the stack's dtype and device."""
        return self.up

    def dense(self) -> torch.Tensor:
        """The products, (E, out, in), in the factors' own dtype, whatever autocast says."""
        kind = self.up.device.type if self.up.device.type != "meta" else "cpu"
        with torch.autocast(device_type=kind, enabled=False):
            return self.up @ self.down

    def times(self, multiply: Multiply, x: torch.Tensor, part: Part) -> torch.Tensor:
        """The tokens times `down`, and that times `up`."""
        up, down = self.up, self.down
        short = -up.shape[2] % (16 // up.element_size())
        if (
            part.offsets is not None
        ):  # grouped products need rows of whole 16 bytes, also where factors are parts of larger ones
            if short:
                up, down = functional.pad(up, (0, short)), functional.pad(down, (0, 0, 0, short))
            up, down = up.contiguous(), down.contiguous()
        return multiply(multiply(x, down), up)


@dataclass(frozen=True)
class Watched:
    """A dense stack (E, out, in) that lets itself be multiplied by as ever, and hands on what was seen."""

    matrices: torch.Tensor
    seen: Callable[[torch.Tensor, torch.Tensor, Part], torch.Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        return tuple(self.matrices.shape)  # type: ignore[return-value]

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the stack's dtype and device."""
        return self.matrices

    def dense(self) -> torch.Tensor:
        """The stack itself."""
        return self.matrices

    def times(self, multiply: Multiply, x: torch.Tensor, part: Part) -> torch.Tensor:
        """The product, as `seen` gives it back."""
        return self.seen(x, multiply(x, self.matrices), part)


class StackView:
    """Stands where a stack of matrices (E, out, in), or a part of it, is expected; see the head of this file.

        view = StackView(Pairs(up, down))
        functional.linear(x, view[3])  # == linear(linear(x, down[3]), up[3])

    Args:
        stack: `Pairs` or `Watched`. index: as in `Part`. flipped: seen as (E, in, out). dtype: seen in another dtype.
    """

    _is_hf_initialized = True
    """Keeps the `_init_weights` of a model from filling a throw-away product."""

    def __init__(
        self, stack: Pairs | Watched, index: Any = None, flipped: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        self._stack, self._index, self._flipped, self._dtype = stack, index, flipped, dtype

    # --- what is asked of a tensor before it is multiplied by ---

    @property
    def shape(self) -> torch.Size:
        """As of the tensor that it stands for."""
        count, m, n = self._stack.shape
        sizes = (n, m) if self._flipped else (m, n)
        if self._index is None:
            return torch.Size((count, *sizes))
        chosen = self._index.shape if isinstance(self._index, torch.Tensor) else ()
        return torch.Size((*chosen, *sizes))

    @property
    def dtype(self) -> torch.dtype:
        """As of the tensor that it stands for."""
        return self._dtype or self._stack.like.dtype

    @property
    def device(self) -> torch.device:
        """As of the tensor that it stands for."""
        return self._stack.like.device

    @property
    def ndim(self) -> int:
        """2 for one matrix, 3 for several."""
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        """Whether the stack is trained."""
        return self._stack.like.requires_grad

    def size(self, dim: int | None = None) -> Any:
        """As of the tensor that it stands for."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """2 for one matrix, 3 for several."""
        return self.ndim

    def numel(self) -> int:
        """As of the tensor that it stands for."""
        return self.shape.numel()

    def data_ptr(self) -> int:
        """Of a tensor in its place: asked for its alignment."""
        return self._stack.like.data_ptr()

    def is_floating_point(self) -> bool:
        """Always."""
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    # --- parts ---

    def __getitem__(self, key: Any) -> Any:
        whole = self._index is None
        number = isinstance(key, int) and not isinstance(key, bool)
        ids = isinstance(key, torch.Tensor) and key.dtype in (torch.int64, torch.int32) and key.ndim <= 1
        return self._seen(index=key) if whole and (number or ids) else self.multiplied_out()[key]

    def transpose(self, first: int, second: int) -> Any:
        """The matrices transposed; other dimensions of the product."""
        last = {self.ndim - 1, self.ndim - 2}
        if {first % self.ndim, second % self.ndim} == last:
            return self._seen(flipped=not self._flipped)
        return self.multiplied_out().transpose(first, second)

    @property
    def mT(self) -> Any:
        """The matrices transposed."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        """One matrix transposed."""
        return self.transpose(-2, -1) if self.ndim == 2 else self.multiplied_out().T

    def t(self) -> Any:
        """One matrix transposed."""
        return self.T

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """In another dtype; anything else is done to the product."""
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            return self._seen(dtype=args[0])
        return self.multiplied_out().to(*args, **kwargs)

    def float(self) -> Any:
        """In fp32."""
        return self.to(torch.float32)

    def multiplied_out(self) -> torch.Tensor:
        """What it stands for, as a tensor, differentiable."""
        return self._of(self._stack.dense())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_stack", "_index", "_flipped", "_dtype"):
            raise AttributeError(name)
        return getattr(self.multiplied_out(), name)

    def _seen(self, **changes: Any) -> Self:
        now = {"index": self._index, "flipped": self._flipped, "dtype": self._dtype}
        return type(self)(self._stack, **{**now, **changes})

    def _of(self, matrices: torch.Tensor) -> torch.Tensor:
        """The part of a stack (E, a, b) that this is of its own."""
        part = matrices if self._index is None else matrices[self._index]
        part = part if self._dtype is None else part.to(self._dtype)
        return part.mT if self._flipped else part

    # --- products ---

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if (found := _product(func, args, kwargs)) is not None:
            return found
        args, kwargs = tree_map_only(cls, cls.multiplied_out, (args, kwargs))
        return func(*args, **kwargs)


def _product(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The call as a product of tokens and a view; None for any other."""
    if len(args) < 2:
        return None
    left, right = args[:2]
    if func is functional.linear and isinstance(right, StackView) and right.ndim == 2 and not right._flipped:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        y = _times(right, lambda x, w: functional.linear(x, w), left)
        return y if bias is None else y + bias
    if func in _PRODUCTS and not kwargs and len(args) == 2:
        if isinstance(right, StackView) and isinstance(left, torch.Tensor) and right._flipped:
            return _times(right, func, left)
        if isinstance(left, StackView) and isinstance(right, torch.Tensor) and not left._flipped:
            return _times(left, lambda x, w: func(w, x), right, columns=True)
    if _is_grouped(func) and isinstance(right, StackView) and right._flipped and right._index is None:
        others = {k: v for k, v in kwargs.items() if v is not None}
        if set(others) == {"offs"} and len(args) == 2:
            return _times(right, lambda x, w: func(x, w, offs=others["offs"]), left, offsets=others["offs"])
    return None


def _times(view: StackView, call: Multiply, x: torch.Tensor, **part: Any) -> torch.Tensor:
    return view._stack.times(lambda tokens, matrices: call(tokens, view._of(matrices)), x, Part(view._index, **part))


_PRODUCTS = {
    *(torch.matmul, torch.mm, torch.bmm),
    *(torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__),
}


def _is_grouped(func: Callable[..., Any]) -> bool:
    """Whether a function is one of those that multiply tokens, sorted by expert, by each expert's matrix."""
    name = getattr(func, "__name__", "")
    return "grouped_mm" in name and "backward" not in name


# --- the module ---


class Stack(nn.Module):
    """One factor of each expert's matrix: (E, r, in) or (E, out, r)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> torch.Tensor:
        """The factors; a call, so that hooks that fetch parameters fire."""
        return self.weight

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return " x ".join(map(str, self.weight.shape))


class StackOfPairs(nn.Module):
    """Two stacks of factors that an experts module takes for the 3-D parameter in whose place they are registered.

        experts.gate_up_proj = StackOfPairs(down, up)
        functional.linear(x, experts.gate_up_proj[3])  # x down[3]^T up[3]^T

    Args:
        down: (E, r, in). up: (E, out, r). transposed: whether the parameter was (E, in, out).
    """

    _is_hf_initialized = True
    """Keeps `_init_weights` of the experts' class from filling it."""

    down: nn.Module
    up: nn.Module

    def __init__(self, down: nn.Parameter, up: nn.Parameter, transposed: bool = False) -> None:
        super().__init__()
        self.down, self.up = Stack(down), Stack(up)
        self.transposed = transposed

    def forward(self) -> StackView:
        """What stands for the parameter now."""
        return StackView(Pairs(self.up(), self.down()), flipped=self.transposed)

    @property
    def weight(self) -> StackView:
        """What stands for the parameter: its dtype, shape and device, and its values where they are asked for."""
        return self()

    # --- what its owner's code takes for a tensor ---

    def __getitem__(self, key: Any) -> Any:
        return self()[key]

    def __len__(self) -> int:
        return len(self())

    def __iter__(self) -> Iterator[Any]:
        return iter(self())

    def __getattr__(self, name: str) -> Any:
        return getattr(self(), name) if name in _LIKE_A_TENSOR else super().__getattr__(name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda stack: stack(), (args, dict(kwargs or {})))
        return func(*args, **kwargs)


_LIKE_A_TENSOR = {
    *("shape", "dtype", "device", "ndim", "size", "dim", "numel", "data_ptr", "is_floating_point"),
    *("transpose", "mT", "multiplied_out"),
}


def is_transposed(module: nn.Module, name: str) -> bool:
    """Whether a stack is held as (E, in, out). Where the class does not say it, the sizes of its two stacks do."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    for child in module._modules.values():
        if isinstance(child, StackOfPairs):
            return child.transposed
    first, second = (module._parameters.get(n) for n in ("gate_up_proj", "down_proj"))
    if first is None or second is None or first.ndim != 3 or second.ndim != 3:
        return False
    (a, b), (c, d) = first.shape[1:], second.shape[1:]
    return (b, a) == (2 * c, d)
