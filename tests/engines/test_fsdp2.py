"""fully_shard (FSDP2; real processes, gloo), against the model as a whole in one process."""

import json

import pytest
import torch

import fsdp2_loops
import trainers
from launch import launch
from loops import largest


@pytest.fixture(scope="module")
def fully_sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    launch(2, "fsdp2_loops.py", folder)
    return json.loads((folder / "sharded.json").read_text()), torch.load(folder / "sharded.pt")


def check_as_unsharded(everywhere, tensors, name, options):
    expected = fsdp2_loops.train(**{k: v for k, v in options.items() if k != "options"})
    tolerance = {"bf16 policy": 2e-2}.get(name, 1e-6)
    for results, _ in everywhere:
        run = results[name]
        assert run["sharded"] and run["held"] and run["switched"] == expected["switched"] is not None
        assert run["plan"] == everywhere[0][0][name]["plan"] and run["losses"] == everywhere[0][0][name]["losses"]
        assert run["losses"] == pytest.approx(expected["losses"], abs=tolerance)
        if name != "bf16 policy":
            assert run["plan"] == expected["plan"] and run["parameters"] == expected["parameters"]
            assert largest(tensors[name]["_weights"], expected["_weights"]) < 2e-5


@pytest.mark.parametrize("name", fsdp2_loops.SCENARIOS)
def test_a_sharded_model_trains_as_a_whole_one(fully_sharded, name):
    """fully_shard on each block and around all; plan, step, losses, and the full state dict in an unsharded model."""
    everywhere, tensors = fully_sharded
    check_as_unsharded(everywhere, tensors, name, fsdp2_loops.SCENARIOS[name])
    here = [results[name]["numbers here"] for results, _ in everywhere]
    assert max(here) < 0.51 * sum(here) and sum(here) == everywhere[0][0][name]["parameters"]


@pytest.mark.parametrize("name", ["compiled", "compiled by blocks"])
def test_a_sharded_model_compiles_in_the_first_step_after_the_switch_and_no_more(fully_sharded, name):
    for results, _ in fully_sharded[0]:
        graphs = results[name]["graphs"]  # by step
        before, after = graphs[fsdp2_loops.SWITCH - 1], graphs[fsdp2_loops.SWITCH]
        assert 0 < graphs[0] < after and after - before <= 2 * before and after == graphs[-1]


def test_a_sharded_checkpoint_resumes_after_the_switch_bit_for_bit(fully_sharded):
    everywhere, tensors = fully_sharded
    for results, _ in everywhere:
        assert results["resumed"]["losses"] == results["plain"]["losses"]
    for part in ("_weights", "_state"):
        whole, again = tensors["plain"][part], tensors["resumed"][part]
        assert len(whole) > 20 and whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize(
    "name",
    [
        "fully_shard on the layer",
        "mesh of a part",
        "tensor parallel",
        "a DTensor besides",
        "another dimension",
        "spectra fails on 0",
        "factors fails on 0",
        "tensor parallel alone",
        "optimizer fails on 1",
        "groups fails on 1",
        "commit fails on 0",
    ],
)
def test_sharded_faults_are_refused_or_put_back_on_all_processes(fully_sharded, name):
    assert [faults[name] for _, faults in fully_sharded[0]] == ["ok", "ok"]


def test_shards_that_have_copies_stay_equal(tmp_path):
    """A mesh of 2 copies by 2 shards (HSDP), 4 processes."""
    launch(4, "fsdp2_loops.py", tmp_path, "copies of shards")
    everywhere, tensors = json.loads((tmp_path / "sharded.json").read_text()), torch.load(tmp_path / "sharded.pt")
    check_as_unsharded(everywhere, tensors, "copies of shards", {})
    here = [results["copies of shards"]["numbers here"] for results, _ in everywhere]
    assert here[:2] == here[2:] and sum(here[:2]) == everywhere[0][0]["copies of shards"]["parameters"]


@pytest.fixture(scope="module")
def trained_sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    launch(2, "fsdp2_trainer.py", folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_trainer_switches_and_resumes_under_fsdp2(trained_sharded, trained, kind):
    """Switch, save, resume before, at and after the switch: the same losses as under DDP, and the same shards in the end."""
    for everywhere in trained_sharded:
        run = everywhere[kind]
        assert run["on"] and run["switched"] == trainers.SWITCH and len(run["plan"]) == 12
        assert run["losses"] == pytest.approx(trained[0][0]["plain"]["losses"], abs=1e-4)
        for step in (4, 6, 8):
            again = everywhere[f"{kind} {step}"]
            assert again["on"] and again["switched"] == trainers.SWITCH and again["plan"] == run["plan"]
            assert again["losses"] == run["losses"] and again["shards"] == run["shards"]


def test_a_compiled_model_switches_and_resumes_under_fsdp2(trained_sharded):
    for everywhere in trained_sharded:
        plain = everywhere["FULL_STATE_DICT"]
        assert not plain["compiled"]
        for name in ("compiled", "compiled 8", "compiled by blocks"):
            run = everywhere[name]
            assert run["on"] and run["compiled"] and run["switched"] == trainers.SWITCH and run["plan"] == plain["plan"]
            assert run["losses"] == pytest.approx(plain["losses"], abs=1e-4)


def test_an_fsdp2_checkpoint_loads_with_automodel(trained_sharded):
    shards = [everywhere["FULL_STATE_DICT"]["shards"] for everywhere in trained_sharded]
    assert trained_sharded[0]["loaded"] == pytest.approx([sum(parts) for parts in zip(*shards, strict=True)], abs=1e-6)


def test_examples_save_the_model_where_checkpoints_are_sharded(trained_sharded):
    """Trainer saves none there, without a word."""
    for everywhere in trained_sharded:
        assert everywhere["saved by the examples"] == pytest.approx(everywhere["loaded"], abs=1e-4)


def test_fsdp2_refuses_to_go_back_to_a_best_model(trained_sharded):
    for everywhere in trained_sharded:
        assert "load_best_model_at_end" in everywhere["best"] and "from_pretrained" in everywhere["best"]
