"""Steps as one CUDA graph: the same numbers as without, through the switch; what cannot be recorded runs as it is."""

from __future__ import annotations

import contextlib
import gc
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig, GraphedStep
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.patch import graphed_step
from hf_cuttlefish.patch.capture import waiting_seen
from hf_cuttlefish.patch.graph_room import MORE, MOST
from hf_cuttlefish.patch.graphed_step import drop_graphs, has_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: run on a GPU with `pytest -m gpu`"),
]
STEPS = 24
SWITCH = {"switch_step": 10, "statistics_steps": 3, "target_ratio": 0.5, "on_error": "raise"}


def build(dropout: float = 0.1, hidden: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 4}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**sizes, **rates, intermediate_size=4 * hidden, problem_type="single_label_classification")
    return BertForSequenceClassification(config)


def batches(count: int, rows: int = 8, length: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (count, rows, length), generator=generator)
    return [
        {"input_ids": i.cuda(), "attention_mask": torch.ones_like(i).cuda(), "labels": (i[:, 1] > 100).long().cuda()}
        for i in ids
    ]


def train(
    graphs: bool,
    micro: int = 1,
    precision: torch.dtype | None = torch.bfloat16,
    set_to_none: bool = True,
    compiled: bool = False,
) -> tuple[list[float], Any, Any, Cuttlefish]:
    """Losses of a loop through the switch, its model, the graphed step (or the function), and the run."""
    model = build().cuda().train()
    call = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=precision == torch.float16)
    run = Cuttlefish(model, optimizer, CuttlefishConfig(**SWITCH), total_steps=STEPS, scaler=scaler)

    def forward_backward(batch: Any) -> torch.Tensor:
        with torch.autocast("cuda", dtype=precision, enabled=precision is not None):
            loss = call(**batch).loss / micro
        scaler.scale(loss).backward()
        return loss.detach()

    step: Any = GraphedStep(model, forward_backward) if graphs else forward_backward
    torch.manual_seed(5)
    losses = []
    for i, batch in enumerate(batches(STEPS * micro)):
        losses.append(step(batch))
        if (i + 1) % micro == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=set_to_none)
            run.step()
    assert run.switch_step == 10
    assert low_rank_layers(model)
    return [float(loss) for loss in losses], model, step, run


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("micro", [1, 3])
def test_a_run_with_graphs_has_the_losses_of_one_without(precision: Any, micro: int) -> None:
    plain, with_graphs = train(False, micro, precision), train(True, micro, precision)
    assert with_graphs[2].refused is None
    assert has_graphs()
    torch.testing.assert_close(with_graphs[0], plain[0], rtol=2e-3, atol=2e-3)
    for mine, other in zip(with_graphs[1].parameters(), plain[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)


def test_gradients_that_are_set_to_zero_are_not_added_twice() -> None:
    plain, with_graphs = train(False, set_to_none=False), train(True, set_to_none=False)
    torch.testing.assert_close(with_graphs[0], plain[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("order", [(16, 24), (24, 16)])
def test_gradients_add_up_over_micro_batches_of_two_shapes(order: tuple[int, int]) -> None:
    """The graphs share their memory."""
    model = build(dropout=0.0).cuda().train()
    step = GraphedStep(model, lambda batch: _backward(model, batch))
    for length in order:
        for batch in batches(4, length=length):
            step(batch)
            model.zero_grad()
    assert len(step._graphs) == 2
    micro = [batches(1, length=length)[0] for length in (16, 24, 16, 24, 24)]
    for batch in micro:
        step(batch)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for batch in micro:
        _backward(model, batch)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_compiled_code_is_recorded_before_and_after_the_switch() -> None:
    plain, with_graphs = train(False, compiled=True), train(True, compiled=True)
    assert with_graphs[2].refused is None
    assert len(with_graphs[2]._graphs) == 1
    torch.testing.assert_close(with_graphs[0], plain[0], rtol=2e-2, atol=2e-2)


def test_dropout_draws_anew_in_each_replay() -> None:
    model = build(dropout=0.5).cuda().train()
    step = GraphedStep(model, lambda batch: _backward(model, batch))
    one = batches(1)[0]
    losses = []
    for _ in range(8):
        losses.append(float(step(one)))
        model.zero_grad()
    assert has_graphs()
    assert len(set(losses)) == 8


def _backward(model: nn.Module, batch: Any) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("is_seen", [True, False], ids=["seen before", "seen in the recording"])
def test_a_step_that_waits_for_the_device_runs_as_it_is(
    is_seen: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a broken recording has left behind hurts neither dropout nor memory nor another recording."""
    if not is_seen:
        monkeypatch.setattr(graphed_step, "waiting_seen", lambda looks: contextlib.nullcontext([]))
    model = build().cuda().train()
    seen: list[float] = []

    def waits(batch: Any) -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        seen.append(loss.item())
        return loss.detach()

    def losses(step: Any) -> list[float]:
        torch.manual_seed(3)
        found = []
        for batch in batches(8):
            found.append(float(step(batch)))
            model.zero_grad()
        return found

    expected = losses(waits)
    step = GraphedStep(model, waits)
    with caplog.at_level(logging.WARNING):
        assert losses(step) == expected
    assert step.refused is not None
    assert ("waits for the device" if is_seen else "can't be recorded") in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    good = GraphedStep(model, lambda batch: _backward(model, batch))
    torch.testing.assert_close(losses(good), expected)
    assert good.refused is None and good._graphs
    good.drop()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    kept = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    del kept
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_a_step_that_raises_before_it_launches_anything_leaves_nothing_broken() -> None:
    """Its recording ends well, so its memory must not be freed twice: that aborts the process."""
    model = build().cuda().train()

    def raises(batch: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("nothing compiles here")
        return _backward(model, batch)

    step = GraphedStep(model, raises)
    for batch in batches(8):
        step(batch)
        model.zero_grad()
    assert "nothing compiles here" in str(step.refused)
    gc.collect()
    torch.cuda.empty_cache()
    good = GraphedStep(model, lambda batch: _backward(model, batch))
    for batch in batches(5):
        good(batch)
        model.zero_grad()
    assert good.refused is None and good._graphs


def test_random_numbers_of_the_host_are_not_frozen(caplog: pytest.LogCaptureFixture) -> None:
    model = build().cuda().train()

    def draws(batch: Any) -> torch.Tensor:
        keep = torch.rand(()) < 2  # as layerdrop does
        loss = model(**batch).loss * float(keep)
        loss.backward()
        return loss.detach()

    step = GraphedStep(model, draws)
    with caplog.at_level(logging.WARNING):
        for batch in batches(5):
            step(batch)
            model.zero_grad()
    assert step.refused is not None and "layerdrop" in caplog.text


def test_only_so_many_shapes_are_recorded(caplog: pytest.LogCaptureFixture) -> None:
    model = build().cuda().train()
    step = GraphedStep(model, lambda batch: _backward(model, batch))
    with caplog.at_level(logging.WARNING):
        for length in range(8, 8 + MORE + 2):
            for batch in batches(4, length=length):
                step(batch)
                model.zero_grad()
    assert MOST <= len(step._graphs) <= MORE
    assert caplog.text.count("pad to one length") == 1


def test_a_change_of_the_model_is_seen() -> None:
    model = build(dropout=0.0).cuda().train()
    step = GraphedStep(model, lambda batch: _backward(model, batch))
    one = batches(1)[0]

    def loss() -> float:
        model.zero_grad()
        return float(step(one))

    for _ in range(5):
        before = loss()
    model.classifier.weight = nn.Parameter(model.classifier.weight.detach() * 50)
    after = loss()
    assert after != before
    torch.testing.assert_close(after, float(model(**one).loss))
    seen: list[int] = []
    for _ in range(4):
        loss()
    handle = model.classifier.register_forward_hook(lambda *given: seen.append(1))
    loss()
    handle.remove()
    assert seen == [1]


def test_checkpointed_blocks_give_the_same_losses_recorded_or_not() -> None:
    def losses(graphs: bool) -> list[float]:
        model = build().cuda().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        step: Any = (
            GraphedStep(model, lambda batch: _backward(model, batch))
            if graphs
            else (lambda batch: _backward(model, batch))
        )
        torch.manual_seed(3)
        found = []
        for batch in batches(6):
            found.append(float(step(batch)))
            model.zero_grad()
        return found

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-4, atol=1e-4)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.all = {
            k: torch.cat([b[k] for b in batches(STEPS)]).cpu() for k in ("input_ids", "attention_mask", "labels")
        }

    def __len__(self) -> int:
        return len(self.all["labels"])

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {k: v[at] for k, v in self.all.items()}


def run_trainer(folder: Any, graphs: bool | None, **settings: Any) -> tuple[Trainer, CuttlefishCallback]:
    callback = CuttlefishCallback(CuttlefishConfig(**SWITCH), cuda_graphs=graphs)
    how: dict[str, Any] = {
        "bf16": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "optim": "adamw_torch_fused",
    }
    how |= {
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    trainer = Trainer(
        build(), TrainingArguments(str(folder), **(how | settings)), train_dataset=Rows(), callbacks=[callback]
    )
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2, "max_steps": 12}, {"bf16": False, "fp16": True}, {"max_grad_norm": 0.0}],
    ids=["bf16", "accumulating", "fp16", "not clipped"],
)
def test_a_trainer_with_graphs_logs_what_one_without_logs(tmp_path: Any, settings: dict[str, Any]) -> None:
    if "max_steps" in settings:
        settings = settings | {"num_train_epochs": 1}
    plain, _ = run_trainer(tmp_path, False, **settings)
    recorded, callback = run_trainer(tmp_path, True, **settings)
    assert callback.switch_step == 10
    mine, other = ([r for r in t.state.log_history if "loss" in r] for t in (recorded, plain))
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=0.02, abs=0.02)
    assert recorded.state.total_flos == plain.state.total_flos
    assert "training_step" not in vars(recorded)
    assert not has_graphs()


@pytest.mark.parametrize(
    "settings", [{"max_steps": 48}, {"bf16": False, "fp16": True}, {"bf16": False}], ids=["bf16", "fp16", "fp32"]
)
def test_low_rank_steps_are_recorded_unasked(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    plain, _ = run_trainer(tmp_path, False, **settings)
    with caplog.at_level(logging.INFO):
        recorded, callback = run_trainer(tmp_path, None, **settings)
    assert callback.switch_step == 10
    assert caplog.text.index("low-rank steps run as CUDA graphs") < caplog.text.index("run as one CUDA graph from")
    assert "multiplied out" not in caplog.text
    mine, other = ([r for r in t.state.log_history if "loss" in r] for t in (recorded, plain))
    for a, b in zip(mine, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02, abs=0.02)
    assert "training_step" not in vars(recorded)
    assert not has_graphs()


def test_a_full_device_records_nothing_unasked(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.cuda.mem_get_info
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *of: (2**20, real(*of)[1]))
    with caplog.at_level(logging.INFO):
        run_trainer(tmp_path, None, max_steps=96, num_train_epochs=4)
    assert "has no room for one beside steps as they are" in caplog.text
    assert "the low-rank layers run" in caplog.text  # the forms are tried after all
    assert not [r for r in caplog.records if "CUDA graph" in r.message and r.levelno >= logging.WARNING]


def test_what_waits_for_the_device_is_seen_without_a_recording() -> None:
    x = torch.ones(4, device="cuda")
    with waiting_seen() as waits:
        x.sum().item()
    assert len(waits) == 1 and "test_cuda_graphs.py" in waits[0]
    with waiting_seen() as waits:
        x.add_(1)
        torch.tensor([1.0, 2.0], device="cuda")
    assert len(waits) == 1
    with waiting_seen() as waits:
        (x * 2).sum()
    assert not waits and torch.cuda.get_sync_debug_mode() == 0


def test_the_dense_graphs_memory_is_free_after_the_switch() -> None:
    model = build(hidden=256).cuda().train()
    step = GraphedStep(model, lambda batch: _backward(model, batch))
    for batch in batches(4):
        step(batch)
        model.zero_grad()
    assert has_graphs()
    held = torch.cuda.memory_allocated()
    drop_graphs(model)
    gc.collect()
    assert torch.cuda.memory_allocated() < held - sum(p.nbytes for p in model.parameters()) // 2
