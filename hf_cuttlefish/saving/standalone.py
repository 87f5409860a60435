"""The modelling file as it stands in a folder: one text, put together of two files of the package."""

from __future__ import annotations

import re
from pathlib import Path

from . import modeling_low_rank, standalone_layers


def standalone_text() -> str:
    """The text of `modeling_low_rank.py`, with the layers where it imports them."""
    text, layers = (Path(str(module.__file__)).read_text("utf-8") for module in (modeling_low_rank, standalone_layers))
    body = layers.partition('"""\n\n')[2].rstrip()
    return re.sub(r"^from \.standalone_layers import .*$", lambda _: body, text, count=1, flags=re.MULTILINE)
