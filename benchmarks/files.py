"""Write records so that a reader never finds half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write the file under another name beside its own, and then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """The record, indented by one."""
    write_whole(path, json.dumps(record, indent=1) + "\n")
