"""Random states: what is done for a measurement draws from none that training draws from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """All random states (Python's, NumPy's, torch's on every device in use) are afterwards what they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    is_used = torch.cuda.is_available() and torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(list(range(torch.cuda.device_count())) if is_used else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
