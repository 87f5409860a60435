"""What can come of a class, and what to say of an error."""

from __future__ import annotations

import re

PASSES, REFUSED, FAILS, UPSTREAM, NOT_BUILT, NOT_RUN = "passes", "refused", "fails", "upstream", "not built", "not run"


class CheckFailed(Exception):
    """A step did not do what it has to; the message says which."""


def require(condition: bool, message: str) -> None:
    """Raises CheckFailed with the message unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


def shorten(error: BaseException) -> str:
    """One line of an error, without addresses."""
    kind = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
    text = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(str(error).split()))
    return (kind + text)[:300]
