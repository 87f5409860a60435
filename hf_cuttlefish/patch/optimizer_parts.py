"""What an optimizer is made of: itself and those inside it, their groups and states, and how else it knows its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def optimizers_in(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizer and all that it keeps in its attributes, each once, the outermost first."""
    found: list[torch.optim.Optimizer] = []

    _add_optimizers(optimizer, 0, found)
    return found


def _add_optimizers(value: Any, depth: int, found: list[torch.optim.Optimizer]) -> None:
    """No closure: one that calls itself would keep the optimizers alive."""
    if isinstance(value, torch.optim.Optimizer):
        if id(value) not in {id(other) for other in found}:
            found.append(value)
            for name, attribute in vars(value).items():
                if name not in ("state", "param_groups"):
                    _add_optimizers(attribute, 0, found)
    elif depth < 3:
        for part in parts_of(value):
            _add_optimizers(part, depth + 1, found)


def groups_in(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer and of those inside it, each dictionary once."""
    groups = {id(group): group for one in optimizers_in(optimizer) for group in one.param_groups}
    return list(groups.values())


def states_in(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The state of an optimizer and of those inside it, each mapping once, in the order of `Verdict.kinds`."""
    states = {id(one.state): one.state for one in optimizers_in(optimizer)}
    return list(states.values())


def owners(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers whose state `states_in` gives."""
    return list({id(one.state): one for one in reversed(optimizers_in(optimizer))}.values())[::-1]


def beside_groups(
    groups: Sequence[dict[str, Any]], weights: Sequence[nn.Parameter]
) -> list[tuple[dict[Any, Any], nn.Parameter, Any]]:
    """State that stands in a group and not in `optimizer.state`: (dictionary, weight, what it holds of the weight)."""
    tables = [value for group in groups for value in group.values() if isinstance(value, dict)]
    return [(table, weight, table[weight]) for table in tables for weight in weights if weight in table]


def has_shape(value: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a state has its weight's shape: as it is, flat, or several in one."""
    return value.shape[-weight.ndim :] == weight.shape or (value.ndim == 1 and value.numel() == weight.numel())


def kept_elsewhere(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> str | None:
    """The first attribute, neither groups nor state, by which an optimizer knows one of the weights; None for none.

    By the Parameter itself, or by its name or id as the key of a dictionary.
    """
    wanted = {id(weight) for weight in weights.values()}
    names = {f"{name}.weight" for name in weights}

    def knows(value: Any, depth: int) -> bool:
        if isinstance(value, torch.Tensor):
            return id(value) in wanted
        if isinstance(value, str | torch.optim.Optimizer | nn.Module) or depth > 3:
            return False
        if isinstance(value, Mapping) and any(
            (isinstance(key, str) and key in names) or (isinstance(key, int) and key in wanted) for key in value
        ):
            return True
        return any(knows(part, depth + 1) for part in parts_of(value))

    known = [one.state for one in optimizers_in(optimizer)] + [one.param_groups for one in optimizers_in(optimizer)]
    for one in optimizers_in(optimizer):
        for name, value in vars(one).items():
            if "hook" not in name and not any(value is other for other in known) and knows(value, 0):
                return f"{type(one).__name__}.{name}"
    return None


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary fp32 tensor of the same values, also of a packed one that optimizers keep (torchao's)."""
    unpack = getattr(tensor, "dequantize", None) if is_packed(tensor) else None
    return (unpack() if unpack is not None else tensor.detach()).float()


def is_packed(tensor: Any) -> bool:
    """Whether it is of a class of its own that stands for packed numbers, and no DTensor."""
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor) not in (torch.Tensor, nn.Parameter)
        and not hasattr(tensor, "full_tensor")
        and type(tensor).dequantize is not torch.Tensor.dequantize
    )


def parts_of(value: Any) -> list[Any]:
    """What a container holds, keys and values; nothing for anything else."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []
