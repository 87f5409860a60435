"""A form of running: the factors of many layers are multiplied out in one batch, and each layer runs as one product.

Where the host is slower than the device, what counts is how many kernels are launched, and a pair launches two products where a
dense layer launches one. Multiplied out together, the layers of one shape launch one product each and a few for all of them,
and no cast of a weight of their own under autocast: fewer than dense layers do. The device multiplies more, and has the time.
The parameters stay those of the pairs, and so do their gradients: d up = dW down^T, d down = up^T dW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .low_rank import LowRankLinear

MOST_BYTES = 2**26
"""Of the weights that are multiplied out in one batch, and again of their gradients."""


class Multiplied:
    """Layers of one shape that run multiplied out while their model's forward is under way.

        batch = Multiplied([block.query for block in blocks]); batch.open(); model(**inputs); batch.close()

    Args:
        layers: of one shape, dtype and device, all with a bias or none; ranks may differ.
    """

    def __init__(self, layers: Sequence[LowRankLinear]) -> None:
        self.layers = list(layers)
        self._made: dict[tuple[torch.dtype, bool], dict[int, tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self._layout: _Layout | None = None

    def open(self) -> None:
        """A forward of the model begins; layers whose factors are not plain ones run as pairs."""
        self._made.clear()
        if all(_is_plain(child) for layer in self.layers for child in (layer.down, layer.up)):
            for layer in self.layers:
                layer.__dict__["form"] = self

    def close(self) -> None:
        """The forward has ended: pairs again, and nothing is kept alive."""
        self._made.clear()
        for layer in self.layers:
            layer.__dict__.pop("form", None)

    def weight_and_bias(self, layer: LowRankLinear) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The weight (out, in) and bias that a layer is to run with, in the precision of autocast; None: as a pair.

        A checkpointed block runs twice, the second time outside of the model's forward: it runs as pairs both times.
        """
        if torch.is_grad_enabled():
            if _saving_is_watched():
                return None
        elif layer.training:
            return None
        kind = layer.up.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.up.weight.dtype
        key = dtype, torch.is_grad_enabled()
        if key not in self._made:
            self._made[key] = self._multiply(dtype)
        return self._made[key].get(id(layer))

    def _multiply(self, dtype: torch.dtype) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
        downs = [layer.down.weight for layer in self.layers]
        ups = [layer.up.weight for layer in self.layers]
        biases = [layer.up.bias for layer in self.layers if layer.up.bias is not None]
        ranks = [len(down) for down in downs]
        if self._layout is None or self._layout.ranks != ranks or self._layout.device != downs[0].device:
            self._layout = _Layout(ranks, downs[0].device)
        made = _Products.apply(self._layout, dtype, *downs, *ups, *biases)
        count = len(self.layers)
        held: Sequence[torch.Tensor | None] = made[count:] if biases else [None] * count
        return {id(la): (w, b) for la, w, b in zip(self.layers, made[:count], held, strict=True)}


