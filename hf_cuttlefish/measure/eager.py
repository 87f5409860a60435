"""Run eagerly for a while: hooks set after compilation are not seen by compiled code."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

MANY_GRAPHS = 8
"""More than that are said: a model has one for training and one for evaluation, and some where its code breaks."""


class _Asking:
    """Who asks for compiled code to run uncompiled, and what torch's stance was before the first of them did."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.who: dict[int, weakref.finalize[..., Any]] = {}
        self.before: Any = None


_ASKING = _Asking()


def run_eagerly(who: object, on: bool) -> None:
    """Let compiled models run uncompiled for `who`, or compiled again as soon as nobody asks for it any more.

    The stance is the process's, so that several runs may ask at once; what its user has set comes back. Who is freed without a
    word (a run that an exception has ended) asks no more. Nothing is done where nothing has been compiled: torch's compiler takes
    seconds to import, and the switch would drop what it then finds.
    """
    if "torch._dynamo" not in sys.modules:
        return
    with _ASKING.lock:
        if not on:
            _let_go(id(who))
        elif id(who) not in _ASKING.who:
            gone = weakref.finalize(who, _let_go, id(who))  # first: this may free another who asks
            if not _ASKING.who:
                _ASKING.before = torch.compiler.set_stance("force_eager")
            _ASKING.who[id(who)] = gone


def _let_go(key: int) -> None:
    with _ASKING.lock:
        known = _ASKING.who.pop(key, None)
        if known is None:
            return
        known.detach()
        if not _ASKING.who:
            before, _ASKING.before = _ASKING.before, None
            if before is not None:
                before.__exit__(None, None, None)


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


class _Block:
    """A block that asks: `object()` cannot be referred to weakly."""


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled models run uncompiled inside."""
    who = _Block()
    run_eagerly(who, True)
    try:
        yield
    finally:
        run_eagerly(who, False)
