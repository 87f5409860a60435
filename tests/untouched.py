"""What a model, its gradients, hooks, config and optimizer are: to be compared with what they are later."""

import copy
from typing import Any

import torch
from torch import nn


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Objects and values of a model, its gradients, its hooks, its config, and its optimizer."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_is_full_backward_hook")
    config = getattr(model, "config", None)
    result: dict[str, Any] = {
        "modules": [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        "values": {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_meta},
        "gradients": {n: (id(p.grad), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None},
        "hooks": [
            (n, t, getattr(m, t) if t[:3] == "_is" else list(getattr(m, t).items()))
            for n, m in model.named_modules()
            for t in tables
        ],
        "forwards": [n for n, m in model.named_modules() if "forward" in vars(m)],
        "config": None if config is None else config.to_dict(),
    }
    if optimizer is not None:
        result["groups"] = [
            ([id(p) for p in g["params"]], {k: v for k, v in g.items() if k != "params"})
            for g in optimizer.param_groups
        ]
        result["state"] = {
            id(p): {k: (id(v), copy.deepcopy(v)) for k, v in state.items()} for p, state in optimizer.state.items()
        }
    return result


def assert_untouched(before: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    after = snapshot(model, optimizer)
    for part in ("values", "gradients", "state"):
        left, right = before.pop(part, {}), after.pop(part, {})
        assert left.keys() == right.keys(), part
        assert all(_equal(left[key], right[key]) for key in left), part
    assert before == after


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and bool(torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float())))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
