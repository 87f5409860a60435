"""Carry state: what an optimizer's moments of a weight are for its two factors.

With W = U V (U = up, V = down) and G the gradient by W, the gradients by the factors are G V^T and U^T G. So first moments
and momentum buffers carry over exactly, m_U = m V^T and m_V = U^T m; second moments approximately, v_U = v (V o V)^T and
v_V = (U o U)^T v, the cross terms dropped. A state that is a copy of the weight (a slow or an undecayed one) starts as a copy of
the factor. An average of gradients that were normalized before they were averaged has no scale, so that it is projected by
factors of unit length: m_U = m V^T / |V|.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
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


@torch.no_grad()
def project(
    state: Mapping[str, Any],
    down: torch.Tensor,
    up: torch.Tensor,
    transposed: bool = False,
    kinds: Mapping[str, str] = KINDS,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a pair's two factors, down and up, from that of the weight whose place they take.

    Args:
        state: of the weight (m, n), or of its transpose where `transposed` (Conv1D); tensors whole.
        down: (r, n). up: (m, r). kinds: state name -> kind, as in `KINDS`; other names are left out.
    """
    down, up = down.detach().float(), up.detach().float()
    for_down: dict[str, Any] = {}
    for_up: dict[str, Any] = {}
    for key, value in state.items():
        kind = kinds.get(key)
        if kind == "scalar" or not isinstance(value, torch.Tensor):
            for_down[key], for_up[key] = _copied(value), _copied(value)
        elif kind == "parameter":
            for_down[key], for_up[key] = down.clone(), up.clone()
        elif kind == "rounding":
            for_down[key], for_up[key] = torch.zeros_like(down), torch.zeros_like(up)
        elif kind in ("linear", "square", "normalized"):
            dense = as_matrix(value, (len(up), down.shape[1]), transposed).float()
            left, right = (up.square(), down.square()) if kind == "square" else (up, down)
            if kind == "normalized":
                left, right = left / left.norm(dim=0), right / right.norm(dim=1, keepdim=True)
            for_down[key], for_up[key] = left.mT @ dense, dense @ right.mT
        if kind in ("parameter", "rounding", "linear", "square", "normalized") and isinstance(value, torch.Tensor):
            for new in (for_down, for_up):
                new[key] = (new[key].flatten() if value.ndim == 1 else new[key]).to(value.dtype)
    for names in FACTORED_PAIRS:
        if all(name in state and kinds.get(name) == "factored" for name in names):
            row, column = (state[name].float().flatten() for name in names)
            dense = torch.outer(row / row.mean().clamp_min(torch.finfo(torch.float32).tiny), column)
            dense = dense.mT if transposed else dense
            keep = state[names[0]].ndim == 2
            for new, moment in ((for_down, up.square().mT @ dense), (for_up, dense @ down.square().mT)):
                for name, dim in zip(names, (-1, -2), strict=True):
                    new[name] = moment.mean(dim, keepdim=keep).to(state[name].dtype)
    for new, parameter in ((for_down, down), (for_up, up)):
        if isinstance(new.get("RMS"), float):
            new["RMS"] = float(parameter.square().mean().sqrt())
    return for_down, for_up


def as_matrix(value: torch.Tensor, shape: tuple[int, ...], transposed: bool = False) -> torch.Tensor:
    """State of a weight (m, n) in that shape: it may be flat, several matrices in one, or of the transpose (Conv1D)."""
    held = shape[::-1] if transposed else shape
    matrix = value.view(held) if value.ndim == 1 else value
    return matrix.mT if transposed else matrix


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
