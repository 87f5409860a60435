"""Run eagerly for a while: hooks set after compilation are not seen by compiled code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

MANY_GRAPHS = 8
"""More than that are said: a model has one for training and one for evaluation, and some where its code breaks."""


_EAGER = {"on": False}


def run_eagerly(on: bool) -> None:
    """Let compiled models and captured steps run uncompiled, or compiled again.

    The compiler is told only where it has been imported: that takes seconds, and the switch would drop what it then finds.
    """
    _EAGER["on"] = on
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager" if on else "default")


def runs_eagerly() -> bool:
    """Whether steps are to run with their hooks at the moment, neither compiled nor captured."""
    return _EAGER["on"]


def has_compiled() -> bool:
    """Whether torch has compiled anything in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return False
    counts = utils.counters  # with fullgraph=True no frames are counted
    return bool(counts["frames"] or counts["stats"]["unique_graphs"])


def has_cuda_graphs() -> bool:
    """Whether torch's compiler runs anything as CUDA graphs in this process; False where torch does not tell any more."""
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    try:
        found = {} if trees is None else trees.get_obj(trees.local, "tree_manager_containers")
        return any(container.tree_manager is not None for container in found.values())
    except (AttributeError, AssertionError):  # older torch asserts that this thread has imported it
        return False


def said_of_shapes() -> str | None:
    """What to say where torch has compiled so many graphs that shapes must have changed; None where it has not."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return None
    graphs = int(utils.counters["stats"]["unique_graphs"])
    gave_up = any(word in why for why in utils.counters["unimplemented"] for word in _GAVE_UP)
    if graphs <= MANY_GRAPHS and not gave_up:
        return None
    slow = ", and runs what it has no more room for uncompiled (recompile_limit)" if gave_up else ""
    return (
        f"torch has compiled {graphs} graphs so far{slow}: where batches have many shapes, pad to one length, or to a few "
        "(pad_to_multiple_of=64 of the collator), and set dataloader_drop_last=True"
    )


_GAVE_UP = ("recompile limit exceeded", "recompile_limit", "cache_size_limit")
"""Of the reasons that torch counts for not compiling, in its own words."""


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled models run uncompiled inside."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
