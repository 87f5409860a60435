"""What is decided around a recorded step. A stand-in records here, since there is no GPU: it replays by calling the function again, and
writes the gradients into the tensors that were recorded, as a graph does. The real thing runs in tests/whole/test_cuda_graphs.py."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

import replayed
from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig, GraphedStep
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.patch import graphed_step
from hf_cuttlefish.patch.graph_stamp import stamp

SIZES = replayed.SIZES
Replayed = replayed.Replayed
recording = replayed.recording  # for all tests here


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


def stepper(model: nn.Module) -> GraphedStep:
    def forward_and_backward(batch: Any) -> torch.Tensor:
        loss = model(batch["x"]).square().sum()
        loss.backward()
        return loss.detach()

    return GraphedStep(model, forward_and_backward)


def rows(*shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


def recorded(step: GraphedStep, batch: Any) -> GraphedStep:
    for _ in range(3):
        step.model.zero_grad()
        step(batch)
    assert step._graphs, step.refused
    step.model.zero_grad()
    return step


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("order", [(3, 5), (5, 3)])
def test_gradients_add_up_over_micro_batches_of_two_shapes(order: tuple[int, int]) -> None:
    """Graphs share their memory: the gradient of one lies where the other writes."""
    model = small()
    step = stepper(model)
    for length in order:
        recorded(step, rows(length, 4))
    micro = [rows(3, 4, seed=1), rows(5, 4, seed=2), rows(3, 4, seed=3)]
    for batch in micro:
        step(batch)
    found = gradients(model)
    model.zero_grad()
    for batch in micro:
        step.function(batch)
    for mine, expected in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("of", ["a module", "its config"])
def test_a_number_that_python_reads_is_not_frozen(of: str) -> None:
    """A temperature that a callback anneals: the graph is recorded anew."""
    model: Any = small()
    model.config = SimpleNamespace(scale=1.0)
    owner = model.config if of == "its config" else model
    owner.scale = 1.0

    def forward_and_backward(batch: Any) -> torch.Tensor:
        loss = model(batch["x"]).square().sum() * owner.scale
        loss.backward()
        return loss.detach()

    step = recorded(GraphedStep(model, forward_and_backward), rows(3, 4))
    before = float(step(rows(3, 4)))
    owner.scale = 2.0
    assert float(step(rows(3, 4))) == pytest.approx(2 * before)
    recorded(step, rows(3, 4))
    assert float(step(rows(3, 4))) == pytest.approx(2 * before) and step.refused is None


def test_a_number_that_changes_with_each_step_ends_recording(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = small()
    model.calls = 0
    model.register_forward_hook(lambda module, given, output: setattr(model, "calls", model.calls + 1))
    step = stepper(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2 * graphed_step.UNSTEADY):
            step(rows(3, 4))
    assert "attributes of its modules change from step to step" in caplog.text
    assert model.calls == 2 * graphed_step.UNSTEADY


def test_a_number_that_changes_with_each_optimizer_step_ends_recording_too() -> None:
    """Four micro-batches find it the same, and a graph would be recorded for the last two."""
    model: Any = small()
    model.temperature = 0
    step = stepper(model)
    for _ in range(2 * graphed_step.UNSTEADY):
        model.temperature += 1
        for _ in range(4):
            step(rows(3, 4))
    assert "change from step to step" in str(step.refused)


def test_a_gradient_that_another_graph_has_written_is_kept() -> None:
    """Of two layers each batch uses one: the second graph may write where the first one's gradient lies."""
    model = small()

    def forward_and_backward(batch: Any) -> torch.Tensor:
        loss = model[batch["layer"]](batch["x"]).square().sum()
        loss.backward()
        return loss.detach()

    step = GraphedStep(model, forward_and_backward)
    batches = [{"x": rows(3, 4)["x"], "layer": 0}, {"x": rows(3, 8)["x"], "layer": 1}]
    for batch in batches:
        recorded(step, batch)
    for batch in batches:
        step(batch)
    found = gradients(model)
    model.zero_grad()
    for batch in batches:
        forward_and_backward(batch)
    for mine, expected in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(mine, expected)


