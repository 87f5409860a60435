"""Real processes (torchrun, gloo): the switch happens once, everywhere, and every replica stays the same.

The scenarios are in tests/distributed_scripts; each launch runs many of them, since starting Python costs most.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent / "distributed_scripts"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(SCRIPTS))

import loops  # noqa: E402
import sharded  # noqa: E402
import trainers  # noqa: E402

ENVIRONMENT = {
    **{
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    },
    **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"},
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
LIMIT = 480
"""Seconds that a launch may take on a busy machine; usual are 15 to 60."""

ON_THEIR_OWN = {"autocast", "frozen layers", "ranks by singular values", "ranks by shape", "switch found"}
"""Scenarios that train something else than "plain"; all others must come out as it does."""
TOLERANCE = {"autocast": 2e-2, "fp16 comm hook": 1e-3, "PowerSGD": 0.1}
"""Of the losses, against one process; else 1e-6. bf16 rounds to 4e-3 (and ranks may differ), fp16 to 5e-4."""


def launch(processes: int, *command: str) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone():
    """The scenario in this one process, each made once."""
    made = {}

    def run(name):
        key = name if name in ON_THEIR_OWN else "plain"
        if key not in made:
            made[key] = loops.run(key)
            assert made[key]["size"] == 1 and not made[key]["ddp"]
        return made[key]

    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "results.json"
    launch(2, str(SCRIPTS / "loops.py"), str(path))
    return json.loads(path.read_text()), torch.load(f"{path}.pt")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    path = tmp_path_factory.mktemp("four") / "results.json"
    launch(4, str(SCRIPTS / "loops.py"), str(path), "plain", "no_sync", "switch found")
    return json.loads(path.read_text()), torch.load(f"{path}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    launch(2, str(SCRIPTS / "trainers.py"), str(folder))
    return json.loads((folder / "results.json").read_text()), torch.load(folder / "weights.pt")


def largest(a, b):
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def check_as_alone(found, tensors, name, alone, processes):
    run, expected = found[name], alone(name)
    assert (
        run["ddp"]
        and run["size"] == processes
        and run["calls"] == loops.STEPS * loops.SCENARIOS[name].get("accumulate", 1)
    )
    assert run["unequal"] == [] and run["unequal_state"] == [] and run["held"]
    assert run["switched"] == expected["switched"] is not None and run["reason"] == expected["reason"]
    assert run["plan"].keys() == expected["plan"].keys() and run["plan"]
    if name not in TOLERANCE:
        assert run["plan"] == expected["plan"]
    assert run["dtype"] == ("torch.bfloat16" if name == "autocast" else "torch.float32")
    tolerance = TOLERANCE.get(name, 1e-6)
    assert run["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    if name not in TOLERANCE:
        mine = {k: v for k, v in tensors[name]["_weights"].items() if not k.startswith("spare.")}
        assert largest(mine, expected["_weights"]) < 2e-5  # of weights that steps of 1e-2 have moved
        mine = {k: v for k, v in tensors[name]["_gradients"].items() if not k.startswith("spare.")}
        assert largest(mine, expected["_gradients"]) < 1e-6
        for a, b in zip(run["history"], expected["history"], strict=True):
            assert a["layer"] == b["layer"] and a["stable_rank"] == pytest.approx(b["stable_rank"], rel=1e-5)


@pytest.mark.parametrize("name", loops.SCENARIOS)
def test_two_processes_train_as_one_does(two, alone, name):
    """Plan, step of the switch, losses, gradients of the step after it, weights; replicas are equal bit for bit."""
    check_as_alone(*two, name, alone, 2)


@pytest.mark.parametrize("name", ["plain", "no_sync", "switch found"])
def test_four_processes_train_as_one_does(four, alone, name):
    check_as_alone(*four, name, alone, 4)


@pytest.mark.parametrize("name", loops.SCENARIOS)
def test_the_wrapper_keeps_what_it_was_built_with(two, name):
    """Every attribute, number of hooks and logged option of DDP reads the same after the run as before it."""
    changed = two[0][name]["changed"]
    changed.pop("_comm_hooks", None) if name == "own comm hook" else None  # its state is a list that grows
    assert changed == {}


def test_a_comm_hook_goes_on_with_the_new_gradients(two, alone):
    before, after = two[0]["own comm hook"]["hook_calls"][:5], two[0]["own comm hook"]["hook_calls"][5:]
    dense = sum(p.numel() for p in loops.tiny_bert().parameters())
    assert (
        before == [dense] * loops.SWITCH
        and after == [after[0]] * (loops.STEPS - loops.SWITCH)
        and after[0] < 0.7 * dense
    )


def test_a_compiled_model_compiles_once_after_the_switch(two):
    graphs = two[0]["compiled"]["graphs"]  # by step
    assert graphs[0] >= 1 and graphs[loops.SWITCH] == graphs[loops.SWITCH - 1] + 1 == graphs[-1]


def test_a_compiled_model_compiles_once_after_the_switch_in_one_process_too():
    graphs = loops.run("compiled")["graphs"]
    assert graphs[0] >= 1 and graphs[loops.SWITCH] == graphs[loops.SWITCH - 1] + 1 == graphs[-1]


def test_blocks_compiled_one_by_one_stay_compiled_whatever_their_ranks():
    """torch gives up after 8 versions of the same code; 12 blocks of 12 ranks are 12."""
    dynamo = torch._dynamo
    limit = dynamo.config.recompile_limit
    dynamo.reset()
    model, batch = loops.tiny_bert(num_hidden_layers=12), loops.batches()[0]
    for block in model.bert.encoder.layer:
        block.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pattern = {rf".*\.{i}\.intermediate\.dense": i + 2 for i in range(12)}
    settings = loops.config(
        target_modules=["intermediate.dense"], rank_pattern=pattern, switch_step=1, statistics_steps=0
    )
    cuttlefish = loops.Cuttlefish(model, optimizer, settings, total_steps=3)
    try:
        assert cuttlefish.step() and sorted(cuttlefish.plan.values()) == [*range(2, 14)]
        dynamo.utils.counters.clear()
        for _ in range(2):
            model(**batch).loss.backward()
        frames = dynamo.utils.counters["frames"]
        assert frames["ok"] == frames["total"] == 12
    finally:
        dynamo.config.recompile_limit = limit
        dynamo.reset()


@pytest.mark.parametrize("name", loops.FAULTS)
def test_faults(two, name):
    """Each process gives its verdict: the error that it should raise, or training that goes on as it should."""
    assert two[0][name] == ["ok", "ok"]


# --- Trainer ---


@pytest.mark.parametrize("name", ["plain", "accumulation", "standing still", "standing still, averaged"])
def test_trainer_on_two_processes_trains_as_on_one(trained, tmp_path_factory, name):
    results, tensors = trained
    if not hasattr(test_trainer_on_two_processes_trains_as_on_one, "alone"):
        test_trainer_on_two_processes_trains_as_on_one.alone = trainers.comparable(tmp_path_factory.mktemp("alone"))
    expected = test_trainer_on_two_processes_trains_as_on_one.alone[name]
    for run in (results[0][name], results[1][name]):
        assert run["ddp"] and run["size"] == 2 and run["unequal"] == [] and run["unequal_state"] == []
        assert run["switched"] == expected["switched"] == trainers.SWITCH and run["plan"] == expected["plan"]
        # With averaging over devices the Trainer doubles the loss; what is predicted from it must not be doubled.
        assert run["increase"] == pytest.approx(expected["increase"], rel=1e-4)
        assert run["history"] == results[0][name]["history"]
    if name == "standing still, averaged":
        assert results[0][name]["losses"][0] == pytest.approx(2 * expected["losses"][0], rel=1e-4)
    else:
        assert results[0][name]["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        assert largest(tensors[name], expected["_weights"]) < 2e-5


@pytest.mark.parametrize("step", [2, 4, 5, 6, 7])
def test_trainer_resumes_bit_identically_on_two_processes(trained, step):
    """When gathering begins (2), while it goes on, before, at and after the switch (6)."""
    for everywhere in trained[0]:
        run = everywhere[f"resumed at {step}"]
        assert run["ddp"] and run["differences"] == [] and run["same_run"] and run["unequal"] == []


def test_trainer_switches_by_restart(trained):
    """It stops at the switch; resumed, it ends on the bits of the run that went on in place."""
    for everywhere in trained[0]:
        run = everywhere["restart"]
        assert run["stopped_at"] == trainers.SWITCH == run["switched"] and run["differences"] == []
        assert run["ddp"] and run["unequal"] == [] and run["unequal_state"] == []


@pytest.mark.parametrize("name", ["uneven, checkpointing", "bf16, accumulation", "compiled", "best"])
def test_trainer_keeps_replicas_equal(trained, name):
    for everywhere in trained[0]:
        run = everywhere[name]
        assert run["ddp"] and run["switched"] == trainers.SWITCH and run["plan"] == trained[0][0][name]["plan"]
        assert run["unequal"] == [] and run["unequal_state"] == [] and run["losses"] == trained[0][0][name]["losses"]
    if name == "compiled":
        assert trained[0][0][name]["losses"] == pytest.approx(trained[0][0]["plain"]["losses"], abs=1e-5)


def test_a_killed_process_ends_the_others_and_the_last_checkpoint_resumes(tmp_path):
    """Started by hand: torchrun would end the survivor itself."""
    started = time.monotonic()
    environment = {
        **ENVIRONMENT,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 2000),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / "trainers.py"), str(tmp_path), "killed"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        errors = [p.communicate(timeout=LIMIT)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert processes[1].returncode == -9, errors[1][-3000:]
    assert processes[0].returncode == 1 and "ProcessLostError: process 0 of 2 got no answer" in errors[0], errors[0][
        -3000:
    ]
    assert time.monotonic() - started < LIMIT / 2
    assert (tmp_path / "killed" / f"checkpoint-{trainers.SWITCH - 1}").is_dir()
    assert not (tmp_path / "killed" / f"checkpoint-{trainers.SWITCH}").exists()
    launch(2, str(SCRIPTS / "trainers.py"), str(tmp_path), "resumed")


# --- fully_shard (FSDP2) ---


@pytest.fixture(scope="module")
def fully_sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    launch(2, str(SCRIPTS / "sharded.py"), str(folder))
    return json.loads((folder / "sharded.json").read_text()), torch.load(folder / "sharded.pt")


def check_as_unsharded(everywhere, tensors, name, options):
    expected = sharded.train(**{k: v for k, v in options.items() if k != "options"})
    tolerance = {"bf16 policy": 2e-2}.get(name, 1e-6)
    for results, _ in everywhere:
        run = results[name]
        assert run["sharded"] and run["held"] and run["switched"] == expected["switched"] is not None
        assert run["plan"] == everywhere[0][0][name]["plan"] and run["losses"] == everywhere[0][0][name]["losses"]
        assert run["losses"] == pytest.approx(expected["losses"], abs=tolerance)
        if name != "bf16 policy":
            assert run["plan"] == expected["plan"] and run["parameters"] == expected["parameters"]
            assert largest(tensors[name]["_weights"], expected["_weights"]) < 2e-5


@pytest.mark.parametrize("name", sharded.SCENARIOS)
def test_a_sharded_model_trains_as_a_whole_one(fully_sharded, name):
    """fully_shard on each block and around all; plan, step, losses, and the full state dict in an unsharded model."""
    everywhere, tensors = fully_sharded
    check_as_unsharded(everywhere, tensors, name, sharded.SCENARIOS[name])
    here = [results[name]["numbers here"] for results, _ in everywhere]
    assert max(here) < 0.51 * sum(here) and sum(here) == everywhere[0][0][name]["parameters"]


@pytest.mark.parametrize("name", ["compiled", "compiled by blocks"])
def test_a_sharded_model_compiles_in_the_first_step_after_the_switch_and_no_more(fully_sharded, name):
    for results, _ in fully_sharded[0]:
        graphs = results[name]["graphs"]  # by step
        before, after = graphs[sharded.SWITCH - 1], graphs[sharded.SWITCH]
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
    launch(4, str(SCRIPTS / "sharded.py"), str(tmp_path), "copies of shards")
    everywhere, tensors = json.loads((tmp_path / "sharded.json").read_text()), torch.load(tmp_path / "sharded.pt")
    check_as_unsharded(everywhere, tensors, "copies of shards", {})
    here = [results["copies of shards"]["numbers here"] for results, _ in everywhere]
    assert here[:2] == here[2:] and sum(here[:2]) == everywhere[0][0]["copies of shards"]["parameters"]


@pytest.fixture(scope="module")
def trained_sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    launch(2, str(SCRIPTS / "fsdp_trainer.py"), str(folder))
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


def test_fsdp2_refuses_to_go_back_to_a_best_model(trained_sharded):
    for everywhere in trained_sharded:
        assert "load_best_model_at_end" in everywhere["best"] and "from_pretrained" in everywhere["best"]


# --- examples ---


def test_the_loop_without_a_trainer_runs_on_two_processes(tmp_path):
    """`accelerate launch --config_file`, the bundled model and data, few steps."""
    pytest.importorskip("datasets")
    from accelerate.commands import accelerate_cli

    options = {"max_train_samples": 64, "max_eval_samples": 32, "max_train_steps": 6, "per_device_train_batch_size": 4}
    options |= {"gradient_accumulation_steps": 2, "switch_step": 3, "max_length": 16, "output_dir": tmp_path / "model"}
    command = [sys.executable, accelerate_cli.__file__, "launch", "--config_file"]
    command += [str(ROOT / "examples" / "accelerate_configs" / "cpu_2_processes.yaml"), "--main_process_port", "0"]
    command += [str(ROOT / "examples" / "text_classification_no_trainer.py")]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "ACCELERATE_USE_CPU"}  # the file and the script must do
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    if "is not installed" in done.stderr:
        pytest.skip("the packages with the bundled model and data are not installed (examples/requirements-data.txt)")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 process(es), MULTI_CPU: switched at step 3" in done.stdout and "step 6 of 6: test accuracy" in done.stdout
    ranks = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["ranks"]
    assert len(ranks) > 20 and (tmp_path / "model" / "model.safetensors").stat().st_size < 70e6 < 22.7e6 * 4


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_reads_the_configs(path):
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "fp16", "bf16")
