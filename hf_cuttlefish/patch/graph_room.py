"""Graph room: for how many recorded steps a device has the memory."""

from __future__ import annotations

import torch

MOST = 8
"""Graphs that are kept, each of which holds the gradients of the model; more where the device is nearly empty."""
MORE = 32
"""That many while so much of the device's memory is free."""
FREE = 0.5


def has_room_for(count: int, device: torch.device) -> bool:
    """Whether there may be one more graph beside so many.

    has_room_for(3, torch.device("cuda"))  # True
    """
    if count < MOST:
        return True
    if count >= MORE or device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free > FREE * total


def fits_beside(device: torch.device) -> bool:
    """Whether a graph leaves the device the memory for what runs without one, now and later.

    A graph keeps the memory of its step, and what is not recorded finds none of it: steps of other shapes, and an evaluation, which
    may take more than a step. So one is recorded where three times as many bytes are free as the largest step up to now took beside
    what stays.

        fits_beside(torch.device("cuda"))  # False where a step takes a third of the device
    """
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()  # of steps that ran as they are
    took = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    free = min(free, int(share * total) - torch.cuda.memory_reserved(device))  # a process may have been given a part
    return free > 3 * took
