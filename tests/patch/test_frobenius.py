"""Frobenius decay: its gradients against autograd, the full-rank phase against SGD's weight decay, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, factorize
from hf_cuttlefish.engines.base import ShardedEngine
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.patch.decay import add_decay, check_can_decay

DECAY = 0.1


def network():
    torch.manual_seed(0)

    def block(groups):
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.Tanh(), nn.Conv2d(8, 8, 1))

    return nn.Sequential(nn.Conv2d(1, 8, 3), block(1), block(2), nn.Flatten(), nn.Linear(8 * 16, 3))


def loss_of(model):
    x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return model(x).square().mean()


def test_it_is_the_gradient_of_the_products_norm():
    model = network()
    factorize(model, {"1.0": 3, "2.0": 2})  # "2.0" is grouped
    targets = {name: model.get_submodule(name) for name in ("1.0", "1.2", "2.0", "2.2")}
    (loss_of(model) + DECAY / 2 * sum(layer.weight.square().sum() for layer in targets.values())).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(model).backward()
    add_decay(targets.values(), DECAY)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def run_of(model, weight_decay=0.0, **settings):
    targets = [m.weight for m in (model[1][0], model[1][2], model[2][0], model[2][2])]
    rest = [p for p in model.parameters() if all(p is not t for t in targets)]
    groups = [{"params": targets, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    ratio = {"rank_rule": "ratio", "rank_ratio": 0.4, "rank_multiple": 1, "objective": "size"}
    config = CuttlefishConfig.paper_cnn(**ratio, switch_step=4, **settings)
    return optimizer, Cuttlefish(model, optimizer, config, total_steps=12)


def steps(model, optimizer, run, count):
    for _ in range(count):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()


def test_before_the_switch_it_is_weight_decay_and_afterwards_it_is_not():
    ours, theirs = network(), network()
    mine, other = run_of(ours, frobenius_decay=DECAY), run_of(theirs, weight_decay=DECAY)
    steps(ours, *mine, 3), steps(theirs, *other, 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    steps(ours, *mine, 1), steps(theirs, *other, 1)
    assert low_rank_layers(ours) and mine[1].plan == other[1].plan
    # One step by hand, with autograd's gradient of the product.
    by_hand, optimizer = copy.deepcopy(ours), mine[0]
    names = mine[1].plan.decisions
    weights = [by_hand.get_submodule(name).weight for name in names]
    (loss_of(by_hand) + DECAY / 2 * sum(w.square().sum() for w in weights)).backward()
    seen = {}
    handle = optimizer.register_step_pre_hook(
        lambda o, a, k: seen.update({id(p): p.grad.clone() for p in ours.parameters()})
    )
    steps(ours, *mine, 1)
    handle.remove()
    for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(seen[id(a)], b.grad)
    # The run is over: nothing is added any more.
    mine[1].end()
    before = {id(p): p.detach().clone() for p in ours.parameters()}
    for p in ours.parameters():
        p.grad = torch.zeros_like(p)
    mine[0].state.clear()
    mine[0].step()
    assert all(torch.equal(p, before[id(p)]) for p in ours.parameters())


def test_weight_decay_of_the_same_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"frobenius_decay is 0.1, and the optimizer decays target weights.*weight_decay=0"
    ):
        run_of(network(), weight_decay=0.01, frobenius_decay=DECAY)
    with pytest.raises(ValueError, match="frobenius_decay is -1"):
        CuttlefishConfig(frobenius_decay=-1)


def test_engines_that_divide_weights_are_refused():
    model = network()
    engine = ShardedEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        ValueError, match=r"frobenius_decay is 0.1, which needs whole weights in each process: ShardedEngine"
    ):
        check_can_decay(engine, [model[1][0]], DECAY)


def test_a_run_that_is_resumed_low_rank_goes_on_with_it():
    model = network()
    factorize(model, {"1.0": 3})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = Cuttlefish(model, optimizer, CuttlefishConfig(frobenius_decay=DECAY), total_steps=12)
    before = model[1][0].product().square().sum()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    run.end()
    assert model[1][0].product().square().sum() < before
