"""The learning rate in a checkpoint: which files hold the schedule, what is written, and what is refused. No processes."""

import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from hf_cuttlefish import CuttlefishConfig
from hf_cuttlefish.engines.saved_rate import SavedRate, files_of, saved_rate
from hf_cuttlefish.patch.learning_rate import SCALE_UNKNOWN


def made(steps=3):
    """An optimizer and its schedule after some steps."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda s: 1 - s / 10)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def rate(folder, optimizer, scheduler, scale=None, kept=0.4, **others):
    return saved_rate(folder, optimizer, scheduler, CuttlefishConfig(learning_rate_scale=scale), kept, None, **others)


@pytest.mark.parametrize("name", ["scheduler.pt", "scheduler.bin", "scheduler_1.bin", "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_file_of_this_very_schedule_is_scaled(tmp_path, name, wrapped):
    optimizer, scheduler = made()
    _, other = made(steps=4)
    for path, state in {
        name: scheduler.state_dict(),
        "scheduler_2.bin": other.state_dict(),
        "custom_checkpoint_1.pkl": {"seen": torch.ones(3)},
        "custom_checkpoint_2.pkl": StepLR(optimizer, 3),  # weights_only does not load it
        "optimizer.bin": scheduler.state_dict(),
    }.items():
        torch.save(state, tmp_path / path)
    given = Accelerator(cpu=True).prepare_scheduler(scheduler) if wrapped else scheduler
    found = rate(tmp_path, optimizer, given, 2.0)
    assert found.files == (name,) and found.summary == "learning rate times 2 from here on (0.007 -> 0.014)"
    staging = tmp_path / "staging"
    staging.mkdir()
    found.write(tmp_path, staging)
    assert [p.name for p in staging.iterdir()] == [name]
    fresh, again = made(steps=0)
    fresh.load_state_dict({"state": {}, "param_groups": found.groups(optimizer.state_dict()["param_groups"])})
    again.load_state_dict(torch.load(staging / name))
    taken = []
    for _ in range(4):
        taken.append(fresh.param_groups[0]["lr"])
        fresh.step()
        again.step()
    assert taken == pytest.approx([2e-2 * (1 - s / 10) for s in range(3, 7)])
    assert torch.load(tmp_path / name)["base_lrs"] == [1e-2] and optimizer.param_groups[0]["lr"] == pytest.approx(7e-3)


def test_left_to_itself_it_follows_the_size(tmp_path):
    optimizer, scheduler = made()
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    assert rate(tmp_path, optimizer, scheduler).scale == SCALE_UNKNOWN
    assert rate(tmp_path, optimizer, scheduler, kept=0.2).scale == 1.5
    assert rate(tmp_path, optimizer, scheduler, 1.0) == SavedRate()


def test_a_schedule_that_is_in_no_file(tmp_path):
    """It would go on as it was, whatever the optimizer's groups say."""
    optimizer, scheduler = made()
    torch.save(made(steps=4)[1].state_dict(), tmp_path / "scheduler.pt")  # of another step
    assert files_of(tmp_path, scheduler, by_engine=True) == ()
    with pytest.raises(ValueError, match=f"learning_rate_scale: no file in {re.escape(str(tmp_path))}"):
        rate(tmp_path, optimizer, scheduler, 2.0)
    unchanged = rate(tmp_path, optimizer, scheduler)
    assert unchanged.scale == 1 and "learning rate unchanged (learning_rate_scale: no file in" in unchanged.summary
    by_engine = rate(tmp_path, optimizer, scheduler, 2.0, by_engine=True)
    assert by_engine.scale == 2 and by_engine.files == ()
    assert by_engine.scheduler(scheduler).state_dict()["base_lrs"] == [2e-2] and scheduler.base_lrs == [1e-2]


def test_without_a_schedule_the_groups_are_scaled(tmp_path):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": r} for r in (0.1, 0.3)], lr=0.1)
    found = rate(tmp_path, optimizer, None, 2.0)
    assert [g["lr"] for g in found.groups(optimizer.param_groups)] == pytest.approx([0.2, 0.6])
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.3]
    driven, _ = made()
    with pytest.raises(ValueError, match="a scheduler drives this optimizer"):
        rate(tmp_path, driven, None, 2.0)


def test_deepspeed_s_own_schedule_is_left_alone(tmp_path):
    class WarmupLR:
        min_lrs, max_lrs = [0.0], [1e-2]

    WarmupLR.__module__ = "deepspeed.runtime.lr_schedules"
    optimizer, _ = made()
    with pytest.raises(TypeError, match="WarmupLR is DeepSpeed's own scheduler"):
        rate(tmp_path, optimizer, WarmupLR(), 2.0, by_engine=True)
    unchanged = rate(tmp_path, optimizer, WarmupLR(), by_engine=True)
    assert unchanged.scale == 1 and "DeepSpeed's own scheduler" in unchanged.summary