def test_what_waits_is_not_recorded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The first time it may have looked at a mask: steps with masks of their own are looked at again."""
    looked: list[bool] = []

    @contextlib.contextmanager
    def seen(looks: bool) -> Any:
        looked.append(looks)
        yield ["loss.py, line 3"] if looks else []

    monkeypatch.setattr(graphed_step, "waiting_seen", seen)
    step = stepper(small())
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            step(rows(3, 4))
    assert looked == [False, True, False, True]
    assert "it waits for the device in a step (loss.py, line 3)" in caplog.text and not Replayed.count


def test_a_careful_step_asks_for_room(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    room = [True, False]
    monkeypatch.setattr(graphed_step, "fits_beside", lambda device: room.pop(0))
    step = stepper(small())
    step.careful, step.level = True, logging.INFO
    with caplog.at_level(logging.INFO):
        recorded(step, rows(3, 4))
        for _ in range(4):
            step(rows(5, 4))
    assert len(step._graphs) == 1 and step.refused is None and not room
    assert "the device has no memory for more graphs" in caplog.text
    room.append(False)
    other = stepper(small())
    other.careful = True
    for _ in range(4):
        other(rows(3, 4))
    assert "no room for one beside" in str(other.refused)


def test_a_new_parameter_with_the_old_memory_is_seen() -> None:
    model = small()
    step = recorded(stepper(model), rows(3, 4))
    model[0].weight = nn.Parameter(model[0].weight.data)
    step(rows(3, 4))
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("change", ["hook", "dropout", "buffer", "frozen", "flag"])
def test_a_change_of_the_model_is_recorded_anew(change: str) -> None:
    model = small()
    model.append(nn.Dropout(0.0))
    model.register_buffer("seen", torch.zeros(2))
    step = recorded(stepper(model), rows(3, 4))
    count, state = Replayed.count, step.state
    step(rows(3, 4))
    assert Replayed.count == count + 1 and step.state == state
    {
        "hook": lambda: model[0].weight.register_hook(lambda gradient: gradient * 0),
        "dropout": lambda: setattr(model[2], "p", 0.5),
        "buffer": lambda: setattr(model, "seen", torch.ones(2)),
        "frozen": lambda: model[0].weight.requires_grad_(False),
        "flag": lambda: model[2].eval(),
    }[change]()
    model.zero_grad()
    step(rows(3, 4))
    assert Replayed.count == count + 1 and step.state == state + 1
    if change == "hook":
        assert model[0].weight.grad is not None and not model[0].weight.grad.any()


def test_a_weight_that_holds_others_inside_has_no_place_of_its_own() -> None:
    """Quantized weights beside adapters: to ask where they lie is an error, or 0."""
    model = small()
    model[0].weight = nn.Parameter(TwoTensor(torch.ones(8, 4), torch.ones(8, 4)), requires_grad=False)
    before = stamp(list(model.modules()))
    assert before == stamp(list(model.modules()))
    model[0].weight = nn.Parameter(TwoTensor(torch.ones(8, 4), torch.ones(8, 4)), requires_grad=False)
    assert before != stamp(list(model.modules()))


def test_parameters_outside_of_the_model_are_trained_where_they_are_named_and_refused_where_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, head = small(), nn.Linear(2, 1)

    def with_head(batch: Any) -> torch.Tensor:
        loss = head(model(batch["x"])).square().sum()
        loss.backward()
        return loss.detach()

    named = recorded(GraphedStep(model, with_head, lambda: head.parameters()), rows(3, 4))
    head.zero_grad()
    named(rows(3, 4))
    assert head.weight.grad is not None
    unnamed = GraphedStep(model, with_head)
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            unnamed(rows(3, 4))
    assert unnamed.refused is not None and "not in the model get gradients" in unnamed.refused
    assert "steps run without CUDA graphs" in caplog.text


def test_a_failed_recording_runs_the_step_and_keeps_nothing(recording: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    step = stepper(model)
    recording.fails = {"why": "it waits"}
    held = weakref.ref(model[0].weight)
    for _ in range(8):
        model.zero_grad()
        step(rows(3, 4))
        assert all(p.grad is not None for p in model.parameters())
    assert step.refused == "what it does can't be recorded (it waits)"
    model[0] = nn.Linear(4, 8)  # as the switch does
    model.zero_grad()
    gc.collect()
    assert held() is None


def test_want_of_memory_keeps_what_is_recorded(recording: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    step = recorded(stepper(model), rows(3, 4))
    recording.fails = {"why": "no room", "no_room": True}
    for _ in range(5):
        step(rows(5, 4))
    assert step.refused is None and len(step._graphs) == 1
    assert caplog.text.count("no memory for more") == 1


def test_a_batch_that_no_graph_can_take_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    step = stepper(model)
    with caplog.at_level(logging.WARNING):
        for i in range(120):
            step({**rows(3, 4), "step": i})
        for _ in range(5):
            step({**rows(3, 4), "of": object()})
    assert caplog.text.count("batches in a row differ") == 1
    assert caplog.text.count("a batch holds object") == 1
    assert not step._graphs


def test_a_function_that_leaves_backward_to_others_is_refused() -> None:
    model = small()
    step = GraphedStep(model, lambda batch: model(batch["x"]).sum())
    with pytest.raises(ValueError, match=r"returns a tensor that has a graph: call backward\(\) in it"):
        step(rows(3, 4))


def test_a_loop_with_graphs_has_the_losses_of_one_without() -> None:
    """Through the statistics and the switch; two shapes, two micro-batches."""

    def run(graphed: bool) -> list[float]:
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**SIZES, problem_type="single_label_classification")).eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        config = CuttlefishConfig(
            switch_step=8, statistics_steps=3, target_ratio=0.5, rank_multiple=1, on_error="raise"
        )
        cuttlefish = Cuttlefish(model, optimizer, config, total_steps=20)

        def forward_and_backward(batch: Any) -> torch.Tensor:
            loss = model(**batch).loss / 2
            loss.backward()
            return loss.detach()

        step: Any = GraphedStep(model, forward_and_backward) if graphed else forward_and_backward
        losses = []
        for i in range(40):
            ids = torch.randint(5, 50, (4, 6 + i % 2), generator=torch.Generator().manual_seed(i))
            losses.append(float(step({"input_ids": ids, "labels": ids[:, 0] % 2})))
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
                cuttlefish.step()
        assert cuttlefish.switch_step == 8 and low_rank_layers(model)
        return losses

    assert run(True) == pytest.approx(run(False), rel=1e-5)
    assert Replayed.count > 10


on_gpu = replayed.on_gpu


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 16},
        {"eval_strategy": "steps", "eval_steps": 5},
        {"max_grad_norm": 0.1},
        {"max_grad_norm": 0.0},
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 5, "max_steps": -1, "num_train_epochs": 4},
    ],
    ids=["plain", "accumulating", "evaluating", "clipped", "not clipped", "smoothed", "shorter last accumulation"],
)
def test_a_trainer_with_graphs_logs_what_one_without_logs(
    tmp_path: Path, on_gpu: None, settings: dict[str, Any]
) -> None:
    expected = replayed.trainer_of(tmp_path, graphed=False, **settings)
    trainer = replayed.trainer_of(tmp_path, **settings)
    assert replayed.logged(trainer) == [pytest.approx(row, rel=1e-3) for row in replayed.logged(expected)]
    assert trainer.state.total_flos == expected.state.total_flos
    assert Replayed.count > 5
    assert not {"training_step", "floating_point_ops"} & set(vars(trainer))


def test_a_trial_of_steps_that_are_not_recorded_is_refused(tmp_path: Path, on_gpu: None) -> None:
    trainer = replayed.trainer_of(tmp_path)
    trainer.callback_handler.callbacks = [
        CuttlefishCallback(CuttlefishConfig(objective="speed"), cuda_graphs=True)
        if isinstance(c, CuttlefishCallback)
        else c
        for c in trainer.callback_handler.callbacks
    ]
    with pytest.raises(ValueError, match="objective is 'speed', which times steps that are not recorded"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_evaluation_costs_no_recording(tmp_path: Path, on_gpu: None) -> None:
    trainer = replayed.trainer_of(tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert Replayed.count >= 24 - 3 - 2 * (
        2 + 1 + 2
    )  # the steps that gather, and warming up before and after the switch


class Raise(TrainerCallback):
    """Another limit for the norm from step 6 on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            args.max_grad_norm = 0.01


