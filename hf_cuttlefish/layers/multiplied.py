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
from .products import Layout, Pairs, Products

MOST_BYTES = 2**26
"""Of the weights of one shape that are multiplied out in one batch, and again of their gradients."""


class Multiplied:
    """Layers that run multiplied out while their model's forward is under way.

        batch = Multiplied([[[block.query, block.key] for block in blocks]]); batch.start()
        batch.open(); model(**inputs); batch.close()

    Args:
        kinds: groups of layers that read one tensor, those of one shape together; a shape's layers all have a bias or none, and all
            are of one dtype and on one device. Ranks may differ.
    """

    def __init__(self, kinds: Iterable[Iterable[Sequence[LowRankLinear]]]) -> None:
        self.kinds = [sorted((list(group) for group in kind), key=len) for kind in kinds]
        self.groups = [group for kind in self.kinds for group in kind]
        self.layers = [layer for group in self.groups for layer in group]
        self.is_open = False
        self.made: _Made | None = None
        self._layout: Layout | None = None
        self._members = [_Member(self, at, i) for at, group in enumerate(self.groups) for i in range(len(group))]
        self._children = [child for layer in self.layers for child in (layer.down, layer.up)]
        # Each step is begun by the host, which is what has to be spared: looked up once.
        self._tables = [table for child in self._children for table in _hook_tables(child)]

    def start(self) -> None:
        """From now on the layers run multiplied out while it is open."""
        for layer, member in zip(self.layers, self._members, strict=True):
            layer.__dict__["form"] = member

    def stop(self) -> None:
        """Pairs again."""
        self.close()
        if self._layout is not None:
            self._layout.let_go()
        for layer in self.layers:
            layer.__dict__.pop("form", None)

    def open(self) -> None:
        """A forward of the model begins; where a factor holds an adapter, a parametrization or hooks all run as pairs."""
        self.made = None
        children = [child for layer in self.layers for child in (layer._modules["down"], layer._modules["up"])]
        are_same = all(map(operator.is_, children, self._children))
        are_changed = any(self._tables) or any("forward" in child.__dict__ for child in children)
        are_plain = set(map(type, children)) == {nn.Linear}  # a parametrized one is of a class of its own
        self.is_open = are_plain and are_same and not are_changed

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
        kinds = []
        begin = 0
        for groups in self.kinds:
            sizes = [len(group) for group in groups]
            own = self._children[begin : begin + 2 * sum(sizes)]
            begin += len(own)
            weights = [cast(torch.Tensor, child._parameters["weight"]) for child in own]
            biases = [b for child in own[1::2] if (b := child._parameters["bias"]) is not None]
            kinds.append(Pairs(weights[::2], weights[1::2], biases, sizes))
        if self._layout is None or not self._layout.is_of(kinds):
            self._layout = Layout(kinds)
        made = list(Products.apply(self._layout, dtype, *(p for kind in kinds for p in kind.all)))
        of_weights: list[torch.Tensor] = []
        of_biases: list[torch.Tensor | None] = []
        for kind in kinds:
            count = len(kind.groups)
            of_weights += made[:count]
            of_biases += made[count : 2 * count] if kind.biases else [None] * count
            del made[: count * (2 if kind.biases else 1)]
        return _Made(dtype, of_weights, of_biases)


class _Member:
    """The form of one layer, at its place in a group."""

    def __init__(self, batch: Multiplied, at: int, place: int) -> None:
        self.batch, self.at, self.place = batch, at, place

    def run(self, layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor | None:
        """What the layer makes of x (..., in), in the precision of autocast; None: run as a pair.

        A checkpointed block runs twice, the second time outside of the model's forward: it runs as pairs both times.
        """
        if not self.batch.is_open or torch.compiler.is_compiling():
            return None
        with_grad = torch.is_grad_enabled()
        # Tensors of inference mode do not say whether they were changed.
        if _saving_is_watched() if with_grad else layer.training or torch.is_inference_mode_enabled():
            return None
        made = self.batch.prepare(layer, x.device.type, with_grad)
        weight, bias = made.weights[self.at], made.biases[self.at]
        if weight.ndim == 2:
            return functional.linear(x, weight, bias)
        return made.of_group(self.at, self.place, x)


def in_batches(groups: Iterable[Sequence[nn.Module]]) -> list[Multiplied]:
    """Low-rank layers, grouped by the tensor that they read, in batches: of several shapes, or a part of one shape's.

    Of one shape at most `MOST_BYTES` run in a batch. Those that are not linear, not trained, or alone are left out.
    """
    kinds: dict[tuple[Any, ...], list[list[LowRankLinear]]] = {}
    for group in groups:
        same: dict[tuple[Any, ...], list[LowRankLinear]] = {}
        for layer in group:
            if type(layer) is LowRankLinear and layer.up.weight.requires_grad and layer.down.weight.requires_grad:
                up = layer.up.weight
                kind = (up.dtype, up.device, len(up), layer.down.weight.shape[1], layer.up.bias is not None)
                same.setdefault(kind, []).append(layer)
        for kind, members in same.items():
            kinds.setdefault(kind, []).append(members)
    found: list[list[Any]] = []
    whole: dict[tuple[Any, ...], list[list[list[LowRankLinear]]]] = {}
    for (dtype, device, rows, columns, _), members_of_all in kinds.items():
        most = MOST_BYTES // (rows * columns * min(2, dtype.itemsize))
        parts = [part for part in _parts(members_of_all, most) if sum(map(len, part)) > 1 and device.type != "meta"]
        if len(parts) == 1:
            whole.setdefault((dtype, device), []).append(parts[0])
        else:
            found += [[part] for part in parts]
    return [Multiplied(some) for some in [*whole.values(), *found]]


def _parts(groups: Iterable[list[LowRankLinear]], most: int) -> list[list[list[LowRankLinear]]]:
    """Groups one after another, so many in a part that it holds at most so many layers, or one group."""
    found: list[list[list[LowRankLinear]]] = [[]]
    for group in groups:
        if found[-1] and sum(map(len, found[-1])) + len(group) > most:
            found.append([])
        found[-1].append(group)
    return found


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
