"""DeepSpeed ZeRO-1, 2 and 3 (real processes, gloo, its CPU backend): the switch by restart. Skipped where it is not installed."""

import importlib.util
import json

import pytest
import torch

import trainers
from hf_cuttlefish import CuttlefishConfig, last_whole_checkpoint
from hf_cuttlefish.engines.files import is_weights_file
from hf_cuttlefish.maths.projection import unknown_state
from hf_cuttlefish.patch.learning_rate import SCALE_UNKNOWN
from hf_cuttlefish.saving.checkpoints import what_is_missing
from launch import PLAIN, launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip(
            "deepspeed is not installed (pip install deepspeed; it builds a small CPU operator when it first runs)"
        )
    folder = tmp_path_factory.mktemp("deepspeed")
    launch(2, "deepspeed_trainer.py", folder, environment=PLAIN)  # ACCELERATE_USE_CPU would turn DeepSpeed off
    return json.loads((folder / "results.json").read_text())


def check_run(run, first, scale=1.0, ahead=0):
    """One switch by restart, after which DeepSpeed trains the factorized model, at `scale` times the rate; all processes alike."""
    assert run["on"] and run["on again"] and run["stopped"] == run["switched"] == trainers.SWITCH
    assert run["restart_from"] == run["whole"] and run["restart_from"].endswith(f"checkpoint-{trainers.SWITCH}")
    assert (
        run["steps"] == trainers.STEPS and run["still dense"] and run["ranks"] == run["plan"] and len(run["plan"]) == 12
    )
    assert run["unequal"] == [] and run["losses"] == first["losses"] and run["plan"] == first["plan"]
    assert run["rates"] == pytest.approx(trainers.scheduled(scale, ahead))
    assert ("learning rate times" in run["optimizer"]) is (scale != 1)
    assert run["epochs"] == pytest.approx([(i + 1) / 6 for i in range(10)])  # 48 rows, 8 a step
    assert (
        run["AutoModel"]
        and "README.md" in run["left"]
        and not any("cuttlefish" in name or "full_rank" in name for name in run["left"])
    )


@pytest.mark.parametrize(
    ("name", "like", "scale"),
    [
        *((name, "DDP", 1) for name in ("ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3, divided from the start")),
        ("accumulation", "DDP, accumulation", None),
        ("own optimizer", "DDP, scaled", 1.5),
    ],
)
def test_a_restart_goes_on_as_a_switch_in_place(trained, name, like, scale):
    """Losses, plan and step of DDP's switch in place on the same batches; learning rate, epoch and data unbroken."""
    for everywhere in trained:
        run, expected = everywhere[name], everywhere[like]
        measured = trainers.scale_of(expected["rates"])
        assert measured == scale or (scale is None and 1.01 < measured != SCALE_UNKNOWN)
        ahead = int(name == "own optimizer")  # DeepSpeed steps that schedule itself
        check_run(run, trained[0][name], measured, ahead)
        assert expected["ddp"] and run["plan"] == expected["plan"] and run["switched"] == expected["switched"]
        assert run["losses"] == pytest.approx(expected["losses"], abs=2e-6)
        assert run["increase"] == pytest.approx(expected["increase"], rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loop_of_ones_own_goes_on_from_its_checkpoint(trained, stage):
    for everywhere in trained:
        run, expected = everywhere[f"loop, ZeRO-{stage}"], everywhere["loop, DDP"]
        assert run["on"] and run["switched"] == expected["switched"] == trainers.SWITCH
        assert run["plan"] == expected["plan"] == run["ranks"] and len(run["plan"]) == 12
        assert run["losses"] == pytest.approx(expected["losses"], abs=2e-6)
        assert run["rates"] == pytest.approx(trainers.scheduled(1.5))


def test_deepspeed_s_own_schedule_goes_on_as_it_was(trained):
    for everywhere in trained:
        run = everywhere["own schedule"]
        assert run["on"] and run["on again"] and run["switched"] == trainers.SWITCH and len(run["ranks"]) == 12
        assert run["rates"] == pytest.approx([0.0, 5e-3, *(1e-2 * (1 - i / 8) for i in range(8))])
        assert "learning rate unchanged (learning_rate_scale: WarmupDecayLR is DeepSpeed's own" in run["optimizer"]


@pytest.mark.parametrize("name", ["bf16", "ZeRO-3, bf16"])
def test_bf16_weights_are_factorized_from_the_fp32_ones(trained, name):
    for everywhere in trained:
        run = everywhere[name]
        check_run(run, trained[0][name])
        assert run["dtype"] == "torch.bfloat16" and run["losses"] == pytest.approx(
            everywhere["DDP"]["losses"], abs=2e-2
        )


@pytest.mark.parametrize("name", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "accumulation", "bf16", "ZeRO-3, bf16"])
def test_the_optimizer_s_state_is_carried(trained, name):
    """The partitions on disk against the projection of what DeepSpeed had; bf16 rounds the factors compared with."""
    run = trained[0][name]
    assert (
        len(run["moments"]) == 4 and run["step count"] == trainers.SWITCH and "carried for 12 of 12" in run["optimizer"]
    )
    for size, error in run["moments"].values():
        assert size > 0 and error <= (5e-3 if "bf16" in name else 1e-6) * size


