"""Never slower without a word: real runs whose clock is told what data, steps and evaluations take."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.measure.pace import STEPS, UNCOUNTED
from tiny_trainer import Rows, run, tiny_bert

SWITCH = 20
TOTAL = SWITCH + UNCOUNTED + STEPS + 16
CONFIG = CuttlefishConfig(switch_step=SWITCH, statistics_steps=2, rank_multiple=4, target_ratio=0.4)
WORDS = "before the switch"


class Clock:
    """Passes when a model trains, a row is fetched or an evaluation runs, and at no other time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def watch(self, model: torch.nn.Module, dense: float, pairs: float, evaluation: float = 7.0) -> None:
        def hook(module: Any, args: Any) -> None:
            is_low = bool(low_rank_layers(model))
            self.now += (pairs if is_low else dense) if model.training else evaluation

        model.get_submodule("classifier").register_forward_pre_hook(hook)


class SlowRows(Rows):
    """Each row takes a while."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def __getitem__(self, i: int) -> Any:
        self.clock.now += self.seconds
        return super().__getitem__(i)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if WORDS in r.getMessage() and "ms" in r.getMessage()]


def train(folder: Path, clock: Clock, dense: float, pairs: float, resume: str | None = None, **more: Any) -> Any:
    model = tiny_bert()
    clock.watch(model, dense, pairs)
    arguments = {"save_strategy": "no", "max_steps": TOTAL, "logging_steps": 3, **more}
    return run(folder, CONFIG, model, resume, rows=SlowRows(clock, 0.5), **arguments)


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "saving": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("how", list(HOW))
def test_a_run_that_gets_slower_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level(logging.INFO)
    micro = HOW[how].get("gradient_accumulation_steps", 1)
    train(tmp_path, Clock(monkeypatch), 0.04 / micro, 0.06 / micro, **HOW[how])
    (line,) = told(caplog)
    assert "a step takes 60 ms, and took 40 ms before the switch" in line and "objective='speed'" in line
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["plain", "evaluation"])
def test_a_run_that_gets_no_slower_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level(logging.INFO)
    _, callback = train(tmp_path, Clock(monkeypatch), 0.04, 0.041, **HOW[how])
    assert told(caplog) == [] and callback.cuttlefish.watch.seconds == pytest.approx((0.04, 0.041))


def test_a_run_resumed_after_its_switch_knows_what_a_step_took_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock(monkeypatch)
    train(tmp_path, clock, 0.04, 0.06, save_strategy="steps", save_steps=SWITCH + 2)
    caplog.clear()
    train(tmp_path, clock, 0.04, 0.06, resume=str(tmp_path / f"checkpoint-{SWITCH + 2}"))
    (line,) = told(caplog)
    assert "60 ms, and took 40 ms before the switch in the run that this one goes on from" in line


def test_a_loop_of_ones_own_counts_from_step_to_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock, model = Clock(monkeypatch), tiny_bert().train()
    clock.watch(model, 0.04, 0.06)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cuttlefish = Cuttlefish(model, optimizer, CONFIG, total_steps=TOTAL)
    for step in range(TOTAL):
        ids = torch.randint(3, 50, (8, 10))
        model(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
        clock.now += 30.0 if step % 10 == 0 else 0.0  # an evaluation
    cuttlefish.end()
    (line,) = told(caplog)
    assert "60 ms, and took 40 ms" in line
