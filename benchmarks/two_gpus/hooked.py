"""examples/text_classification.py, with gradients sent as bf16: torch's own communication hook, set as a user sets it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import text_classification

prepare = Accelerator.prepare_model


def prepare_with_hook(self: Accelerator, model: Any, *args: Any, **kwargs: Any) -> Any:
    """As of Accelerate, and the hook."""
    prepared = prepare(self, model, *args, **kwargs)
    if isinstance(prepared, DistributedDataParallel):
        prepared.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return prepared


if __name__ == "__main__":
    Accelerator.prepare_model = prepare_with_hook  # type: ignore[method-assign]
    text_classification.main()
