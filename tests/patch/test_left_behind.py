"""What the switch leaves behind: whoever still holds dense weights is named, and nobody else is."""

import gc
import logging
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_cuttlefish import Cuttlefish, CuttlefishConfig

SWITCH, STEPS = 4, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Closure(Net):
    """Runs its first block by a function that has kept it, and no module of its own knows of that."""

    def __init__(self):
        super().__init__()
        up, down = self.blocks[0].up, self.blocks[0].down
        self.first = lambda x: x + down(up(x).tanh())

    def forward(self, x):
        return self.blocks[1](self.first(x))


def train(model, caplog, stepping=None, around=lambda model: None, penalty=lambda: 0.0):
    """Warnings of a run. stepping: (step, optimizer) -> the optimizer that steps. around: called between backward and step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CuttlefishConfig(switch_step=SWITCH, rank_multiple=4, target_ratio=0.4)
    cuttlefish = Cuttlefish(model, optimizer, config, total_steps=STEPS)
    generator = torch.Generator().manual_seed(1)
    with caplog.at_level(logging.WARNING):
        for step in range(STEPS):
            if stepping is not None:
                optimizer = stepping(step, optimizer)
            loss = model(torch.randn(8, 32, generator=generator)).square().mean() + penalty()
            loss.backward()
            around(model)
            optimizer.step()
            optimizer.zero_grad()
            cuttlefish.step()
    assert cuttlefish.switch_step == SWITCH and len(cuttlefish.plan) == 4
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_in_which_nobody_holds_them_says_nothing(caplog):
    assert train(Net(), caplog) == []


@pytest.mark.parametrize("when", [0, 2])
def test_another_optimizer_than_the_one_given_is_named(caplog, when):
    """Made anew before the first step or on the way: the factors are in the first one, which steps no more."""
    model = Net()
    (said,) = train(
        model,
        caplog,
        lambda step, optimizer: torch.optim.SGD(model.parameters(), lr=1e-3) if step == when else optimizer,
    )
    assert "and 1 more, which the switch has replaced, are held by an optimizer" in said
    assert "(SGD)" in said and "Give Cuttlefish the optimizer that steps" in said


def test_an_optimizer_of_an_earlier_stage_is_not_taken_for_the_one_that_steps(caplog):
    model = Net()
    earlier = torch.optim.SGD(model.parameters(), lr=1e-3)
    (said,) = train(model, caplog)
    assert "are still held by another optimizer (SGD), and take memory" in said
    assert held_ids(earlier) - {id(p) for p in model.parameters()}


def held_ids(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_an_optimizer_that_is_gone_is_not_named(caplog):
    """One that only waits to be freed holds nothing."""
    model = Net()
    stale = torch.optim.SGD(model.parameters(), lr=1e-3)
    stale.itself = stale
    del stale
    assert train(model, caplog) == []


def test_a_forward_that_runs_the_dense_layers_on_is_said(caplog):
    (said,) = train(Closure(), caplog)
    assert "gradients still reach the dense weights of blocks.0.up, blocks.0.down, which" in said
    assert "nor saved" in said


def test_a_penalty_on_the_weights_from_before_is_said(caplog):
    model = Net()
    weights = [model.blocks[1].up.weight]
    (said,) = train(model, caplog, penalty=lambda: weights[0].square().sum())
    assert "gradients still reach the dense weights of blocks.1.up, which" in said


def test_a_list_of_parameters_from_before_the_switch_is_said(caplog):
    """Clipping by it leaves the factors out, and nothing fails."""
    model = Net()
    parameters = list(model.parameters())
    (said,) = train(model, caplog, around=lambda _: nn.utils.clip_grad_norm_(parameters, 1.0))
    assert "are still held by something" in said and "take model.parameters() anew" in said


class ThroughData(torch.optim.Optimizer):
    """Writes past torch's count of versions, as many optimizers from elsewhere do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


def switched(model, optimizer, steps=STEPS, **settings):
    """A run through its switch."""
    settings = {"switch_step": SWITCH, "rank_multiple": 4, "target_ratio": 0.4} | settings
    cuttlefish = Cuttlefish(model, optimizer, CuttlefishConfig(**settings), total_steps=STEPS)
    for _ in range(steps):
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
    assert cuttlefish.switch_step == settings["switch_step"]
    return cuttlefish


def test_an_optimizer_that_writes_past_the_count_of_versions_is_not_said_to_be_idle(caplog):
    model = Net()
    unused = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        switched(model, ThroughData(model.parameters()), optimizer_state="reset")
    assert "no factor has changed" not in caplog.text and len(unused.param_groups) == 1


def test_a_run_that_chose_by_speed_holds_no_dense_layer_afterwards(caplog, monkeypatch):
    """It kept what it had seen to flow, and told the user to look for who holds it."""
    monkeypatch.setattr(
        "hf_cuttlefish.measure.whole_steps.time_steps", lambda candidate, step, warm: 1.0 if candidate.layers else 2.0
    )
    model = Net()
    weights = [weakref.ref(block.up.weight) for block in model.blocks]
    with caplog.at_level(logging.WARNING):
        switched(model, torch.optim.AdamW(model.parameters()), objective="speed", min_speedup=1.0)
    gc.collect()
    assert "which the switch has replaced" not in caplog.text
    assert all(ref() is None for ref in weights)


def test_a_run_can_be_pickled_right_after_its_switch():
    model = Net()
    run = switched(model, torch.optim.AdamW(model.parameters()), steps=SWITCH)
    assert pickle.loads(pickle.dumps(run.phase._left)).held() == {}


def test_fully_shard_holds_no_dense_layer_afterwards_and_knows_the_pairs(caplog, tmp_path):
    """Its hooks for state dicts stood on the old layers: these stayed in memory, and a state dict after an evaluation held whole factors."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = Net()
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=False)
        fully_shard(model)
        with caplog.at_level(logging.WARNING):
            run = switched(model, torch.optim.AdamW(model.parameters()))
        assert "which the switch has replaced" not in caplog.text
        with torch.no_grad():
            model(torch.randn(8, 32))
        state = model.state_dict()
        assert {type(value).__name__ for value in state.values()} == {"DTensor"} and len(run.plan) == 4
        with torch.no_grad():
            model(torch.randn(8, 32))
        model.load_state_dict(state)
    finally:
        dist.destroy_process_group()
