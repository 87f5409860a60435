"""`hf-cuttlefish train`: from a file or a folder to a model that loads, and what it says before it begins to train."""

import json

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_cuttlefish import LowRankLinear
from hf_cuttlefish.cli import main as cli
from tiny_models import BY_NAME

WORDS = "abcdefgh"
OPTIONS = ("--epochs", "4", "--batch-size", "8", "--max-length", "12", "--learning-rate", "1e-3", "--cpu")
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def save_tokenizer(folder, template=None):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[MASK]"}
    found = hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=16, **special)
    found.chat_template = template
    found.save_pretrained(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    BY_NAME["bert"].build().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker")
    BY_NAME["llama"].build().save_pretrained(folder)
    save_tokenizer(folder, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewer")
    model = BY_NAME["vit"].build()
    model.save_pretrained(folder)
    size = {"height": model.config.image_size, "width": model.config.image_size}
    hf.ViTImageProcessorPil(size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = cli.main(["train", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def write_rows(path, labels, count=80):
    rows = [f"{' '.join(WORDS[(i + j) % 8] for j in range(3 + i % 4))},{labels[i % len(labels)]}" for i in range(count)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def test_texts(run, classifier, tmp_path):
    data, out = write_rows(tmp_path / "rows.csv", ["10", "9", "x y"]), tmp_path / "deep" / "out"
    code, shown, err = run("--data", data, "--model", classifier, "--out", out, "--json", *OPTIONS)
    assert code == 0, err
    (result,) = json.loads(shown)
    assert result["switch_step"] and result["parameters"] < result["parameters_before"] and 0 <= result["accuracy"] <= 1
    assert "65 rows to train on, 15 to evaluate on, 3 classes" in err  # some of each class
    assert {"README.md", "report.html", "results.json", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert not (out / "checkpoints").exists() and "Loss over the run" in (out / "report.html").read_text()
    model = hf.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "10", 1: "9", 2: "x y"}
    assert any(isinstance(m, LowRankLinear) for m in model.modules())
    assert "accuracy" in (out / "README.md").read_text()
    code, _, err = run("--data", data, "--model", classifier, "--out", out)
    assert code == 1 and "is not empty" in err


def test_compared_with_dense(run, classifier, tmp_path):
    data = write_rows(tmp_path / "rows.csv", ["yes", "no"])
    code, shown, err = run("--data", data, "--model", classifier, "--out", tmp_path / "out", "--compare", *OPTIONS)
    lines = shown.splitlines()
    assert code == 0 and lines[0].split() == ["dense", "cuttlefish"], err
    assert "(100%)" in shown and "of 32" in shown and "report.html" in lines[-1]


def test_images(run, viewer, tmp_path):
    from PIL import Image

    for name, colour in (("dark", 20), ("light", 230)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (12, 9), colour + i).save(tmp_path / "photos" / name / f"{i}.png")
    code, shown, err = run(
        "--data", tmp_path / "photos", "--model", viewer, "--out", tmp_path / "out", "--json", *OPTIONS
    )
    assert code == 0 and json.loads(shown)[0]["switch_step"], err
    model = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "dark", 1: "light"} and (tmp_path / "out" / "preprocessor_config.json").exists()
    (tmp_path / "photos" / "dark" / "3.png").write_bytes(b"no image")
    code, _, err = run("--data", tmp_path / "photos", "--model", viewer, "--out", tmp_path / "other")
    assert code == 1 and "1 of 40 images do not open" in err and "3.png" in err


def test_conversations(run, speaker, tmp_path):
    rows = [
        {"messages": [{"role": "a", "content": "b c d"}, {"role": "b", "content": " ".join(WORDS[i % 5 :])}]}
        for i in range(40)
    ]
    data = tmp_path / "chat.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    code, shown, err = run("--data", data, "--model", speaker, "--out", tmp_path / "out", *OPTIONS)
    assert code == 0 and "perplexity on rows held out" in shown and "language, 32 rows" in err, err
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(isinstance(m, LowRankLinear) for m in model.modules())
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    data.write_text(json.dumps(rows[0]) + '\n{"messages": "hello"}')
    code, _, err = run("--data", data, "--model", speaker, "--out", tmp_path / "other")
    assert code == 1 and "entry 2 holds no messages" in err


def test_texts_for_a_language_model(run, speaker, tmp_path):
    data = tmp_path / "lines.txt"
    data.write_text("\n".join(" ".join(WORDS[i % 4 :]) for i in range(40)))
    code, shown, err = run("--data", data, "--model", speaker, "--out", tmp_path / "out", *OPTIONS)
    assert code == 0 and "perplexity" in shown, err


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, (), "no such file or folder"),
        ("", (), "holds no text"),
        ("text,label\n", (), "holds no text"),
        ("text,topic\na,b\n", ("--text-column", "text"), "has no column 'label'"),
        ("text,label\na,x\nb,x\n", (), "of one class, 'x'"),
        ("text,label\na,0.5\nb,0.25\n", (), "holds scores such as 0.5"),
        ("text,label\na,x\nb,\nc,y\n", (), "1 rows of"),
        ("text,label\na,x\nb,y\n", (), "too few to hold some out"),
        ("text,label\n" + "".join(f"a b,{i}\n" for i in range(60)), (), "60 different values in"),
    ],
)
def test_bad_files_are_refused_before_training(run, classifier, tmp_path, text, options, message):
    data = tmp_path / "rows.csv"
    if text is not None:
        data.write_text(text)
    code, _, err = run("--data", data, "--model", classifier, "--out", tmp_path / "out", *options)
    assert code == 1 and message in err and err.count("\n") == 1, err


def test_an_unknown_class_to_evaluate_on(run, classifier, tmp_path):
    data, other = write_rows(tmp_path / "a.csv", ["x", "y"]), write_rows(tmp_path / "b.csv", ["x", "z"])
    code, _, err = run("--data", data, "--eval-data", other, "--model", classifier, "--out", tmp_path / "out")
    assert code == 1 and "the class 'z'" in err


def test_a_missing_extra_is_named(run, viewer, tmp_path, monkeypatch):
    import sys

    (tmp_path / "photos").mkdir()
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    code, _, err = run("--data", tmp_path / "photos", "--model", viewer, "--out", tmp_path / "out")
    assert code == 1 and "pip install hf-cuttlefish[images]" in err


def test_resume_needs_a_checkpoint(run, classifier, tmp_path):
    data = write_rows(tmp_path / "a.csv", ["x", "y"])
    code, _, err = run("--data", data, "--model", classifier, "--out", tmp_path / "out", "--resume", *OPTIONS)
    assert code == 1 and "holds no whole checkpoint" in err
    assert torch.is_grad_enabled()
