"""learning_rate_scale: under every schedule, in hand-written loops, in the Trainer, on resume, and under DDP."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import lr_scheduler as torch_schedules
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, get_scheduler

from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig, factorize
from hf_cuttlefish.patch.learning_rate import (
    SCALE_UNKNOWN,
    ScaleLearningRate,
    averages_weights,
    learning_rate_edit,
    scaled_groups,
    scaled_scheduler,
    suggested_scale,
)
from launch import launch

STEPS, SWITCH, SCALE = 12, 5, 1.5

SCHEDULES = {
    "linear": lambda o: get_scheduler("linear", o, num_warmup_steps=2, num_training_steps=STEPS),
    "cosine with a least rate": lambda o: get_scheduler(
        "cosine_with_min_lr",
        o,
        num_warmup_steps=2,
        num_training_steps=STEPS,
        scheduler_specific_kwargs={"min_lr": 1e-3},
    ),
    "step": lambda o: torch_schedules.StepLR(o, 3),
    "multiplicative": lambda o: torch_schedules.MultiplicativeLR(o, lambda s: 0.9),
    "polynomial": lambda o: torch_schedules.PolynomialLR(o, STEPS),
    "cosine": lambda o: torch_schedules.CosineAnnealingLR(o, STEPS, eta_min=1e-3),
    "warm restarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 4, eta_min=1e-3),
    "one cycle": lambda o: torch_schedules.OneCycleLR(o, 0.1, total_steps=STEPS + 2),
    "cyclic": lambda o: torch_schedules.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
    "one after the other": lambda o: torch_schedules.SequentialLR(
        o, [torch_schedules.LinearLR(o, 0.1, total_iters=7), torch_schedules.CosineAnnealingLR(o, 5, eta_min=1e-3)], [7]
    ),
    "chained": lambda o: torch_schedules.ChainedScheduler(
        [torch_schedules.ConstantLR(o, 0.1, 7), torch_schedules.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: torch_schedules.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=1e-3),
    "in Accelerate's wrapper": lambda o: Accelerator(cpu=True).prepare_scheduler(torch_schedules.StepLR(o, 3)),
}


def rates(schedule, scale, kind=float, saved=False):
    """The first group's and the last group's rate before each step; scaled after SWITCH of them, or in what is saved then."""
    optimizer, scheduler = optimized(schedule, kind)
    seen = []
    for step in range(STEPS):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, torch_schedules.ReduceLROnPlateau) else []))
        if step + 1 == SWITCH and saved:
            state, schedule_state = optimizer.state_dict(), scheduler.state_dict()
            before = copy.deepcopy((state, schedule_state))
            groups = scaled_groups(state["param_groups"], scale)
            scaled = scaled_scheduler(schedule_state, scale)
            assert (state, schedule_state) == before  # pure
            optimizer, scheduler = optimized(schedule, kind)
            optimizer.load_state_dict({**state, "param_groups": groups})
            scheduler.load_state_dict(scaled)
        elif step + 1 == SWITCH:
            ScaleLearningRate(optimizer, scheduler, scale).apply()
        if step + 1 == SWITCH:
            assert scheduler.get_last_lr() == pytest.approx([float(group["lr"]) for group in optimizer.param_groups])
    return seen


def optimized(schedule, kind=float):
    layer = nn.Linear(2, 2)
    rate = torch.tensor(1e-2) if kind is torch.tensor else 1e-2
    optimizer = torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=rate)
    return optimizer, schedule(optimizer)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("saved", [False, True])
def test_the_rest_of_the_schedule_is_multiplied(name, saved):
    plain, scaled = rates(SCHEDULES[name], 1.0), rates(SCHEDULES[name], SCALE, saved=saved)
    assert len({x for pair in plain for x in pair}) > 1
    for step, (a, b) in enumerate(zip(plain, scaled, strict=True)):
        assert b == pytest.approx([x * (SCALE if step >= SWITCH else 1) for x in a], rel=1e-6), step


def test_one_tensor_as_the_rate_of_all_groups():
    """Groups share it, and what captured it reads this very tensor."""
    plain, scaled = (torch.tensor(rates(SCHEDULES["linear"], scale, torch.tensor)) for scale in (1.0, SCALE))
    torch.testing.assert_close(scaled[SWITCH:], SCALE * plain[SWITCH:])
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=rate)
    edit = ScaleLearningRate(optimizer, None, 2.0)
    edit.apply()
    assert "0.01 -> 0.02" in edit.summary
    assert all(group["lr"] is rate for group in optimizer.param_groups) and float(rate) == pytest.approx(2e-2)


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24)) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def config(**changes):
    return CuttlefishConfig(
        **{
            "switch_step": SWITCH,
            "rank_multiple": 4,
            "target_ratio": 0.4,
            "learning_rate_scale": SCALE,
            "on_error": "raise",
        }
        | changes
    )


def make(seed=0, **changes):
    model = Net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch_schedules.LambdaLR(optimizer, lambda s: 1 - s / STEPS)
    return (
        model,
        optimizer,
        scheduler,
        Cuttlefish(model, optimizer, config(**changes), total_steps=STEPS, scheduler=scheduler),
    )


def train(model, optimizer, scheduler, cuttlefish, first, last):
    seen = []
    for step in range(first, last):
        seen.append(optimizer.param_groups[0]["lr"])
        model(torch.randn(8, 24, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        cuttlefish.step()
    return seen


def test_a_loop_of_ones_own_and_its_resume():
    whole = make()
    seen = train(*whole, 0, STEPS)
    assert seen == pytest.approx([1e-2 * (1 - s / STEPS) * (SCALE if s >= SWITCH else 1) for s in range(STEPS)])
    assert "learning rate times 1.5 from here on (0.00583 -> 0.00875)" in str(whole[3].report)
    for stop in (3, SWITCH, 9):
        model, optimizer, scheduler, cuttlefish = make()
        train(model, optimizer, scheduler, cuttlefish, 0, stop)
        other, optimizer2, scheduler2, again = make(seed=4)
        if cuttlefish.plan is not None:
            factorize(other, cuttlefish.plan, optimizer2)
        other.load_state_dict(model.state_dict())
        again.load_state_dict(cuttlefish.state_dict(), cuttlefish.statistics_state())
        optimizer2.load_state_dict(optimizer.state_dict())
        scheduler2.load_state_dict(scheduler.state_dict())
        assert train(other, optimizer2, scheduler2, again, stop, STEPS) == seen[stop:]
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in whole[0].state_dict().items())
        assert str(again.report).splitlines()[:-1] == str(whole[3].report).splitlines()[:-1]


@pytest.mark.parametrize(("kept", "scale"), [(0.4, SCALE_UNKNOWN), (0.2, 1.5)])
def test_left_to_itself_it_follows_the_size_and_the_weights_travel(kept, scale):
    whole = make(learning_rate_scale=None, target_ratio=kept, rank_multiple=2)
    seen = train(*whole, 0, STEPS)
    assert seen == pytest.approx([1e-2 * (1 - s / STEPS) * (scale if s >= SWITCH else 1) for s in range(STEPS)])
    assert f"learning rate times {scale:g}" in str(whole[3].report)


@pytest.mark.parametrize(
    ("kept", "alignment", "scale"),
    [
        (0.4, 0.0, 1.0),
        (0.4, -0.3, 1.0),
        (0.4, 0.1, 1.6),
        (0.4, 0.9, 3.0),
        (0.4, None, SCALE_UNKNOWN),
        (0.2, 0.0, 1.0),
        (0.2, None, 1.5),
        (0.2, 0.2, 2.2),
    ],
)
def test_weights_that_travel_in_one_direction_get_a_higher_rate(kept, alignment, scale):
    assert suggested_scale(kept, alignment) == pytest.approx(scale)


def test_left_to_itself_it_leaves_a_schedule_alone_that_it_does_not_know():
    model, optimizer, scheduler, _ = make()
    settings = config(learning_rate_scale=None, target_ratio=0.2, rank_multiple=2)
    cuttlefish = Cuttlefish(model, optimizer, settings, total_steps=STEPS)  # no scheduler, and one drives the optimizer
    seen = train(model, optimizer, scheduler, cuttlefish, 0, STEPS)
    assert seen == pytest.approx([1e-2 * (1 - s / STEPS) for s in range(STEPS)])
    assert "learning rate unchanged (learning_rate_scale: a scheduler drives this optimizer" in str(cuttlefish.report)


def test_one_leaves_the_schedule_alone():
    """Also where no scheduler was given, as before there was a learning_rate_scale."""
    model, optimizer, scheduler, _ = make()
    cuttlefish = Cuttlefish(model, optimizer, config(learning_rate_scale=1.0), total_steps=STEPS)
    seen = train(model, optimizer, scheduler, cuttlefish, 0, STEPS)
    assert seen == pytest.approx([1e-2 * (1 - s / STEPS) for s in range(STEPS)])
    assert "learning rate" not in str(cuttlefish.report)


def test_mistakes_are_refused_before_the_switch():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def start(**arguments):
        return Cuttlefish(model, optimizer, config(), total_steps=STEPS, **arguments)

    without = start()  # no scheduler so far, which is fine
    model(torch.ones(1, 24)).backward()
    optimizer.step()
    scheduler = torch_schedules.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match=r"would undo the scaling.*scheduler=scheduler"):
        without.step()  # made since
    without.close()
    with pytest.raises(ValueError, match="initial_lr"):
        start()
    with pytest.raises(TypeError, match=r"builtins\.dict"):
        start(scheduler={})
    other = torch_schedules.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), 3)
    with pytest.raises(ValueError, match="drives another optimizer"):
        start(scheduler=other)
    with pytest.raises(ValueError, match="drives another optimizer"):
        start(scheduler=torch_schedules.ChainedScheduler([other]))
    assert scheduler.base_lrs == [1e-2] and optimizer.param_groups[0]["lr"] == 1e-2
    for group in optimizer.param_groups:
        group["lr"] = None  # as transformers' Adafactor has it with relative_step
    with pytest.raises(ValueError, match="AdamW finds its own"):
        start(scheduler=scheduler)
    for bad, error in ((0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), ("2", TypeError)):
        with pytest.raises(error, match="learning_rate_scale"):
            CuttlefishConfig(learning_rate_scale=bad)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(3, 30, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": int(ids[0]) % 3}


def run_trainer(folder, seed=0, resume=None, **arguments):
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=8, num_labels=3)
    )  # fmt: skip
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "seed": 3,
        "logging_steps": 1, "save_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "warmup_steps": 2,
    }  # fmt: skip
    callback = CuttlefishCallback(config())
    trainer = Trainer(
        model=model, args=TrainingArguments(**options | arguments), train_dataset=Rows(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    assert callback.switch_step == SWITCH
    return trainer


def logged(trainer):
    return {r["step"]: r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r}


class Averaging(torch.optim.SGD):
    """The interface of schedule-free optimizers."""

    def train(self):
        pass

    def eval(self):
        pass


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_average_of_weights_says_nothing_of_the_rate(wrapped):
    """It travels straight at any rate: a schedule-free run had its rate tripled at the switch, and lost 13 points."""
    parameter = nn.Parameter(torch.ones(2))
    plain, averaging = torch.optim.SGD([parameter], lr=0.1), Averaging([parameter], lr=0.1)
    if wrapped:
        accelerator = Accelerator(cpu=True)
        plain, averaging = accelerator.prepare_optimizer(plain), accelerator.prepare_optimizer(averaging)
    edit = learning_rate_edit(plain, None, None, 0.4, alignment=0.9)
    assert isinstance(edit, ScaleLearningRate) and edit.scale == 3 and not averages_weights(plain)
    assert averages_weights(averaging)
    assert not isinstance(learning_rate_edit(averaging, None, None, 0.1, alignment=0.9), ScaleLearningRate)
    assert learning_rate_edit(averaging, None, 2.0, 0.4, alignment=0.9).scale == 2


def test_schedulefree_is_known_as_an_average():
    schedulefree = pytest.importorskip("schedulefree")
    for cls in (schedulefree.AdamWScheduleFree, schedulefree.RAdamScheduleFree, schedulefree.SGDScheduleFree):
        assert averages_weights(cls([nn.Parameter(torch.ones(2))], lr=0.1))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_trainers_schedule_and_a_resume_to_the_bit(tmp_path, optim):
    whole = run_trainer(tmp_path, optim=optim)
    taken = [min(s / 2, (STEPS - s) / (STEPS - 2)) * (SCALE if s >= SWITCH else 1) for s in range(STEPS)]
    expected = {s + 1: 1e-3 * share for s, share in enumerate(taken)}  # logged with the step that it was used for
    assert logged(whole) == pytest.approx(expected)
    for step in (3, SWITCH, 9):
        again = run_trainer(
            tmp_path, seed=8, optim=optim, save_strategy="no", resume=str(tmp_path / f"checkpoint-{step}")
        )
        assert logged(again) == logged(whole)
        assert again.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
        assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in again.model.state_dict().items())


def test_the_same_on_every_process():
    """Two processes under DDP in torchrun: rates and weights, compared bit for bit by each other."""
    assert "the same on all processes: 2" in launch(2, "learning_rate_loop.py")
