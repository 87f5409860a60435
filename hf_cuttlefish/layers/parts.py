"""Sharded tensors, of which each process holds a part: the whole of one, this process's part of another, its true size.

Two kinds: a DTensor (FSDP2, tensor parallelism) says its whole shape; a parameter of ZeRO-3 is empty between uses and notes its
shape beside it.
"""

from __future__ import annotations

import torch


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def is_empty_between_uses(parameter: object) -> bool:
    """Whether a parameter has its values only while its module runs (ZeRO-3)."""
    return hasattr(parameter, "ds_shape")


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def numel(parameter: torch.Tensor) -> int:
    """How many numbers the whole parameter has."""
    return shape_of(parameter).numel()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, detached; every process that holds a part must ask at the same time."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all hold whole, sharded as `like` is; the tensor itself where that is no DTensor."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    local = tensor
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = local.chunk(mesh.size(dimension), placement.dim)
            at = mesh.get_local_rank(dimension)
            empty = local.narrow(placement.dim, 0, 0)
            local = parts[at] if at < len(parts) else empty
    return DTensor.from_local(
        local.contiguous().clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
