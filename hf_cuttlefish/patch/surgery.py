"""Exchange modules by identity, wherever they are registered, with their hooks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def swap(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Replace child modules by id, in every place where a module is registered."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                parent._modules[child_name] = new[id(child)]


def keep_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    """Let `new` share the hook tables of `old`, so that hooks fire on and their handles still remove them."""
    for table in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        setattr(new, table, getattr(old, table))
    return new
