"""Where: the tables of tokens of a model, and output layers of their own, for `embeddings=True`."""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..layers.kinds import kind_of
from ..layers.vocabulary import EmbeddingKind, users, why_not_tied


def find_vocabulary(model: nn.Module) -> dict[str, nn.Module]:
    """The tables of tokens, each weight once, and the output layers that have a weight of their own: module name -> layer.

    What is tied to a table follows it, and is not named. An output layer of its own whose bias another module has too stays dense.

    Raises:
        ValueError: there is no table, or one of a form that a low-rank table cannot have; the text says which.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    given = list({id(module): module for module in embeddings_of(model)}.values())
    tables = [module for module in given if EmbeddingKind.takes(module)]
    if not tables:
        raise ValueError(
            f"embeddings=True finds no table of tokens in {type(model).__name__}: no get_input_embeddings() of it gives an "
            "nn.Embedding. Leave embeddings out"
        )
    # Of tables that share a weight the one that the others are tied to.
    sources = set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    tables.sort(key=lambda table: f"{names[id(table)]}.weight" not in sources)
    chosen: list[nn.Module] = []
    followers: set[int] = set()
    for table in tables:
        if id(table) in followers:
            continue
        others = users(model, table)
        read = (_who_reads(model, names[id(module)]) for module in (table, *others))
        for why in (kind_of(table).why_dense(), *(why_not_tied(table, other) for other in others), *read):
            if why:
                raise ValueError(f"embeddings=True cannot factorize {names[id(table)]}: {why}. Leave embeddings out")
        chosen.append(table)
        followers |= {id(other) for other in others}
    sizes = {kind_of(table).size for table in chosen}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    outputs = [m for m in given if type(m) is nn.Linear and id(m) not in followers and kind_of(m).size[::-1] in sizes]
    outputs = [m for m in outputs if m.bias is None or owners[id(m.bias)] == 1]
    return {names[id(module)]: module for module in (*chosen, *outputs)}


def _who_reads(model: nn.Module, name: str) -> str:
    """Which forward of the model reads the weight of this table, or of what is tied to it, by itself; "" if none does.

    Gemma 4 takes the row of its padding, heads of DeBERTa and MobileBERT multiply by the whole table, and the low-rank one's rows
    are narrower. Known from the text of `forward` alone.
    """
    last = re.escape(name.rpartition(".")[2])
    reads = re.compile(
        rf"\b({last}|get_input_embeddings\(\))\.weight\b(?!\s*=[^=]|\.(device|dtype|shape|is_meta|requires_grad)\b)"
    )
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if reads.search(_text_of(kind.forward)):
            return f"{kind.__name__}.forward reads {name}.weight, and a low-rank table has no rows of that width"
    return ""


@functools.cache
def _text_of(forward: Callable[..., Any]) -> str:
    """The text of a forward; "" where there is none to be read, and for torch's own."""
    if forward.__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):
        return ""


def embeddings_of(model: nn.Module) -> Iterator[nn.Module]:
    """What the model, and each model inside it, gives as its input and output embeddings."""
    for module in model.modules():
        for getter in ("get_output_embeddings", "get_input_embeddings"):
            get = getattr(module, getter, None)
            if get is None:
                continue
            try:
                found = get()
            except (NotImplementedError, AttributeError):  # models without a vocabulary say so in this way
                continue
            if isinstance(found, nn.Module):
                yield found
