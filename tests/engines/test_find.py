"""Finding the engine: by the kind of the wrapper around the model, whatever a subclass of it is called."""

import pytest
from torch import nn

from hf_cuttlefish.engines.around import Around, check_not_wrapped
from hf_cuttlefish.engines.ddp import DataParallel
from hf_cuttlefish.engines.find import find_engine


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
