"""Exchange modules by identity, wherever they are registered, with their hooks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn


def swap(model: nn.Module, new: Mapping[int, nn.Module | nn.Parameter]) -> None:
    """Replace child modules, and parameters, by id, in every place where one is registered; either can take the other's place."""
    for parent in list(model.modules()):
        for table in (parent._modules, parent._parameters):
            for name, child in list(table.items()):
                if child is None or id(child) not in new:
                    continue
                replacement = new[id(child)]
                if isinstance(replacement, nn.Parameter) == (table is parent._parameters):
                    table[name] = replacement  # type: ignore[assignment]
                    continue
                order = vars(parent).setdefault("_order_of_parameters", list(parent._parameters))
                del table[name]
                setattr(parent, name, replacement)
                _sort(parent._parameters, order)


def _sort(table: dict[str, nn.Parameter | None], order: list[str]) -> None:
    """Parameters in the order that their module made them in, so that states that go by position fit again."""
    for name in sorted(table, key=lambda n: order.index(n) if n in order else len(order)):
        table[name] = table.pop(name)


def places(model: nn.Module, ids: Collection[int]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Where child modules of these ids are registered: (parent, name, child)."""
    found = []
    for parent in model.modules():
        found += [
            (parent, name, child) for name, child in parent._modules.items() if child is not None and id(child) in ids
        ]
    return found


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
