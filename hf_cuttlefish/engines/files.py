"""Files of a checkpoint: which ones hold weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def is_weights_file(name: str) -> bool:
    """Whether a file of this name holds weights, whole or a shard of them, or says where they are."""
    return re.fullmatch(r"(adapter_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name) is not None


def weights_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, with those that an index names."""
    for name in INDEXES:
        if (folder / name).is_file():
            try:
                return sorted({str(n) for n in json.loads((folder / name).read_text("utf-8"))["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return [name]
    return [name for name in WEIGHTS if (folder / name).is_file()][:1] or [WEIGHTS[0]]
