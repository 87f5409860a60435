"""Files that lie, explode or attack: a correct load or a clear error, and nothing else happens (benchmarks/robustness/fuzz)."""

import copy
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from benchmarks.robustness.fuzz import pages
from hf_cuttlefish import Cuttlefish, CuttlefishConfig, LowRankLinear, RankPlan, estimate_ranks, factorize, merge
from hf_cuttlefish.decide.targets import find_targets, matches
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.measure.batches import steps_in
from hf_cuttlefish.measure.history import StableRankHistory
from hf_cuttlefish.measure.moments import MomentCollector
from hf_cuttlefish.patch.report import FactorizationReport
from hf_cuttlefish.saving.doors import STANDALONE_FILE, STANDALONE_TEXT
from hf_cuttlefish.saving.following import follow_checkpoints
from hf_cuttlefish.saving.loading import CuttlefishStructure, names_in
from hf_cuttlefish.saving.run_state import RunState
from tiny_models import BY_NAME, RANK, outputs

ROOT = Path(__file__).parents[2]
MUTATIONS = int(os.environ.get("CUTTLEFISH_MUTATIONS", "150"))
BERT = BY_NAME["bert"]


def small_run():
    """A model, its optimizer and a Cuttlefish that switches at step 4 of 6."""
    model = BERT.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CuttlefishConfig(switch_step=4, statistics_steps=2, check_steps=1, on_error="raise")
    return model, optimizer, Cuttlefish(model, optimizer, config, total_steps=6)


def train(model, optimizer, cuttlefish, steps):
    for _ in range(steps):
        model(**BERT.inputs()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = BERT.build()
    factorize(model, dict.fromkeys(find_targets(model), RANK))
    folder = tmp_path_factory.mktemp("hostile")
    model.save_pretrained(folder)
    return model, folder


def test_mutated_files_load_rightly_or_are_refused(tmp_path):
    """Every door, in processes that are watched; 10,000 with CUTTLEFISH_MUTATIONS or the script itself."""
    out = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "benchmarks.robustness.fuzz", "--mutations", str(MUTATIONS), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600 + 2 * MUTATIONS)
    result = json.loads(out.read_text())
    assert result["findings"] == [] and done.returncode == 0, done.stderr[-2000:]
    assert result["mutations"] >= MUTATIONS - 6
    assert all(counts["unchanged"] == 4 for counts in result["counts"].values())
    assert sum(counts["refused"] for counts in result["counts"].values()) > MUTATIONS / 3


def test_the_page_is_what_the_record_says():
    record, page = json.loads((ROOT / "benchmarks/results/fuzz.json").read_text("utf-8")), pages.PAGE.read_text("utf-8")
    assert pages.page_of(record, page) == page and set(record["counts"]) == set(pages.WHAT)
    assert not record["findings"]


