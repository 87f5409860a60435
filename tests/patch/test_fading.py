"""What the cut took is added again, less and less: nothing jumps in training, evaluation sees what is saved, and it ends."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, factorize
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.patch import fading
from hf_cuttlefish.patch.fading import Fading, fading_steps

TOTAL, SWITCH, STEPS = 30, 8, 12


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Other tests of this process compile."""
    monkeypatch.setattr(fading, "has_compiled", lambda: False)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.act, self.two = nn.Linear(width, 2 * width), nn.Tanh(), Conv1D(width, 2 * width)

    def forward(self, x):
        return x + self.two(self.act(self.one(x)))


class Net(nn.Module):
    def __init__(self, seed=0, width=24):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.layers, self.head = (
            nn.Linear(8, width),
            nn.ModuleList(Block(width) for _ in range(2)),
            nn.Linear(width, 3),
        )

    def forward(self, x, labels):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch(step):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)) + 1
    return {"x": x, "labels": x[:, :3].argmax(-1)}


def train(model, optimizer, run, first, last):
    for step in range(first, last):
        model(**batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()


def make(seed=0, **changes):
    model = Net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = {"switch_step": SWITCH, "statistics_steps": 4, "rank_multiple": 1, "target_ratio": 0.3, "fade_steps": STEPS}
    config = CuttlefishConfig(**{**given, **changes}, on_error="raise")
    return model, optimizer, Cuttlefish(model, optimizer, config, total_steps=TOTAL)


def test_nothing_jumps_in_training_and_evaluation_sees_the_pairs_alone():
    """Right after the switch the model still computes what the dense one did, the bias's share among it."""
    model, optimizer, run = make()
    train(model, optimizer, run, 0, SWITCH - 1)
    model(**batch(SWITCH - 1))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    dense = model(**batch(99))["logits"]
    assert run.step() and any(shift for shift in (la.bias is not None for la in low_rank_layers(model).values()))
    assert torch.allclose(model(**batch(99))["logits"], dense, atol=1e-5)
    model.eval()
    cut = model(**batch(99))["logits"]
    assert (cut - dense).abs().max() > 1e-2
    model.train()
    run.phase.fading.stop()
    assert torch.equal(model(**batch(99))["logits"], cut)


def test_it_is_gone_after_its_steps_and_falls_evenly():
    model, optimizer, run = make()
    train(model, optimizer, run, 0, SWITCH)
    assert run.phase.fading.left == 1 and len(run.statistics_state()) == 8  # a weight and a bias of each layer
    for done in range(1, STEPS + 1):
        train(model, optimizer, run, SWITCH + done - 1, SWITCH + done)
        assert run.phase.fading.left == pytest.approx(1 - done / STEPS)
    assert not run.phase.fading.is_on and run.statistics_state() is None
    assert not any(m._forward_hooks for m in model.modules())


def test_gradients_are_those_of_the_sum():
    layer = nn.Linear(6, 5)
    model = nn.Sequential(nn.Sequential(layer), nn.Sequential(nn.Linear(5, 5)))
    weight, x = layer.weight.detach().clone(), torch.randn(7, 6, requires_grad=True)
    factorize(model, {"0.0": 2})
    pair = model[0][0]
    fade = Fading(4)
    fade.change = SimpleNamespace(layers={"0.0": layer}, pairs={"0.0": pair}, shifts={"0.0": None})
    fade.apply()
    fade.step(1)
    pair(x).square().sum().backward()
    up, down, given = (t.detach().clone().requires_grad_() for t in (pair.up.weight, pair.down.weight, x))
    lost = weight - (up @ down).detach()
    expected = (given @ (up @ down + 0.75 * lost).T + pair.up.bias.detach()).square().sum()
    expected.backward()
    for found, wanted in ((x.grad, given.grad), (pair.up.weight.grad, up.grad), (pair.down.weight.grad, down.grad)):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [SWITCH, SWITCH + 5, SWITCH + STEPS])
def test_a_resumed_run_goes_on_bit_for_bit(stop):
    model, optimizer, run = make()
    train(model, optimizer, run, 0, stop)
    saved, statistics = json.loads(json.dumps(run.state_dict())), run.statistics_state()
    assert (statistics is not None) == (stop < SWITCH + STEPS)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    state = {
        "param_groups": state["param_groups"],
        "state": {k: {n: t.clone() for n, t in v.items()} for k, v in state["state"].items()},
    }
    other = Net(seed=5)
    factorize(other, run.plan)
    other.load_state_dict(weights)
    second = torch.optim.AdamW(other.parameters(), lr=1e-2)
    again = Cuttlefish(other, second, run.config, total_steps=TOTAL)
    again.load_state_dict(saved, statistics)
    second.load_state_dict(state)
    train(model, optimizer, run, stop, TOTAL)
    train(other, second, again, stop, TOTAL)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_without_it_says_so(caplog):
    model, optimizer, run = make()
    train(model, optimizer, run, 0, SWITCH + 2)
    again = Cuttlefish(model, optimizer, run.config, total_steps=TOTAL)
    with caplog.at_level("WARNING"):
        again.load_state_dict(json.loads(json.dumps(run.state_dict())), None)
    assert "no longer added" in caplog.text and not again.phase.fading.is_on


def test_a_switch_that_fails_leaves_no_hook(monkeypatch):
    model, optimizer, run = make()
    train(model, optimizer, run, 0, SWITCH - 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fail(self):
        raise RuntimeError("on purpose")

    monkeypatch.setattr("hf_cuttlefish.cuttlefish._Record.apply", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        run.step()
    assert not low_rank_layers(model) and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_when_there_is_none():
    engine = SimpleNamespace(holds_whole_weights=True, fixed="", replicas=1)
    assert (
        fading_steps(engine, None, 200) == 60
        and fading_steps(engine, 7, 200) == 7
        and fading_steps(engine, 300, 200) == 200
    )
    assert fading_steps(engine, None, 20) == 0 == fading_steps(engine, 0, 200)
    for change in ({"holds_whole_weights": False}, {"fixed": "partitions"}, {"replicas": 2}):
        assert fading_steps(SimpleNamespace(**{**vars(engine), **change}), 50, 200) == 0
    assert CuttlefishConfig.paper().fade_steps == 0
    model, optimizer, run = make(fade_steps=0)
    train(model, optimizer, run, 0, SWITCH)
    assert run.phase.fading is None and run.statistics_state() is None


def test_compiled_code_sees_no_hook(monkeypatch):
    monkeypatch.setattr(fading, "has_compiled", lambda: True)
    assert fading_steps(SimpleNamespace(holds_whole_weights=True, fixed="", replicas=1), 50, 200) == 0
