"""One thread, no hub, no progress bars, and the same seed for every test."""

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

torch.set_num_threads(1)  # tiny models lose far more to waiting threads than they win
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

COMPILER = {"recompile_limit": 8, "accumulated_recompile_limit": 256, "automatic_dynamic_shapes": True}
"""Of torch's compiler, as it comes: what the package and the benchmarks change."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiler_as_set() -> Iterator[None]:
    """No test leaves a setting of the compiler to the next.

    A switch of compiled blocks raises a limit, and keeps it; a run that ends among its gathering steps leaves compiled code off.
    """
    yield
    if (eager := sys.modules.get("hf_cuttlefish.measure.eager")) is not None:
        eager.run_eagerly(False)
    if "torch._dynamo" in sys.modules:  # nothing is changed before it is imported, which takes seconds
        for name, value in COMPILER.items():
            setattr(torch._dynamo.config, name, value)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """The compiler has neither graphs nor counts of other tests, and leaves none."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
