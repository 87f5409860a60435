"""Stored: under which names and in which layout `save_pretrained` writes a model, and whose factors would come back from there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

NOT_A_FACTOR = r"(?!\w)(?!\.down\.weight)(?!\.up\.weight)"
"""Ends a pattern that names a parameter: it means no factor of that parameter."""


def lost_when_saved(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the layers whose factors would not come back under their names from `save_pretrained`.

    transformers 5 stores some models in another layout (Kimi's vision tower: q, k and v as one tensor, rows rearranged) or
    under names that only whole weights get (Inkling 2). Its patterns are not made for factors.
    """
    loading = [c for c in conversions(model, add_legacy=False) if type(c).__name__ != "PrefixChange"]
    saving = [c.reverse_transform() for c in loading[::-1]]
    return [n for n in names if not all(_comes_back(f"{n}.{part}.weight", saving, loading) for part in ("down", "up"))]


def conversions(model: nn.Module, **options: Any) -> list[Any]:
    """How `from_pretrained` changes names and layouts for a model, factors spared; none before transformers knew such changes."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return spared(get_model_conversion_mapping(model, **options)) if isinstance(model, PreTrainedModel) else []


def spared(changes: Iterable[Any]) -> list[Any]:
    """The same conversions, which leave alone the factors of what they convert.

    A stack of experts is stored as one tensor for each expert, by a pattern that ends with the stack's name; it would take the
    factors below that name for the stack itself.
    """
    return [_spared(change) if hasattr(change, "operations") else change for change in changes]


def _spared(change: Any) -> Any:
    sources, targets = (
        [_bounded(pattern) for pattern in getattr(change, f"_original_{which}", getattr(change, which))]
        for which in ("source_patterns", "target_patterns")
    )
    new = type(change)(source_patterns=sources, target_patterns=targets, operations=list(change.operations))
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(change, name):
            setattr(new, name, getattr(change, name))
    return new


def _bounded(pattern: str) -> str:
    names_a_stack = "expert" in pattern and pattern[-1:].isalnum() and not pattern.endswith("weight")
    return pattern + NOT_A_FACTOR if names_a_stack else pattern


def _comes_back(key: str, saving: list[Any], loading: list[Any]) -> bool:
    renamed = key
    for changes in (saving, loading):
        for conversion in changes:
            new, match = conversion.rename_source_key(renamed)
            if match is not None and hasattr(conversion, "operations"):
                return False  # it would be put together with others, or rearranged
            renamed = new
    return renamed == key
