"""`bench`: what it times, what it prints, and what it refuses."""

import json
import shutil
import time

import pytest
import torch

from hf_cuttlefish import factorize
from hf_cuttlefish.cli import main as cli
from hf_cuttlefish.cli.bench import table
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure import serving
from hf_cuttlefish.measure.serving import DECODED, example_inputs, time_calls
from tiny_models import BY_NAME, RANK

QUICK = ["--rounds", "2", "--length", "7", "--device", "cpu"]


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(serving, "ROUND_SECONDS", 0.01)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for family in ("bert", "vit", "llama"):
        model = BY_NAME[family].build()
        model.save_pretrained(root / f"dense {family}")
        factorize(model, dict.fromkeys(find_targets(model), RANK))
        model.save_pretrained(root / family)
    return root


@pytest.fixture
def bench(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = cli.main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


# --- the clock ---


def test_calls_are_timed_in_turn():
    order = []

    def call(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    found = time_calls({"ours": call("ours", 0.02), "other": call("other", 0.06)}, rounds=4)
    assert order[4:] == ["ours", "other", "other", "ours", "ours", "other", "other", "ours"]
    assert 20 <= found["ours"].low <= found["ours"].median <= found["ours"].high
    assert found["ours"].median < found["other"].median and found["other"].low >= 60


def test_a_quick_call_is_repeated():
    count = []
    time_calls({"quick": lambda: count.append(1)}, rounds=1)
    assert len(count) > 50


# --- what a model is given ---


@pytest.mark.parametrize(
    ("family", "shape"), [("bert", (3, 7)), ("llama", (3, 7)), ("t5", (3, 7)), ("vit", (3, 3, 32, 32))]
)
def test_the_example_runs(family, shape):
    model = BY_NAME[family].build()
    inputs = example_inputs(model, 3, 7)
    assert next(iter(inputs.values())).shape == shape and model(**inputs).logits.shape[0] == 3
    assert all(torch.equal(value, example_inputs(model, 3, 7)[name]) for name, value in inputs.items())


def test_roberta_has_fewer_positions_than_its_table():
    model = BY_NAME["roberta"].build()
    rows = model.config.max_position_embeddings
    usable = rows - model.config.pad_token_id - 1
    model(**example_inputs(model, 1, usable))
    with pytest.raises(ValueError, match=f"length is {usable + 1}, and RobertaFor.* has {usable} positions"):
        example_inputs(model, 1, usable + 1)


# --- the command ---


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_json_has_a_row_for_each_batch_and_kind(bench, folders, family):
    code, out, err = bench(folders / family, *QUICK, "--batch", "1", "2", "--json")
    assert code == 0, err
    found = json.loads(out)
    decode = [(1, DECODED), (2, 2 * DECODED)]
    wanted = {(b, "forward", b) for b in (1, 2)} | {(b, "decode", n) for b, n in decode if family == "llama"}
    assert {(row["shape"][0], row["what"], row["count"]) for row in found["rows"]} == wanted
    for row in found["rows"]:
        assert row["ours"]["low"] <= row["ours"]["ms"] <= row["ours"]["high"] and row["against"]["ms"] > 0
        assert row["ratio"] == pytest.approx(row["ours"]["ms"] / row["against"]["ms"])
    dense = sum(p.numel() for p in BY_NAME[family].build().parameters())
    assert found["parameters"]["ours"] < found["parameters"]["against"] == dense
    assert found["bytes"]["against"] == 4 * dense and found["against"] == "its dense form"


def test_against_another_folder_as_a_table(bench, folders):
    code, out, _ = bench(folders / "bert", "--against", folders / "dense bert", *QUICK, "--batch", "1")
    lines = out.splitlines()
    assert code == 0 and f"beside {folders / 'dense bert'}" in lines[0] and "both in turn" in lines[1]
    assert lines[4].split()[:5] == ["torch", "forward", "1", "x", "7"] and " of 1 rows" in lines[-1]


def test_the_last_line_counts_what_does_not_overlap():
    def row(ours, against):
        times = {"ours": ours, "against": against}
        spans = {name: {"low": low, "ms": ms, "high": high} for name, (low, ms, high) in times.items()}
        return {"backend": "torch", "what": "forward", "shape": [1, 8], "count": 1, "ratio": 1.0, **spans}

    rows = [row((1, 2, 3), (4, 5, 6)), row((1, 2, 5), (4, 5, 6)), row((7, 8, 9), (4, 5, 6))]
    facts = {
        **{name: name for name in ("model", "against", "device", "threads", "dtype", "torch", "rounds")},
        **{name: {"ours": 10, "against": 20} for name in ("parameters", "bytes")},
    }
    assert table({**facts, "rows": rows})[-1] == "faster in 1 of 3 rows, slower in 1; in 1 the rounds overlap"


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        ("dense bert", [], "is no factorized model, so it has no dense form: give --against"),
        ("bert", ["--backend", "torch,tensorrt"], "--backend tensorrt: it must be some of torch,onnx,compile"),
        ("bert", ["--length", "4096"], "length is 4096, and BertForSequenceClassification has"),
    ],
)
def test_what_cannot_be_timed(bench, folders, which, options, words):
    code, _, err = bench(folders / which, *QUICK, *options)
    assert code == 1 and words in err


def test_onnx_and_torch_side_by_side(bench, folders):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    code, out, err = bench(folders / "vit", *QUICK, "--backend", "torch,onnx", "--batch", "1", "--json")
    assert code == 0, err
    assert [row["backend"] for row in json.loads(out)["rows"]] == ["torch", "onnx"]


@pytest.fixture
def compiler():
    """torch.compile as a new process has it; it compiles in this one."""
    torch.compiler.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield torch._inductor.config
    torch.compiler.reset()


def test_a_compiled_model_is_timed(bench, folders, compiler):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    code, out, err = bench(folders / "bert", *QUICK, "--backend", "compile", "--batch", "1")
    assert code == 0, err
    row = out.splitlines()[4].split()
    assert row[:5] == ["compile", "forward", "1", "x", "7"] and all(float(cell) > 0 for cell in row[5:])


def test_no_compiler_is_said_in_a_line(bench, folders, compiler):
    with compiler.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
        code, _, err = bench(folders / "bert", *QUICK, "--backend", "compile", "--batch", "1")
    line = err.strip().splitlines()[-1]
    assert code == 1 and line.startswith("hf-cuttlefish: error: torch.compile cannot compile the model here"), err
    assert line.endswith("or leave compile out of --backend")
