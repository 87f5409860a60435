"""Other ways to run low-rank layers, for the speed benchmark: what each would gain before the package takes it up."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_cuttlefish.layers.kinds import dense_weight
from hf_cuttlefish.layers.low_rank import LowRankLinear, low_rank_layers
from hf_cuttlefish.patch.structure import restructure


def fill(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, LowRankLinear]:
    """Give layers low-rank structure with random factors of the same scale: time does not depend on the values."""
    restructure(model, ranks)
    layers = {name: layer for name, layer in low_rank_layers(model).items() if name in ranks}
    with torch.no_grad():
        for layer in layers.values():
            for child in (layer.down, layer.up):
                nn.init.normal_(child.weight, std=child.in_features**-0.5)
    return layers


def groups_by_input(model: nn.Module, names: list[str], batch: Mapping[str, Any]) -> list[list[str]]:
    """Names of layers that read the very same tensor, as it flows: [q, k, v], [gate, up], [dense], ..."""
    seen: dict[int, list[str]] = {}
    kept: list[torch.Tensor] = []  # alive, so that an id is not given twice

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            kept.append(args[0])
            seen.setdefault(id(args[0]), []).append(name)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return list(seen.values())


# --- a: F.linear on the children's weights, without calling the children ---


def use_direct(layers: Mapping[str, LowRankLinear]) -> None:
    """Two F.linear calls in the place of two module calls."""

    def forward(self: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        down, up = self._modules["down"], self._modules["up"]
        return F.linear(F.linear(x, down.weight), up.weight, up.bias)

    for layer in layers.values():
        layer.forward = types.MethodType(forward, layer)


# --- b: one autograd function a pair: casts by hand, weight gradients straight in fp32 ---


def _working_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _weight_gradient(g: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """g^T x (out, in) in `dtype`: on CUDA the product is written in fp32 at once, without a cast."""
    if g.dtype != dtype and g.is_cuda and dtype == torch.float32 and not torch.compiler.is_compiling():
        return torch.mm(g.mT, x, out_dtype=dtype)
    return (g.mT @ x).to(dtype)


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        dtype = _working_dtype(x)
        flat, d, u = x.reshape(-1, x.shape[-1]).to(dtype), down.to(dtype), up.to(dtype)
        h = flat @ d.mT
        y = h @ u.mT if bias is None else torch.addmm(bias.to(dtype), h, u.mT)
        ctx.save_for_backward(flat, h, d, u)
        ctx.x_dtype, ctx.w_dtype, ctx.has_bias = x.dtype, down.dtype, bias is not None
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        flat, h, d, u = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        gh = g @ u
        gx = (gh @ d).to(ctx.x_dtype).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        gb = g.sum(0, dtype=ctx.w_dtype) if ctx.has_bias else None
        return gx, _weight_gradient(gh, flat, ctx.w_dtype), _weight_gradient(g, h, ctx.w_dtype), gb


def use_function(layers: Mapping[str, LowRankLinear]) -> None:
    """One autograd function for each pair."""

    def forward(self: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        down, up = self._modules["down"], self._modules["up"]
        return _Pair.apply(x, down.weight, up.weight, up.bias)

    for layer in layers.values():
        layer.forward = types.MethodType(forward, layer)


# --- c, d: layers that read one tensor share one down product ---


class _Shared(torch.autograd.Function):
    """(x, downs..., ups..., biases...) -> one output a member; one GEMM for all downs, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, count: int, x: torch.Tensor, *params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        downs, ups, biases = params[:count], params[count : 2 * count], params[2 * count :]
        dtype = _working_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        d = torch.cat([w.to(dtype) for w in downs]) if len({w.dtype for w in downs}) > 1 else torch.cat(downs).to(dtype)
        us = [u.to(dtype) for u in ups]
        h = flat @ d.mT
        parts = h.split([len(w) for w in downs], -1)
        ys = [
            (p @ u.mT if b is None else torch.addmm(b.to(dtype), p, u.mT)).view(*x.shape[:-1], -1)
            for p, u, b in zip(parts, us, biases, strict=True)
        ]
        ctx.save_for_backward(flat, h, d, *us)
        ctx.x_dtype, ctx.dtypes, ctx.ranks = x.dtype, [p.dtype for p in ups], [len(w) for w in downs]
        ctx.bias = [b is not None for b in biases]
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        flat, h, d, *us = ctx.saved_tensors
        parts = h.split(ctx.ranks, -1)
        gs = [g.reshape(-1, g.shape[-1]) for g in grads]
        if torch.compiler.is_compiling():
            gh = torch.cat([g @ u for g, u in zip(gs, us, strict=True)], -1)
        else:
            gh = torch.empty_like(h)
            for g, u, out in zip(gs, us, gh.split(ctx.ranks, -1), strict=True):
                torch.mm(g, u, out=out)
        gx = (gh @ d).to(ctx.x_dtype).view(*grads[0].shape[:-1], -1) if ctx.needs_input_grad[1] else None
        gdowns = _weight_gradient(gh, flat, ctx.dtypes[0]).split(ctx.ranks)
        gups = [_weight_gradient(g, p, t) for g, p, t in zip(gs, parts, ctx.dtypes, strict=True)]
        gbs = [g.sum(0, dtype=t) if b else None for g, b, t in zip(gs, ctx.bias, ctx.dtypes, strict=True)]
        return None, gx, *gdowns, *gups, *gbs


class _Group:
    """The outputs of one input, handed out as the members ask for them."""

    def __init__(self, members: list[LowRankLinear], fused: bool) -> None:
        self.members, self.fused = members, fused
        self.x: torch.Tensor | None = None
        self.ready: dict[int, torch.Tensor] = {}

    def get(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.x is not x or index not in self.ready:
            self.x, self.ready = x, dict(enumerate(self.compute(x)))
        y = self.ready.pop(index)
        if not self.ready:
            self.x = None
        return y

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        downs = [m.down.weight for m in self.members]
        ups, biases = [m.up.weight for m in self.members], [m.up.bias for m in self.members]
        if self.fused:
            return _Shared.apply(len(downs), x, *downs, *ups, *biases)
        parts = F.linear(x, torch.cat(downs)).split([len(w) for w in downs], -1)
        return tuple(F.linear(p, u, b) for p, u, b in zip(parts, ups, biases, strict=True))


def use_shared(layers: Mapping[str, LowRankLinear], groups: list[list[str]], fused: bool) -> None:
    """One product for all `down`s of a group; `fused`: the whole group as one autograd function (pairs too)."""
    for names in groups:
        members = [layers[name] for name in names]
        if len(members) == 1:
            (use_function if fused else use_direct)({names[0]: members[0]})
            continue
        group = _Group(members, fused)
        for index, member in enumerate(members):

            def forward(
                self: LowRankLinear, x: torch.Tensor, group: _Group = group, index: int = index
            ) -> torch.Tensor:
                return group.get(index, x)

            member.forward = types.MethodType(forward, member)


# --- others' ways ---


def use_sequential(model: nn.Module, layers: Mapping[str, LowRankLinear]) -> None:
    """Hand-made nn.Sequential pairs in the place of each layer."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Sequential(layer.down, layer.up))


def use_lora(model: nn.Module, names: list[str], rank: int = 16) -> nn.Module:
    """PEFT's LoRA on the same layers: what is trained is small, what is run is the dense model and more."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=names))


def dense_shapes(model: nn.Module, names: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of layers."""
    return {name: tuple(dense_weight(model.get_submodule(name)).shape) for name in names}
