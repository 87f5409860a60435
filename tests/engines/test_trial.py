"""The trial before a switch: what runs in each mode, what cannot be tried, and that a run that stays dense goes on as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.engines.around import compiled_runner
from hf_cuttlefish.engines.trial import Trial
from hf_cuttlefish.layers.low_rank import LowRankLinear, low_rank_layers
from hf_cuttlefish.measure import whole_steps as whole_steps_file
from hf_cuttlefish.measure.kept import KeptBatches
from hf_cuttlefish.measure.whole_steps import Candidate, Step, UnableError
from launch import launch
from tiny_trainer import run, tiny_bert

pytestmark = pytest.mark.usefixtures("nothing_compiled")
SPEED = CuttlefishConfig(objective="speed", switch_step=8, rank_rule="ratio", rank_multiple=4, on_error="raise")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Candidate, Step, int]]:
    """Dense steps are said to be the quickest; each candidate runs three, and is seen with the graphs that there are then."""
    seen: list[tuple[Candidate, Step, int]] = []

    def timer(candidate: Candidate, step: Step, warm_up: int) -> float:
        for _ in range(3):
            step()
        seen.append((candidate, step, graphs()))
        return 2.0 if candidate.layers else 1.0

    monkeypatch.setattr(whole_steps_file, "time_steps", timer)
    return seen


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def in_blocks(model: Any, **options: Any) -> Any:
    for block in model.bert.encoder.layer:
        block.compile(**options)
    return model


def train(compile: Callable[..., Any] | None = None, config: CuttlefishConfig = SPEED) -> tuple[Cuttlefish, list[Any]]:
    """Ten steps of a loop; for each the bits of the loss, and the graphs made by then."""
    model = tiny_bert().train()
    runs = model if compile is None else compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cuttlefish, seen = Cuttlefish(model, optimizer, config, total_steps=20), []
    torch.manual_seed(5)
    for _ in range(10):
        ids = torch.randint(3, 50, (8, 10))
        loss = runs(input_ids=ids, labels=ids[:, 0] % 3).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
        seen.append((float(loss.detach()), graphs()))
    return cuttlefish, seen


@pytest.mark.parametrize("compile", [None, torch.compile, compile_regions, in_blocks], ids=lambda c: c and c.__name__)
def test_a_run_that_stays_dense_goes_on_as_if_nothing_had_been_tried(
    timed: list[Any], compile: Callable[..., Any] | None
) -> None:
    pairs: list[weakref.ref[Any]] = []
    made = LowRankLinear.__init__
    with pytest.MonkeyPatch.context() as patched:

        def note(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            pairs.append(weakref.ref(self))

        patched.setattr(LowRankLinear, "__init__", note)
        tried, seen = train(compile)
    assert tried.switch_step is None and not low_rank_layers(tried.model)
    assert "a step takes 1 ms dense, 2 ms as planned; nothing is 1.05 times faster" in str(tried.reason)
    # The same bits as a run that never tries: weights, random numbers, dropout.
    plain, expected = train(None, CuttlefishConfig(switch_step=20, rank_rule="ratio", rank_multiple=4))
    assert len(timed) == 6
    assert [loss for loss, _ in seen] == [loss for loss, _ in expected]
    weights = plain.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in tried.model.state_dict().items())
    # Compiled steps were compiled, once for each candidate, and the dense model's graphs serve on.
    after = [made for *_, made in timed]
    if compile is None:
        assert set(after) == {0}
    else:
        assert 0 < after[0] == seen[6][1] < after[1] == after[-1] == seen[-1][1]
    del tried, timed[:]
    gc.collect()
    assert len([ref for ref in pairs if ref() is None]) == len(pairs) > 0


def test_trainer_compiled(tmp_path: Path, timed: list[Any]) -> None:
    arguments = {"save_strategy": "no", "max_steps": 10, "torch_compile": True, "torch_compile_backend": "eager"}
    trainer, callback = run(tmp_path, SPEED, **arguments)
    assert callback.switch_step is None and len(timed) == 6
    assert all(step.is_compiled and step.run is not trainer.model for _, step, _ in timed)
    assert "2 ms as planned" in str(callback.cuttlefish.reason)


def test_what_is_compiled_as_a_whole_is_left_alone(timed: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    def whole(model: nn.Module, **options: Any) -> Any:
        return torch.compile(lambda **batch: model(**batch), **options)

    with caplog.at_level("INFO", "hf_cuttlefish"):
        train(whole)
    assert not timed
    why = "groups of layers decide: the training step is compiled as a whole, and not the model"
    assert f"whole steps were not measured, and {why}" in caplog.text


def test_a_compiled_forward_is_found() -> None:
    model = tiny_bert()
    assert compiled_runner(model) is None
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    assert compiled_runner(model) is model
    other = nn.Linear(2, 2)
    wrapped = torch.compile(other, backend="eager")
    assert compiled_runner(other) is wrapped


def test_what_cannot_be_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuttlefish = Cuttlefish(model := tiny_bert(), torch.optim.SGD(model.parameters(), 0.1), SPEED, total_steps=20)
    plan: Any = {}
    engine, watch = cuttlefish.engine, cuttlefish.watch
    trial = Trial(engine, watch, 200)
    assert not trial.multiplies
    with pytest.raises(UnableError, match="no batch of the run is kept"):
        trial(plan, [])
    for name, value in (("holds_whole_weights", False), ("fixed", "its flat weights"), ("replicas", 2)):
        with monkeypatch.context() as patched:
            patched.setattr(engine, name, value, raising=False)
            with pytest.raises(UnableError, match="under Engine no other layers can take a place"):
                trial(plan, [])
    watch.early = KeptBatches(model)
    watch.early.start()
    model(input_ids=torch.ones(2, 3, dtype=torch.long)).logits.sum().backward()
    watch.early.stop()
    monkeypatch.setattr(engine.processes, "size", 2)
    model.add_module("norm", nn.SyncBatchNorm(2))
    with pytest.raises(UnableError, match="SyncBatchNorm waits"):
        trial(plan, [])


def test_under_ddp_the_main_process_measures_and_all_agree() -> None:
    assert "both took the plan of whole steps, eager and compiled" in launch(2, "speed_loop.py")
