"""Models that work in place on what a layer gave: the gradient that counts is that of what it gave."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_cuttlefish.measure.moments import MomentCollector

CHANGES = {
    "itself": lambda y: y.mul_(0.5).add_(1.0),
    "a view": lambda y: (y.view(-1).mul_(0.5).add_(1.0), y)[1],
    "a part": lambda y: (y[..., :3].mul_(0.5), y)[1],
    "an activation": lambda y: y.relu_(),
    "through heads": lambda y: y.view(*y.shape[:-1], 2, -1).transpose(-2, -3).div_(2.0),
}


class Net(nn.Module):
    """A layer, a change of what it gives, in place or on a copy, and another layer."""

    def __init__(self, layer, change, copies):
        super().__init__()
        self.layer, self.last, self.change, self.copies = layer, nn.Linear(6, 6), change, copies

    def forward(self, x):
        y = self.layer(x)
        y = self.change(y.clone() if self.copies else y)
        return self.last(y.reshape(*x.shape[:-1], -1)).square().mean()


def sums(make, shape, change, copies, together, tokens):
    torch.manual_seed(0)
    net, x = Net(make(), CHANGES[change], copies), torch.randn(*shape, 4, generator=torch.Generator().manual_seed(1))
    collector = MomentCollector(net, {"layer": net.layer}, max_tokens=tokens)
    collector.together = together
    collector.start()
    net(x).backward()
    collector.step()
    collector.stop()
    return collector.sums["layer"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(4, 6), (24,)], ids=["3d", "2d"])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(4, 6), lambda: nn.Linear(4, 6, bias=False), lambda: Conv1D(6, 4)],
    ids=["bias", "none", "Conv1D"],
)
@pytest.mark.parametrize("together", [False, True])
def test_statistics_are_those_of_a_model_that_works_on_copies(make, shape, change, together):
    if len(shape) == 1 and change == "through heads":
        pytest.skip("needs positions beside the heads")
    for tokens in (8, 100):
        found, wanted = (sums(make, shape, change, copies, together, tokens) for copies in (False, True))
        assert float(wanted["count"]) > 12 and float(wanted["metric"].abs().sum()) > 0
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, msg=lambda m, k=key: f"{k}: {m}")


def test_the_model_gets_what_the_layer_gave_without_a_copy():
    """nn.Linear's output goes on as it is: a copy would be one more launch a layer."""
    layer = nn.Linear(4, 6)
    net = nn.Sequential(layer)
    collector = MomentCollector(net, {"0": layer})
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.data_ptr()))
    collector.start()
    assert net(torch.randn(2, 3, 4)).data_ptr() == seen[0]
    collector.stop()


def test_outputs_kept_on_a_cpu_are_those_from_before_the_change():
    """Of a layer with no more outputs than inputs the outputs enter, and a change in place must not reach them."""
    for tokens in (8, 100):
        made = []
        for copies in (False, True):
            torch.manual_seed(0)
            net = Net(nn.Linear(8, 6), CHANGES["itself"], copies)
            collector = MomentCollector(net, {"layer": net.layer}, max_tokens=tokens)
            collector.start()
            net(torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))).backward()
            collector.stop()
            made.append(collector.sums["layer"])
        for key, value in made[1].items():
            torch.testing.assert_close(made[0][key], value)
