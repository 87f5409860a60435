"""Count: parameters of a model, of some of its modules, the containers of its blocks, and layers of one kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .kinds import layer_at
from .parts import numel


def count_parameters(model: nn.Module, names: set[str] | None = None) -> int:
    """Number of parameters, each counted once; only those under the given names of modules and layers if any are given."""
    if names is None:
        return sum(numel(p) for p in model.parameters())
    modules = [layer_at(model, name) or model.get_submodule(name) for name in names]
    found = {id(p): numel(p) for module in modules for p in module.parameters()}
    return sum(found.values())


def block_containers(model: nn.Module, layers: Mapping[str, Any]) -> set[str]:
    """Outermost containers of repeated blocks (the module holding the numbered children) that hold the given layers."""
    containers = set()
    for name in layers:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        containers.add(".".join(parts[:first]) if first else name)
    return containers


WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Under which name FSDP1 and torch's activation checkpointing hold the module that they are around."""


def plain_name(name: str) -> str:
    """The name that a module has where nothing is wrapped: that of a saved file.

    >>> plain_name("layer.0._fsdp_wrapped_module.output")
    'layer.0.output'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def group_name(name: str) -> str:
    """The name without its block numbers, such as "encoder.layer.*.attention.self.query"."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
