"""Tokenizer, processor, chat template, generation config and the card's facts go along through every door."""

import json
from pathlib import Path

import pytest
import transformers as hf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Trainer, TrainingArguments
from transformers.utils import hub

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig, factorize, save_merged
from hf_cuttlefish.cli.main import main
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.report.model_card import BEGIN
from hf_cuttlefish.saving.doors import STANDALONE_FILE
from tiny_models import BY_NAME, RANK

LABELS = {0: "person", 1: "place", 2: "number"}
FACTS = {"license": "mit", "language": ["en", "de"], "datasets": ["trec"], "base_model": "me/tiny-bert"}
CARD = f"---\n{yaml.safe_dump({**FACTS, 'tags': ['mine']})}---\n\n# Tiny\n\nWritten by hand.\n"


@pytest.fixture
def tokenizer():
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=8, **special)
    made.chat_template = "{{ messages }}"
    return made


@pytest.fixture
def source(tmp_path, tokenizer) -> Path:
    """The folder of a dense model with all that belongs to it."""
    model = BY_NAME["bert"].build()
    model.config.id2label, model.config.label2id = LABELS, {v: k for k, v in LABELS.items()}
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(CARD)
    (tmp_path / "source" / "LICENSE.txt").write_text("mine")
    return tmp_path / "source"


@pytest.fixture
def model(source):
    """It, factorized."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(source).eval()
    factorize(model, dict.fromkeys(find_targets(model), RANK))
    return model


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n", 2)[1])


def assert_ready(folder: Path, low_rank: bool = True) -> None:
    """Names of classes by a pipeline that is given the folder alone; the template; the card's facts, and our part of it."""
    answers = hf.pipeline("text-classification", model=str(folder), device="cpu")("a b c", top_k=None)
    assert {answer["label"] for answer in answers} == set(LABELS.values())
    loaded = hf.AutoTokenizer.from_pretrained(folder)
    assert loaded("a b c")["input_ids"] == [3, 4, 5] and loaded.chat_template == "{{ messages }}"
    data = front_matter(folder)
    assert {key: data[key] for key in FACTS} == FACTS
    text = (folder / "README.md").read_text()
    assert (BEGIN in text) == low_rank == (folder / STANDALONE_FILE).exists() and str(folder.parent) not in text
    assert (folder / "LICENSE.txt").read_text() == "mine"


def test_save_pretrained_and_save_merged(model, tmp_path):
    model.save_pretrained(tmp_path / "low")
    assert_ready(tmp_path / "low")
    save_merged(model, tmp_path / "dense")
    assert_ready(tmp_path / "dense", low_rank=False)
    # once more from the folder: what was written by hand there stays, what was ours goes
    again = tmp_path / "low" / "README.md"
    again.write_text(again.read_text().replace("# Bert", "By hand, too.\n\n# Bert"))
    save_merged(hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "low"), tmp_path / "second")
    assert_ready(tmp_path / "second", low_rank=False)
    text = (tmp_path / "second" / "README.md").read_text()
    assert (
        "By hand, too." in text
        and "this is a dense model" in text
        and "low-rank" not in front_matter(tmp_path / "second")["tags"]
    )


def test_the_command(source, tmp_path, capsys):
    assert main(["factorize", str(source), str(tmp_path / "low"), "--ratio", "0.5", "--rank-multiple", "1"]) == 0
    assert_ready(tmp_path / "low")
    assert main(["merge", str(tmp_path / "low"), str(tmp_path / "dense")]) == 0
    assert_ready(tmp_path / "dense", low_rank=False)


def test_a_tokenizer_that_is_given_comes_first(model, tokenizer, tmp_path):
    tokenizer.chat_template = "{{ mine }}"
    save_merged(model, tmp_path / "dense", tokenizer)
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "dense").chat_template == "{{ mine }}"
    with pytest.raises(TypeError, match="processing_class is a str: it must be a tokenizer or a processor"):
        save_merged(model, tmp_path / "none", "bert")
    assert not (tmp_path / "none").exists()


def test_a_tokenizer_that_is_there_stays(model, tokenizer, tmp_path):
    tokenizer.chat_template = "{{ there }}"
    tokenizer.save_pretrained(tmp_path / "low")
    (tmp_path / "low" / "README.md").write_text("---\nlicense: gpl-3.0\n---\n\nTheirs.\n")
    model.save_pretrained(tmp_path / "low")
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "low").chat_template == "{{ there }}"
    text = (tmp_path / "low" / "README.md").read_text()
    assert "Theirs." in text and BEGIN in text and front_matter(tmp_path / "low")["license"] == "gpl-3.0"