@pytest.mark.parametrize("rank", [10**12, 2**64, -1, 0, 4.0, "4", True, None, math.nan, math.inf, [4], {}])
def test_no_rank_is_believed(saved, tmp_path, rank):
    """In config.json, in a plan, in a dictionary: refused before anything is made."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((saved[1] / "config.json").read_text())
    name = next(iter(config["quantization_config"]["ranks"]))
    config["quantization_config"]["ranks"][name] = rank
    (folder / "config.json").write_text(json.dumps(config))
    os.link(saved[1] / "model.safetensors", folder / "model.safetensors")
    plan = estimate_ranks(BERT.build(), CuttlefishConfig(rank_rule="ratio", rank_multiple=4)).to_dict()
    plan["layers"][name]["rank"] = rank
    model = BERT.build()
    with pytest.raises((ValueError, TypeError), match=rf"{name}|rank of"):
        hf.AutoModelForSequenceClassification.from_pretrained(folder)
    if rank is not None:  # in a plan it says that the layer stays dense
        with pytest.raises((ValueError, TypeError), match="rank of"):
            RankPlan.from_json(json.dumps(plan))
    with pytest.raises((ValueError, TypeError), match="rank of"):
        factorize(model, {name: rank})
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "",
        ".",
        "..",
        "__class__",
        "__dict__.weight",
        "_modules",
        "forward",
        "bert..encoder",
        "\0",
        "0",
    ],
)
def test_names_lead_nowhere_but_to_layers(name):
    """Names are looked up among the modules, never with getattr and never as paths."""
    model = BERT.build()
    with pytest.raises(ValueError, match=r"no module|is itself a layer|can be factorized"):
        factorize(model, {name: 4})
    assert names_in(model, CuttlefishStructure(ranks={name: 4}).ranks) == {}
    follow_checkpoints(model)
    result = model.load_state_dict({f"{name}.down.weight": torch.zeros(4, 32)}, strict=False)
    assert len(result.unexpected_keys) == 1


EXPLODING = [
    r"([a-z0-9.]+)+X",
    r"(\w|\w\w)+!",
    r"(.*)*x",
    r"((.*)*)*!",
    r"(a+)+$",
    r"(?:[a-z.]*[a-z.]*)*Z",
    r"(.*\.)?(.*)+9",
]


@pytest.mark.parametrize("pattern", EXPLODING)
def test_patterns_that_explode_end_in_time(pattern):
    """With `re`, the first of these takes longer than the universe has lasted."""
    started = time.monotonic()
    for fields in ({"target_modules": pattern}, {"rank_pattern": {pattern: 4}}, {"exclude_modules": pattern}):
        with pytest.raises(ValueError, match=r"matches no|none of the target layers|takes more than"):
            find_targets(BERT.build(), CuttlefishConfig(**fields))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "pattern", ["(" * 3000, "(?:" * 2000 + ")" * 2000, "a{99999999999999}", "[" * 10, r"(?P<a>x)(?P=b)", "*", r"\1"]
)
def test_patterns_that_cannot_be_compiled_are_named(pattern):
    for fields in ({"target_modules": pattern}, {"rank_pattern": {pattern: 4}}):
        with pytest.raises(ValueError, match="is no regular expression"):
            CuttlefishConfig(**fields)


def test_a_pattern_may_begin_with_a_flag():
    assert matches("(?i)QUERY", "encoder.query") and not matches("QUERY", "encoder.query")


def test_a_slow_pattern_is_given_up(monkeypatch):
    monkeypatch.setattr("hf_cuttlefish.decide.targets.PATTERN_SECONDS", 1e-9)
    with pytest.raises(ValueError, match=r"takes more than .* write it without repeats"):
        matches(r"(x|\w+\w+|\.)*(\w+\.?)+", "bert.encoder.layer.0.attention.self.query" * 20)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "\xff", "", "null", "[]", "1e999", '{"version": 1e999}']
)
@pytest.mark.parametrize("read", [RankPlan.from_json, CuttlefishConfig.from_json], ids=["plan", "config"])
def test_what_is_no_object_is_refused(tmp_path, read, text):
    path = tmp_path / "file.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises((ValueError, TypeError)):
        read(path if read == RankPlan.from_json else path.read_text("latin-1"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stable_rank", "1"),
        ("stable_rank", [1]),
        ("predicted_loss_increase", True),
        ("stable_rank", 10**400),
        ("in_features", 2**63),
    ],
)
def test_the_numbers_of_a_plan_are_numbers(field, value):
    plan = estimate_ranks(BERT.build(), CuttlefishConfig(rank_rule="ratio")).to_dict()
    name = next(iter(plan["layers"]))
    plan["layers"][name][field] = value
    with pytest.raises(ValueError, match=name):
        RankPlan.from_json(json.dumps(plan))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -1])
@pytest.mark.parametrize("field", ["stable_rank_tolerance", "min_speedup", "max_loss_increase", "rank_ratio"])
def test_the_numbers_of_a_config_are_finite(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        CuttlefishConfig.from_json(json.dumps({field: value}))


def test_a_plan_that_is_no_text_is_said(tmp_path):
    (tmp_path / "plan.json").write_bytes(b'{"layers": {"\xa2": 1}}')
    with pytest.raises(ValueError, match="the plan is no JSON"):
        RankPlan.from_json(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "data", [{}, {"steps": 1, "ranks": {}}, {"steps": [1], "ranks": []}, {"steps": ["x"], "ranks": {}}]
)
def test_a_history_that_is_none_is_said(data):
    with pytest.raises(ValueError, match="the stable-rank history must be"):
        StableRankHistory.from_dict(data)


@pytest.mark.parametrize(
    "change",
    [
        *({f.name: "1"} for f in dataclasses.fields(FactorizationReport) if f.type in ("int", "bool")),
        {"parameters_after": -1},
        {"seconds": []},
        {"step": "3"},
        {"optimizer": None},
        {"strange": 1},
    ],
    ids=str,
)
def test_a_report_of_wrong_types_is_said(change):
    model = BERT.build()
    report = factorize(model, dict.fromkeys(find_targets(model), RANK))
    data = {k: v for k, v in report.to_dict().items() if k != "plan"}
    assert str(FactorizationReport.from_dict(report.plan, data)) == str(report)
    with pytest.raises(ValueError, match="saved report of the switch"):
        FactorizationReport.from_dict(report.plan, {**data, **change})


def test_a_saved_config_may_lack_fields_and_others_are_named():
    """Of a run that has switched: what an older version did not write is no change."""
    model, optimizer, cuttlefish = small_run()
    train(model, optimizer, cuttlefish, 5)
    cuttlefish.close()
    state = cuttlefish.state_dict()
    names = list(low_rank_layers(model))
    for name in state["config"]:
        less = {**state, "config": {k: v for k, v in state["config"].items() if k != name}}
        assert RunState.from_dict(less, model).under(cuttlefish.config, names).switch_step == 4
    other = {**state, "config": {**state["config"], "target_modules": ["query"]}}
    with pytest.raises(ValueError, match="target_modules is 'all'"):
        RunState.from_dict(other, model).under(cuttlefish.config, names)


def test_statistics_that_are_not_whole_are_said():
    model, optimizer, cuttlefish = small_run()
    train(model, optimizer, cuttlefish, 3)
    flat = cuttlefish.statistics_state()
    cuttlefish.close()
    collector = MomentCollector(model, find_targets(model))
    collector.load_state_dict(flat)
    assert steps_in(flat) == 1
    some = next(key for key in flat if key.endswith("/y"))
    for broken, message in (
        ({k: v for k, v in flat.items() if k != some}, "have the shapes"),
        ({**flat, some: torch.zeros(3)}, "have the shapes"),
        ({k: v for k, v in flat.items() if k != "losses"}, "no single number for losses"),
        ({**flat, "terms_total": torch.zeros(2)}, "no single number for terms_total"),
        ({**flat, "sums/elsewhere/x": torch.zeros(2)}, "is no target layer"),
    ):
        with pytest.raises(ValueError, match=message):
            collector.load_state_dict(broken)
    with pytest.raises(ValueError, match="do not say in how many steps"):
        steps_in({})


def test_a_spoiled_header_is_named_with_its_file(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved[1] / "config.json").read_text())
    data = (saved[1] / "model.safetensors").read_bytes()
    for spoiled in (data[:-1], data[:100], b"\xff" * 8 + data[8:], b""):
        (tmp_path / "model.safetensors").write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or was cut off"):
            hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_tensor_larger_than_its_file_is_never_made(saved, tmp_path):
    tensors = load_file(saved[1] / "model.safetensors")
    key = next(k for k in tensors if k.endswith(".down.weight"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[key]["shape"] = [10**9, 10**3]
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    (tmp_path / "config.json").write_text((saved[1] / "config.json").read_text())
    with pytest.raises(ValueError, match="is no safetensors file"):
        hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("shape", [(), (RANK,), (RANK, 1, 32)], ids=str)
def test_a_factor_has_two_dimensions(saved, tmp_path, shape):
    tensors = load_file(saved[1] / "model.safetensors")
    key = next(k for k in tensors if k.endswith(".down.weight"))
    tensors[key] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((saved[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"two dimensions|needs \(4, 32\)"):
        hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    follower = BERT.build()
    follow_checkpoints(follower)
    with pytest.raises(ValueError, match="two dimensions"):
        follower.load_state_dict(tensors)


def test_code_in_the_folder_is_never_run(saved, tmp_path):
    """The loader needs no trust_remote_code, and a config that points to code does not change that."""
    config = json.loads((saved[1] / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\nclass EvilConfig: pass\n"
    )
    os.link(saved[1] / "model.safetensors", tmp_path / "model.safetensors")
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model) is type(saved[0]) and not (tmp_path / "ran").exists()


def test_what_is_saved_is_json_and_safetensors(saved):
    assert {path.suffix for path in saved[1].iterdir()} <= {".json", ".safetensors", ".md", ".py"}
    assert (saved[1] / STANDALONE_FILE).read_text() == STANDALONE_TEXT  # fixed, whatever the model


def test_nothing_is_sent_anywhere(monkeypatch, tmp_path):
    """No telemetry, no hub: a run with its switch, a save, a load and a merge open no socket, offline or not."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    model, optimizer, cuttlefish = small_run()
    train(model, optimizer, cuttlefish, 6)
    cuttlefish.end()
    assert cuttlefish.switch_step == 4
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before = outputs(copy.deepcopy(loaded), BERT.inputs())
    after = outputs(merge(loaded), BERT.inputs())
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    assert tried == []
