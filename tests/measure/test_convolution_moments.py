"""Statistics of convolutions inside a training step: against moments worked out by hand, and the mean that a norm holds."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_cuttlefish import CuttlefishConfig, estimate_ranks, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.kinds import dense_weight, kind_of
from hf_cuttlefish.measure.kept import KeptBatches
from hf_cuttlefish.measure.moments import MomentCollector

STEPS, BATCH = 3, 16


class Net(nn.Module):
    """Two blocks of convolution and batch norm, the second grouped, and scores."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=g, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            for g in (1, 2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values, labels):
        x = functional.relu(self.stem(pixel_values))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean((-2, -1)))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        yield {
            "pixel_values": torch.randn(BATCH, 1, 8, 8, generator=generator),
            "labels": torch.randint(0, 4, (BATCH,), generator=generator),
        }


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def gathered(net, tokens=10**6):
    layers = find_targets(net)
    collector = MomentCollector(net, layers, tokens)
    collector.start()
    for batch in batches():
        net(**batch)["loss"].backward()
        collector.step()
    collector.stop()
    return layers, collector


def test_the_targets_are_the_convolutions_of_the_blocks(net):
    assert list(find_targets(net)) == ["blocks.0.0", "blocks.1.0"]
    with pytest.raises(ValueError, match="all-linear"):
        find_targets(net, CuttlefishConfig(target_modules="all-linear"))


def test_the_covariance_is_that_of_the_outputs(net):
    """m <= n, and a norm behind: the signal is the covariance about the mean of what the convolution gives."""
    outputs = {"blocks.0.0": [], "blocks.1.0": []}
    other = copy.deepcopy(net)
    for name, kept in outputs.items():
        other.get_submodule(name).register_forward_hook(lambda m, a, y, kept=kept: kept.append(y.detach()))
    for batch in batches():
        other(**batch)
    layers, collector = gathered(net)
    moments = collector.moments()
    for name, kept in outputs.items():
        y = torch.cat(kept).movedim(1, -1).reshape(-1, layers[name].groups, 8 // layers[name].groups)
        found = moments[name] if layers[name].groups > 1 else [moments[name]]
        for group, one in enumerate(found):
            assert torch.allclose(one.signal, torch.cov(y[:, group].T, correction=0), atol=1e-4)
            weight = dense_weight(layers[name]) if len(found) == 1 else dense_weight(layers[name])[group]
            assert torch.allclose(weight @ one.mean, y[:, group].mean(0), atol=1e-5)


def test_a_sample_of_positions_stands_for_all(net):
    _, whole = gathered(copy.deepcopy(net))
    _, some = gathered(net, tokens=200)
    a, b = whole.moments()["blocks.0.0"], some.moments()["blocks.0.0"]
    assert a.tokens == pytest.approx(b.tokens, rel=0.05)
    assert float((a.signal - b.signal).norm() / a.signal.norm()) < 0.3


def test_the_norm_behind_a_convolution_takes_the_mean(net):
    """In training its batch mean takes it away, so that in evaluation its running mean has to know."""
    _, collector = gathered(net)
    assert kind_of(net.blocks[0][0]).norm is net.blocks[0][1]
    plan = estimate_ranks(net, CuttlefishConfig(rank_multiple=1, target_ratio=0.3), statistics=collector.moments())
    before, plain = net.blocks[0][1].running_mean.clone(), copy.deepcopy(net)
    factorize(net, plan, statistics=collector.moments())
    assert not torch.equal(net.blocks[0][1].running_mean, before)
    with torch.no_grad():
        x = functional.relu(net.stem(torch.cat([b["pixel_values"] for b in batches()])))
        moved = net.blocks[0][0](x).mean((0, 2, 3)) - plain.blocks[0][0](x).mean((0, 2, 3))
    assert torch.allclose(net.blocks[0][1].running_mean - before, moved, atol=0.05 * float(moved.abs().max()))


def test_a_failed_switch_leaves_the_norms_alone(net, monkeypatch):
    from hf_cuttlefish.patch.structure import NoteStructure

    _, collector = gathered(net)
    statistics = collector.moments()
    plan = estimate_ranks(net, CuttlefishConfig(rank_multiple=1, target_ratio=0.3), statistics=statistics)
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def fail(self):
        raise OSError("full")

    monkeypatch.setattr(NoteStructure, "apply", fail)
    with pytest.raises(OSError, match="full"):
        factorize(net, plan, statistics=statistics)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_sizes_are_tried_with_the_norms_of_the_batch(net):
    """And the norms remember nothing of it."""
    kept = KeptBatches(net)
    kept.start()
    for batch in batches():
        net(**batch)["loss"].backward()
    kept.stop()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    running = net.blocks[0][1].running_mean.clone()
    effect = kept.effect(find_targets(net), {})
    assert torch.equal(net.blocks[0][1].running_mean, running)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.blocks[0][1].momentum == 0.1
    with torch.no_grad():  # in training mode, which is what the loss was of
        assert effect.loss == pytest.approx(sum(float(net(**b)["loss"]) for b in batches()) / STEPS)
