"""Where the statistics of each layer are kept: on the layer's device, or on the CPU where the device has no room for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..layers.kinds import dense_weight, kind_of

GIB = 2**30
SPARE = GIB
"""Bytes of a device that are left alone: samples wait to be added, and products of one batch of layers."""


def bytes_of(layer: nn.Module) -> int:
    """Of the sums of one layer or stack: about 2 k^2 numbers in fp32, k = min(m, n)."""
    kind = kind_of(layer)
    m, n = kind.size
    return 4 * kind.count * (2 * min(m, n) ** 2 + n + m)


def room(device: torch.device) -> int | None:
    """Bytes that the largest step so far has left free on a CUDA device, less `SPARE`; None on others, which are not asked."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return max(0, free + unused - SPARE)


def lacks_room_beside_graphs(device: torch.device) -> bool:
    """Whether a step that runs uncompiled may not fit on a CUDA device beside what CUDA graphs hold there; False on others.

    Graphs keep the memory of their steps in pools of their own, which nothing else can use.
    """
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    step = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    if free - SPARE >= step:
        return False
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # cudaMallocAsync has none
        return False
    of_graphs = [s for s in segments if s.get("segment_pool_id", (0, 0)) != (0, 0)]
    return any(s["device"] == device.index for s in of_graphs)


def far_layers(layers: Mapping[str, nn.Module], budget: float | None) -> frozenset[str]:
    """Names of the layers whose statistics are to be kept on the CPU, so that those of the others fit into a budget.

        far = far_layers(find_targets(model), budget=2.0)

    Whole shapes go, the largest first. Tables of tokens stay, and so does what has their shape. Layers that are on the CPU
    anyway are not named.

    Args:
        layers: name -> dense layer. budget: GiB on each device; None: what `room` finds, and all where it finds nothing.
    """
    shapes: dict[tuple[torch.device, tuple[int, int]], list[str]] = {}
    for name, layer in layers.items():
        device = dense_weight(layer).device
        if device.type != "cpu":
            shapes.setdefault((device, kind_of(layer).size), []).append(name)
    held = {device: 0 for device, _ in shapes}
    for (device, _), names in shapes.items():
        held[device] += sum(bytes_of(layers[name]) for name in names)
    most = {device: room(device) if budget is None else int(budget * GIB) for device in held}
    far: set[str] = set()
    for (device, _), names in sorted(shapes.items(), key=lambda item: -bytes_of(layers[item[1][0]])):
        limit = most[device]
        if limit is None or held[device] <= limit or any(kind_of(layers[n]).is_vocabulary for n in names):
            continue
        far.update(names)
        held[device] -= sum(bytes_of(layers[name]) for name in names)
    return frozenset(far)


def said_of_far(layers: Mapping[str, nn.Module], far: frozenset[str]) -> str:
    """What a plan says of them; "" for none."""
    if not far:
        return ""
    gib = sum(bytes_of(layers[name]) for name in far) / GIB
    return (
        f"statistics of {len(far)} layers ({gib:.2g} GiB) were kept on the CPU, for want of room on the device: steps that gather "
        "take longer; statistics_memory says how many GiB of it they may take"
    )
