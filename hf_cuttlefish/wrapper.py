"""Repair the wrapper: what to do about DDP, FSDP and the like around the model. What is not handled is refused, named."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_WRAPPERS = {
    "DistributedDataParallel": "DDP",
    "DataParallel": "nn.DataParallel",
    "FullyShardedDataParallel": "FSDP",
    "DeepSpeedEngine": "DeepSpeed",
}


def check_not_wrapped(model: nn.Module) -> None:
    """Raises ValueError for a model inside an engine's wrapper, or one whose weights an engine has sharded."""
    kind = _WRAPPERS.get(type(model).__name__)
    if kind is not None:
        raise ValueError(f"the model is wrapped by {kind}: pass the model inside it (accelerator.unwrap_model(model))")
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ValueError(f"{name} is sharded over devices (DTensor: FSDP2 or tensor parallel), which is not supported yet")
        if hasattr(parameter, "ds_id"):
            raise ValueError(f"{name} belongs to DeepSpeed ZeRO-3, which is not supported yet")
        if type(parameter).__name__ == "FlatParameter":
            raise ValueError(f"{name} is flattened by FSDP1, which is not supported: use FSDP2")


def check_engine(model: nn.Module, optimizer: Any) -> None:
    """Raises ValueError, naming the engine, where a switch in the middle of training would go wrong in silence."""
    check_not_wrapped(model)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "several processes train this model, and the switch is not supported there yet: replicas would drift apart in "
            "silence. Train on one process"
        )
