"""Side stream: the one stream beside the current one on which work is recorded as CUDA graphs."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def side_stream(device: torch.device) -> Any:
    """The same stream for each call.

        with torch.cuda.stream(side_stream(torch.device("cuda:0"))): ...

    A product leaves a workspace in each stream that it has run in, for each thread that launched it (32 MiB on an H100), and torch
    keeps them all: with a new stream for each recording they came to 2 GiB.
    """
    return torch.cuda.Stream(device)
