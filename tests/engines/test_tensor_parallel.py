"""Tensor parallelism (real processes, gloo): the switch by restart, against one process on the same batches."""

import json
import math
from pathlib import Path

import pytest
import torch

import tensor_parallel_trainer
import trainers
from hf_cuttlefish.decide import schedule
from hf_cuttlefish.patch.learning_rate import SCALE_UNKNOWN
from launch import launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What each process says of all runs, the runs of both models in this one process, and the folder."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tensor_parallel_trainer.make_bases(folder)
    launch(2, "tensor_parallel_trainer.py", folder)
    torch.set_num_threads(1)
    kinds = {
        "base": ("base", tensor_parallel_trainer.SETTINGS),
        "left to itself": ("base", tensor_parallel_trainer.LEFT_TO_ITSELF),
        "biased": ("biased", tensor_parallel_trainer.SCALED),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(schedule, "SHORTEST_STRETCH", 1)  # so that the weights' travel is known at the switch
        alone = {
            name: tensor_parallel_trainer.run(folder / f"{name} alone", folder / base, settings)
            for name, (base, settings) in kinds.items()
        }
    assert not any(run["divided"] or run["divided again"] for run in alone.values())
    return json.loads((folder / "results.json").read_text()), alone, folder


def check_run(run, scale=1.0):
    """One switch by restart, after which the factorized model is tensor parallel, at `scale` times the rate."""
    for _, part, whole in run["divided"].values():
        assert 2 * math.prod(part) <= 1.02 * math.prod(whole)  # of 99 tokens a process has 50
    assert run["dense"] and run["stopped"] == run["switched"] == trainers.SWITCH
    assert run["restart_from"] == run["whole"] and run["restart_from"].endswith(f"checkpoint-{trainers.SWITCH}")
    assert not any("cuttlefish" in name or "full_rank" in name or "partial" in name for name in run["left"])
    assert run["ranks"] == run["plan"] and len(run["plan"]) >= 10
    assert run["rates"] == pytest.approx(trainers.scheduled(scale))
    assert ("learning rate times" in run["optimizer"]) is (scale != 1)
    assert run["epochs"] == pytest.approx([(i + 1) / 6 for i in range(10)])  # 48 rows, 8 a step


@pytest.mark.parametrize(
    ("name", "like", "scale"),
    [("plain", "base", 1), ("accumulation", "left to itself", None), ("biased", "biased", 1.5)],
)
def test_a_restart_goes_on_as_one_process(trained, name, like, scale):
    """Losses, plan and rate of one process, which has switched in place."""
    everywhere, alone, _ = trained
    expected = alone[like]
    for results in everywhere:
        run = results[name]
        measured = trainers.scale_of(expected["rates"])
        assert measured == scale or (scale is None and 1.01 < measured != SCALE_UNKNOWN)
        check_run(run, measured)
        assert len(run["divided"]) == (22 if name == "biased" else 16) and run["plan"] == expected["plan"]
        assert run["losses"] == pytest.approx(expected["losses"], abs=2e-6)
        assert run["increase"] == pytest.approx(expected["increase"], rel=1e-4)
        assert f"carried for {len(run['plan'])} of" in run["optimizer"] and len(run["moments"]) == 4
        assert all(size > 0 and error <= 1e-6 * size for size, error in run["moments"].values())


def test_the_factors_are_divided_as_their_weight_was(trained):
    for results in trained[0]:
        run = results["plain"]
        rank = run["plan"]["model.layers.1.mlp.down_proj"]
        expected = {
            "mlp.gate_proj.up": ["S(0)", [32, 6], [64, 6]],
            "mlp.gate_proj.down": ["R", [6, 32], [6, 32]],
            "mlp.down_proj.up": ["R", [32, rank], [32, rank]],
            "mlp.down_proj.down": ["S(1)", [rank, 32], [rank, 64]],
            "self_attn.q_proj": ["S(0)", [16, 32], [32, 32]],  # stayed dense
        }
        found = {name: run["divided again"][f"model.layers.1.{name}.weight"] for name in expected}
        assert run["plan"]["model.layers.1.mlp.gate_proj"] == 6 and found == expected
        assert results["loaded"]["divided"] == run["divided again"]  # by from_pretrained


def test_the_folder_loads_tensor_parallel(trained):
    for results in trained[0]:
        loaded = results["loaded"]
        assert loaded["difference"] <= 1e-5 * loaded["size"] and loaded["saved"] and loaded["generated"]
        assert loaded["losses"] == pytest.approx(results["plain"]["losses"], abs=1e-6)


def test_one_process_goes_on_from_the_checkpoint(trained):
    everywhere, alone, folder = trained
    losses = tensor_parallel_trainer.resume(
        folder / "one", folder / "base", Path(everywhere[0]["plain"]["restart_from"])
    )
    assert losses == pytest.approx(alone["base"]["losses"], abs=2e-6)


def test_the_optimizer_s_state_starts_anew_on_request(trained):
    for results in trained[0]:
        run, plain = results["reset"], results["plain"]
        check_run(run)
        assert not run["moments"] and run["optimizer"].endswith("state starts anew") and run["plan"] == plain["plan"]
        assert run["losses"][:7] == pytest.approx(plain["losses"][:7]) and run["losses"][7:] != plain["losses"][7:]


def test_queries_are_factorized_too(trained):
    for results in trained[0]:
        run = results["with q_proj"]
        check_run(run)
        assert sum("q_proj" in name for name in run["plan"]) == 2
        assert run["losses"] == trained[0][0]["with q_proj"]["losses"]


def test_an_error_loses_nothing(trained):
    """The full-rank checkpoint of that step is whole, and resumes on the same losses: its optimizer.pt too."""
    for results in trained[0]:
        run = results["failing"]
        assert "no space left" in run["reason"] and run["dense"] and run["steps"] == trainers.STEPS
        assert run["whole"].endswith(f"checkpoint-{trainers.SWITCH}") and len(run["divided"]) == 16
        assert run["again"] == run["losses"] and len(run["losses"]) == trainers.STEPS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("in place", "switch is 'in_place'"),
        ("speed", "objective is 'speed'"),
        ("data parallel", "data parallelism besides"),
        ("experts", "expert parallelism"),
        ("packed", "mlp.gate_proj.weight is sharded by tensor parallelism as"),
        ("style", "in the style 'replicated_with_grad_allreduce'"),
        ("save_only_model", "save_only_model is True"),
        ("dense into factors", "factorized at another rank"),
        ("rules that do not fit", "leave the factorized layers out of tp_plan"),
        ("parts in the file", "one process's parts"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(trained, name, said):
    for results in trained[0]:
        assert said in results["refused"][name]
