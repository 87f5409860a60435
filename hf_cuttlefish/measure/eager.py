"""Run eagerly for a while: hooks set after compilation are not seen by compiled code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

MANY_GRAPHS = 8
"""More than that are said: a model has one for training and one for evaluation, and some where its code breaks."""


def run_eagerly(on: bool) -> None:
    """Let compiled models run uncompiled, or compiled again.

    Nothing is done where nothing has been compiled: torch's compiler takes seconds to import, and the switch would drop what it
    then finds.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager" if on else "default")


def has_compiled() -> bool:
    """Whether torch has compiled anything in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and bool(utils.counters["frames"])


def said_of_shapes() -> str | None:
    """What to say where torch has compiled so many graphs that shapes must have changed; None where it has not."""
    utils = sys.modules.get("torch._dynamo.utils")
    graphs = 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])
    if graphs <= MANY_GRAPHS:
        return None
    return (
        f"torch has compiled {graphs} graphs so far: where batches have many shapes, pad to one length, or to a few "
        "(pad_to_multiple_of=64 of the collator), and set dataloader_drop_last=True"
    )


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled models run uncompiled inside."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
