"""The card: valid front matter, numbers that are the model's, and other people's cards that stay theirs."""

import pytest
import torch
import transformers as hf
import yaml
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Trainer, TrainingArguments

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.report.model_card import BEGIN, END, model_card, write_model_card
from hf_cuttlefish.saving.merged import save_merged
from tiny_models import BY_NAME, RANK


@pytest.fixture
def tokenizer():
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=8, **special)


@pytest.fixture
def model():
    model = BY_NAME["bert"].build()
    layers = find_targets(model)
    dense = "bert.encoder.layer.1.attention.self.value"
    factorize(model, {name: RANK + (name.endswith("query")) for name in layers if name != dense})
    return model


def front_matter(text: str) -> dict:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_front_matter_and_numbers(model):
    card = model_card(
        model,
        name="tiny-trec",
        base_model="me/tiny",
        datasets="trec",
        metrics={
            "eval_accuracy": 0.5,
            "eval_loss": 1.25,
            "eval_runtime": 3.0,
            "epoch": 3.0,
            "eval_steps_per_second": 2,
        },
        license="apache-2.0",
        language="en",
        tags=["demo"],
    )
    data = front_matter(str(card))
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-classification"
    assert data["base_model"] == "me/tiny" and data["datasets"] == ["trec"] and data["license"] == "apache-2.0"
    assert data["tags"] == ["cuttlefish", "low-rank", "demo"] and data["metrics"] == ["accuracy"]
    (index,) = data["model-index"]
    metrics = {m["type"]: m["value"] for m in index["results"][0]["metrics"]}
    assert index["name"] == "tiny-trec" and metrics == {"accuracy": 0.5, "loss": 1.25}

    before = sum(p.numel() for p in BY_NAME["bert"].build().parameters())
    after = sum(p.numel() for p in model.parameters())
    assert f"| parameters | {before:,} | {after:,} | {after / before:.0%} |" in card.text
    assert f"| `bert.encoder.layer.*.attention.self.query` | 32 x 32 | {RANK + 1}, {RANK + 1} |" in card.text
    assert f"| `bert.encoder.layer.*.attention.self.value` | 32 x 32 | {RANK}, dense |" in card.text
    assert "runtime" not in card.text and "| accuracy | 0.5 |" in card.text
    assert "import hf_cuttlefish" in card.text and "AutoModelForSequenceClassification.from_pretrained" in card.text


def test_a_local_path_gets_into_no_card(model, tmp_path):
    model.save_pretrained(tmp_path / "there")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "there")
    card = str(model_card(loaded))
    assert str(tmp_path) not in card and "base_model" not in front_matter(card)
    loaded.config._name_or_path = "google-bert/bert-base-uncased"
    assert front_matter(str(model_card(loaded)))["base_model"] == "google-bert/bert-base-uncased"


def test_the_snippet_of_the_card_runs(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    text = write_model_card(tmp_path, model).text
    code = text.split("```python\n")[1].split("```")[0].replace('"..."', repr(str(tmp_path)))
    monkeypatch.setattr(hf, "pipeline", lambda task, model: (task, model))  # there is no tokenizer in the folder
    found: dict = {}
    exec(code, found)
    assert type(found["model"]) is type(model) and found["pipe"] == ("text-classification", str(tmp_path))


def test_a_card_of_ones_own_stays(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# My model\n\nWritten by hand.\n")
    write_model_card(tmp_path, model, license="apache-2.0", base_model="me/tiny")
    write_model_card(tmp_path, model, metrics={"accuracy": 0.75})
    text = (tmp_path / "README.md").read_text()
    data = front_matter(text)
    assert data["license"] == "mit" and data["tags"] == ["mine", "cuttlefish", "low-rank"]
    assert data["base_model"] == "me/tiny" and data["metrics"] == ["accuracy"]
    assert "Written by hand." in text and text.count(BEGIN) == text.count(END) == 1
    assert "| accuracy | 0.75 |" in text  # the part is the newer one


def test_a_card_without_front_matter_and_a_broken_one(model, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Notes\n")
    write_model_card(tmp_path, model)
    assert "# Notes" in path.read_text() and ModelCard.load(path).data.library_name == "transformers"
    path.write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"front matter of .*README\.md cannot be read"):
        write_model_card(tmp_path, model)
    assert path.read_text() == "---\nlicense: [mit\n---\n"


def test_refusals(model, tmp_path):
    with pytest.raises(ValueError, match="BertForSequenceClassification has no factorized layer"):
        model_card(BY_NAME["bert"].build())
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: save the model first"):
        write_model_card(tmp_path / "nowhere", model)


def test_with_the_trainers_own_card_and_pipelines(tmp_path, tokenizer):
    rows = [{"input_ids": [3 + i % 5, 4, 5], "labels": i % 3} for i in range(24)]
    callback = CuttlefishCallback(CuttlefishConfig(switch_step=4, rank_multiple=4))
    trainer = Trainer(
        model=BY_NAME["bert"].build(),
        args=TrainingArguments(
            tmp_path / "out", max_steps=6, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_tags="trec", dataset="TREC")
    write_model_card(tmp_path / "out", trainer.model, report=callback.report, metrics=metrics)
    path = tmp_path / "out" / "README.md"
    text = path.read_text()
    data = front_matter(text)
    assert {"generated_from_trainer", "cuttlefish"} <= set(data["tags"]) and data["datasets"] == ["trec"]
    assert "### Training hyperparameters" in text and "the layers were exchanged after step 4" in text
    assert f"| loss | {metrics['eval_loss']:.4g} |" in text
    trainer.create_model_card(tags=["mine"])  # writes a new text, as push_to_hub does, and keeps the tags
    assert {"mine", "cuttlefish", "low-rank"} <= set(ModelCard.load(path).data.tags)
    assert path.read_text().count(BEGIN) == 1 and "exchanged after step 4" in path.read_text()
    write_model_card(tmp_path / "out", trainer.model)
    assert path.read_text().count(BEGIN) == 1

    save_merged(trainer.model, tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    answers = []
    for folder in (tmp_path / "out", tmp_path / "merged"):
        pipe = hf.pipeline("text-classification", model=str(folder), device="cpu")
        answers.append(pipe(["a b c", "d e"], top_k=None))
    for low, dense in zip(*answers, strict=True):
        assert [a["label"] for a in low] == [a["label"] for a in dense]
        torch.testing.assert_close(
            torch.tensor([a["score"] for a in low]), torch.tensor([a["score"] for a in dense]), rtol=1e-4, atol=1e-5
        )
