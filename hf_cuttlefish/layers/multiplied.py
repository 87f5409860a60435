"""A form of running: the factors of many layers are multiplied out in one batch, and each layer runs as one product.

Where the host is slower than the device, what counts is how many kernels are launched, and a pair launches two products where a
dense layer launches one. Multiplied out together, the layers of one shape launch one product each and a few for all of them,
and no cast of a weight of their own under autocast; those that read one tensor (q, k, v) launch one product together. That is
fewer than dense layers do. The device multiplies more, and has the time.
The parameters stay those of the pairs, and so do their gradients: d up = dW down^T, d down = up^T dW.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from .low_rank import LowRankLinear

MOST_BYTES = 2**26
"""Of the weights that are multiplied out in one batch, and again of their gradients."""


class Multiplied:
    """Layers of one shape that run multiplied out while their model's forward is under way.

        batch = Multiplied([[block.query, block.key] for block in blocks]); batch.start()
        batch.open(); model(**inputs); batch.close()

    Args:
        groups: layers that read one tensor, all of one shape, dtype and device, and all with a bias or none; ranks may differ.
    """

    def __init__(self, groups: Iterable[Sequence[LowRankLinear]]) -> None:
        self.groups = sorted((list(group) for group in groups), key=len)
        self.layers = [layer for group in self.groups for layer in group]
        self.is_open = False
        self.made: _Made | None = None
        self._layout: _Layout | None = None
        self._members = [_Member(self, at, i) for at, group in enumerate(self.groups) for i in range(len(group))]
        self._children = [child for layer in self.layers for child in (layer.down, layer.up)]
        # Each step is begun by the host, which is what has to be spared: looked up once.
        self._tables = [table for child in self._children for table in _hook_tables(child)]
        self._are_plain = all(type(child) is nn.Linear for child in self._children)

    def start(self) -> None:
        """From now on the layers run multiplied out while it is open."""
        for layer, member in zip(self.layers, self._members, strict=True):
            layer.__dict__["form"] = member

    def stop(self) -> None:
        """Pairs again."""
        self.close()
        for layer in self.layers:
            layer.__dict__.pop("form", None)

    def open(self) -> None:
        """A forward of the model begins; where a factor holds an adapter or hooks all run as pairs."""
        self.made = None
        children = [child for layer in self.layers for child in (layer._modules["down"], layer._modules["up"])]
        are_same = all(map(operator.is_, children, self._children))
        are_changed = any(self._tables) or any("forward" in child.__dict__ for child in children)
        self.is_open = self._are_plain and are_same and not are_changed

    def close(self) -> None:
        """The forward has ended: nothing is kept alive."""
        self.is_open, self.made = False, None

    def prepare(self, layer: LowRankLinear, kind: str, with_grad: bool) -> _Made:
        """The weights for a device's kind of autocast, multiplied out, unless they are there."""
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.up.weight.dtype
        if self.made is None or self.made.dtype != dtype or self.made.with_grad is not with_grad:
            self.made = self._multiply(dtype)
            self.made.with_grad = with_grad
        return self.made

    def _multiply(self, dtype: torch.dtype) -> _Made:
        weights = [cast(torch.Tensor, child._parameters["weight"]) for child in self._children]
        downs, ups = weights[::2], weights[1::2]
        biases = [b for child in self._children[1::2] if (b := child._parameters["bias"]) is not None]
        if self._layout is None or not self._layout.is_of(downs):
            self._layout = _Layout(downs, ups, [len(group) for group in self.groups])
        made = _Products.apply(self._layout, dtype, *downs, *ups, *biases)
        count = len(self.groups)
        return _Made(dtype, made[:count], made[count:] or [None] * count)


