"""Stacks of experts, for folders that load without the package: follows the text of modeling_low_rank.py in folders that have some.

The text of layers/stack_views.py stands between the two; nothing else is imported there.
"""

import re

from torch import nn

from ..layers.stack_views import StackOfPairs, is_transposed
from .modeling_low_rank import note_ranks
from .standalone_layers import PAIRS

# --- from here on ---


class LowRankStack(StackOfPairs):
    """A pair for each expert, at one rank, in the place of a 3-D parameter."""

    def __init__(self, weight, rank, transposed):
        count, m, n = weight.mT.shape if transposed else weight.shape
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(m, n):
            raise ValueError(
                f"config.json: a rank of experts is {rank!r}: it must be a whole number from 1 to {min(m, n)}"
            )
        shapes = (count, rank, n), (count, m, rank)
        super().__init__(*(nn.Parameter(weight.detach().new_empty(shape)) for shape in shapes), transposed)

    @property
    def rank(self):
        """Inner size of each pair."""
        return self.down.weight.shape[1]


PAIRS = (*PAIRS, LowRankStack)


def exchange_stack(modules, name, rank):
    """Put a stack of pairs in the place of the stack of experts of this name; whether there is one."""
    owner, _, part = name.rpartition(".")
    module = modules.get(owner)
    weight = module._parameters.get(part) if module is not None else None
    if weight is None or weight.ndim != 3:
        return False
    made = LowRankStack(weight, rank, is_transposed(module, part))
    del module._parameters[part]
    setattr(module, part, made)
    return True


note_without_sparing = note_ranks


def note_ranks(model):
    """As without stacks, and before anything is saved transformers is told of them."""
    spare_factors(model)
    note_without_sparing(model)


def spare_factors(model):
    """transformers stores a stack as one tensor for each expert; its patterns would take the factors for the stack."""
    changes = vars(model).get("_weight_conversions")
    if changes is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        changes = get_model_conversion_mapping(model, add_legacy=False)
        changes = [change for change in changes if type(change).__name__ != "PrefixChange"]
    if changes:
        model._weight_conversions = [spared(change) if hasattr(change, "operations") else change for change in changes]


def spared(change):
    """The same conversion, which leaves factors alone."""
    end = r"(?!\w)(?!\.down\.weight)(?!\.up\.weight)"
    patterns = [
        [p + end if "expert" in p and re.search(r"\w$", p) and not p.endswith("weight") else p for p in given]
        for given in (change._original_source_patterns, change._original_target_patterns)
    ]
    new = type(change)(source_patterns=patterns[0], target_patterns=patterns[1], operations=list(change.operations))
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(change, name):
            setattr(new, name, getattr(change, name))
    return new
