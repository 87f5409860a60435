"""Optimizer state across the switch: exact first moments, the first update, every optimizer users bring, group order."""

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor
from transformers.pytorch_utils import Conv1D

from hf_cuttlefish import factorize
from hf_cuttlefish.patch.optimizer import check_holds, inner_optimizer


def make_model(conv: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first = Conv1D(24, 16) if conv else nn.Linear(16, 24)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(24, 16), nn.LayerNorm(16))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=True, beta1=0.9),
    "lion-like unknown": lambda p: torch.optim.Adadelta(p),
}


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["carry", "reset"])
def test_every_optimizer_goes_on(name, mode, conv):
    model = make_model(conv)
    optimizer = OPTIMIZERS[name](model.parameters())
    groups = optimizer.param_groups
    train(model, optimizer)
    kept = {id(p): optimizer.state.get(p) for p in (model[0].bias, model[3].weight)}
    factorize(model, {"0": 4, "2": 4}, optimizer, optimizer_state=mode)
    assert optimizer.param_groups is groups
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert set(map(id, optimizer.state)) <= set(map(id, model.parameters()))
    for p in (model[0].bias, model[3].weight):
        assert optimizer.state.get(p) is kept[id(p)]
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 2)
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_first_moments_are_exact(conv):
    """Train on gradients, then compare the carried moment with the one that the factors would have had all along."""
    model = make_model(conv)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    train(model, optimizer, 4)
    dense = optimizer.state[model[0].weight]["exp_avg"]
    dense = (dense.mT if conv else dense).clone()
    square = optimizer.state[model[0].weight]["exp_avg_sq"]
    square = (square.mT if conv else square).clone()
    factorize(model, {"0": 16}, optimizer)
    up, down = model[0].up.weight, model[0].down.weight
    torch.testing.assert_close(optimizer.state[up]["exp_avg"], dense @ down.mT, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(optimizer.state[down]["exp_avg"], up.mT @ dense, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(optimizer.state[up]["exp_avg_sq"], square @ down.square().mT, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(optimizer.state[down]["exp_avg_sq"], up.square().mT @ square, rtol=1e-5, atol=1e-12)
    assert float(optimizer.state[up]["step"]) == 4


def test_first_update_of_the_product_follows_the_dense_update():
    """SGD with momentum at full rank: W moves by -lr (m D^T D + U U^T m), to first order, with the carried momentum."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train(model, optimizer)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    factorize(model, {"0": 16}, optimizer)
    layer = model[0]
    up, down = layer.up.weight.detach().clone(), layer.down.weight.detach().clone()
    before = layer.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = -1e-3 * 0.9 * (momentum @ down.mT @ down + up @ up.mT @ momentum)
    torch.testing.assert_close(layer.weight.detach() - before, expected, rtol=1e-2, atol=1e-7)


def test_groups_keep_their_settings_and_order():
    model = make_model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1, "lr": 1e-3},
            {"params": [model[0].bias, model[2].bias, model[3].weight, model[3].bias], "weight_decay": 0.0},
        ]
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    train(model, optimizer)
    scheduler.step()
    factorize(model, {"2": 4, "0": 4}, optimizer)
    decay, plain = optimizer.param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in decay["params"]] == ["0.down.weight", "0.up.weight", "2.down.weight", "2.up.weight"]
    assert [names[id(p)] for p in plain["params"]] == ["0.up.bias", "2.up.bias", "3.weight", "3.bias"]
    assert decay["weight_decay"] == 0.1 and decay["lr"] == 5e-4
    scheduler.step()
    assert decay["lr"] == pytest.approx(1e-3 / 3)
    # State goes by position in checkpoints: a fresh optimizer of the same groups loads it onto the same tensors.
    fresh = torch.optim.AdamW([{"params": list(g["params"])} for g in optimizer.param_groups])
    fresh.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(fresh.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]) for p in model.parameters())


def test_unknown_state_is_reset_and_said(caplog):
    model = make_model()
    optimizer = torch.optim.Adadelta(model.parameters())
    train(model, optimizer)
    factorize(model, {"0": 4}, optimizer)
    assert "acc_delta" in caplog.text and model[0].up.weight not in optimizer.state


def test_an_optimizer_of_another_model_is_refused():
    model, other = make_model(), make_model()
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(ValueError, match=r"does not hold 0\.weight"):
        factorize(model, {"0": 4}, optimizer)
    assert isinstance(model[0], nn.Linear)
    with pytest.raises(TypeError, match=r"no torch\.optim\.Optimizer"):
        factorize(model, {"0": 4}, object())
    check_holds(torch.optim.SGD(model.parameters(), 0.1), {"0": model[0].weight})


def test_accelerates_wrapper_is_opened():
    from accelerate import Accelerator

    model = make_model()
    wrapped = Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters()))
    assert inner_optimizer(wrapped) is wrapped.optimizer
    factorize(model, {"0": 4}, wrapped)
    assert {id(p) for p in wrapped.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
