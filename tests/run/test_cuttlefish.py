"""The hand-written loop: one call a step, the switch where it belongs, state that goes on exactly, mistakes refused early."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, LowRankLinear, factorize

TOTAL = 40


class Net(nn.Module):
    def __init__(self, seed: int = 0, width: int = 32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x, labels):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


def batch(step: int):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=g)
    return {"x": x, "labels": (x[:, :3]).argmax(-1)}


def train(model, optimizer, scheduler, cuttlefish, first, last, accumulate=1):
    switched = []
    for step in range(first, last):
        for micro in range(accumulate):
            (model(**batch(step * accumulate + micro))["loss"] / accumulate).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if cuttlefish.step():
            switched.append(step + 1)
    return switched


def make(config=None, seed=0, **kwargs):
    model = Net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / TOTAL)
    config = config or CuttlefishConfig(rank_multiple=4, target_ratio=0.4)
    return model, optimizer, scheduler, Cuttlefish(model, optimizer, config, total_steps=TOTAL, **kwargs)


@pytest.mark.parametrize("step", [1, 3, 17, TOTAL])
def test_switch_step_is_exact(step):
    model, optimizer, scheduler, cuttlefish = make(
        CuttlefishConfig(switch_step=step, rank_multiple=4, target_ratio=0.4)
    )
    assert train(model, optimizer, scheduler, cuttlefish, 0, TOTAL) == [step] == [cuttlefish.switch_step]
    assert set(cuttlefish.plan) == {f"layers.{i}.{j}" for i in (0, 1) for j in (0, 2)}
    assert cuttlefish.plan.predicted_loss_increase is not None  # even at step 1 there were statistics
    before, after = cuttlefish.plan.parameters()
    assert after <= 0.4 * before


def test_by_itself_between_earliest_and_latest():
    model, optimizer, scheduler, cuttlefish = make()
    (step,) = train(model, optimizer, scheduler, cuttlefish, 0, TOTAL)
    assert 12 <= step <= 16
    assert cuttlefish.reason in ("stable ranks have converged", "latest_switch")
    assert cuttlefish.history[0] == {
        "step": 0,
        "layer": "layers.0.0",
        "stable_rank": cuttlefish.history[0]["stable_rank"],
    }
    assert not model._forward_hooks and not any(m._forward_hooks for m in model.modules())


def test_the_loss_hardly_jumps_and_training_goes_on():
    model, optimizer, scheduler, cuttlefish = make(CuttlefishConfig(switch_step=20, rank_multiple=4, target_ratio=0.5))
    train(model, optimizer, scheduler, cuttlefish, 0, 19)
    with torch.no_grad():
        before = model(**batch(999))["loss"].item()
    train(model, optimizer, scheduler, cuttlefish, 19, 20)
    with torch.no_grad():
        just_after = model(**batch(999))["loss"].item()
    train(model, optimizer, scheduler, cuttlefish, 20, TOTAL)
    with torch.no_grad():
        at_the_end = model(**batch(999))["loss"].item()
    assert just_after < before + 0.1 and at_the_end < before


@pytest.mark.parametrize("stop", [2, 12, 15, 16, 30])
def test_state_goes_on_exactly(stop):
    """Through JSON, as a checkpoint would; 12 and 15 lie among the steps that gather statistics."""
    config = CuttlefishConfig(switch_step=16, statistics_steps=6, rank_multiple=4, target_ratio=0.4)
    model, optimizer, scheduler, cuttlefish = make(config)
    train(model, optimizer, scheduler, cuttlefish, 0, stop)
    saved = json.loads(json.dumps(cuttlefish.state_dict(), sort_keys=True))
    statistics = cuttlefish.statistics_state()
    statistics = None if statistics is None else {k: v.clone() for k, v in statistics.items()}
    assert (statistics is not None) == (10 <= stop < 16)
    cuttlefish.note_save()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    moments, schedule = optimizer.state_dict(), scheduler.state_dict()
    moments = {"state": {k: {n: t.clone() for n, t in v.items()} for k, v in moments["state"].items()}, "param_groups": [
        dict(g) for g in moments["param_groups"]]}  # fmt: skip
    schedule = dict(schedule)
    train(model, optimizer, scheduler, cuttlefish, stop, TOTAL)

    other = Net(seed=5)
    if saved["plan"] is not None:
        factorize(other, cuttlefish.plan)
    other.load_state_dict(weights)
    optimizer2 = torch.optim.AdamW(other.parameters(), lr=1e-2)
    scheduler2 = torch.optim.lr_scheduler.LambdaLR(optimizer2, lambda s: 1 - s / TOTAL)
    again = Cuttlefish(other, optimizer2, config, total_steps=TOTAL)
    again.load_state_dict(saved, statistics)
    optimizer2.load_state_dict(moments)
    scheduler2.load_state_dict(schedule)
    train(other, optimizer2, scheduler2, again, stop, TOTAL)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert again.history == cuttlefish.history and again.plan == cuttlefish.plan and again.switch_step == 16


def test_a_state_that_does_not_fit_is_refused():
    model, optimizer, scheduler, cuttlefish = make(CuttlefishConfig(switch_step=4, rank_multiple=4, target_ratio=0.4))
    train(model, optimizer, scheduler, cuttlefish, 0, 6)
    state = cuttlefish.state_dict()
    _, _, _, fresh = make()
    with pytest.raises(ValueError, match="load the checkpoint's weights first"):
        fresh.load_state_dict(state)
    with pytest.raises(ValueError, match="version 9"):
        fresh.load_state_dict({**state, "version": 9})
    with pytest.raises(ValueError, match="it has no finished"):
        fresh.load_state_dict({})


def test_accumulation():
    model, optimizer, scheduler, cuttlefish = make(CuttlefishConfig(switch_step=10, rank_multiple=4, target_ratio=0.4))
    assert train(model, optimizer, scheduler, cuttlefish, 0, 12, accumulate=3) == [10]


def test_the_dense_weights_are_gone_after_the_switch():
    model, optimizer, scheduler, cuttlefish = make(CuttlefishConfig(switch_step=10, rank_multiple=4, target_ratio=0.4))
    train(model, optimizer, scheduler, cuttlefish, 0, 9)
    dense = [weakref.ref(layer[0].weight) for layer in model.layers] + [weakref.ref(layer[0]) for layer in model.layers]
    state = weakref.ref(optimizer.state[model.layers[0][0].weight]["exp_avg"])
    train(model, optimizer, scheduler, cuttlefish, 9, 10)
    gc.collect()
    assert all(r() is None for r in [*dense, state])


def test_no_layer_that_would_get_smaller_means_no_switch(caplog):
    model, optimizer, scheduler, cuttlefish = make(CuttlefishConfig(switch_step=5, rank_rule="ratio", rank_ratio=1.0))
    assert train(model, optimizer, scheduler, cuttlefish, 0, 10) == []
    cuttlefish.end()
    assert "no layer would get smaller" in caplog.text and "without a switch" in caplog.text
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


def test_a_failing_switch_leaves_everything_as_it_was(monkeypatch, caplog):
    import hf_cuttlefish.switch as switch

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    model, optimizer, scheduler, cuttlefish = make(CuttlefishConfig(switch_step=5, rank_multiple=4))
    monkeypatch.setattr(switch, "plan_ranks", fail)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, optimizer, scheduler, cuttlefish, 0, 4)
    names = set(before)
    assert train(model, optimizer, scheduler, cuttlefish, 4, 10) == [] and "out of memory" in caplog.text
    assert set(model.state_dict()) == names and cuttlefish.switch_step is None
    assert not any(m._forward_hooks for m in model.modules())
    model, optimizer, scheduler, cuttlefish = make(CuttlefishConfig(switch_step=5, rank_multiple=4, on_error="raise"))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, optimizer, scheduler, cuttlefish, 0, 10)


@pytest.mark.parametrize(
    "rule", ["stable_rank", "scaled_stable_rank", "accumulative", "paper", "energy", "ratio", "loss"]
)
def test_every_rule_switches(rule):
    config = CuttlefishConfig(
        rank_rule=rule, switch_step=6, rank_multiple=1, rank_ratio=0.2, energy_share=0.3, accumulative_share=0.2
    )
    model, optimizer, scheduler, cuttlefish = make(config)
    switched = train(model, optimizer, scheduler, cuttlefish, 0, 10)
    if switched:  # xi times a random matrix' stable rank is full rank: such layers stay dense
        assert switched == [6] and sum(isinstance(m, LowRankLinear) for m in model.modules()) == len(cuttlefish.plan)
    else:
        assert rule in ("scaled_stable_rank", "paper") and cuttlefish.switch_step is None


def test_bad_arguments():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="total_steps is 0"):
        Cuttlefish(model, optimizer, total_steps=0)
    with pytest.raises(TypeError, match="total_steps"):
        Cuttlefish(model, optimizer, total_steps=1.5)
    with pytest.raises(TypeError, match="CuttlefishConfig"):
        Cuttlefish(model, optimizer, "paper", total_steps=3)
    with pytest.raises(ValueError, match=r"switch_step is 9.*3 steps"):
        Cuttlefish(model, optimizer, CuttlefishConfig(switch_step=9), total_steps=3)
    with pytest.raises(ValueError, match="does not hold"):
        Cuttlefish(model, torch.optim.SGD(Net().parameters(), 0.1), total_steps=3)
    with pytest.raises(ValueError, match="meta device"):
        with torch.device("meta"):
            empty = Net()
        Cuttlefish(empty, torch.optim.SGD(empty.parameters(), 0.1), total_steps=3)


@pytest.mark.parametrize("given", ["wrapper", "bare"])
def test_data_parallel_needs_no_repair(given):
    """Without a GPU it calls the model itself; copies on several GPUs are in test_gpu.py."""
    plain, wrapped = (make(CuttlefishConfig(switch_step=6, rank_multiple=4, target_ratio=0.4)) for _ in range(2))
    parallel = nn.DataParallel(wrapped[0])
    plain[3].close()
    wrapped[3].close()
    losses = []
    for (model, optimizer, *_), run in ((plain, plain[0]), (wrapped, parallel)):
        cuttlefish = Cuttlefish(
            run if given == "wrapper" else model,
            optimizer,
            CuttlefishConfig(switch_step=6, rank_multiple=4, target_ratio=0.4),
            total_steps=10,
        )
        losses.append([])
        for step in range(10):
            loss = run(**batch(step))["loss"].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cuttlefish.step()
            losses[-1].append(float(loss.detach()))
        assert (
            cuttlefish.switch_step == 6
            and cuttlefish.plan
            and any(isinstance(m, LowRankLinear) for m in model.modules())
        )
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"pass the model inside it \(model\.module\)"):
        factorize(parallel, {"a": 4})


def test_compiled_model_gathers_and_switches():
    """Hooks set after compilation are not seen by compiled code: while statistics are gathered it must run eagerly."""
    torch._dynamo.reset()
    model, optimizer, _, cuttlefish = make(CuttlefishConfig(switch_step=6, rank_multiple=4, target_ratio=0.4))
    compiled = torch.compile(model, backend="eager")
    for step in range(10):
        compiled(**batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
    assert cuttlefish.switch_step == 6 and cuttlefish.plan.predicted_loss_increase > 0
    assert compiled(**batch(3))["loss"].item() == pytest.approx(model(**batch(3))["loss"].item(), rel=1e-5)
