"""Carry state: what an optimizer's moments of a weight are for its two factors.

With W = U V (U = up, V = down) and G the gradient by W, the gradients by the factors are G V^T and U^T G. So first moments
and momentum buffers carry over exactly, m_U = m V^T and m_V = U^T m; second moments approximately, v_U = v (V o V)^T and
v_V = (U o U)^T v, the cross terms dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

LINEAR_STATE = ("exp_avg", "momentum_buffer", "grad_avg", "exp_avg_diff")
"""State tensors that are linear in the gradient (names used by torch.optim and transformers)."""


SQUARE_STATE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""State tensors that are sums or averages of squared gradients."""


FACTORED_STATE = ("exp_avg_sq_row", "exp_avg_sq_col")
"""Adafactor: v ~ row column^T / mean(row)."""


SCALAR_STATE = ("step", "RMS", "mu_product")


def unknown_state(state: Iterable[str]) -> list[str]:
    """Names of the kinds of state that `project` does not know."""
    return [k for k in state if k not in LINEAR_STATE + SQUARE_STATE + FACTORED_STATE + SCALAR_STATE]


@torch.no_grad()
def project(
    state: Mapping[str, Any], down: torch.Tensor, up: torch.Tensor, transposed: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a pair's two factors, down and up, from that of the weight whose place they take.

    Args:
        state: of the weight (m, n), or of its transpose where `transposed` (Conv1D); tensors whole.
        down: (r, n). up: (m, r).
    """
    down, up = down.detach().float(), up.detach().float()
    for_down: dict[str, Any] = {}
    for_up: dict[str, Any] = {}
    for key, value in state.items():
        if key in SCALAR_STATE or not isinstance(value, torch.Tensor):
            for_down[key], for_up[key] = _copied(value), _copied(value)
        elif key in LINEAR_STATE:
            dense = value.float().mT if transposed else value.float()
            for_up[key] = (dense @ down.mT).to(value.dtype)
            for_down[key] = (up.mT @ dense).to(value.dtype)
        elif key in SQUARE_STATE:
            dense = value.float().mT if transposed else value.float()
            for_up[key] = (dense @ down.square().mT).to(value.dtype)
            for_down[key] = (up.square().mT @ dense).to(value.dtype)
    if "exp_avg_sq_row" in state and "exp_avg_sq_col" in state:
        row, column = state["exp_avg_sq_row"].float(), state["exp_avg_sq_col"].float()
        dense = torch.outer(row / row.mean().clamp_min(torch.finfo(torch.float32).tiny), column)
        dense = dense.mT if transposed else dense
        for new, moment in ((for_up, dense @ down.square().mT), (for_down, up.square().mT @ dense)):
            new["exp_avg_sq_row"] = moment.mean(-1).to(state["exp_avg_sq_row"].dtype)
            new["exp_avg_sq_col"] = moment.mean(-2).to(state["exp_avg_sq_col"].dtype)
    for new, parameter in ((for_down, down), (for_up, up)):
        if isinstance(new.get("RMS"), float):
            new["RMS"] = float(parameter.square().mean().sqrt())
    return for_down, for_up


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
