"""Through the switch compiled: the losses of an uncompiled run, old graphs gone, accumulation, checkpointing and resume."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, factorize, merge
from hf_cuttlefish.decide.even import PARTS
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.engines.around import compiles_blocks
from hf_cuttlefish.engines.base import Engine
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.measure.eager import said_of_shapes
from tiny_trainer import CONFIG, SWITCH, assert_same_run, run, tiny_bert

pytestmark = pytest.mark.usefixtures("nothing_compiled")
STEPS = 14
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(folder: Path, **arguments: Any) -> tuple[Any, Any]:
    arguments = {"save_strategy": "no", "max_steps": STEPS, "logging_steps": 1} | arguments
    return run(folder, **arguments)


def without_dropout() -> BertForSequenceClassification:
    """A checkpointed block draws other random numbers when torch's compiler runs it, with or without us."""
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "bf16": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["accumulation in bf16", "checkpointing"],
)
def test_trainer_loses_what_it_would_uncompiled(tmp_path: Path, more: dict[str, Any]) -> None:
    plain, _ = train(tmp_path, model=without_dropout(), **more)
    compiled, callback = train(tmp_path, model=without_dropout(), **more, **COMPILED)
    assert callback.switch_step == SWITCH and low_rank_layers(compiled.model)
    assert len(losses(compiled)) == STEPS
    assert losses(compiled) == pytest.approx(losses(plain), rel=2e-2 if more.get("bf16") else 1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert callback.cuttlefish.phase.multiplied is None


def test_a_compiled_run_resumes_before_and_after_the_switch(tmp_path: Path) -> None:
    whole, _ = train(tmp_path, save_strategy="steps", save_steps=1, **COMPILED)
    for step in (SWITCH - 1, SWITCH + 2):
        again, callback = train(tmp_path, model=tiny_bert(9), resume=str(tmp_path / f"checkpoint-{step}"), **COMPILED)
        assert callback.switch_step == SWITCH
        assert_same_run(whole, again)


def test_the_losses_are_the_same_with_dropout_and_graphs_of_the_dense_model_go(tmp_path: Path) -> None:
    weights: list[weakref.ref[Any]] = []

    class Look(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            weights.extend(weakref.ref(layer.weight) for layer in find_targets(model).values())

    plain, _ = train(tmp_path)
    compiled, _ = train(tmp_path, callbacks=[Look()], **COMPILED)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    factorized = low_rank_layers(compiled.model)
    gc.collect()
    assert sum(ref() is None for ref in weights) == len(factorized) > 0


def test_graphs_that_leave_no_room_go_before_statistics_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that gather run uncompiled, and what CUDA graphs hold cannot be used by them: a run that had filled its GPU failed."""
    plain, _ = train(tmp_path)
    forgotten = []
    forget = Engine.forget_compiled
    monkeypatch.setattr(Engine, "forget_compiled", lambda self: (forgotten.append(self.model), forget(self)))
    monkeypatch.setattr("hf_cuttlefish.measure.watch.lacks_room_beside_graphs", lambda device: True)
    compiled, callback = train(tmp_path, **COMPILED)
    assert forgotten == [compiled.model] and callback.switch_step == SWITCH
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 1


def test_the_recipe_for_gpus_compiles_block_by_block_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/fast-on-a-gpu.md, as it stands there, but for the backend."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    unwaited = {"logging_nan_inf_filter": False, "accelerator_config": {"non_blocking": True}}
    recipe = COMPILED | unwaited | {"dataloader_drop_last": True}
    plain, _ = train(tmp_path / "plain", model=without_dropout())
    saved = {"save_strategy": "steps", "save_steps": SWITCH + 2}
    compiled, callback = train(tmp_path / "blocks", model=without_dropout(), **recipe, **saved)
    wrapped = compiled.model_wrapped
    assert isinstance(wrapped, BertForSequenceClassification) and wrapped is not compiled.model
    assert all(isinstance(block, torch._dynamo.OptimizedModule) for block in wrapped.bert.encoder.layer)
    assert callback.switch_step == SWITCH and low_rank_layers(wrapped)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    again, _ = train(
        tmp_path / "again", model=without_dropout(), resume=str(tmp_path / f"blocks/checkpoint-{SWITCH + 2}"), **recipe
    )
    assert losses(again)[-1] == pytest.approx(losses(compiled)[-1], rel=1e-6)
    compiled.save_model(str(tmp_path / "out"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert low_rank_layers(loaded).keys() == low_rank_layers(compiled.model).keys() != set()


class Blocks:
    """A hand-written loop whose blocks are compiled one by one, as Accelerate's compile_regions does; or none are."""

    def __init__(self, compile: bool) -> None:
        self.model: BertForSequenceClassification = tiny_bert().train()
        if compile:
            for block in self.model.bert.encoder.layer:
                block.compile(backend="eager")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.cuttlefish = Cuttlefish(self.model, self.optimizer, CONFIG, total_steps=20)

    def run(self) -> list[float]:
        found = []
        for step in range(STEPS):
            ids = torch.randint(3, 50, (8, 10), generator=torch.Generator().manual_seed(step))
            torch.manual_seed(step)
            loss = self.model(input_ids=ids, labels=ids[:, 0] % 3).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.cuttlefish.step()
            found.append(float(loss.detach()))
        return found


def test_blocks_compiled_one_by_one() -> None:
    plain, compiled = Blocks(False), Blocks(True)
    wanted = plain.run()
    assert compiled.run() == pytest.approx(wanted, rel=1e-4)
    assert compiled.cuttlefish.switch_step == SWITCH


def test_blocks_of_different_ranks_all_stay_compiled() -> None:
    """torch gives up after 8 versions of one code; ranks that differ are versions."""
    model = tiny_bert()
    blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(10))
    for block in blocks:
        block.compile(backend="eager")
    model.add_module("more", blocks)
    before = torch._dynamo.config.recompile_limit
    try:
        for block in blocks:
            block(torch.ones(1, 8))
        loop = Blocks(False)
        loop.model.add_module("more", blocks)
        loop.optimizer.add_param_group({"params": list(blocks.parameters())})
        loop.run()
        assert torch._dynamo.config.recompile_limit >= 10
    finally:
        torch._dynamo.config.recompile_limit = before


@pytest.mark.parametrize("even", ["auto", False])
def test_blocks_that_share_ranks_share_a_graph(even: bool | str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50, "num_labels": 3}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=7, **sizes)).train()
    for block in model.bert.encoder.layer:
        block.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CuttlefishConfig(switch_step=3, statistics_steps=2, rank_multiple=1, target_ratio=0.4, even_ranks=even)
    cuttlefish = Cuttlefish(model, optimizer, config, total_steps=20)
    graphs = []
    for _ in range(5):
        ids = torch.randint(3, 50, (8, 10))
        model(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    plan = cuttlefish.plan
    assert plan is not None
    kinds = {tuple(plan[name] for name in plan if f"layer.{i}." in name) for i in range(7)}
    assert graphs[-1] - graphs[2] == len(kinds)
    assert (len(kinds) <= PARTS) is bool(even)
    assert any("even ranks (blocks are compiled one by one" in note for note in plan.notes) is bool(even)


def test_blocks_compiled_one_by_one_are_told_from_a_whole_model() -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    for compile, is_so in ((compile_regions, True), (torch.compile, False)):
        torch._dynamo.reset()
        model = tiny_bert()
        assert not compiles_blocks(model)
        compiled = compile(model, backend="eager")
        compiled(input_ids=ids)
        assert compiles_blocks(model) is is_so
        torch._dynamo.utils.counters.clear()


def test_many_shapes_are_said_with_how_to_bound_them() -> None:
    assert said_of_shapes() is None
    torch._dynamo.utils.counters["stats"]["unique_graphs"] = 12
    told = said_of_shapes()
    assert told is not None and "12 graphs" in told and "pad_to_multiple_of" in told


def test_the_report_of_the_switch_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cuttlefish.switch.said_of_shapes", lambda: "many shapes")
    loop = Blocks(False)
    loop.run()
    assert "many shapes" in str(loop.cuttlefish.report)


def test_a_config_of_a_compiled_run_may_ask_for_speed() -> None:
    loop = Blocks(True)
    loop.cuttlefish = Cuttlefish(loop.model, loop.optimizer, CuttlefishConfig(objective="speed"), total_steps=20)
    loop.run()
    assert loop.cuttlefish.watch.flow is not None


def test_a_layer_that_is_compiled_by_itself_runs_as_what_stands_for_it() -> None:
    """torch's wrapper called the dense layer on, whose weight nobody trained any more."""
    model = tiny_bert().eval()
    output = model.bert.encoder.layer[0].output
    output.dense = wrapper = torch.compile(output.dense, backend="eager")
    dense, x = wrapper._orig_mod, torch.randn(3, 64)
    before = wrapper(x)
    factorize(model, {"bert.encoder.layer.0.output.dense._orig_mod": 4})
    pair = low_rank_layers(model)["bert.encoder.layer.0.output.dense._orig_mod"]
    after = wrapper(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, pair(x))
    forgotten = weakref.ref(dense)
    merge(model)
    torch._dynamo.reset()
    del dense, before
    gc.collect()
    assert forgotten() is None
    torch.testing.assert_close(wrapper(x), after, rtol=1e-4, atol=1e-5)
