"""FSDP1 (real processes, gloo): the switch by restart."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "distributed_scripts"
sys.path[:0] = [str(SCRIPTS), str(Path(__file__).parent)]

import trainers  # noqa: E402
from test_distributed import launch  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp1")
    launch(2, str(SCRIPTS / "fsdp1_trainer.py"), str(folder))
    return json.loads((folder / "results.json").read_text())


def check_run(run):
    assert run["on"] and run["on again"] and run["stopped"] == run["switched"] == trainers.SWITCH
    assert run["restart_from"] == run["whole"] and run["AutoModel"]
    assert not any("cuttlefish" in name or "full_rank" in name for name in run["left"])
    assert run["rates"] == pytest.approx([1e-2 * (1 - i / 10) for i in range(10)])
    assert run["epochs"] == pytest.approx([(i + 1) / 6 for i in range(10)])  # 48 rows, 8 a step


@pytest.mark.parametrize(("name", "like"), [("plain", "DDP"), ("accumulation", "DDP, accumulation")])
def test_a_restart_goes_on_as_a_switch_in_place(trained, name, like):
    """Losses, plan and step of DDP's switch in place on the same batches; learning rate, epoch and data unbroken."""
    for everywhere in trained:
        run, expected = everywhere[name], everywhere[like]
        check_run(run)
        assert expected["ddp"] and run["plan"] == expected["plan"] and run["switched"] == expected["switched"]
        assert run["losses"] == pytest.approx(expected["losses"], abs=2e-6)
        assert len(run["moments"]) == 4 and "carried for 12 of 12" in run["optimizer"]
        assert all(size > 0 and error <= 1e-6 * size for size, error in run["moments"].values())


def test_the_optimizer_s_state_starts_anew_on_request(trained):
    run, plain = trained[0]["reset"], trained[0]["plain"]
    check_run(run)
    assert "moments" not in run and run["optimizer"].endswith("state starts anew") and run["plan"] == plain["plan"]
    assert run["losses"][:7] == pytest.approx(plain["losses"][:7]) and run["losses"][7:] != plain["losses"][7:]


@pytest.mark.parametrize(("where", "whole"), [("writing", 6), ("exchange", 5)])
def test_an_error_loses_nothing(trained, where, whole):
    for everywhere in trained:
        run = everywhere[f"failing in {where}"]
        assert run["dense"] and run["steps"] == 7 and "no space left" in run["reason"]  # it went on full rank
        assert ("trainer_state.json" in run["at the switch"]) is (where == "writing")
        assert run["whole"].endswith(f"checkpoint-{whole}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("in_place", "switch is 'in_place'"),
        ("sharded", "FSDP1 with SHARDED_STATE_DICT"),
        ("original", "FSDP1 with use_orig_params"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(trained, name, said):
    for everywhere in trained:
        assert said in everywhere[name]
