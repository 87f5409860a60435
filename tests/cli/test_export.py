"""`export`: a folder in another form, whole or not at all."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import transformers as hf

from hf_cuttlefish import factorize
from hf_cuttlefish.cli import main as cli
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.saving.doors import STANDALONE_FILE
from tiny_models import BY_NAME, RANK, assert_close, outputs

ROOT = Path(__file__).parents[2]
IDS = torch.arange(3, 9)[None]
CONVERTER = os.environ.get("LLAMA_CPP")


def save(folder, family="bert", **kwargs):
    model = BY_NAME[family].build()
    factorize(model, dict.fromkeys(find_targets(model), RANK))
    model.save_pretrained(folder, **kwargs)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("low") / "rank"
    save(path)
    return path


@pytest.fixture
def export(capsys):
    """Runs `export` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main(["export", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def assert_fails(result, *parts):
    code, _, stderr = result
    lines = [line for line in stderr.splitlines() if line.startswith("hf-cuttlefish: error: ")]
    assert code == 1 and len(lines) == 1 and all(part in lines[0] for part in parts), stderr


def left(folder: Path):
    """What lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.rglob("*"))


def needs(kind):
    """Skips where a package for this format is missing."""
    for package in {"onnx": ["onnx", "onnxscript", "onnxruntime"], "gguf": ["gguf"]}.get(kind, []):
        pytest.importorskip(package)


# --- dense ---


def test_dense_answers_as_the_factors_do(export, folder, tmp_path):
    code, out, _ = export(folder, tmp_path / "out", "--format", "dense")
    assert code == 0 and "12 layers" in out
    cls = hf.BertForSequenceClassification
    dense, low = cls.from_pretrained(tmp_path / "out"), cls.from_pretrained(folder)
    assert not low_rank_layers(dense) and sum(p.numel() for p in dense.parameters()) == int(
        out.split("-> ")[1].split(" param")[0].replace(",", "")
    )
    assert_close(outputs(dense.eval(), {"input_ids": IDS}), outputs(low.eval(), {"input_ids": IDS}), 1e-5)


def test_dense_of_a_dense_model_is_refused(export, tmp_path):
    BY_NAME["bert"].build().save_pretrained(tmp_path / "dense")
    assert_fails(export(tmp_path / "dense", tmp_path / "out", "--format", "dense"), "is no factorized model")
    assert not (tmp_path / "out").exists()


def test_a_sharded_folder_and_one_that_lacks_a_shard(export, tmp_path):
    save(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1 and export(tmp_path / "shards", tmp_path / "out", "--format", "dense")[0] == 0
    shards[0].unlink()
    assert_fails(export(tmp_path / "shards", tmp_path / "new" / "out", "--format", "dense"), shards[0].name)
    assert not (tmp_path / "new").exists()


# --- what cannot be exported ---


@pytest.mark.parametrize("kind", ["dense", "onnx", "gguf"])
def test_a_quantized_model_is_refused_by_name(export, folder, tmp_path, kind):
    needs(kind)
    shutil.copytree(folder, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit(1)\n")
    options = ["--converter", tmp_path] if kind == "gguf" else []
    out = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    assert_fails(export(tmp_path / "packed", out, "--format", kind, *options), "is quantized (gptq)", "before it was")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "dense", "--int8"], "--int8 goes with --format onnx"),
        (["--format", "gguf", "--int8"], "--outtype q8_0"),
        (["--format", "onnx", "--converter", "x"], "go with --format gguf, not with onnx"),
    ],
)
def test_options_that_do_not_go_together(export, folder, tmp_path, options, words):
    assert_fails(export(folder, tmp_path / "out", *options), words)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime"), ("gguf", "gguf")])
def test_a_missing_extra_is_named_before_the_work(export, folder, tmp_path, monkeypatch, kind, package):
    for name in ("onnx", "onnxscript", "onnxruntime", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_fails(export(folder, tmp_path / "out", "--format", kind), f"pip install hf-cuttlefish[{kind}]")
    assert left(tmp_path) == []


def test_a_file_is_no_folder(export, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = export(tmp_path / "model.gguf", tmp_path / "out", "--format", "dense")
    assert_fails(result, "is a file", "gguf_file=")


def test_a_changed_modelling_file_is_not_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "changed")
    with open(tmp_path / "changed" / STANDALONE_FILE, "a") as file:
        file.write("\nimport pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    command = [sys.executable, "-m", "hf_cuttlefish", "export", tmp_path / "changed", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command), "--format", "dense"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "is not the text that hf_cuttlefish writes" in done.stderr, done.stderr
    assert not (tmp_path / "changed" / "ran").exists()


def test_damaged_weights_are_not_taken_for_a_full_disk(export, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "model.safetensors", 1000)
    code, _, stderr = export(tmp_path / "damaged", tmp_path / "new" / "out", "--format", "dense")
    assert code == 1 and "hf-cuttlefish: error: " in stderr and "cannot be written" not in stderr, stderr
    assert not (tmp_path / "new").exists()


# --- no room ---


def test_no_room_is_said_before_anything_is_written(export, folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 99, 99))
    assert_fails(export(folder, tmp_path / "new" / "out", "--format", "dense"), "no room for", "the disk has 99")
    assert left(tmp_path) == []


@pytest.mark.parametrize("kind", ["dense", "onnx", "gguf"])
def test_a_write_that_fails_half_way_leaves_nothing(folder, tmp_path, kind):
    """The file system takes files of 8 KB at most, which is less than the weights."""
    needs(kind)
    out = tmp_path / "new" / ("out.gguf" if kind == "gguf" else "out")
    arguments = ["export", str(folder), str(out), "--format", kind]
    if kind == "gguf":
        (tmp_path / "clone").mkdir()
        (tmp_path / "clone" / "convert_hf_to_gguf.py").write_text("raise SystemExit('not reached')\n")
        arguments += ["--converter", str(tmp_path / "clone")]
    code = (
        "import resource, signal, sys\n"
        "from hf_cuttlefish.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        f"sys.exit(main({arguments!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith(f"hf-cuttlefish: error: {out} cannot be"), done.stderr
    assert "File too large" in said and not (tmp_path / "new").exists()


def mounted(place: Path, size: str) -> bool:
    """Whether a file system of that size could be put there, which takes root."""
    if os.geteuid() or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("kind", ["dense", "onnx", "gguf"])
def test_a_disk_that_is_too_small(export, folder, tmp_path, kind):
    """A real one: a file system of 64 KB."""
    needs(kind)
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, "64k"):
        pytest.skip("no file system can be mounted here")
    try:
        options = []
        if kind == "gguf":
            (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('not reached')\n")
            options = ["--converter", tmp_path]
        out = disk / "new" / ("out.gguf" if kind == "gguf" else "out")
        # The factors alone would fit, the graph beside them does not.
        words = [f"{out} cannot be written: No space left"] if kind == "onnx" else [f"no room for {out}", "has 65,536"]
        assert_fails(export(folder, out, "--format", kind, *options), *words)
        assert left(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# --- onnx ---


def test_onnx_is_held_against_torch_at_three_shapes(export, folder, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    code, out, _ = export(folder, tmp_path / "out", "--format", "onnx")
    assert code == 0 and all(f"  {shape}: differs" in out for shape in ("2 x 16", "1 x 5", "3 x 9"))
    model = hf.BertForSequenceClassification.from_pretrained(folder).eval()
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    mask = torch.ones_like(IDS)
    (found,) = session.run(["logits"], {"input_ids": IDS.numpy(), "attention_mask": mask.numpy()})
    assert_close([torch.from_numpy(found)], outputs(model, {"input_ids": IDS, "attention_mask": mask}), 1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*fp32*"))


def test_int8_is_smaller_and_near(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from hf_cuttlefish.saving.onnx_export import export_onnx

    config = hf.BertConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    model = hf.BertModel(config).eval()
    factorize(model, dict.fromkeys(find_targets(model), 24))
    export_onnx(model, tmp_path / "exact.onnx")
    found = export_onnx(model, tmp_path / "packed.onnx", int8=True)
    assert left(tmp_path) == ["exact.onnx", "packed.onnx"]
    assert (tmp_path / "packed.onnx").stat().st_size < 0.75 * (tmp_path / "exact.onnx").stat().st_size
    assert 0 < max(found.values()) < 0.1


def test_a_graph_that_torch_cannot_write(export, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save(tmp_path / "t5", "t5")
    assert_fails(export(tmp_path / "t5", tmp_path / "new" / "out", "--format", "onnx"), "torch.onnx cannot export T5")
    assert not (tmp_path / "new").exists()


# --- gguf ---


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('ERROR:hf-to-gguf:Model X is not supported'); sys.exit(1)", "Model X is not supported"),
        ("open(out, 'wb').write(b'GGUF half of it'); raise RuntimeError('no more')", "no more"),
        ("open(out, 'wb').write(b'something else')", "is no GGUF file"),
        ("pass", "cannot write this model: it said nothing"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(export, tmp_path, script, words):
    """Faults of the converter, by scripts in its place; the real one is below."""
    pytest.importorskip("gguf")
    save(tmp_path / "low")
    (tmp_path / "low" / "tokenizer.json").write_text("{}")
    (tmp_path / "clone").mkdir()
    text = f"import sys\nout = sys.argv[sys.argv.index('--outfile') + 1]\n{script}\n"
    (tmp_path / "clone" / "convert_hf_to_gguf.py").write_text(text)
    target = tmp_path / "new" / "model.gguf"
    assert_fails(export(tmp_path / "low", target, "--format", "gguf", "--converter", tmp_path / "clone"), words)
    assert not target.parent.exists()


def test_gguf_says_what_it_lacks(export, folder, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")
    assert_fails(export(folder, tmp_path / "m.gguf", "--format", "gguf"), "--converter", "a clone of llama.cpp")
    result = export(folder, tmp_path / "m.gguf", "--format", "gguf", "--converter", tmp_path)
    assert_fails(result, "holds no convert_hf_to_gguf.py")
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert_fails(export(folder, tmp_path / "m", "--format", "gguf", "--converter", tmp_path), "ends in .gguf")
    assert_fails(export(folder, tmp_path / "m.gguf", "--format", "gguf", "--converter", tmp_path), "has no tokenizer")
    assert left(tmp_path) == ["convert_hf_to_gguf.py"]


@pytest.mark.skipif(not CONVERTER, reason="LLAMA_CPP names no clone of llama.cpp")
def test_llama_cpps_converter_writes_a_file_with_the_same_answers(export, tmp_path):
    """What it wrote is read by transformers, and by llama.cpp itself where llama-cpp-python is installed."""
    pytest.importorskip("gguf")
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, file = tmp_path / "low", tmp_path / "model.gguf"
    folder.mkdir()
    lines = [f"the {a} {b} a {c}" for a in ("cat", "dog", "bird") for b in ("sees", "eats") for c in ("house", "tree")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_prefix=str(folder / "tokenizer"), vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(**shape, vocab_size=size, max_position_embeddings=64)
    model = hf.LlamaForCausalLM(config).eval()
    factorize(model, dict.fromkeys(find_targets(model), 12))
    model.save_pretrained(folder)
    code, out, err = export(folder, file, "--format", "gguf", "--outtype", "f32", "--converter", CONVERTER)
    assert code == 0 and "llama, 21 tensors" in out and "GGUF has no low-rank layers, so 14" in out, err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    read = hf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    wanted = model(IDS).logits.detach()
    assert_close([read(IDS).logits.detach()], [wanted], 1e-4)
    if importlib.util.find_spec("llama_cpp"):
        run = importlib.import_module("llama_cpp").Llama(
            str(file), n_ctx=32, logits_all=True, verbose=False, n_threads=1
        )
        run.eval(IDS[0].tolist())
        assert_close([torch.tensor(run.scores[: IDS.shape[1]])], [wanted[0]], 1e-2)


@pytest.mark.skipif(not CONVERTER, reason="LLAMA_CPP names no clone of llama.cpp")
def test_an_architecture_that_llama_cpp_does_not_know(export, tmp_path):
    pytest.importorskip("gguf")
    save(tmp_path / "low", "vit")
    (tmp_path / "low" / "tokenizer.json").write_text("{}")
    result = export(tmp_path / "low", tmp_path / "new" / "m.gguf", "--format", "gguf", "--converter", CONVERTER)
    assert_fails(result, "ViTForImageClassification is not supported")
    assert not (tmp_path / "new").exists()
