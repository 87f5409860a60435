"""What the command says on stderr: progress, warnings, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import transformers


def bar(unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar on stderr, if that is a terminal."""
    # transformers' own bar, which `main` has switched off where stderr is no terminal
    return lambda items: transformers.utils.logging.tqdm(items, unit=f" {unit}", leave=False)


def warn(message: str) -> None:
    """Say something on stderr, and go on."""
    print(f"hf-cuttlefish: warning: {message}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text or type(error).__name__