def test_another_limit_of_the_norm_is_followed(tmp_path: Path, on_gpu: None) -> None:
    expected = replayed.logged(replayed.trainer_of(tmp_path, graphed=False, also=[Raise()]))
    assert replayed.logged(replayed.trainer_of(tmp_path, also=[Raise()])) == [
        pytest.approx(row, rel=1e-3) for row in expected
    ]


class ReadsStep(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs) * min(1.0, self.state.global_step / 10)


def test_a_loss_that_reads_the_step_is_not_frozen(
    tmp_path: Path, on_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = replayed.logged(replayed.trainer_of(tmp_path, ReadsStep, graphed=False))
    trainer = replayed.trainer_of(tmp_path, ReadsStep)
    with caplog.at_level(logging.WARNING):
        assert replayed.logged(trainer) == [pytest.approx(row, rel=1e-3) for row in expected]
    assert "the loss reads state.global_step" in caplog.text
    assert "numbers that it takes from Python stay" in caplog.text


class ClipsItself(Trainer):
    calls = 0

    def _clip_grad_norm(self, model: Any) -> Any:
        ClipsItself.calls += 1
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        return torch.tensor(0.0)


@pytest.mark.skipif(not hasattr(Trainer, "_clip_grad_norm"), reason="this transformers has no such method")
def test_a_trainer_that_clips_itself_is_not_clipped_before(tmp_path: Path, on_gpu: None) -> None:
    expected = replayed.logged(replayed.trainer_of(tmp_path, ClipsItself, graphed=False))
    assert replayed.logged(replayed.trainer_of(tmp_path, ClipsItself)) == [
        pytest.approx(row, rel=1e-3) for row in expected
    ]
    assert ClipsItself.calls


def test_what_somebody_has_put_on_the_trainer_comes_back(tmp_path: Path, on_gpu: None) -> None:
    trainer: Any = replayed.trainer_of(tmp_path)
    inner = trainer.training_step
    trainer.training_step = lambda *given: inner(*given)
    mine = trainer.training_step
    trainer.train()
    assert trainer.training_step is mine


class GivesOtherData(TrainerCallback):
    """Masks or noise, by a common idiom."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data * 0.5


class PutsViews(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.data.clamp_(-1e-3, 1e-3)


class AddsPenalty(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        (3.0 * model.classifier.weight.square().sum()).backward()


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (GivesOtherData, {}),
        (GivesOtherData, {"gradient_accumulation_steps": 2, "max_steps": 18}),
        (PutsViews, {"gradient_accumulation_steps": 2, "max_steps": 18}),
        (AddsPenalty, {}),
    ],
)
def test_what_a_callback_does_to_gradients_counts_once(
    tmp_path: Path, on_gpu: None, change: type[TrainerCallback], settings: dict[str, Any]
) -> None:
    expected = replayed.logged(replayed.trainer_of(tmp_path, graphed=False, also=[change()], **settings))
    found = replayed.logged(replayed.trainer_of(tmp_path, also=[change()], **settings))
    assert found == [pytest.approx(row, rel=1e-3) for row in expected] and Replayed.count


def test_a_gradient_that_somebody_keeps_stays_as_it_was(tmp_path: Path, on_gpu: None) -> None:
    class Keeps(TrainerCallback):
        def __init__(self) -> None:
            self.last: torch.Tensor | None = None
            self.turns: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            now = model.classifier.weight.grad
            if self.last is not None:
                self.turns.append(float(torch.cosine_similarity(now.flatten(), self.last.flatten(), 0)))
            self.last = now

    plain, graphed = Keeps(), Keeps()
    replayed.logged(replayed.trainer_of(tmp_path, graphed=False, also=[plain]))
    replayed.logged(replayed.trainer_of(tmp_path, also=[graphed]))
    assert graphed.turns == pytest.approx(plain.turns, abs=0.02) and min(plain.turns) < 0.9 and Replayed.count
