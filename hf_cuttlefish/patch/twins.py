"""Twins: a module of the same classes and names beside another one, with what is to differ exchanged."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .surgery import swap


def copy_tree(
    module: nn.Module,
    change: Callable[[nn.Module, nn.Module], None],
    enter: Callable[[nn.Module], nn.Module] = lambda module: module,
    known: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """Shallow copies of a module and all modules in it, each once, put together as they are.

        copy_tree(model, lambda old, twin: None)  # the same tensors under a structure of its own

    Args:
        change: called with each module and its copy, whose attributes are the module's own until it changes them.
        enter: gives the module to be copied for one that is met, such as what a wrapper holds.
        known: id of a module -> what stands for it; those are not copied.
    """
    known = {} if known is None else known
    inside = enter(module)
    if id(inside) in known:
        return known[id(inside)]
    known[id(inside)] = twin = copy.copy(inside)
    change(module, twin)
    twin.__dict__["_modules"] = {
        n: None if c is None else copy_tree(c, change, enter, known) for n, c in inside._modules.items()
    }
    return twin


def copy_configs(old: nn.Module, twin: nn.Module, known: dict[int, Any]) -> None:
    """Give a copy configs of its own; one that several modules share stays one. known: of the whole copy."""
    for key, value in vars(old).items():
        if isinstance(value, PreTrainedConfig):
            twin.__dict__[key] = copy.deepcopy(value, known)


def copy_module(module: nn.Module, data: Callable[[nn.Parameter], torch.Tensor]) -> nn.Module:
    """A module with parameters (of what `data` gives for each), buffers and configs of its own and no hooks."""
    parameters: dict[int, nn.Parameter] = {}
    configs: dict[int, Any] = {}

    def change(old: nn.Module, twin: nn.Module) -> None:
        copy_configs(old, twin, configs)
        bare = vars(nn.Module())
        twin.__dict__.update({key: type(value)() for key, value in bare.items() if isinstance(value, OrderedDict)})
        twin.__dict__["_parameters"] = own = {}
        for name, parameter in old._parameters.items():
            if parameter is not None and id(parameter) not in parameters:
                parameters[id(parameter)] = nn.Parameter(data(parameter), requires_grad=parameter.requires_grad)
            own[name] = None if parameter is None else parameters[id(parameter)]
        twin.__dict__["_buffers"] = {n: None if b is None else b.detach().clone() for n, b in old._buffers.items()}

    return copy_tree(module, change)


def with_exchanged(module: nn.Module, new: Mapping[int, nn.Module | nn.Parameter]) -> nn.Module:
    """A module of the same tensors, whose structure and configs are its own, with modules exchanged (by id) for what `new` has."""
    configs: dict[int, Any] = {}

    def change(old: nn.Module, twin: nn.Module) -> None:
        copy_configs(old, twin, configs)
        twin.__dict__["_parameters"] = dict(old._parameters)

    parameters = {key: value for key, value in new.items() if isinstance(value, nn.Parameter)}
    known = {id(child): child for child in module.modules() if id(child) in parameters}
    known |= {key: value for key, value in new.items() if isinstance(value, nn.Module)}
    twin = copy_tree(module, change, known=known)
    swap(twin, parameters)
    return twin
