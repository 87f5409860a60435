"""Stamp: what a recorded step has fixed of a model, in a form that is compared before each step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Tables of a module's hooks; those of all modules are called "_global" + name."""
PLAIN = frozenset({bool, int, float, str})


def stamp(modules: list[nn.Module]) -> Hashable:
    """Where parameters, buffers and tensors that are attributes lie, which train, modules, hooks, scales of adapters, functions that
    are attributes of modules, and all plain attributes of modules and of their configs: flags, numbers, words.

        before = stamp(list(model.modules())); ...; changed = stamp(list(model.modules())) != before

    Lists, dictionaries and objects that Python reads in forward are not in it.
    """
    found: list[Any] = [key for hooks in HOOKS for key in getattr(hooks_of_all, f"_global{hooks}", ())]
    configs: dict[int, Any] = {}
    for module in modules:
        state = module.__dict__
        for value in state.values():
            if type(value) in PLAIN:
                found.append(value)
            elif type(value) is torch.Tensor:
                found += (id(value), _place(value))
            elif callable(value):
                found.append(id(value))
        if (config := state.get("config")) is not None:
            configs[id(config)] = config
        if type(scaling := state.get("scaling")) is dict:  # of PEFT's layers
            found += scaling.values()
        for parameter in state.get("_parameters", {}).values():
            if parameter is not None:
                found += (id(parameter), _place(parameter), parameter.requires_grad)
                found += parameter._backward_hooks or ()
                found += parameter._post_accumulate_grad_hooks or ()
        for buffer in state.get("_buffers", {}).values():
            found += (id(buffer), None if buffer is None else _place(buffer))
        found += map(id, state.get("_modules", {}).values())
        for hooks in HOOKS:
            found += state.get(hooks, ())
    for config in configs.values():
        found += [value for value in getattr(config, "__dict__", {}).values() if type(value) in PLAIN]
    return tuple(found)


def _place(tensor: torch.Tensor) -> int | None:
    """Where its numbers lie; None of one that has no memory of its own (sparse, or quantized weights, which hold others inside)."""
    return None if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()