def test_a_model_without_a_source_gets_a_card_and_no_tokenizer(tmp_path):
    model = BY_NAME["llama"].build()
    model.generation_config.max_new_tokens = 7
    factorize(model, dict.fromkeys(find_targets(model), RANK))
    model.save_pretrained(tmp_path / "low")
    save_merged(model, tmp_path / "dense")
    assert not list(tmp_path.glob("*/tokenizer*")) and BEGIN in (tmp_path / "low" / "README.md").read_text()
    assert not (tmp_path / "dense" / "README.md").exists()  # nothing is known that it could say
    for folder in ("low", "dense"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_every_door_of_the_trainer_writes_the_same_card(source, tmp_path, monkeypatch):
    rows = [{"input_ids": [3 + i % 5, 4, 5], "labels": i % 3} for i in range(24)]
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = Trainer(
        hf.AutoModelForSequenceClassification.from_pretrained(source),
        TrainingArguments(str(tmp_path / "out"), save_steps=6, eval_strategy="steps", eval_steps=6, **settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=hf.AutoTokenizer.from_pretrained(source),
        callbacks=[CuttlefishCallback(CuttlefishConfig(switch_step=3, rank_multiple=4))],
    )
    trainer.train()
    trainer.save_model(tmp_path / "final")
    trainer.model.save_pretrained(tmp_path / "plain")
    trainer.save_model()
    trainer.create_model_card()
    uploads = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, operations, **kwargs):
            for operation in operations:
                uploads[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

        def create_branch(self, **kwargs):
            pass

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *a, **k: hub.ModelCard("---\ntags: [theirs]\n---\nTheirs.\n")
    )
    trainer.model.push_to_hub("me/tiny")
    (tmp_path / "hub").mkdir()
    for name, content in uploads.items():
        (tmp_path / "hub" / name).write_bytes(content)
    parts = set()
    for folder in (
        tmp_path / "out" / "checkpoint-6",
        tmp_path / "final",
        tmp_path / "plain",
        tmp_path / "out",
        tmp_path / "hub",
    ):
        assert_ready(folder)
        text = (folder / "README.md").read_text()
        assert "the layers were exchanged after step 3" in text and "| loss |" in text
        parts.add(text[text.index(BEGIN) :])
    assert len(parts) == 1
    assert (
        "Theirs." in (tmp_path / "hub" / "README.md").read_text() and "theirs" in front_matter(tmp_path / "hub")["tags"]
    )
    assert "### Training hyperparameters" in (tmp_path / "out" / "README.md").read_text()


def test_a_trainer_that_writes_a_card_of_its_own_keeps_our_part(source, tmp_path):
    """As TRL's do, without asking Trainer's method."""

    class Own(Trainer):
        def create_model_card(self, *args, **kwargs):
            Path(self.args.output_dir, "README.md").write_text("---\ntags: [own]\n---\n\nOwn.\n")

    model = hf.AutoModelForSequenceClassification.from_pretrained(source)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Own(model, arguments, callbacks=[CuttlefishCallback()])
    trainer.create_model_card()
    assert BEGIN not in (tmp_path / "README.md").read_text()
    factorize(model, dict.fromkeys(find_targets(model), RANK))
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "Own." in text and BEGIN in text and front_matter(tmp_path)["license"] == "mit"


def test_a_push_in_the_middle_finds_the_file_and_the_card(tmp_path):
    """Trainer copies weights and config.json of a checkpoint into the output folder, and uploads that folder."""
    callback = CuttlefishCallback()
    model = BY_NAME["bert"].build()
    factorize(model, dict.fromkeys(find_targets(model), RANK))
    callback.on_push_begin(
        TrainingArguments(str(tmp_path), report_to=[]), hf.TrainerState(is_world_process_zero=True), None, model=model
    )
    assert {STANDALONE_FILE, "README.md"} == {p.name for p in tmp_path.iterdir()}


def test_a_broken_card_is_said_and_the_weights_are_saved(model, tmp_path, caplog):
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "README.md").write_text("---\nlicense: [\n---\n")
    model.save_pretrained(tmp_path / "low")
    assert "got no model card" in caplog.text and (tmp_path / "low" / "model.safetensors").exists()
    hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "low")