def in_batches(layers: Sequence[LowRankLinear]) -> list[Multiplied]:
    """Layers in batches of one shape, at most `MOST_BYTES` each; those that are alone, or are not trained, are left out."""
    kinds: dict[tuple[Any, ...], list[LowRankLinear]] = {}
    for layer in layers:
        up, down = layer.up.weight, layer.down.weight
        if up.requires_grad and down.requires_grad and not up.is_meta:
            kind = (up.shape[0], down.shape[1], up.dtype, up.device, layer.up.bias is not None)
            kinds.setdefault(kind, []).append(layer)
    found = []
    for (rows, columns, dtype, _, _), same in kinds.items():
        most = max(2, MOST_BYTES // (rows * columns * min(2, dtype.itemsize)))
        parts = [same[i : i + most] for i in range(0, len(same), most)]
        found += [Multiplied(part) for part in parts if len(part) > 1]
    return found


class _Layout:
    """Where the ranks of some layers lie in a stack that has room for the largest of them.

    fill: for each row of the stack the row of all ranks one below the other, or one of zeros behind them; keep: the way back.
    """

    def __init__(self, ranks: list[int], device: torch.device) -> None:
        self.ranks, self.device, self.most, self.total = ranks, device, max(ranks), sum(ranks)
        self.is_even = len(set(ranks)) == 1
        rows: list[int] = []
        kept: list[int] = []
        begin = 0
        for i, rank in enumerate(ranks):
            rows += [*range(begin, begin + rank), *[self.total] * (self.most - rank)]
            kept += range(i * self.most, i * self.most + rank)
            begin += rank
        self.fill, self.keep = (torch.tensor(t, device=device) for t in (rows, kept))

    def stack(
        self, downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All downs (layers, most, n) and ups (layers, m, most), with zeros where a rank is smaller."""
        if not self.is_even:
            downs = [*downs, downs[0].new_zeros(1, downs[0].shape[1])]
            ups = [*ups, ups[0].new_zeros(len(ups[0]), 1)]
        down, up = torch.cat(list(downs)).to(dtype), torch.cat(list(ups), 1).to(dtype)
        if not self.is_even:
            down, up = down.index_select(0, self.fill), up.index_select(1, self.fill)
        count = len(self.ranks)
        return down.view(count, self.most, -1), up.view(len(up), count, self.most).transpose(0, 1)

    def unstack_downs(self, down: torch.Tensor) -> Sequence[torch.Tensor]:
        """(layers, most, n) -> (rank, n) of each."""
        rows = down.reshape(-1, down.shape[-1])
        return (rows if self.is_even else rows.index_select(0, self.keep)).split(self.ranks)

    def unstack_ups(self, up: torch.Tensor) -> Sequence[torch.Tensor]:
        """(layers, m, most) -> (m, rank) of each."""
        return up.unbind() if self.is_even else [u[:, :rank] for u, rank in zip(up, self.ranks, strict=True)]


class _Products(torch.autograd.Function):
    """(downs..., ups..., biases...) -> (weights..., biases...) in the dtype asked for; a few kernels for all of them."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, dtype: torch.dtype, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(layout.ranks)
        downs, ups, biases = parameters[:count], parameters[count : 2 * count], parameters[2 * count :]
        ctx.layout, ctx.dtype = layout, dtype
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        with torch.autocast(layout.device.type, enabled=False):
            down, up = layout.stack(downs, ups, dtype)
            weights = torch.bmm(up, down).unbind()
            return (*weights, *(torch.stack(biases).to(dtype).unbind() if biases else ()))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        parameters, layout = ctx.saved_tensors, ctx.layout
        count = len(layout.ranks)
        downs, ups, biases = parameters[:count], parameters[count : 2 * count], parameters[2 * count :]
        found: list[torch.Tensor | None] = [None] * len(parameters)
        used = [i for i, g in enumerate(grads[:count]) if g is not None]
        with torch.autocast(layout.device.type, enabled=False):
            if used:
                missing = torch.zeros((), dtype=ctx.dtype, device=layout.device).expand(len(ups[0]), downs[0].shape[1])
                g = torch.stack([missing if grad is None else grad for grad in grads[:count]])
                down, up = layout.stack(downs, ups, ctx.dtype)
                for_down = layout.unstack_downs(torch.bmm(up.mT, g).to(downs[0].dtype))
                for_up = layout.unstack_ups(torch.bmm(g, down.mT).to(ups[0].dtype))
                for i in used:  # a layer that did not run has no gradient, and not one of zeros
                    found[i], found[count + i] = for_down[i], for_up[i]
            used = [i for i, g in enumerate(grads[count:]) if g is not None]
            if used:
                together = torch.stack([grads[count + i] for i in used]).to(biases[0].dtype)  # type: ignore[misc]
                for i, grad in zip(used, together.unbind(), strict=True):
                    found[2 * count + i] = grad
        return None, None, *found


def _is_plain(child: nn.Module) -> bool:
    """Whether a factor is a linear layer that nobody listens to: no adapter, no parametrization, no hooks."""
    hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks)
    return type(child) is nn.Linear and "forward" not in child.__dict__ and not any(hooks)


def _saving_is_watched() -> bool:
    """Whether what autograd saves goes through somebody's hooks, as in a checkpointed block."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is not None
