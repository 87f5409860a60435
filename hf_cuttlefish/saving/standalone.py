"""The modelling file as it stands in a folder: one text, put together of two files of the package; of four where there are experts."""

from __future__ import annotations

import re
from pathlib import Path

from ..layers import stack_views
from . import modeling_experts, modeling_low_rank, standalone_layers


def standalone_text() -> str:
    """The text of `modeling_low_rank.py`, with the layers where it imports them."""
    text, layers = (Path(str(module.__file__)).read_text("utf-8") for module in (modeling_low_rank, standalone_layers))
    body = layers.partition('"""\n\n')[2].rstrip()
    return re.sub(r"^from \.standalone_layers import .*$", lambda _: body, text, count=1, flags=re.MULTILINE)


def text_with_stacks() -> str:
    """The same, then `stack_views.py` and `modeling_experts.py` without what they begin with: for folders with experts."""
    views = Path(stack_views.__file__).read_text("utf-8").split("from __future__ import annotations\n", 1)[1]
    experts = Path(modeling_experts.__file__).read_text("utf-8").split("# --- from here on ---\n", 1)[1]
    return f"{standalone_text()}\n\n# --- stacks of experts ---\n{views}{experts}"
