"""The callback in a real Trainer: one run, one switch, logs, and resumes that end on the same bits."""

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig, LowRankLinear
from hf_cuttlefish.patch.learning_rate import SCALE_UNKNOWN
from hf_cuttlefish.saving.checkpoints import STATISTICS_FILE
from tiny_trainer import CONFIG, STEPS, SWITCH, Rows, assert_same_run, run, tiny_bert


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, callback = run(folder)
    return folder, trainer, callback


def test_one_run_switches_and_ends_low_rank(whole):
    _, trainer, callback = whole
    layers = [m for m in trainer.model.modules() if isinstance(m, LowRankLinear)]
    assert callback.switch_step == SWITCH and len(layers) == len(callback.plan) == 12
    held = [id(p) for g in trainer.optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.model.parameters())
    rates = [r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r]
    full = [1e-3 * (1 - (s - 1) / STEPS) for s in range(2, STEPS + 1, 2)]
    after = [
        SCALE_UNKNOWN if s > SWITCH else 1 for s in range(2, STEPS + 1, 2)
    ]  # too short a run to see where it heads
    assert rates == pytest.approx(
        [rate * scale for rate, scale in zip(full, after, strict=True)]
    )  # no step is left out
    assert {r["layer"] for r in callback.history} == {n.removesuffix("") for n in callback.plan}
    assert callback.history[0]["step"] == 0 and callback.report.parameters_after < callback.report.parameters_before
    assert f"step {SWITCH}" in callback.report.headline() and "query" in str(callback.report)


def test_checkpoints_hold_safetensors_and_json_of_ours(whole):
    folder, *_ = whole
    ours = {p.name for p in folder.rglob("*cuttlefish*")}
    assert ours == {STATISTICS_FILE}
    before = load_file(folder / "checkpoint-7" / "model.safetensors")
    after = load_file(folder / "checkpoint-8" / "model.safetensors")
    assert not any("down" in k for k in before) and any("query.down.weight" in k for k in after)
    assert sum(t.numel() for t in after.values()) < sum(t.numel() for t in before.values())
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["CuttlefishCallback"]["attributes"]["_saved"]["switch_step"] == SWITCH


@pytest.mark.parametrize("step", [2, 5, SWITCH - 1, SWITCH, SWITCH + 1, 15])
@pytest.mark.parametrize("restore", [False, True], ids=["", "restored callback"])
def test_resume_is_bit_identical(whole, tmp_path, step, restore):
    """Before the switch, while statistics are gathered (5 to 7), exactly at it, and after."""
    folder, trainer, callback = whole
    again, other = run(
        folder,
        model=tiny_bert(seed=9),  # other weights: everything must come from the checkpoint
        resume=str(folder / f"checkpoint-{step}"),
        save_strategy="steps" if step < SWITCH else "no",
        restore_callback_states_from_checkpoint=restore,
    )
    assert_same_run(trainer, again)
    assert other.history == callback.history and other.switch_step == SWITCH
    assert other.plan == callback.plan and str(other.report).splitlines()[:-1] == str(callback.report).splitlines()[:-1]


