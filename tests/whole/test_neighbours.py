"""Neighbours in the ecosystem: what trains, changes, exports and serves a factorized model beside Trainer itself.

Each of them is an optional package: its tests are skipped, with the reason, where it is not installed.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers.integrations import peft as hf_peft

from hf_cuttlefish import (
    Cuttlefish,
    CuttlefishCallback,
    CuttlefishConfig,
    LowRankLinear,
    estimate_ranks,
    factorize,
    follow_checkpoints,
    merge,
)
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from tiny_models import BERT, BY_NAME, LLAMA, T5, add_noise, assert_close, assert_same, image, outputs, text

STEPS, SWITCH = 12, 6
CONFIG = CuttlefishConfig(switch_step=SWITCH, rank_multiple=4, target_ratio=0.4)
QUERY = "bert.encoder.layer.0.attention.self.query"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
Auto = hf.AutoModelForSequenceClassification


def make(name: str = "bert", rank: int | None = 4) -> hf.PreTrainedModel:
    model = BY_NAME[name].build()
    if rank is not None:
        factorize(model, dict.fromkeys(find_targets(model), rank))
    return model


def arguments(folder: Path, cls: type = hf.TrainingArguments, **changes: Any) -> Any:
    options = {"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    options |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3}
    return cls(**{**options, **changes})


def rows(count: int = 32) -> list[dict[str, Any]]:
    ids = torch.randint(3, 99, (count, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


def tokenizer() -> hf.PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", model_max_length=16, **special)


# --- PEFT ---


def test_lora_trains_saves_and_merges_on_a_factorized_model(tmp_path):
    """The low-rank base stays frozen and as it is; adapter, merged factors and merged dense layers all say the same."""
    peft = pytest.importorskip("peft")
    base = make()
    base.save_pretrained(tmp_path / "base")
    before = {name: p.clone() for name, p in base.state_dict().items()}
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    for factor in ("down", "up"):
        assert sum(f".{factor}.lora_A" in name for name, _ in adapted.named_parameters()) == 12
    hf.Trainer(model=adapted, args=arguments(tmp_path, learning_rate=1e-2), train_dataset=rows()).train()
    after = adapted.get_base_model().state_dict()
    names = [name for name in before if ".encoder." in name]
    assert all(torch.equal(before[n], after[n if n in after else _base_layer(n)]) for n in names)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = outputs(adapted, text())
    assert (expected[1] - outputs(make(), text())[1]).abs().max() > 1e-2

    loaded = peft.PeftModel.from_pretrained(Auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert_close(outputs(loaded, text()), expected, 1e-6)
    merged = loaded.merge_and_unload()
    assert len(low_rank_layers(merged)) == 12
    assert_close(outputs(merged, text()), expected, 1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(outputs(Auto.from_pretrained(tmp_path / "merged"), text()), expected, 1e-5)
    assert_close(outputs(merge(merged), text()), expected, 1e-5)


def _base_layer(name: str) -> str:
    return f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"


def test_a_model_of_pefts_keeps_the_note_of_the_model_inside(tmp_path):
    """It hands out that model's config, and prefixes its names: with these the folder could not be loaded."""
    peft = pytest.importorskip("peft")
    model = make()
    note = copy.deepcopy(model.config.quantization_config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query.down"]))
    follow_checkpoints(adapted)
    assert model.config.quantization_config == note
    adapted.merge_and_unload().save_pretrained(tmp_path)
    assert len(low_rank_layers(Auto.from_pretrained(tmp_path))) == 12


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_adapters_come_after_the_switch(how):
    """Before it the weights are frozen, and the adapters' own small matrices would be taken for target layers."""
    peft = pytest.importorskip("peft")
    model, lora = make(rank=None), peft.LoraConfig(r=2, target_modules=["query"])
    if how == "add_adapter":
        least = getattr(hf_peft, "MIN_PEFT_VERSION", "0")
        if Version(peft.__version__) < Version(least):
            pytest.skip(f"add_adapter of this transformers asks for peft {least}")
        model.add_adapter(lora)
    else:
        model = peft.get_peft_model(model, lora)
    for use in (find_targets, lambda m: Cuttlefish(m, torch.optim.AdamW(m.parameters()), total_steps=10)):
        with pytest.raises(ValueError, match=r"belongs to PEFT.*factorize first.*merge_and_unload\(\)"):
            use(model)


# --- gradient checkpointing ---


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(tmp_path, reentrant):
    """Blocks that run their forward twice are measured once: the same plan, the same weights at the end."""
    ends = []
    for on in (False, True):
        callback = CuttlefishCallback(CONFIG)
        options = {"activation_checkpointing": on, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = hf.Trainer(
            model=make(rank=None), args=arguments(tmp_path, **options), train_dataset=rows(), callbacks=[callback]
        )
        trainer.train()
        assert trainer.model.bert.encoder.layer[0].gradient_checkpointing == on and callback.switch_step == SWITCH
        ends.append((callback.plan.to_dict(), trainer.model.state_dict()))
    (plan, weights), (other_plan, other_weights) = ends
    assert plan == other_plan and weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


# --- torchao ---


def test_torchao_makes_int8_of_the_factors(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    make().save_pretrained(tmp_path)
    model = Auto.from_pretrained(tmp_path)
    expected = outputs(model, text())[1]
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    pair = model.get_submodule(QUERY)
    assert isinstance(pair, LowRankLinear) and type(pair.down.weight).__module__.startswith("torchao")
    actual = outputs(model, text())[1]
    assert 0 < (actual - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(ValueError, match=r"factors of .*query are quantized.*merge before quantizing"):
        merge(model)


def test_a_model_that_torchao_has_quantized_is_refused():
    """Its tensors say that they are floats; what they cannot do showed as NotImplementedError from deep inside."""
    torchao = pytest.importorskip("torchao.quantization")
    model = make(rank=None)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match="quantized layer cannot be factorized"):
        find_targets(model)
    with pytest.raises(ValueError, match="query is quantized"):
        factorize(model, {QUERY: 4})


# --- export ---


def test_torch_export_gives_the_same_bits():
    model, batch = make(), {k: v for k, v in text().items() if k != "labels"}
    program = torch.export.export(model, (), kwargs=batch)
    assert {f"{QUERY}.down.weight", f"{QUERY}.up.weight"} <= set(program.state_dict)
    assert f"{QUERY}.weight" not in program.state_dict
    assert_same(outputs(program.module(), batch), outputs(model, batch))


def test_onnxruntime_gives_the_same_outputs(tmp_path):
    """Exported once, with free batch and length, and run at two sizes. The file holds the factors, not their products."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    model, batch = make(), {k: v for k, v in text().items() if k != "labels"}
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    program = torch.onnx.export(model, (), kwargs=batch, dynamo=True, dynamic_shapes=free, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for b in (batch, {name: value[:1, :5] for name, value in batch.items()}):
        found = session.run(None, {name: value.numpy() for name, value in b.items()})
        assert_close([torch.from_numpy(found[0])], outputs(model, b), 1e-5)
    held = sum(
        value.const_value.size for value in program.model.graph.initializers.values() if value.dtype.is_floating_point()
    )
    assert held <= sum(p.numel() for p in model.parameters()) + 100


# --- sentence-transformers ---


def test_a_sentence_encoder_switches_saves_and_loads(tmp_path):
    """The encoder lies inside a model that is no PreTrainedModel; its own folder must load all the same."""
    library = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    datasets = pytest.importorskip("datasets")
    encoder = hf.BertModel(hf.BertConfig(**BERT))
    add_noise(encoder)
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    model = library.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    pairs = datasets.Dataset.from_dict(
        {"anchor": ["a b", "c d e", "f", "g h"] * 8, "positive": ["a", "c", "f f", "h"] * 8}
    )
    callback = CuttlefishCallback(CONFIG)
    trainer = library.SentenceTransformerTrainer(
        model=model,
        args=arguments(
            tmp_path / "run", library.SentenceTransformerTrainingArguments, save_strategy="steps", save_steps=STEPS
        ),
        train_dataset=pairs,
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.switch_step == SWITCH and len(callback.plan) == 12
    assert callback.plan.predicted_loss_increase > 0
    texts = ["a b c", "x y"]
    expected = model.encode(texts, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / f"checkpoint-{STEPS}"):
        loaded = library.SentenceTransformer(str(folder), device="cpu")
        assert len(low_rank_layers(loaded)) == 12
        assert_close([loaded.encode(texts, convert_to_tensor=True)], [expected], 1e-6)


# --- Trainer's subclasses ---


def test_seq2seq_trainer_switches_and_generates(tmp_path):
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5))
    add_noise(model)
    ids = torch.randint(3, 99, (24, 7), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row.flip(0)} for row in ids]
    callback = CuttlefishCallback(CONFIG)
    settings = arguments(tmp_path, hf.Seq2SeqTrainingArguments, predict_with_generate=True)
    trainer = hf.Seq2SeqTrainer(model=model, args=settings, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert callback.switch_step == SWITCH and len(callback.plan) == len(low_rank_layers(model)) == 32
    assert callback.plan.predicted_loss_increase > 0
    exactly = {"max_new_tokens": 5, "min_new_tokens": 5}
    predicted = torch.from_numpy(trainer.predict(data[:4], **exactly).predictions)
    expected = model.generate(ids[:4], **exactly)
    assert torch.equal(predicted[:, : expected.shape[1]], expected) and len(expected.unique()) > 1


def test_trls_sft_trainer_switches(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**LLAMA, "vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2})
    )
    add_noise(model)
    callback = CuttlefishCallback(CONFIG)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(
            tmp_path,
            trl.SFTConfig,
            max_length=12,
            save_strategy="steps",
            save_steps=STEPS,
            bf16=False,
            activation_checkpointing=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": ["a b c d e", "f g h", "i j k l", "m n"] * 8}),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.switch_step == SWITCH and len(callback.plan) == len(low_rank_layers(trainer.model)) >= 12
    assert any(
        "loss on the last" in note for note in callback.plan.notes
    )  # measured, though the fused head gives no scores
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    ids = {"input_ids": torch.tensor([[4, 5, 6, 7]])}
    assert_close(outputs(loaded, ids), outputs(trainer.model.eval(), ids), 1e-6)


def test_trls_reference_model_that_follows_is_refused_at_the_start(tmp_path):
    """It is averaged with the model parameter by parameter, and after the switch these are others: said before the first step."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    config = hf.LlamaConfig(**{**LLAMA, "vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2})
    pairs = {"prompt": ["a b", "c d"] * 8, "chosen": ["e f", "g h"] * 8, "rejected": ["i j", "k l"] * 8}
    callback = CuttlefishCallback(CONFIG)

    def trainer(**settings: Any) -> Any:
        return trl.DPOTrainer(
            model=hf.LlamaForCausalLM(config),
            ref_model=hf.LlamaForCausalLM(config),
            args=arguments(
                tmp_path, trl.DPOConfig, max_length=12, bf16=False, activation_checkpointing=True, **settings
            ),
            train_dataset=datasets.Dataset.from_dict(pairs),
            processing_class=tokenizer(),
            callbacks=[callback],
        )

    run = trainer(sync_ref_model=True, ref_model_sync_steps=2)
    with pytest.raises(ValueError, match=r"sync_ref_model=True copies .* set it to False"):
        run.train()
    assert run.state.global_step == 0 and not low_rank_layers(run.model)
    run = trainer(sync_ref_model=False)
    run.train()
    assert callback.switch_step == SWITCH and low_rank_layers(run.model) and not low_rank_layers(run.ref_model)


@pytest.mark.parametrize("packed", [False, True])
def test_trls_completions_give_statistics_and_a_size(tmp_path, packed):
    """Labels of answers alone, chats in one row, activations worked out anew: the moments count what has a gradient."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**LLAMA, "vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2})
    )
    callback = CuttlefishCallback(CuttlefishConfig(switch_step=SWITCH, rank_multiple=4, on_error="raise"))
    rows = {"prompt": ["a b", "f g h", "i", "m n"] * 8, "completion": [" c d e", " d", " j k l", " b a"] * 8}
    options = {"completion_only_loss": True, "packing": packed, "activation_checkpointing": True}
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(tmp_path, trl.SFTConfig, max_length=12, save_strategy="no", bf16=False, **options),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.switch_step == SWITCH and "no usable statistics" not in str(callback.plan.notes)
    assert callback.plan.predicted_loss_increase > 0
    assert any("measured on" in note and "outputs" in note for note in callback.plan.notes)


# --- timm ---


def test_a_vit_of_timm_is_factorized_trained_and_loaded():
    """No PreTrainedModel and no config: the functional API, a loop of one's own, and state_dict."""
    timm = pytest.importorskip("timm", exc_type=ImportError)

    def vit() -> nn.Module:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
        return timm.models.vision_transformer.VisionTransformer(**shape)

    model, pixels = vit(), image()["pixel_values"]
    plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_multiple=4))
    assert set(plan) == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    optimizer = torch.optim.AdamW(model.parameters())
    cuttlefish = Cuttlefish(model, optimizer, CONFIG, total_steps=STEPS)
    for _ in range(STEPS):
        nn.functional.cross_entropy(model(pixels), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
    cuttlefish.end()
    assert cuttlefish.switch_step == SWITCH and cuttlefish.plan.predicted_loss_increase > 0
    again = vit()
    follow_checkpoints(again)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(pixels)
        assert torch.equal(again.eval()(pixels), expected)
        assert_close([merge(again)(pixels)], [expected], 1e-5)


# --- Trainer's other features ---


def trainer_with(folder: Path, callback: CuttlefishCallback, *others: hf.TrainerCallback, **options: Any) -> hf.Trainer:
    def fresh(trial: Any = None) -> hf.PreTrainedModel:
        return make(rank=None)

    return hf.Trainer(
        model_init=fresh,
        args=arguments(folder, **options),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=[callback, *others],
    )


def test_early_stopping_after_the_switch_loads_the_best(tmp_path):
    """It stops the run at step 9; the best checkpoint is the one written at the switch, a factorized one."""

    class Score(hf.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_score"] = {3: 1.0, 6: 0.5}.get(state.global_step, 2.0)

    callback = CuttlefishCallback(CONFIG)
    trainer = trainer_with(
        tmp_path, callback, Score(), hf.EarlyStoppingCallback(early_stopping_patience=1), eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=3, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 9 and trainer.state.best_global_step == SWITCH == callback.switch_step
    best = load_file(tmp_path / f"checkpoint-{SWITCH}" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


def test_early_stopping_before_the_switch_is_said(tmp_path, caplog):
    class Score(hf.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_score"] = float(state.global_step)

    callback = CuttlefishCallback(CONFIG)
    trainer_with(
        tmp_path, callback, Score(), hf.EarlyStoppingCallback(early_stopping_patience=1), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False,
    ).train()  # fmt: skip
    assert callback.switch_step is None and "ended after 4 of 12 steps without a switch" in caplog.text


def test_model_init_starts_dense_each_time(tmp_path):
    callback = CuttlefishCallback(CONFIG)
    trainer = trainer_with(tmp_path, callback)
    trainer.train()
    expected, plan = {k: v.clone() for k, v in trainer.model.state_dict().items()}, callback.plan
    trainer.train()
    assert callback.plan == plan
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def test_model_init_resumes_if_its_models_follow_checkpoints(tmp_path):
    """Trainer makes the model anew after its callbacks have seen the first one; forgotten, the resume is an error."""
    trainer = trainer_with(tmp_path, CuttlefishCallback(CONFIG), save_strategy="steps", save_steps=9)
    trainer.train()
    resume = str(tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match="parameter group"):
        trainer_with(tmp_path, CuttlefishCallback(CONFIG)).train(resume_from_checkpoint=resume)

    def fresh() -> hf.PreTrainedModel:
        model = make(rank=None)
        follow_checkpoints(model)
        return model

    callback = CuttlefishCallback(CONFIG)
    again = hf.Trainer(model_init=fresh, args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
    again.train(resume_from_checkpoint=resume)
    assert callback.switch_step == SWITCH
    expected = trainer.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_hyperparameter_search_switches_in_each_trial(tmp_path):
    pytest.importorskip("optuna")
    seen = []

    class Watch(hf.TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen.append((callback.switch_step, len(low_rank_layers(model)), callback.plan.to_dict()))

    callback = CuttlefishCallback(CONFIG)
    trainer = trainer_with(tmp_path, callback, Watch(), eval_strategy="steps", eval_steps=STEPS)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 2e-3, 2e-3)},
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert best.hyperparameters == {"learning_rate": 2e-3} and trainer.args.learning_rate == 2e-3
    assert [(switch, count) for switch, count, _ in seen] == [(SWITCH, 12)] * 2
    assert seen[0] == seen[1]  # a trial starts from nothing that another left behind


# --- a moving average of the weights ---


def test_an_average_of_the_weights_starts_again_at_the_switch():
    """A copy made before the switch is dense and cannot follow: torch raises, and the loop makes a new one."""
    model = make(rank=None).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cuttlefish = Cuttlefish(model, optimizer, CONFIG, total_steps=STEPS)

    def average() -> torch.optim.swa_utils.AveragedModel:
        return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))

    ema = average()
    for step in range(1, STEPS + 1):
        model(**text()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuttlefish.step():
            with pytest.raises(RuntimeError, match=r"size|shape|broadcast"):
                ema.update_parameters(model)
            ema = average()
        ema.update_parameters(model)
        if step == STEPS - 1:
            before = copy.deepcopy(ema.module.state_dict())
    weights, averaged = model.state_dict(), ema.module.state_dict()
    assert len(low_rank_layers(ema.module)) == len(cuttlefish.plan)
    name = f"{QUERY}.down.weight"
    torch.testing.assert_close(averaged[name], (before[name] + weights[name]) / 2)
