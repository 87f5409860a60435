"""The command line as its user meets it: exit codes, one line on stderr, and folders that can be used at once."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Trainer, TrainingArguments

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig, LowRankLinear, estimate_ranks
from hf_cuttlefish.cli import main as cli
from hf_cuttlefish.report.inspection import inspect_model
from tiny_models import BERT, BY_NAME, assert_close, outputs

ROOT = Path(__file__).parents[2]
WORDS = "abcdefgh"
LABELS = ["NUM", "LOC", "HUM"]


def save_tokenizer(folder):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=8, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny classifier with its tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    model = BY_NAME["bert"].build()
    model.config.id2label, model.config.label2id = dict(enumerate(LABELS)), {n: i for i, n in enumerate(LABELS)}
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def factorized(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("factorized") / "out"
    assert cli.main(["factorize", str(dense), str(folder), "--ratio", "0.4", "--rank-multiple", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with labels, as names and as numbers."""
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    rows = [
        f"{' '.join(WORDS[(i + j) % 8] for j in range(3 + i % 4))},{LABELS[i % 3] if i % 2 else i % 3}"
        for i in range(96)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def run(capsys):
    """Runs one command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def assert_fails(result, *parts, code=1):
    found, _, stderr = result
    assert found == code and stderr.count("\n") == 1 and stderr.startswith("hf-cuttlefish: error: "), stderr
    for part in parts:
        assert part in stderr, stderr


# --- inspect ---


def test_inspect_json_has_the_numbers_of_every_rule(run, dense):
    code, out, _ = run("inspect", dense, "--json", "--rank-multiple", "4")
    found = json.loads(out)
    model = BY_NAME["bert"].build()
    assert code == 0 and found["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(found["layers"]) == 12 and not found["statistics"]
    for rule in ("stable_rank", "scaled_stable_rank", "accumulative", "paper", "energy", "ratio"):
        plan = estimate_ranks(model, CuttlefishConfig(rank_rule=rule, rank_multiple=4))
        assert {x["name"]: x["rules"][rule]["rank"] for x in found["layers"] if x["rules"][rule]["rank"]} == dict(plan)
        assert found["rules"][rule]["target_parameters"] == plan.parameters()[1]
        assert found["rules"][rule]["flops_per_token"] == 2 * plan.parameters()[1]
    layer = found["layers"][0]
    weight = model.get_submodule(layer["name"]).weight.detach().double()
    sigma = torch.linalg.svdvals(weight)
    assert layer["stable_rank"] == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2))
    assert (layer["break_even"], layer["parameters"], layer["flops_per_token"]) == (15, 1024, 2048)


def test_inspect_table_plots_and_plan(run, dense, tmp_path):
    files = [tmp_path / n for n in ("map.png", "spectra.svg", "plan.json")]
    options = ["--plot", files[0], "--plot-spectra", files[1], "--save-plan", files[2], "--rule", "energy"]
    code, out, err = run("inspect", dense, *options)
    assert code == 0 and err == ""  # no progress bar where stderr is no terminal
    line = next(line for line in out.splitlines() if line.startswith("bert.encoder.layer.0.intermediate.dense"))
    assert line.split()[1] == "64x32" and "size (energy)" in out and "12 of 12" in out and "no --data" in out
    assert files[0].read_bytes()[:4] == b"\x89PNG" and b"<svg" in files[1].read_bytes()
    code, _, _ = run("factorize", dense, tmp_path / "out", "--plan", files[2])
    ranks = {k: v["rank"] for k, v in json.loads(files[2].read_text())["layers"].items() if v["rank"]}
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert {n: m.rank for n, m in loaded.named_modules() if isinstance(m, LowRankLinear)} == ranks


def test_inspect_with_data_uses_the_metric_of_the_loss(run, dense, data):
    _, out, _ = run("inspect", dense, "--data", data, "--json", "--rank-multiple", "1", "--ratio", "0.3")
    found = json.loads(out)
    assert found["statistics"] and found["rules"]["loss"]["predicted_loss_increase"] > 0
    assert found["rules"]["loss"]["target_parameters"] <= 0.3 * found["rules"]["loss"]["target_parameters_before"]
    assert (
        len({x["rules"]["loss"]["rank"] for x in found["layers"] if x["parameters"] == 1024}) > 1
    )  # not spread evenly


def test_inspect_compares_sizes(run, dense, data, tmp_path):
    files = [tmp_path / "sizes.png", tmp_path / "sizes.html"]
    options = ["--ratios", "0.6", "0.5", "0.3", "--rank-multiple", "1", "--data", data]
    code, out, err = run("inspect", dense, *options, "--plot", files[0], "--html", files[1])
    assert code == 0 and err == "" and "measured loss" in out and "Rows held out: 24" in out
    assert files[0].read_bytes()[:4] == b"\x89PNG" and "<svg" in files[1].read_text()
    _, out, _ = run("inspect", dense, *options, "--json")
    found = json.loads(out)
    assert [round(s["kept"], 1) for s in found["sizes"]] == [0.6, 0.5, 0.3] and found["rows"] == 24
    assert all(0 <= s["measured"]["accuracy"] <= 1 for s in (found["dense"], *found["sizes"]))
    code, out, _ = run("inspect", dense, "--ratios", "0.5", "--rank-multiple", "1")
    assert code == 0 and "No --data" in out


def test_inspect_says_what_does_not_go_with_sizes(run, dense, factorized, data, tmp_path):
    assert_fails(run("inspect", dense, "--ratios", "0.5", "--rule", "energy"), "--rule is of one size")
    assert_fails(run("inspect", dense, "--ratios", "0.5", "--plot", tmp_path / "p.png"), "give --data")
    assert_fails(run("inspect", dense, "--html", tmp_path / "p.html"), "give --ratios")
    assert_fails(run("inspect", dense, "--ratios", "0.5", "--data", data, "--samples", "5"), "holds 5 rows")
    assert_fails(run("inspect", factorized, "--ratios", "0.5"), "is factorized already")


def test_inspect_a_factorized_model_shows_what_it_is(run, factorized, tmp_path):
    code, out, _ = run("inspect", factorized, "--json")
    found = json.loads(out)
    assert code == 0 and set(found["rules"]) == {"now"}
    assert found["rules"]["now"]["parameters"] == found["parameters"] < found["rules"]["now"]["parameters_before"]
    code, out, _ = run("inspect", factorized)
    assert code == 0 and "size (now)" in out
    assert_fails(run("inspect", factorized, "--save-plan", tmp_path / "p"), "is factorized already")
    code, _, err = run(
        "inspect", factorized, "--data", tmp_path / "rows.csv"
    )  # found by trying it: data that nothing asks for
    assert code == 0 and "is not used" in err


def test_a_terminal_sees_a_progress_bar(run, dense, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    hf.utils.logging.enable_progress_bar()
    try:
        code, _, err = run("inspect", dense)
    finally:
        hf.utils.logging.disable_progress_bar()
    assert code == 0 and "0/12" in err and "layers/s" in err


# --- factorize and merge ---


@pytest.mark.parametrize("kind", ["labels", "predictions", "none"])
def test_factorize_writes_a_folder_that_is_ready(run, dense, data, tmp_path, kind):
    texts = data
    if kind == "predictions":
        texts = tmp_path / "texts.txt"
        texts.write_text("\n".join(line.split(",")[0] for line in data.read_text().splitlines()[1:]))
    options = [] if kind == "none" else ["--data", texts]
    code, out, err = run("factorize", dense, tmp_path / "out", "--ratio", "0.5", "--rank-multiple", "1", *options)
    assert code == 0 and err == "" and ("plain SVD" in out) == (kind == "none") and "12 of 12" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_low_rank.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before, after = (hf.pipeline("text-classification", model=str(f), device="cpu") for f in (dense, tmp_path / "out"))
    assert (
        {a["label"] for a in after("a b c", top_k=None)}
        == {a["label"] for a in before("a b c", top_k=None)}
        == set(LABELS)
    )
    assert str(dense) not in (tmp_path / "out" / "README.md").read_text()


def test_data_makes_better_factors_than_plain_svd(dense, data, run, tmp_path):
    errors = {}
    batch = {"input_ids": torch.tensor([[3 + (i + j) % 8 for j in range(5)] for i in range(8)])}
    exact = outputs(hf.AutoModelForSequenceClassification.from_pretrained(dense).eval(), batch)[0]
    for name, options in {"plain": [], "data": ["--data", data]}.items():
        code, _, _ = run("factorize", dense, tmp_path / name, "--ratio", "0.4", "--rank-multiple", "1", *options)
        model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / name).eval()
        errors[name] = float((outputs(model, batch)[0] - exact).square().mean())
        assert code == 0
    assert errors["data"] < 0.5 * errors["plain"]


def test_a_plan_written_by_hand(run, dense, data, tmp_path):
    name = "bert.encoder.layer.0.attention.self.query"
    (tmp_path / "plan.json").write_text(json.dumps({name: 3}))
    code, out, _ = run("factorize", dense, tmp_path / "out", "--plan", tmp_path / "plan.json", "--json", "--data", data)
    assert code == 0 and list(json.loads(out)["plan"]["layers"]) == [name]
    (tmp_path / "plan.json").write_text(json.dumps({"bert.encoder.layer.0.attention.self.qeury": 3}))
    assert_fails(run("factorize", dense, tmp_path / "no", "--plan", tmp_path / "plan.json"), "close names", "query")
    assert not (tmp_path / "no").exists()
    (tmp_path / "plan.json").write_text("{")
    assert_fails(run("factorize", dense, tmp_path / "no", "--plan", tmp_path / "plan.json"), "plan.json is no JSON")
    (tmp_path / "plan.json").write_text('{"layers": {"x": {"rank": 3}}}')
    assert_fails(run("factorize", dense, tmp_path / "no", "--plan", tmp_path / "plan.json"), "plan.json: layer 'x'")


def test_merge_gives_a_dense_folder(run, factorized, tmp_path):
    code, out, _ = run("merge", factorized, tmp_path / "merged")
    assert code == 0 and "merged 12 layers" in out
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    low = hf.AutoModelForSequenceClassification.from_pretrained(factorized).eval()
    full = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert not any(isinstance(m, LowRankLinear) for m in full.modules())
    assert_close(outputs(full, BY_NAME["bert"].inputs()), outputs(low, BY_NAME["bert"].inputs()), 1e-4)
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "merged")("a b")["input_ids"] == [3, 4]
    assert not (tmp_path / "merged" / "README.md").exists()  # it would say how to load a factorized model


# --- folders, names and files that will not do ---


def test_what_is_no_model(run, dense, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    assert_fails(run("inspect", tmp_path / "empty"), "empty is no model: it holds no config.json")
    assert_fails(run("inspect", tmp_path / "nowhere"), "nowhere: no such folder")
    assert_fails(run("inspect", "nobody/no-such-model"), "nobody/no-such-model is no folder here", "HF_HUB_OFFLINE")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert_fails(run("inspect", tmp_path / "broken"), "broken")
    assert_fails(run("merge", dense, tmp_path / "out"), "is no factorized model")
    assert_fails(run("merge", tmp_path / "empty", tmp_path / "out"), "holds no config.json")
    assert_fails(run("factorize", "nobody/no-such-model", tmp_path / "out", "--ratio", "0.5"), "nobody/no-such-model")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_taken(run, dense, factorized, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("old")
    assert_fails(run("merge", factorized, out), "out is not empty", "--force")
    assert_fails(run("merge", factorized, out / "mine.txt"), "mine.txt is a file")
    assert_fails(run("merge", factorized, factorized, "--force"), "is the model itself")
    code, *_ = run("merge", factorized, out, "--force")
    assert (
        code == 0
        and (out / "mine.txt").read_text() == "mine"
        and not (out / "model-00001-of-00002.safetensors").exists()
    )
    assert hf.AutoModelForSequenceClassification.from_pretrained(out).config.model_type == "bert"
    assert not list(out.glob(".partial*"))


def test_a_read_only_output_folder(run, factorized, tmp_path):
    if os.geteuid() == 0:  # root may write anywhere but here
        place = Path("/sys")
        if not place.is_dir():
            pytest.skip("runs as root, and this system has no folder that root cannot write")
    else:
        place = tmp_path / "closed"
        place.mkdir(mode=0o555)
    assert_fails(run("merge", factorized, place / "out"), f"{place / 'out'} cannot be written")


def test_missing_matplotlib_is_said_before_the_work(run, dense, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_fails(run("inspect", dense, "--plot", tmp_path / "a.png"), "pip install hf-cuttlefish[plots]")


def test_data_that_will_not_do(run, dense, tmp_path):
    bad = tmp_path / "bad.csv"
    ways = {
        "text,label\na b,PLACE\n": "the label 'PLACE' is none that the model knows: NUM, LOC, HUM",
        "text,label\na b,7\n": "the label '7'",
        "text,label\n": "holds no text",
        "one,two,label\na,b,0\n": "say which hold the text with --text-column",
        "text,label\na, b,0\n": "entry 1 has more cells than the 2 columns of the first line",
    }
    for content, message in ways.items():
        bad.write_text(content)
        assert_fails(run("factorize", dense, tmp_path / "out", "--ratio", "0.5", "--data", bad), message)
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"text": "a"}\n{"text": \n')
    assert_fails(run("inspect", dense, "--data", lines), "bad.jsonl, line 2: no JSON")
    assert_fails(run("inspect", dense, "--data", tmp_path / "none.txt"), "none.txt: No such file or directory")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_and_other_devices(run, dense, data, tmp_path):
    BY_NAME["bert"].build().save_pretrained(tmp_path)
    assert_fails(run("inspect", tmp_path, "--data", data), "has no tokenizer")
    assert_fails(run("inspect", tmp_path, "--device", "gpu0"), "--device gpu0 cannot be used")


def test_weights_that_are_missing_are_told(run, dense, tmp_path):
    config = hf.BertConfig(**BERT)
    hf.BertModel(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    code, _, err = run("inspect", tmp_path)
    assert code == 0 and "warning" in err and "classifier" in err and "random numbers" in err
    settings["architectures"] = ["NoSuchModel"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_fails(run("inspect", tmp_path), "is a NoSuchModel, which is no class of transformers")


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["inspect"], ["factorize", "m", "o"], ["factorize", "m", "o", "--ratio", "1.5"],
     ["factorize", "m", "o", "--ratio", "0.5", "--rule", "energy"], ["inspect", "m", "--samples", "0"]],
)  # fmt: skip
def test_wrong_usage_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage: hf-cuttlefish" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["inspect", str(tmp_path / "nowhere"), "--debug"])


# --- plot and env ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = [{"input_ids": [3 + i % 5, 4, 5], "labels": i % 3} for i in range(24)]
    options = {"per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(folder / "out", max_steps=6, save_steps=3, logging_steps=1, **options)
    callback = CuttlefishCallback(CuttlefishConfig(switch_step=4, rank_multiple=4))
    Trainer(BY_NAME["bert"].build(), arguments, train_dataset=rows, callbacks=[callback]).train()
    return folder


@pytest.mark.parametrize("what", ["stable-ranks", "ranks", "loss"])
def test_plot_a_run(run, run_folder, tmp_path, what):
    code, out, _ = run("plot", run_folder, tmp_path / "a.png", "--what", what)
    assert code == 0 and "checkpoint-6" in out and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_of_what_is_not_there(run, run_folder, tmp_path):
    early = run_folder / "out" / "checkpoint-3"
    assert_fails(run("plot", early, tmp_path / "a.png", "--what", "ranks"), "there was no switch up to step 3")
    code, *_ = run("plot", early, tmp_path / "a.png")
    assert code == 0
    assert_fails(run("plot", tmp_path, tmp_path / "b.png"), "it is no run of a Trainer")
    assert_fails(run("plot", tmp_path / "nowhere", tmp_path / "b.png"), "no such folder")
    assert_fails(run("plot", run_folder, tmp_path / "b.nonsense"), "nonsense")
    state = json.loads((early / "trainer_state.json").read_text())
    state["stateful_callbacks"] = {}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert_fails(run("plot", tmp_path, tmp_path / "b.png"), "had no CuttlefishCallback")
    code, *_ = run("plot", tmp_path, tmp_path / "b.png", "--what", "loss")
    assert code == 0
    (tmp_path / "trainer_state.json").write_text("{")
    assert_fails(run("plot", tmp_path, tmp_path / "b.png"), "is no state of a Trainer")


def test_env(run):
    code, out, _ = run("env", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["torch"] == torch.__version__ and facts["transformers"] == hf.__version__
    assert facts["devices"] and facts["HF_HUB_OFFLINE"] == "1"
    assert "transformers" in run("env")[1]


# --- as a process ---


def command(*arguments):
    return [sys.executable, "-m", "hf_cuttlefish", *map(str, arguments)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_ctrl_c_is_130_and_leaves_nothing(dense, tmp_path):
    pipe, out = tmp_path / "texts.txt", tmp_path / "out"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        command("factorize", dense, out, "--ratio", "0.5", "--data", pipe), cwd=ROOT, stderr=subprocess.PIPE,
        # Where the tests run behind a shell's `&` SIGINT is ignored, and what is ignored is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with pipe.open("w") as writer:  # opens when the command has come to read it, and then waits for us
        writer.write("a b\n")
        writer.flush()
        assert out.is_dir()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert process.stderr is not None and b"Traceback" not in process.stderr.read() and not out.exists()


def test_hub_name_in_the_cache_and_a_broken_pipe(dense, tmp_path):
    store = tmp_path / "hub" / "models--me--tiny"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("0" * 40)
    (store / "snapshots").mkdir()
    (store / "snapshots" / ("0" * 40)).symlink_to(dense)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command("factorize", "me/tiny", tmp_path / "out", "--rule", "ratio"),
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before a line is written
    error = process.stderr.read().decode()
    assert process.wait(60) == 141 and "Traceback" not in error and "BrokenPipe" not in error
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "base_model: me/tiny" in (tmp_path / "out" / "README.md").read_text()


def test_the_package_stays_quiet_elsewhere(dense, run):
    level = logging.getLogger("hf_cuttlefish").level
    run("inspect", dense)
    assert logging.getLogger("hf_cuttlefish").level == level
    assert inspect_model(BY_NAME["bert"].build()).plans.keys() >= {"loss", "paper"}