def test_resume_from_a_moved_checkpoint_without_its_statistics(whole, tmp_path, caplog):
    """The folder is elsewhere: the statistics are gathered anew and the switch comes later, and both are said."""
    folder, *_ = whole
    shutil.copytree(folder / "checkpoint-6", tmp_path / "moved")
    (tmp_path / "moved" / STATISTICS_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        _, callback = run(tmp_path / "out", resume=str(tmp_path / "moved"), save_strategy="no")
    assert callback.switch_step == 10 and "gathering starts anew" in caplog.text


def test_the_decision_comes_by_itself_and_resumes(tmp_path):
    config = CuttlefishConfig(rank_multiple=4, stable_rank_tolerance=100.0, statistics_steps=2, target_ratio=0.4)
    trainer, callback = run(tmp_path, config, max_steps=40)
    assert callback.reason == "stable ranks have converged" and 12 <= callback.switch_step <= 14
    again, other = run(tmp_path, config, max_steps=40, resume=str(tmp_path / "checkpoint-5"))
    assert_same_run(trainer, again)
    assert other.switch_step == callback.switch_step and other.history == callback.history


def test_the_deadline_switches_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, callback = run(tmp_path, CuttlefishConfig(rank_multiple=4, stable_rank_tolerance=1e-9), save_strategy="no")
    assert callback.switch_step == 8 and "latest switch point" in caplog.text


def test_a_run_without_a_switch_warns_and_says_why(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    with caplog.at_level(logging.WARNING):
        _, callback = run(tmp_path, CuttlefishConfig(switch_step=15), callbacks=[Stop()], save_strategy="no")
    assert callback.switch_step is None and "without a switch" in caplog.text and "step 15" in caplog.text


def test_weights_that_are_not_finite_leave_the_run_full_rank(tmp_path, caplog):
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == SWITCH - 1:
                model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = math.nan

    spoil = Spoil()
    with caplog.at_level(logging.WARNING):
        trainer, callback = run(tmp_path, callbacks=[spoil], save_strategy="no")
    assert callback.switch_step is None and "layer.1.output.dense" in caplog.text and "NaN" in caplog.text
    assert not any(isinstance(m, LowRankLinear) for m in trainer.model.modules())
    assert trainer.state.global_step == STEPS
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense"):
        run(tmp_path, CuttlefishConfig(switch_step=SWITCH, on_error="raise"), callbacks=[spoil], save_strategy="no")


def test_the_log_shows_ranks_parameters_and_the_switch(tmp_path):
    """What any tracker gets: a callback that stands behind ours, as trackers do, sees our numbers."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    folder = tmp_path / "run"
    callback = CuttlefishCallback(CuttlefishConfig(switch_step=SWITCH, rank_multiple=4))
    trainer = Trainer(
        model=tiny_bert(),
        args=TrainingArguments(output_dir=str(folder), max_steps=12, logging_steps=2, report_to=[], save_strategy="no",
                               per_device_train_batch_size=8, disable_tqdm=True, use_cpu=True),
        train_dataset=Rows(),
        callbacks=[Tracker(), callback],
    )  # fmt: skip
    trainer.train()
    losses = [row for row in seen if "loss" in row]
    assert losses[0]["stable_rank"] > 1 and "switch_step" not in losses[0]
    at = next(row for row in losses if "switch_step" in row)
    assert at["switch_step"] == SWITCH and at["parameters"] < losses[0]["parameters"]
    assert any("stable_rank" in row for row in trainer.state.log_history)


def test_load_best_model_goes_back_across_the_switch(tmp_path):
    """The best checkpoint is a full-rank one: the model at the end is dense again, with its weights."""
    scores = iter([9.0, *[1.0] * 100])
    trainer, callback = run(
        tmp_path, eval_strategy="steps", eval_steps=4, save_steps=4, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, callbacks=[_Score(scores)],
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4") and callback.switch_step == SWITCH
    assert not any(isinstance(m, LowRankLinear) for m in trainer.model.modules())
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(v, best[k]) for k, v in trainer.model.state_dict().items())
    trainer.save_model(str(tmp_path / "best"))
    assert "quantization_config" not in json.loads((tmp_path / "best" / "config.json").read_text())


class _Score(TrainerCallback):
    def __init__(self, scores):
        self.scores = scores

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_score"] = next(self.scores)


def test_saved_model_loads_and_is_ordinary(whole, tmp_path):
    _, trainer, _ = whole
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    batch = {k: torch.stack([torch.as_tensor(Rows()[i][k]) for i in range(4)]) for k in ("input_ids", "attention_mask")}
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, trainer.model(**batch).logits)
    again, _ = run(
        tmp_path / "more", model=model, max_steps=2, save_strategy="no"
    )  # already factorized: trains on as it is
    assert any(isinstance(m, LowRankLinear) for m in again.model.modules())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accumulation_and_clipping(tmp_path, accumulation):
    trainer, callback = run(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=0.1, save_strategy="no")
    assert callback.switch_step == SWITCH and trainer.state.global_step == STEPS


def test_accumulation_gives_the_statistics_of_the_larger_batch(tmp_path):
    """Without dropout, 2 x 4 rows and 1 x 8 rows see the same tokens: the same predicted loss."""

    def still():
        model = tiny_bert()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        for layer in model.bert.encoder.layer:
            layer.attention.self.dropout_prob = 0.0
        return model

    predicted = []
    for rows, accumulation in ((8, 1), (4, 2)):
        _, callback = run(tmp_path, model=still(), per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
                          save_strategy="no", learning_rate=0.0)  # fmt: skip
        predicted.append(callback.plan.predicted_loss_increase)
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_optimizers_of_the_trainer_resume(tmp_path, optim):
    trainer, _ = run(tmp_path, optim=optim, save_steps=10)
    again, _ = run(tmp_path, optim=optim, save_strategy="no", resume=str(tmp_path / "checkpoint-10"))
    assert_same_run(trainer, again)


def test_an_optimizer_of_the_users_own_resumes(tmp_path):
    """Made before the checkpoint's weights are loaded: it follows the change of structure."""

    def start(resume):
        model = tiny_bert()
        optimizer = torch.optim.AdamW(
            [{"params": [p for n, p in model.named_parameters() if ("layer.0" in n) == first], "lr": 1e-3 / (1 + first)}
             for first in (True, False)]
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, seed=3,
                                   save_steps=10, report_to=[], disable_tqdm=True, use_cpu=True),
            train_dataset=Rows(),
            callbacks=[CuttlefishCallback(CuttlefishConfig(switch_step=SWITCH, rank_multiple=4))],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = start(None)
    assert_same_run(trainer, start(str(tmp_path / "checkpoint-10")))


def test_frozen_layers_that_are_named_are_factorized_and_stay_frozen(tmp_path):
    model = tiny_bert()
    for p in model.bert.encoder.layer[0].parameters():
        p.requires_grad_(False)
    config = dataclasses.replace(CONFIG, target_modules=["query", "key", "value", "dense"])
    trainer, callback = run(tmp_path, config, model=model, save_strategy="no")
    assert callback.plan.predicted_loss_increase is not None  # its moments were gathered, too
    frozen = trainer.model.bert.encoder.layer[0].attention.self.query
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert isinstance(frozen, LowRankLinear) and not frozen.up.weight.requires_grad and id(frozen.up.weight) not in held
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def test_frozen_layers_stay_dense_by_default_and_the_plan_says_why(tmp_path, caplog):
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    before = {k: v.clone() for k, v in model.bert.encoder.layer[0].state_dict().items()}
    with caplog.at_level(logging.INFO):
        trainer, callback = run(tmp_path, model=model, save_strategy="no")
    assert len(callback.plan) == 6 and all(name.startswith("bert.encoder.layer.1.") for name in callback.plan)
    assert "frozen" in callback.plan.decisions["bert.encoder.layer.0.output.dense"].reason
    assert any("6 layers stay dense" in note and "frozen" in note for note in callback.plan.notes)
    assert "6 of them are frozen and stay dense" in caplog.text
    after = trainer.model.bert.encoder.layer[0].state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_vit_resumes_in_spite_of_its_legacy_names(tmp_path):
    """transformers saves ViT under old names and loads them raw on resume (its issues 43701, 48805): weights would be lost."""

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            return {"pixel_values": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), "labels": i % 2}

    def vit(seed):
        torch.manual_seed(seed)
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=8,
                patch_size=4,
            )
        )

    trainer, _ = run(tmp_path, model=vit(0), rows=Images(), save_steps=4)
    for step in (4, 12):
        again, callback = run(
            tmp_path, model=vit(1), rows=Images(), save_strategy="no", resume=str(tmp_path / f"checkpoint-{step}")
        )
        assert_same_run(trainer, again)
        assert callback.switch_step == SWITCH


