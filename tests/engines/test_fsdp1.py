"""FSDP1 (real processes, gloo): the switch by restart, against DDP's in place on the same batches."""

import json

import pytest

import trainers
from hf_cuttlefish.patch.learning_rate import SCALE_UNKNOWN
from launch import launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp1")
    launch(2, "fsdp1_trainer.py", folder)
    return json.loads((folder / "results.json").read_text())


def check_run(run, first, scale=1.0):
    """One switch by restart, after which FSDP1 trains the factorized model, at `scale` times the rate; all processes alike."""
    assert run["units"] >= 3 <= run["units again"] and run["stopped"] == run["switched"] == trainers.SWITCH
    assert run["restart_from"] == run["whole"] and run["restart_from"].endswith(f"checkpoint-{trainers.SWITCH}")
    assert run["steps"] == trainers.STEPS and run["dense"] and run["ranks"] == run["plan"] and len(run["plan"]) == 12
    assert run["losses"] == first["losses"] and run["plan"] == first["plan"]
    assert run["rates"] == pytest.approx(trainers.scheduled(scale))
    assert ("learning rate times" in run["optimizer"]) is (scale != 1)
    assert run["epochs"] == pytest.approx([(i + 1) / 6 for i in range(10)])  # 48 rows, 8 a step
    assert run["AutoModel"] and not any("cuttlefish" in name or "full_rank" in name for name in run["left"])


@pytest.mark.parametrize(
    ("name", "like", "strategy"),
    [
        ("orig", "DDP", "FULL_SHARD"),
        ("flat", "DDP", "FULL_SHARD"),
        ("accumulation", "DDP, accumulation", "FULL_SHARD"),
        ("by size, grad op", "DDP", "SHARD_GRAD_OP"),
    ],
)
def test_a_restart_goes_on_as_a_switch_in_place(trained, name, like, strategy):
    """Losses, plan, step and rate of DDP's switch in place; use_orig_params on and off; units by block and by size."""
    for everywhere in trained:
        run, expected = everywhere[name], everywhere[like]
        scale = trainers.scale_of(expected["rates"])
        assert 1.01 < scale != SCALE_UNKNOWN if name == "accumulation" else scale == 1  # measured, or as it is set
        check_run(run, trained[0][name], scale)
        assert expected["ddp"] and run["plan"] == expected["plan"] and run["switched"] == expected["switched"]
        assert run["losses"] == pytest.approx(expected["losses"], abs=2e-6) and run["strategy"] == strategy
        assert run["increase"] == pytest.approx(expected["increase"], rel=1e-3)


def test_a_loop_of_one_s_own_goes_on_as_a_switch_in_place(trained):
    for everywhere in trained:
        run, expected = everywhere["loop"], everywhere["loop, DDP"]
        assert run["on"] and not expected["on"] and run["plan"] == expected["plan"] and len(run["plan"]) == 12
        assert run["switched"] == expected["switched"] == trainers.SWITCH and run["rates"] == expected["rates"]
        assert run["losses"] == pytest.approx(expected["losses"], abs=2e-6)
        assert run["rates"] == pytest.approx(trainers.scheduled(1.5))
        assert all("learning rate times 1.5 from here on (0.004 -> 0.006)" in r["optimizer"] for r in (run, expected))


@pytest.mark.parametrize(("step", "stops"), [(4, trainers.SWITCH), (8, trainers.STEPS)])
def test_other_checkpoints_resume_on_the_same_losses(trained, step, stops):
    """One of the full-rank phase, among the steps that gather statistics, and one of the low-rank phase."""
    for everywhere in trained:
        again, run = everywhere[f"resumed at {step}"], everywhere["orig"]
        assert again["units"] == 3 and again["stopped"] == stops and again["switched"] == trainers.SWITCH
        assert again["plan"] == run["plan"] and again["losses"] == run["losses"][:stops]


def test_bf16_with_activation_checkpointing(trained):
    for everywhere in trained:
        run = everywhere["bf16"]
        check_run(run, trained[0]["bf16"])
        assert run["precision"] == "torch.bfloat16"
        assert run["losses"] == pytest.approx(everywhere["DDP"]["losses"], abs=2e-2)


@pytest.mark.parametrize("name", ["orig", "flat", "accumulation", "by size, grad op", "bf16"])
def test_the_optimizer_s_state_is_carried(trained, name):
    """First and second moments in the file against the projection of those of the full-rank checkpoint."""
    run = trained[0][name]
    assert len(run["moments"]) == 4 and run["optimizer"].endswith("carried for 12 of 12 layers")
    for size, error in run["moments"]:
        assert size > 0 and error <= 1e-6 * size


def test_the_optimizer_s_state_starts_anew_on_request(trained):
    run, plain = trained[0]["reset"], trained[0]["orig"]
    check_run(run, run)
    assert run["moments"] == [None] * 4 and run["optimizer"].endswith("state starts anew")
    assert run["plan"] == plain["plan"] and run["losses"][:7] == pytest.approx(plain["losses"][:7], abs=2e-6)
    assert run["losses"][7:] != plain["losses"][7:]


@pytest.mark.parametrize(("where", "whole", "switched"), [("factors", 6, 7), ("writing", 6, 7), ("exchange", 5, 6)])
def test_an_error_loses_nothing(trained, where, whole, switched):
    """While the low-rank form is written the full-rank checkpoint stays whole; in the exchange itself the one before it is."""
    for everywhere in trained:
        run = everywhere[f"failing in {where}"]
        assert run["units"] == 3 and run["dense"] and run["steps"] == 7 and run["restart_from"] is None
        assert run["reason"].startswith("the switch failed") and "no space left" in run["reason"]
        assert run["whole"].endswith(f"checkpoint-{whole}") and run["staging"] is (where == "exchange")
        assert run["switched"] == run["stopped again"] == switched


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("in_place", "switch is 'in_place', and FSDP1's flat parameters"),
        ("sharded", "state_dict_type is SHARDED_STATE_DICT"),
        ("strategy", "the sharding strategy NO_SHARD"),
        ("offload", "offloaded to the CPU"),
        ("best", "load_best_model_at_end could not go back"),
        ("only the model", "save_only_model is True"),
        ("loop", "in a loop of your own"),
        ("inner", "in a loop of your own"),
        ("late", "--resume_from_checkpoint as a training argument"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(trained, name, said):
    for everywhere in trained:
        assert said in everywhere["refusals"][name]
