"""One thread in tests that compare what a process computes with what several do."""

import json

import pytest
import torch

from launch import launch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The Trainer on two processes under DDP, for all that is compared with it."""
    folder = tmp_path_factory.mktemp("trainer")
    launch(2, "trainers.py", folder)
    return json.loads((folder / "results.json").read_text()), torch.load(folder / "weights.pt")
