"""Finding the engine: by the kind of the wrapper around the model, whatever a subclass of it is called."""

import pytest
from torch import nn

from hf_cuttlefish import CuttlefishConfig
from hf_cuttlefish.engines import around, find
from hf_cuttlefish.engines.around import Around, check_not_wrapped
from hf_cuttlefish.engines.base import Engine
from hf_cuttlefish.engines.ddp import DataParallel
from hf_cuttlefish.engines.find import find_again, find_engine


class OurParallel(nn.DataParallel):
    """A wrapper of a user's own."""


class FullyShardedDataParallel(nn.Module):
    """Called as FSDP1's wrapper is: engines that need not be installed are known by the names of their classes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class OurFSDP(FullyShardedDataParallel):
    """A subclass of it."""


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


@pytest.mark.parametrize("kind", [nn.DataParallel, OurParallel])
def test_data_parallel_splits_batches_whatever_its_class_is_called(model, kind):
    wrapper = kind(model)
    wrapper.device_ids = [0, 1]
    engine = find_engine(model, None)
    assert type(engine) is DataParallel and engine.replicas == 2
    with pytest.raises(ValueError, match=r"wrapped by nn\.DataParallel"):
        check_not_wrapped(wrapper)


@pytest.mark.parametrize("kind", [FullyShardedDataParallel, OurFSDP])
def test_a_wrapper_that_cannot_be_edited_is_refused_whatever_its_class_is_called(model, kind):
    wrapper = kind(model)
    assert Around(model).wrappers == [wrapper]
    with pytest.raises(ValueError, match="FSDP1"):
        check_not_wrapped(wrapper)


def test_who_came_since_the_start_is_looked_for_where_somebody_can_have_come(model, monkeypatch):
    """One process with one device has nobody to wait for; nn.DataParallel comes with the second."""
    first = find_engine(model, None)
    assert type(first) is Engine
    wrapper = nn.DataParallel(model)
    wrapper.device_ids = [0, 1]
    looks, look = [], around.live_modules
    monkeypatch.setattr(around, "live_modules", lambda: looks.append(None) or look())
    monkeypatch.setattr(find, "_devices", lambda: 1)
    assert find_again(first, {}, CuttlefishConfig(), False) is first and not looks
    monkeypatch.setattr(find, "_devices", lambda: 2)
    monkeypatch.setattr(Engine, "check", lambda *args: None)
    found = find_again(first, {}, CuttlefishConfig(), False)
    assert type(found) is DataParallel and found.replicas == 2 and len(looks) == 1
