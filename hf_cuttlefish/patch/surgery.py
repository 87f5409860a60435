"""Exchange modules by identity, wherever they are registered, with their hooks and with what transformers notes of their ties."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..layers.embedding import LowRankEmbedding, LowRankOutput

NOTES = ("_tied_weights_keys", "all_tied_weights_keys")
"""Where a model notes what it ties: {name of a parameter: name of the one that it is}."""

REGISTERED = ("_modules", "_parameters", "_buffers")
"""A module's own tables, in which `swap` exchanges by name."""


def swap(model: nn.Module, new: Mapping[int, nn.Module | nn.Parameter]) -> None:
    """Replace child modules, and parameters, by id, in every place where one is registered; either can take the other's place.

    Modules also where their parent keeps them in a plain list or the like, from which MaskFormer runs them.
    """
    for parent in list(model.modules()):
        for name, value in list(vars(parent).items()):
            if name not in REGISTERED and (kept := _exchanged(value, new)) is not value:
                vars(parent)[name] = kept
        for table in (parent._modules, parent._parameters):
            for name, child in list(table.items()):
                if child is None or id(child) not in new:
                    continue
                replacement = new[id(child)]
                if isinstance(replacement, nn.Parameter) == (table is parent._parameters):
                    table[name] = replacement  # type: ignore[assignment]
                    _compile_anew(parent, name)
                    continue
                order = vars(parent).setdefault("_order_of_parameters", list(parent._parameters))
                del table[name]
                setattr(parent, name, replacement)
                _sort(parent._parameters, order)


def _compile_anew(parent: nn.Module, name: str) -> None:
    """The wrapper that torch.compile has put around a single layer calls what it was made of, not what is its child now."""
    if name == "_orig_mod" and hasattr(parent, "dynamo_ctx"):
        wrapper: Any = parent
        vars(wrapper)["_torchdynamo_orig_callable"] = wrapper._orig_mod.forward
        wrapper._initialize()


def _exchanged(value: Any, new: Mapping[int, nn.Module | nn.Parameter]) -> Any:
    """A plain list, tuple or dictionary with its modules replaced by id; the same object where it has none of them."""
    if type(value) not in (list, tuple, dict):
        return value
    items = value if type(value) is dict else dict(enumerate(value))
    found = {key: new[id(child)] for key, child in items.items() if isinstance(child, nn.Module) and id(child) in new}
    found = {key: child for key, child in found.items() if isinstance(child, nn.Module)}
    if not found:
        return value
    return {**items, **found} if type(value) is dict else type(value)(found.get(i, v) for i, v in items.items())


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


class Ties:
    """The notes as they are now, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self._notes = [(part, {n: vars(part)[n] for n in NOTES if n in vars(part)}) for part in _parts(model)]

    def put_back(self) -> None:
        """Let all models note again what they did."""
        for part, notes in self._notes:
            for name in NOTES:
                vars(part).pop(name, None)
            vars(part).update(notes)


def retie(model: nn.Module) -> None:
    """Note the ties of the model and of each model inside it under the names that its modules have now.

    A table's `weight` is two parameters once it is low rank. The notes of the class stay as they are.
    """
    for part in _parts(model):
        for name in NOTES:
            keys = getattr(part, name, None)
            if isinstance(keys, Mapping) and (new := _renamed(part, keys)) != dict(keys):
                if new == getattr(type(part), name, None):
                    delattr(part, name)
                else:
                    setattr(part, name, new)


def _parts(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _renamed(model: nn.Module, keys: Mapping[str, str]) -> dict[str, str]:
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))

    def is_low_rank(name: str) -> bool:
        return isinstance(modules.get(name), (LowRankEmbedding, LowRankOutput))

    found: dict[str, str] = {}
    for target, source in keys.items():
        name = target.removesuffix(".weight")
        owner, _, child = name.rpartition(".")
        was_low_rank = child in ("down", "up") and isinstance(modules.get(owner), (nn.Linear, nn.Embedding))
        if name != target and is_low_rank(name):
            for part in ("down", "up"):
                found[f"{name}.{part}.weight"] = f"{source.removesuffix('.weight')}.{part}.weight"
        elif not was_low_rank or is_low_rank(owner):
            found[target] = source
        elif child == "down":  # dense again
            found[f"{owner}.weight"] = f"{source.removesuffix('.down.weight')}.weight"
    return found
