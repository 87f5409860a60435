"""Carry state: what an optimizer's moments of a weight are for its two factors.

With W = U V (U = up, V = down) and G the gradient by W, the gradients by the factors are G V^T and U^T G. So first moments
and momentum buffers carry over exactly, m_U = m V^T and m_V = U^T m; second moments approximately, v_U = v (V o V)^T and
v_V = (U o U)^T v, the cross terms dropped. A state that is a copy of the weight (a slow or an undecayed one) starts as a copy of
the factor. An average of gradients that were normalized before they were averaged has no scale, so that it is projected by
factors of unit length: m_U = m V^T / |V|.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

LINEAR_STATE = ("exp_avg", "momentum_buffer", "grad_avg", "exp_avg_diff")
"""State tensors that are linear in the gradient (names used by torch.optim and transformers)."""


SQUARE_STATE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""State tensors that are sums or averages of squared gradients."""


FACTORED_PAIRS = (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var"))
"""Adafactor, of transformers and of torch: v ~ row column^T / mean(row)."""


FACTORED_STATE = tuple(name for pair in FACTORED_PAIRS for name in pair)


ROUNDING_STATE = ("kahan_comp", "compensation")
"""What rounding has lost of a parameter (Kahan): nothing yet for a new one."""


SCALAR_STATE = ("step", "RMS", "mu_product")


KINDS: dict[str, str] = {
    **dict.fromkeys(LINEAR_STATE, "linear"),
    **dict.fromkeys(SQUARE_STATE, "square"),
    **dict.fromkeys(FACTORED_STATE, "factored"),
    **dict.fromkeys(ROUNDING_STATE, "rounding"),
    **dict.fromkeys(SCALAR_STATE, "scalar"),
}
"""State name -> what it is, for the names that torch.optim and transformers use.

Two more kinds have no names of their own: "parameter", a copy of it, and "normalized", an average of gradients that were divided
by the root of their mean square.
"""


def unknown_state(state: Iterable[str], kinds: Mapping[str, str] = KINDS) -> list[str]:
    """Names of the kinds of state that `project` does not know. kinds: state name -> kind, as in `KINDS`."""
    return [k for k in state if k not in kinds]


class Layout:
    """How a weight and its two factors lie in their parameters. Here each is a matrix, its last dimensions taken as one.

        Layout().matrix(torch.ones(8, 3, 2, 2)).shape  # (8, 12)

    A kind of layer whose parameters lie in another way says so (`layers.kind.Kind`).
    """

    def matrix(self, tensor: torch.Tensor, part: str = "dense") -> torch.Tensor:
        """A tensor of the shape of one parameter ("dense", "down", "up") as (out, in), or a stack (count, out, in); a view if it can be."""
        return tensor.flatten(1)

    def tensor(self, matrix: torch.Tensor, part: str, shape: Sequence[int]) -> torch.Tensor:
        """The way back: a matrix (or a stack) in the shape of the parameter."""
        return matrix.reshape(tuple(shape))

    def dense_shape(self, down: torch.Tensor, up: torch.Tensor) -> tuple[int, ...]:
        """Shape of the weight that stands where these two factors, as they lie in their parameters, take its place."""
        return (len(up), *down.shape[1:])


PLAIN = Layout()


@torch.no_grad()
def project(
    state: Mapping[str, Any],
    down: torch.Tensor,
    up: torch.Tensor,
    layout: Layout = PLAIN,
    kinds: Mapping[str, str] = KINDS,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a pair's two factors, down and up, from that of the weight whose place they take.

    Args:
        state: of the weight, in the shape of its parameter; tensors whole.
        down, up: in the shapes of their parameters, (r, n) and (m, r) of a linear layer.
        layout: how these lie in their parameters. kinds: state name -> kind, as in `KINDS`; other names are left out.
    """
    factors = {"down": down.detach().float(), "up": up.detach().float()}
    shape = layout.dense_shape(down, up)
    new: dict[str, dict[str, Any]] = {"down": {}, "up": {}}
    for key, value in state.items():
        kind = kinds.get(key)
        if kind == "scalar" or not isinstance(value, torch.Tensor):
            found = {part: _copied(value) for part in factors}
        elif kind == "parameter":
            found = {part: factor.clone() for part, factor in factors.items()}
        elif kind == "rounding":
            found = {part: torch.zeros_like(factor) for part, factor in factors.items()}
        elif kind in ("linear", "square", "normalized"):
            found = _by_gradient(value, shape, factors, layout, kind)
        else:
            continue
        for part, one in found.items():
            if isinstance(value, torch.Tensor) and kind != "scalar":
                one = (one.flatten() if value.ndim == 1 else one).to(value.dtype)
            new[part][key] = one
    for names in FACTORED_PAIRS:
        if all(name in state and kinds.get(name) == "factored" for name in names):
            row, column = (state[name].float() for name in names)
            keep = row.ndim == len(shape)
            dense = _outer(row.squeeze(-1), column.squeeze(-2)) if keep else _outer(row, column)
            for part, moment in _by_gradient(dense, shape, factors, layout, "square").items():
                for name, dim in zip(names, (-1, -2), strict=True):
                    new[part][name] = moment.mean(dim, keepdim=keep).to(state[name].dtype)
    for part, factor in factors.items():
        if isinstance(new[part].get("RMS"), float):
            new[part]["RMS"] = float(factor.square().mean().sqrt())
    return new["down"], new["up"]


def _by_gradient(
    value: torch.Tensor, shape: Sequence[int], factors: Mapping[str, torch.Tensor], layout: Layout, kind: str
) -> dict[str, torch.Tensor]:
    """What follows the gradients of the two factors, G V^T and U^T G, each in the shape of its parameter.

    Args:
        value: of the weight's shape, flat, or several in one (in dimensions that stand before). kind: "linear", "square" or "normalized".
    """
    value = as_matrix(value, tuple(shape)).float()
    more = value.shape[: value.ndim - len(shape)]
    if more:
        each = [_by_gradient(v, shape, factors, layout, kind) for v in value.flatten(0, len(more) - 1)]
        return {p: torch.stack([e[p] for e in each]).unflatten(0, more) for p in factors}
    dense = layout.matrix(value)
    left, right = layout.matrix(factors["up"], "up"), layout.matrix(factors["down"], "down")
    if kind == "square":
        left, right = left.square(), right.square()
    if kind == "normalized":
        left, right = left / left.norm(dim=-2, keepdim=True), right / right.norm(dim=-1, keepdim=True)
    found = {"down": left.mT @ dense, "up": dense @ right.mT}
    # In memory as the parameter lies: fused optimizers on a GPU take no other strides.
    return {p: torch.empty_like(factors[p]).copy_(layout.tensor(x, p, factors[p].shape)) for p, x in found.items()}


def _outer(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """row column^T / mean(row), of the last two dimensions."""
    tiny = torch.finfo(torch.float32).tiny
    return (row / row.mean(-1, keepdim=True).clamp_min(tiny)).unsqueeze(-1) * column.unsqueeze(-2)


def as_matrix(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """State of a weight in that weight's shape: it may be flat, or several in one."""
    return value.view(shape) if value.ndim == 1 else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
