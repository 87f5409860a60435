"""Whole steps: what runs, in turn, and that all is as it was; times are injected but for one that is checked for sense."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from hf_cuttlefish.measure import whole_steps as file
from hf_cuttlefish.measure.kept import Batch
from hf_cuttlefish.measure.whole_steps import Candidate, Step, UnableError, check_room, measure_steps, time_steps
from untouched import assert_untouched, snapshot

DENSE, OTHER = Candidate("dense"), Candidate("as planned", frozenset({"a"}))


class Net(nn.Module):
    """A model with all that a forward may change: running statistics, a count of its own, random numbers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.last, self.unused = nn.Linear(8, 2), nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(3))
        self.calls, self.width, self.modes = 0, 0.0, []

    def forward(self, x: torch.Tensor) -> Any:
        self.calls, self.seen = self.calls + 1, self.seen + 1
        self.width = random.random() + numpy.random.rand()
        self.modes.append((self.training, torch.is_grad_enabled(), self.first(x).dtype))
        return {"loss": self.last(self.drop(self.norm(self.first(x)))).square().mean()}


class Places:
    def __init__(self) -> None:
        self.turns: list[str] = []

    def put(self, candidate: Candidate) -> None:
        self.turns.append(candidate.words)

    def take_back(self) -> None:
        self.turns.append("back")


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def step_of(model: nn.Module, autocast: bool = False) -> Step:
    return Step(model, model, Batch({"x": torch.ones(4, 6)}, (autocast, torch.bfloat16)))


def run(candidate: Candidate, step: Step, warm_up: int) -> float:
    step()
    return 1.0


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]


def test_all_is_as_it_was_to_the_bit() -> None:
    model = net()
    model.last.weight.requires_grad_(False)
    model(torch.ones(4, 6))["loss"].backward()  # gradients are there, and stay
    fired: list[str] = []
    model.first.weight.register_hook(lambda grad: fired.append("hook"))
    model.first.bias.register_post_accumulate_grad_hook(lambda p: fired.append("step in backward"))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    model.drop.eval()
    before, random_states = snapshot(model, optimizer), states()
    buffers = [(name, id(b), b.clone()) for name, b in model.named_buffers()]
    attributes = (model.calls, model.width, [m.training for m in model.modules()])
    found = measure_steps([DENSE, OTHER], step_of(model), Places(), run)
    assert found == {DENSE: 1.0, OTHER: 1.0} and len(model.modes) == 1 + 2 * file.ROUNDS
    assert_untouched(before, model, optimizer)
    assert states() == random_states
    for (name, b), (known, at, value) in zip(model.named_buffers(), buffers, strict=True):
        assert name == known and id(b) == at and torch.equal(b, value)
    assert (model.calls, model.width, [m.training for m in model.modules()]) == attributes
    assert not fired
    model(torch.ones(4, 6))["loss"].backward()
    assert sorted(fired) == ["hook", "step in backward"]


def test_steps_run_as_training_does() -> None:
    model = net().eval()
    with torch.no_grad():
        measure_steps([DENSE], step_of(model, autocast=True), Places(), run)
    assert set(model.modes) == {(True, True, torch.bfloat16)}
    assert not model.training and not model.drop.training


def test_candidates_have_turns_and_the_quickest_of_each_counts() -> None:
    places, times = Places(), iter([5.0, 4.0, 3.0, 6.0, 7.0, 2.0])
    asked = []

    def timer(candidate: Candidate, step: Step, warm_up: int) -> float:
        asked.append(warm_up)
        return next(times)

    assert measure_steps([DENSE, OTHER], step_of(net()), places, timer) == {DENSE: 3.0, OTHER: 2.0}
    assert places.turns == ["dense", "back", "as planned", "back"] * 3
    assert asked == [1, 1, 0, 0, 0, 0]
    slow = Places()
    measure_steps([DENSE], step_of(net()), slow, lambda *_: 5000.0)
    assert slow.turns == ["dense", "back"] * 2


@pytest.mark.parametrize("where", ["step", "put"])
def test_an_error_names_the_candidate_and_leaves_all_as_it_was(where: str) -> None:
    model, places = net(), Places()
    before, random_states, seen = snapshot(model), states(), model.seen

    def fail(*_: Any) -> float:
        torch.rand(1)
        raise RuntimeError("this cannot run")

    if where == "put":
        places.put = fail  # type: ignore[assignment, method-assign]
    with pytest.raises(UnableError, match=r"a step dense failed \(RuntimeError: this cannot run\)") as caught:
        measure_steps([DENSE], step_of(model), places, fail if where == "step" else run)
    assert caught.value.__context__ is None  # whose frames would hold what the step had allocated
    assert places.turns[-1] == "back"
    assert_untouched(before, model)
    assert states() == random_states and model.seen is seen


def test_ctrl_c_puts_back_too() -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    model, places = net(), Places()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        measure_steps([DENSE], step_of(model), places, interrupt)
    assert places.turns == ["dense", "back"]
    assert_untouched(before, model)


@pytest.mark.parametrize("output", ["tensor", "tuple", "scores", "nothing"])
def test_a_loss_that_is_worked_out_outside_is_stood_in_for(output: str) -> None:
    layer = nn.Linear(6, 2)

    def forward(x: torch.Tensor) -> Any:
        y = layer(x)
        return {
            "tensor": y,
            "tuple": (y, [y, None]),
            "scores": {"logits": y, "other": 3},
            "nothing": y.detach(),
        }[output]

    step = Step(layer, forward, Batch({"x": torch.ones(4, 6)}, (False, torch.bfloat16)))
    if output == "nothing":
        with pytest.raises(UnableError, match="nothing that could be differentiated"):
            measure_steps([DENSE], step, Places(), run)
    else:
        assert measure_steps([DENSE], step, Places(), run) == {DENSE: 1.0}
    assert layer.weight.grad is None


def test_real_times_are_of_whole_steps() -> None:
    model = net()
    step = step_of(model)
    step.begin()
    assert 0 < time_steps(DENSE, step, 2) < 1000
    assert len(model.modes) == 2 + file.MOST_STEPS


def test_a_device_that_would_not_hold_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(net())
    check_room(step, 2**60)  # a CPU is not asked
    step.devices = [torch.device("cuda", 0)]
    numbers = {"memory_allocated": 30, "memory_reserved": 34, "max_memory_allocated": 42}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    check_room(step, 2 * 2**30)  # 10 + 4 are free, 12 + 2 are needed
    with pytest.raises(UnableError, match=r"cuda:0 has 14\.00 GiB free, and a step .* may need 15\.00"):
        check_room(step, 3 * 2**30)
