"""Tables as the documents have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], rule: str = "|---") -> str:
    """Rows under a header. rule: what stands below each column's name, its left border among it."""
    line = "| {} |".format
    lines = [line(" | ".join(header)), rule * len(header) + "|"]
    return "\n".join(lines + [line(" | ".join(map(str, row))) for row in rows])