def test_the_optimizer_s_state_starts_anew_on_request(trained):
    run, plain = trained[0]["reset"], trained[0]["ZeRO-2"]
    check_run(run, run)
    assert run["moments"] == {} and run["optimizer"].endswith("state starts anew") and run["plan"] == plain["plan"]
    assert run["losses"][:7] == pytest.approx(plain["losses"][:7]) and run["losses"][7:] != plain["losses"][7:]


@pytest.mark.parametrize(
    ("where", "whole", "switched"),
    [
        ("writing", 6, 7),
        ("filling", 6, 7),
        ("exchange", 5, 6),
        ("filling, ZeRO-3", 6, 7),
        ("exchange, ZeRO-3", 5, 6),
    ],
)
def test_an_error_loses_nothing(trained, where, whole, switched):
    """While the low-rank form is written the full-rank checkpoint stays whole; in the exchange itself the one before it is."""
    for everywhere in trained:
        run = everywhere[f"failing in {where}"]
        assert run["on"] and run["dense"] and run["steps"] == 7 and run["restart_from"] is None  # it went on full rank
        assert run["reason"].startswith("the switch failed") and "no space left" in run["reason"]
        assert run["whole"].endswith(f"checkpoint-{whole}") and run["staging"] is where.startswith("exchange")
        assert run["switched"] == run["stopped again"] == switched


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("in_place", "switch is 'in_place'"),
        ("learning rate", "WarmupDecayLR is DeepSpeed's own scheduler"),
        ("offloading", "offloading of the parameters"),
        ("ZeRO-0", "ZeRO stage 0"),
        ("best", "load_best_model_at_end could not go back"),
        ("only the model", "save_only_model is True"),
        ("loop", "in a loop of your own"),
        ("engine", "CuttlefishCallback, which switch by restart"),
        ("late 2", "--resume_from_checkpoint as a training argument"),
        ("late 3", "--resume_from_checkpoint as a training argument"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(trained, name, said):
    for everywhere in trained:
        assert said in everywhere["refusals"][name]


# --- without deepspeed ---


@pytest.mark.parametrize("switch", ["auto", "in_place", "restart"])
def test_an_engine_that_can_be_edited_restarts_only_when_told_to(tmp_path, switch):
    settings = CuttlefishConfig(switch_step=3, statistics_steps=2, rank_multiple=2, on_error="raise", switch=switch)
    trainer, callback, _ = trainers.run(tmp_path, switch, settings=settings, max_steps=5)
    stopped = switch == "restart"
    assert callback.switch_step == 3 and trainer.state.global_step == (3 if stopped else 5)
    assert callback.restart_from == (str(tmp_path / switch / "checkpoint-3") if stopped else None)
    assert not callback.cuttlefish.restarts


def test_the_default_is_auto():
    assert CuttlefishConfig().switch == "auto"
    with pytest.raises(ValueError, match=r"unknown switch 'automatic'.*auto, in_place, restart"):
        CuttlefishConfig(switch="automatic")


def deepspeed_checkpoint(folder, processes=2):
    path = folder / "checkpoint-6"
    (path / "global_step6").mkdir(parents=True)
    for name in (
        "mp_rank_00_model_states.pt",
        *(f"bf16_zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(processes)),
    ):
        torch.save({}, path / "global_step6" / name)
    for name in ("scheduler.pt", *(f"rng_state_{i}.pth" for i in range(processes))):
        torch.save({}, path / name)
    (path / "latest").write_text("global_step6")
    (path / "trainer_state.json").write_text('{"global_step": 6}')
    return path


def test_a_whole_checkpoint_of_deepspeed_is_found(tmp_path):
    path = deepspeed_checkpoint(tmp_path)
    assert last_whole_checkpoint(tmp_path, 2) == str(path)
    assert "of 2 processes, and 1 resume" in what_is_missing(path, 1)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("latest", "latest"),
        ("global_step6/mp_rank_00_model_states.pt", "model_states"),
        ("global_step6/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "of 1 processes"),
        ("trainer_state.json", "trainer_state.json"),
    ],
)
def test_a_part_of_a_checkpoint_of_deepspeed_is_passed_over(tmp_path, lost, said):
    path = deepspeed_checkpoint(tmp_path)
    (path / lost).unlink()
    assert said in what_is_missing(path, 2) and last_whole_checkpoint(tmp_path, 2) is None


def test_a_part_that_was_cut_off_is_found(tmp_path):
    path = deepspeed_checkpoint(tmp_path) / "global_step6" / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:100])
    assert "mp_rank_00_model_states.pt is missing or cut off" in what_is_missing(path.parents[1], 2)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("adapter_model.safetensors", True),
        ("config.json", False),
        ("training_args.bin", False),
        ("cuttlefish_statistics.safetensors", False),
    ],
)
def test_what_is_replaced_with_the_weights(name, is_one):
    assert is_weights_file(name) is is_one


def test_kinds_of_state_without_a_projection():
    assert unknown_state(["step", "exp_avg", "exp_avg_sq"]) == [] and unknown_state(["exp_avg", "shampoo"]) == [
        "shampoo"
    ]