def test_gpt2_switches_saves_and_resumes(tmp_path):
    class Text(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            ids = torch.randint(0, 40, (12,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": ids, "labels": ids}

    def gpt2(seed):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2))

    trainer, callback = run(tmp_path, model=gpt2(0), rows=Text(), save_steps=4)
    assert len(callback.plan) == 8 and callback.plan.predicted_loss_increase > 0
    for step in (4, 12):
        again, _ = run(
            tmp_path, model=gpt2(1), rows=Text(), save_strategy="no", resume=str(tmp_path / f"checkpoint-{step}")
        )
        assert_same_run(trainer, again)


def test_a_mistake_stops_before_training(tmp_path):
    for config, words in (
        (CuttlefishConfig(target_modules=["qurey"]), "close names.*query"),
        (CuttlefishConfig(switch_step=STEPS + 1), f"switch_step is {STEPS + 1}"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, config)
    with pytest.raises(TypeError, match="CuttlefishConfig"):
        CuttlefishCallback("paper")
    assert not list(Path(tmp_path).glob("checkpoint-*"))


def test_joining_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    Trainer(
        model=tiny_bert(),
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, save_steps=10,
                               report_to=[], disable_tqdm=True, use_cpu=True, seed=3),
        train_dataset=Rows(),
    ).train()  # fmt: skip
    _, callback = run(tmp_path, CuttlefishConfig(rank_multiple=4), resume=str(tmp_path / "checkpoint-10"), save_steps=5)
    assert 10 < callback.switch_step <= 15
    with pytest.raises(ValueError, match="resumes at step 10"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-10"))


def test_training_again_after_an_exception_and_after_the_switch(tmp_path):
    """An exception among the gathering steps leaves no hooks behind, and a second train() keeps what the first found."""

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == SWITCH - 2 and not getattr(self, "failed", False):
                self.failed = True
                raise KeyboardInterrupt

    callback = CuttlefishCallback(CONFIG)
    trainer = Trainer(
        model=tiny_bert(),
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, report_to=[],
                               save_strategy="no", disable_tqdm=True, use_cpu=True),
        train_dataset=Rows(),
        callbacks=[callback, Fail()],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert callback.switch_step == SWITCH and not any(m._forward_hooks for m in trainer.model.modules())
    plan, history = callback.plan, callback.history
    trainer.train()
    assert callback.plan == plan and callback.switch_step == SWITCH and callback.history == history


def test_a_rank_that_cannot_be_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"rank of .*query is 33"):
        run(tmp_path, CuttlefishConfig(rank_pattern={"query": 33}))


def test_a_restart_is_not_left_to_a_strategy_that_may_not_save(tmp_path):
    args = TrainingArguments(
        tmp_path, max_steps=4, save_strategy="best", eval_strategy="steps", eval_steps=2, metric_for_best_model="loss",
        use_cpu=True, report_to=[],
    )  # fmt: skip
    callback = CuttlefishCallback(CuttlefishConfig(switch="restart"))
    trainer = Trainer(tiny_bert(), args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback])
    with pytest.raises(ValueError, match="save_strategy is 'best'"):
        trainer.train()


def test_data_parallel_switches_in_place(tmp_path):
    """As on a machine with two GPUs and one process, where Trainer wraps the model by itself; without GPUs it calls the model."""
    runs = []
    for gpus in (1, 2):
        callback = CuttlefishCallback(CuttlefishConfig(switch_step=3, target_ratio=0.5, rank_multiple=2))
        made = Trainer(
            model=tiny_bert(),
            args=TrainingArguments(
                output_dir=str(tmp_path / str(gpus)), max_steps=6, save_strategy="no", report_to=[], use_cpu=True
            ),
            train_dataset=Rows(),
            callbacks=[callback],
        )
        made.args._n_gpu = gpus
        made.train()
        assert isinstance(made.model_wrapped, torch.nn.DataParallel) is (gpus == 2)
        assert callback.switch_step == 3 and any(isinstance(m, LowRankLinear) for m in made.model.modules())
        runs.append(callback.plan)
    assert dict(runs[0]) == dict(runs[1])
