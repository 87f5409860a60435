"""Run eagerly for a while: hooks set after compilation are not seen by compiled code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


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


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled models run uncompiled inside."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
