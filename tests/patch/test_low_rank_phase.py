"""The low-rank phase: the quicker form of running stays, and slower steps are said once, with the reason."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_cuttlefish import factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.pace import LEAST, STEPS, UNCOUNTED, Pace
from hf_cuttlefish.patch import low_rank_phase
from hf_cuttlefish.patch.low_rank_phase import TRIED, WARM, Found, LowRankPhase
from hf_cuttlefish.report import lines


class Clock:
    """Time that passes when it is told to; `pace` and the trial read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.backlog = 100.0, 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(low_rank_phase, "_synchronize", self.wait)
        monkeypatch.setattr(low_rank_phase, "can_try", lambda engine: True)

    def wait(self) -> None:
        self.now, self.backlog = self.now + self.backlog, 0.0


class Run:
    """A run in its low-rank phase, whose steps take so many seconds in each form."""

    def __init__(self, clock: Clock, multiplied: float, pairs: float, before: float = 0.04) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
        self.model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes))  # type: ignore[arg-type]
        factorize(self.model, dict.fromkeys(find_targets(self.model), 4))
        self.clock, self.takes = clock, {True: multiplied, False: pairs}
        self.engine = SimpleNamespace(model=self.model, processes=SimpleNamespace(is_main=True, size=1))
        self.schedule = SimpleNamespace(total_steps=1000)
        self.global_step, self.switch_step, self.restarts = 100, 100, False
        self.watch = SimpleNamespace(pace=Pace(), slower=self.slower)
        for _ in range(STEPS + 1):
            clock.now += before
            self.watch.pace.step()
        self.watch.pace.mark()
        self.phase = LowRankPhase(self.watch)  # type: ignore[arg-type]

    def slower(self) -> Any:
        times = self.watch.pace.compare() if self.watch.pace.is_known else None
        if times is not None:
            self.watch.pace = Pace()
        return times if times and times[1] > 1.05 * times[0] else None

    def go(self, steps: int) -> list[Found]:
        found = []
        for _ in range(steps):
            form = self.phase.multiplied
            self.clock.now += self.takes[form is not None and form.is_on]
            self.watch.pace.step()
            found.append(self.phase.step(self))
        return [f for f in found if f is not None]


ALL = 2 * (WARM + TRIED) + 1


@pytest.mark.parametrize(("multiplied", "pairs"), [(0.035, 0.05), (0.05, 0.035)])
def test_the_quicker_form_stays(monkeypatch: pytest.MonkeyPatch, multiplied: float, pairs: float) -> None:
    run = Run(Clock(monkeypatch), multiplied, pairs)
    (found,) = run.go(ALL)
    assert found.tried == pytest.approx({"multiplied": 1000 * multiplied, "pairs": 1000 * pairs})
    assert (run.phase.multiplied is not None and run.phase.multiplied.is_on) is (multiplied < pairs)
    level, line = lines.low_rank_phase(found)
    assert level == logging.INFO
    assert "35 ms" in line and "50 ms" in line and "reduce-overhead" in line
    run.phase.stop()
    assert not run.model._forward_pre_hooks


def test_an_evaluation_among_the_steps_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    run = Run(clock, 0.035, 0.05)
    run.go(WARM + 3)
    clock.now += 60
    (found,) = run.go(ALL)
    assert found.tried == pytest.approx({"multiplied": 35, "pairs": 50})


def test_what_the_device_is_behind_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has launched pairs in 20 ms a step, and the device works at them for 50."""
    clock = Clock(monkeypatch)
    run = Run(clock, 0.04, 0.02)
    original = run.phase.step

    def step(of: Any) -> Any:
        form = run.phase.multiplied
        if form is not None and not form.is_on:
            clock.backlog += 0.03
        return original(of)

    monkeypatch.setattr(run.phase, "step", step)
    (found,) = run.go(ALL)
    assert found.tried == pytest.approx({"multiplied": 40, "pairs": 50})


@pytest.mark.parametrize(("now", "words"), [(0.0407, None), (0.0423, "42.3 ms, and took 40 ms before the switch")])
def test_slower_steps_are_said_once_with_both_times(
    monkeypatch: pytest.MonkeyPatch, now: float, words: str | None
) -> None:
    run = Run(Clock(monkeypatch), now, 0.06)
    run.go(ALL)
    found = run.go(UNCOUNTED + 2 * STEPS)
    assert [words in lines.low_rank_phase(f)[1] for f in found if words] == [True] * (words is not None)
    assert len(found) == (words is not None)
    assert LEAST <= STEPS


@pytest.mark.parametrize(
    ("device", "waits", "words"),
    [
        ("cuda", True, "The host launches kernels one by one, and the device waits for it. torch_compile=True"),
        ("cuda", None, "The host launches kernels one by one"),
        ("cuda", False, "The device sets the pace"),
        ("cpu", None, "before the switch. Use larger batches"),
    ],
)
def test_the_line_says_why_and_what_to_do(device: str, waits: bool | None, words: str) -> None:
    level, line = lines.low_rank_phase(Found(waits, device, slower=(0.04, 0.05)))
    assert level == logging.WARNING and words in line and "objective='speed'" in line


def test_short_runs_and_full_rank_ones_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Clock(monkeypatch), 0.01, 0.02)
    run.schedule.total_steps = run.global_step + low_rank_phase.LEAST - 1
    assert run.go(ALL) == [] and run.phase.tried == {}
    dense = Run(Clock(monkeypatch), 0.01, 0.02)
    dense.switch_step = None
    assert dense.go(ALL) == [] and dense.phase.multiplied is None


def test_nothing_is_tried_on_a_cpu() -> None:
    engine = {"processes": SimpleNamespace(size=1), "holds_whole_weights": True, "fixed": ""}
    run = SimpleNamespace(model=torch.nn.Linear(2, 2), **engine)
    assert not low_rank_phase.can_try(run)