class _Member:
    """The form of one layer, at its place in a group."""

    def __init__(self, batch: Multiplied, at: int, place: int) -> None:
        self.batch, self.at, self.place = batch, at, place

    def run(self, layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor | None:
        """What the layer makes of x (..., in), in the precision of autocast; None: run as a pair.

        A checkpointed block runs twice, the second time outside of the model's forward: it runs as pairs both times.
        """
        if not self.batch.is_open:
            return None
        with_grad = torch.is_grad_enabled()
        if _saving_is_watched() if with_grad else layer.training:
            return None
        made = self.batch.prepare(layer, x.device.type, with_grad)
        weight, bias = made.weights[self.at], made.biases[self.at]
        if weight.ndim == 2:
            return functional.linear(x, weight, bias)
        return made.of_group(self.at, self.place, x)


def in_batches(groups: Iterable[Sequence[nn.Module]]) -> list[Multiplied]:
    """Low-rank layers, grouped by the tensor that they read, in batches of one shape, at most `MOST_BYTES` each.

    Those that are not linear, not trained, or alone are left out.
    """
    kinds: dict[tuple[Any, ...], list[list[LowRankLinear]]] = {}
    for group in groups:
        same: dict[tuple[Any, ...], list[LowRankLinear]] = {}
        for layer in group:
            if type(layer) is LowRankLinear and layer.up.weight.requires_grad and layer.down.weight.requires_grad:
                up = layer.up.weight
                kind = (len(up), layer.down.weight.shape[1], up.dtype, up.device, layer.up.bias is not None)
                same.setdefault(kind, []).append(layer)
        for kind, members in same.items():
            kinds.setdefault(kind, []).append(members)
    found = []
    for (rows, columns, dtype, device, _), members_of_all in kinds.items():
        most = MOST_BYTES // (rows * columns * min(2, dtype.itemsize))
        part: list[list[LowRankLinear]] = []
        for members in members_of_all:
            if part and sum(map(len, part)) + len(members) > most:
                found.append(part)
                part = []
            part.append(members)
        if device.type != "meta":
            found.append(part)
    return [Multiplied(part) for part in found if sum(map(len, part)) > 1]


class _Made:
    """The weights (and biases) of the groups, multiplied out for one forward, and outputs that members have not asked for yet."""

    def __init__(
        self, dtype: torch.dtype, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
    ) -> None:
        self.dtype, self.weights, self.biases = dtype, weights, biases
        self.with_grad = True
        self._held: dict[int, tuple[torch.Tensor, int, dict[int, torch.Tensor]]] = {}

    def of_group(self, at: int, place: int, x: torch.Tensor) -> torch.Tensor:
        """The output of a member of the group numbered `at`."""
        # The member that asks first has the outputs of all worked out; the others read the very same tensor.
        read, version, outputs = self._held.get(at, (None, 0, {}))
        if read is not x or version != x._version or place not in outputs:
            outputs = dict(enumerate(_together(x, self.weights[at], self.biases[at])))
            self._held[at] = x, x._version, outputs
        output = outputs.pop(place)
        if not outputs:
            del self._held[at]
        return output


class _Layout:
    """Where the ranks of some layers lie in a stack that has room for the largest of them.

    fill: for each row of the stack the row of all ranks one below the other, or one of zeros behind them; keep: the way back.
    groups: how many layers read one tensor, in their order.
    """

    def __init__(self, downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], groups: list[int]) -> None:
        self.ranks, self.groups, self.device = [down.size(0) for down in downs], groups, downs[0].device
        self.most, self.total = max(self.ranks), sum(self.ranks)
        self.is_even = len(set(self.ranks)) == 1
        self.runs = [(size, groups.count(size)) for size in sorted(set(groups))]
        self.group_of_each = [at for at, size in enumerate(groups) for _ in range(size)]
        self.zeros = downs[0].new_zeros(1, downs[0].shape[1]), ups[0].new_zeros(len(ups[0]), 1)
        rows: list[int] = []
        kept: list[int] = []
        begin = 0
        for i, rank in enumerate(self.ranks):
            rows += [*range(begin, begin + rank), *[self.total] * (self.most - rank)]
            kept += range(i * self.most, i * self.most + rank)
            begin += rank
        self.fill, self.keep = (torch.tensor(t, device=self.device) for t in (rows, kept))

    def is_of(self, downs: Sequence[torch.Tensor]) -> bool:
        return self.device == downs[0].device and self.ranks == [down.size(0) for down in downs]

    def stack(
        self, downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All downs (layers, most, n) and ups (layers, m, most), with zeros where a rank is smaller."""
        if self.is_even:
            down, up = torch.cat(tuple(downs)).to(dtype), torch.cat(tuple(ups), 1).to(dtype)
        else:
            down = torch.cat((*downs, self.zeros[0])).to(dtype).index_select(0, self.fill)
            up = torch.cat((*ups, self.zeros[1]), 1).to(dtype).index_select(1, self.fill)
        count = len(self.ranks)
        return down.view(count, self.most, -1), up.view(len(up), count, self.most).transpose(0, 1)

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

    def downs(self, up: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """The gradient (rank, n) of each down. g: of the products, (layers, n, m)."""
        rows = torch.bmm(up.mT, g.mT).view(len(g) * self.most, -1)
        return (rows if self.is_even else rows.index_select(0, self.keep)).to(dtype).split(self.ranks)

    def ups(self, down: torch.Tensor, g: torch.Tensor, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The gradient (m, rank) of each up, as autograd wants it: parts of a larger tensor's columns it would copy one by one."""
        dtype = like[0].dtype
        if self.is_even:
            return torch.bmm(g.mT, down.mT).to(dtype).unbind()
        if torch.is_grad_enabled():  # a derivative of derivatives is asked for
            found = torch.bmm(g.mT, down.mT).to(dtype)
            return [u[:, :rank] for u, rank in zip(found, self.ranks, strict=True)]
        columns = g.new_empty(g.shape[2], len(g) * self.most)
        torch.bmm(g.mT, down.mT, out=columns.view(len(columns), len(g), self.most).transpose(0, 1))
        columns = columns.index_select(1, self.keep).to(dtype)
        parts = [columns.new_empty(u.shape) for u in like]
        torch.split_with_sizes_copy(columns, self.ranks, 1, out=parts)
        return parts


class _Products(torch.autograd.Function):
    """(downs..., ups..., biases...) -> (a weight of each group..., biases...) in the dtype asked for, by a few kernels for all.

    A weight is (m, n), or (members, n, m) of a group; a bias (m,), or (members, 1, m).
    """

    @staticmethod
    def forward(ctx: Any, layout: _Layout, dtype: torch.dtype, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(layout.ranks)
        down, up = layout.stack(parameters[:count], parameters[count : 2 * count], dtype)
        # Of the parameters themselves nothing is read later, unless derivatives of derivatives are asked for.
        ctx.layout, ctx.dtype, ctx.parameters = layout, dtype, parameters
        ctx.save_for_backward(down, up)
        ctx.set_materialize_grads(False)
        made = layout.parts(torch.bmm(down.mT, up.mT))
        if len(parameters) > 2 * count:
            made += layout.parts(torch.stack(parameters[2 * count :]).to(dtype))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        parameters, layout = ctx.parameters, ctx.layout
        count, groups = len(layout.ranks), len(layout.groups)
        downs, ups, biases = parameters[:count], parameters[count : 2 * count], parameters[2 * count :]
        again = torch.is_grad_enabled()
        down, up = layout.stack(downs, ups, ctx.dtype) if again else ctx.saved_tensors
        # A layer that did not run has no gradient, and not one of zeros.
        used = [grads[at] is not None for at in layout.group_of_each]
        if not any(used):
            return None, None, *(None for _ in parameters)
        g = layout.joined(grads[:groups], (downs[0].shape[1], len(ups[0])))
        found = [*layout.downs(up, g, downs[0].dtype), *layout.ups(down, g, ups)]
        if biases:
            found += layout.joined(grads[groups:], (len(ups[0]),)).to(biases[0].dtype).unbind()
        if all(used):
            return None, None, *found
        return None, None, *(g if used[i % count] else None for i, g in enumerate(found))


def _together(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Sequence[torch.Tensor]:
    """x (..., n), weight (members, n, m), bias (members, 1, m) or None -> the output (..., m) of each member, by one product."""
    if x.ndim == 1:
        return [y[0] for y in _together(x[None], weight, bias)]
    rows = x.to(weight.dtype).reshape(1, -1, x.shape[-1]).expand(len(weight), -1, -1)
    y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
    # No views of one tensor to autograd, but each a whole one: models work in place on them (Longformer divides its query).
    y = y.view(len(weight) * len(x), *x.shape[1:-1], y.shape[-1])
    return torch.unsafe_split_with_sizes(y, [len(x)] * len(weight))


def _hook_tables(child: nn.Module) -> list[Any]:
    """Where hooks of a factor are, if it has any."""
    return [child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks]


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _saving_is_watched() -> bool:
    """Whether what autograd saves goes through somebody's hooks, as in a checkpointed block."""
    return _top_hooks is not None and _top_hooks(False) is not None
