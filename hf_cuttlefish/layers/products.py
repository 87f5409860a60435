"""Products of many pairs of factors, multiplied out by a few kernels for all, and the gradients of their factors.

The factors of all layers are joined and cast at once. Those of one shape are multiplied in one batch; where ranks differ they are
laid out with room for the largest, and zeros behind the smaller ones. Gradients: d up = dW down^T, d down = up^T dW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors


@dataclass(frozen=True)
class Pairs:
    """Of layers of one shape.

    Attributes:
        downs, ups: (rank, n) and (m, rank) of each layer. biases: (m,) of each, or none at all.
        groups: how many of the layers, in their order, read one tensor.
    """

    downs: Sequence[torch.Tensor]
    ups: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]
    groups: Sequence[int]

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        """Downs, ups, then biases: the order in which `Layout` and `Products` take them."""
        return (*self.downs, *self.ups, *self.biases)


class Layout:
    """Where the factors of several shapes lie when they are joined; of one dtype, on one device."""

    def __init__(self, kinds: Sequence[Pairs]) -> None:
        self.kinds = [_Kind(kind) for kind in kinds]
        self._flat: list[torch.Tensor] = []
        self._places: list[int] = []

    def is_of(self, kinds: Sequence[Pairs]) -> bool:
        """Whether it is that of these factors."""
        return all(own.is_of(kind) for own, kind in zip(self.kinds, kinds, strict=True))

    def let_go(self) -> None:
        """Of the parameters, which it holds on to from step to step."""
        self._flat, self._places = [], []

    def __getstate__(self) -> dict[str, Any]:
        """A copy's parameters are others, at other places; and what is pickled holds them once."""
        return {**vars(self), "_flat": [], "_places": []}

    def stacks(self, parameters: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Of each kind all downs (layers, most, n), all ups (layers, m, most), and biases (layers, m) if it has any."""
        if torch.is_grad_enabled():  # a derivative of derivatives is asked for
            flat = _flatten_dense_tensors(self._with_nothing(parameters)).to(dtype)
        else:
            flat = torch.cat(self._views(parameters)).to(dtype)
        found: list[torch.Tensor] = []
        begin = 0
        for kind in self.kinds:
            found += kind.stacks(flat[begin : begin + kind.numel])
            begin += kind.numel
        return found

    def _views(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The parameters, flat, in their order. They stay where they are from step to step, so that this is worked out once."""
        places = [p.data_ptr() for p in parameters]
        if places != self._places or self._flat[0].dtype != parameters[0].dtype:
            self._flat = [p.detach().reshape(-1) for p in self._with_nothing(parameters)]
            self._places = places if all(p.is_contiguous() for p in parameters) else []
        return self._flat

    def _with_nothing(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Zeros behind the ups of each kind whose ranks differ."""
        found: list[torch.Tensor] = []
        begin = 0
        for kind in self.kinds:
            own = parameters[begin : begin + kind.parameters]
            found += own if kind.is_even else (*own[: 2 * kind.count], kind.nothing, *own[2 * kind.count :])
            begin += kind.parameters
        return found


class _Kind:
    """Layers of one shape: how their ranks lie in a stack that has room for the largest, `most`.

    Ups are moved in units, so many numbers as divide all ranks. in_rows, in_units: for each row of all downs (unit of all ups) in the
    stack the one that is to be there; out_rows, out_units: the way back.
    """

    def __init__(self, factors: Pairs) -> None:
        down, up = factors.downs[0], factors.ups[0]
        self.ranks, self.groups = [d.size(0) for d in factors.downs], list(factors.groups)
        self.count, self.m, self.n, self.device = len(self.ranks), up.size(0), down.size(1), down.device
        self.has_bias = bool(factors.biases)
        self.parameters = (2 + self.has_bias) * self.count
        self.most, self.total, self.unit = max(self.ranks), sum(self.ranks), math.gcd(*self.ranks)
        self.is_even = len(set(self.ranks)) == 1
        self.runs = [(size, self.groups.count(size)) for size in sorted(set(self.groups))]
        self.group_of_each = [at for at, size in enumerate(self.groups) for _ in range(size)]
        self.nothing = up.detach().new_zeros(0 if self.is_even else self.unit)
        self.numel = self.total * (self.m + self.n) + self.nothing.numel() + self.has_bias * self.count * self.m
        if not self.is_even:
            self._lay_out()

    def _lay_out(self) -> None:
        ranks = torch.tensor(self.ranks, device=self.device)
        begins = ranks.cumsum(0) - ranks
        place = torch.arange(self.most, device=self.device)
        is_real = place < ranks[:, None]  # (layers, most)
        # Behind a smaller rank any rows of down do: those columns of up are zeros.
        in_rows = torch.where(is_real, begins[:, None] + place, 0).flatten()
        widths, wide = ranks // self.unit, self.most // self.unit
        rows, place = torch.arange(self.m, device=self.device)[:, None], place[:wide]
        own = (begins // self.unit * self.m)[:, None, None] + rows * widths[:, None, None] + place  # (layers, m, wide)
        is_real_unit = (place < widths[:, None])[:, None].expand_as(own)
        in_units = torch.where(is_real_unit, own, self.total * self.m // self.unit).flatten()
        out = is_real.flatten().nonzero()[:, 0], is_real_unit.flatten().nonzero()[:, 0]
        # The least memory: these are kept as long as the layers.
        found = [t.to(torch.int32) for t in (in_rows, in_units, *out)]
        self.in_rows, self.in_units, self.out_rows, self.out_units = found

    def is_of(self, factors: Pairs) -> bool:
        is_there = self.device == factors.downs[0].device and self.has_bias == bool(factors.biases)
        return is_there and self.ranks == [d.size(0) for d in factors.downs]

    def stacks(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """See `Layout.stacks`. flat: what was joined of this kind."""
        at = self.total * self.n, self.total * (self.n + self.m) + self.nothing.numel()
        down, up, biases = flat[: at[0]], flat[at[0] : at[1]], flat[at[1] :]
        if not self.is_even:
            down = down.view(-1, self.n).index_select(0, self.in_rows)
            up = up.view(-1, self.unit).index_select(0, self.in_units)
        found = [down.view(self.count, self.most, self.n), up.view(self.count, self.m, self.most)]
        return [*found, biases.view(self.count, self.m)] if self.has_bias else found

    def parts(self, stack: torch.Tensor) -> list[torch.Tensor]:
        """(layers, n, m) -> (m, n) for a layer that runs alone, (members, n, m) for a group; (layers, m) -> (m,), (members, 1, m)."""
        found: list[torch.Tensor] = []
        begin = 0
        for size, count in self.runs:
            part = stack[begin : begin + size * count]
            if size == 1:
                found += (part.mT if stack.ndim == 3 else part).unbind()
            else:
                found += part.view(count, size, -1, part.shape[-1]).unbind()
            begin += size * count
        return found

    def joined(self, grads: Sequence[torch.Tensor | None], shape: tuple[int, ...]) -> torch.Tensor:
        """The way back: (layers, *shape), zeros where there is no gradient."""
        present = [grad for grad in grads if grad is not None]
        if len(self.runs) == 1 and len(present) == len(grads):
            together = torch.stack(present)
            if self.runs[0][0] == 1:
                return together.mT if len(shape) == 2 else together
            return together.view(-1, *shape)
        nothing = present[0].new_zeros(()).expand(shape)
        each = []
        for grad, size in zip(grads, self.groups, strict=True):
            if grad is None:
                grad = nothing.expand(size, *shape)
            elif size == 1:
                grad = (grad.mT if len(shape) == 2 else grad)[None]
            each.append(grad if grad.ndim == len(shape) + 1 else grad[:, 0])
        return torch.cat(each)

    def gradients(
        self, down: torch.Tensor, up: torch.Tensor, grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Flat ones, of all downs, ups and biases; grads: of its weights, then of its biases."""
        g = self.joined(grads[: len(self.groups)], (self.n, self.m))
        of_down, of_up = torch.bmm(up.mT, g.mT), torch.bmm(g.mT, down.mT)
        if not self.is_even:
            of_down = of_down.view(-1, self.n).index_select(0, self.out_rows)
            of_up = of_up.view(-1, self.unit).index_select(0, self.out_units)
        found = [of_down.view(-1), of_up.view(-1)]
        return [*found, self.joined(grads[len(self.groups) :], (self.m,)).view(-1)] if self.has_bias else found

    def shares(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of each parameter, in memory as it lies. flat: `gradients`, one behind the other."""
        down, up, biases = flat.split(
            [self.total * self.n, self.total * self.m, flat.numel() - self.total * (self.n + self.m)]
        )
        found = list(down.view(-1, self.n).split(self.ranks))
        ups = up.split([self.m * rank for rank in self.ranks])
        found += [u.view(self.m, rank) for u, rank in zip(ups, self.ranks, strict=True)]
        return [*found, *biases.view(self.count, self.m).unbind()] if self.has_bias else found

    def used(self, grads: Sequence[torch.Tensor | None]) -> list[bool]:
        """Of each layer, whether it ran."""
        return [grads[at] is not None for at in self.group_of_each]


class Products(torch.autograd.Function):
    """(downs..., ups..., biases...) of each kind -> (a weight of each group..., biases...) of each, in the dtype asked for.

    A weight is (m, n), or (members, n, m) of a group; a bias (m,), or (members, 1, m).
    """

    @staticmethod
    def forward(ctx: Any, layout: Layout, dtype: torch.dtype, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Join, cast and multiply; see the class."""
        stacks = iter(layout.stacks(parameters, dtype))
        made: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        for kind in layout.kinds:
            down, up = next(stacks), next(stacks)
            made += kind.parts(torch.bmm(down.mT, up.mT))
            made += kind.parts(next(stacks)) if kind.has_bias else []
            kept += [down, up]
        # Of the parameters themselves nothing is read later, unless derivatives of derivatives are asked for.
        ctx.layout, ctx.dtype, ctx.parameters = layout, dtype, parameters
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """One gradient a parameter, in its dtype; None for layers that did not run."""
        kinds = ctx.layout.kinds
        factors = iter(_again(ctx) if torch.is_grad_enabled() else ctx.saved_tensors)
        flat: list[torch.Tensor] = []
        ran: list[list[bool]] = []
        begin = 0
        for kind in kinds:
            down, up = next(factors), next(factors)
            own = grads[begin : begin + len(kind.groups) * (1 + kind.has_bias)]
            begin += len(own)
            ran.append(kind.used(own))
            if any(ran[-1]):
                flat += kind.gradients(down, up, own)
        joined = torch.cat(flat).to(ctx.parameters[0].dtype) if flat else None
        return None, None, *_shares(kinds, ran, joined)


def _again(ctx: Any) -> list[torch.Tensor]:
    """Downs and ups of each kind, of which derivatives can be taken."""
    stacks = ctx.layout.stacks(ctx.parameters, ctx.dtype)
    return [stack for stack in stacks if stack.ndim == 3]


def _shares(
    kinds: Sequence[_Kind], ran: Sequence[Sequence[bool]], joined: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """The gradient of each parameter. A layer that did not run has none, and not one of zeros."""
    found: list[torch.Tensor | None] = []
    begin = 0
    for kind, used in zip(kinds, ran, strict=True):
        if joined is None or not any(used):
            found += [None] * kind.parameters
            continue
        size = kind.numel - kind.nothing.numel()
        shares = kind.shares(joined[begin : begin + size])
        begin += size
        found += shares if all(used) else [g if used[i % kind.count] else None for i, g in enumerate(shares)]
    return found
