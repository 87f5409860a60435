"""What every engine promises: one table, the same promises. What is peculiar to one engine is in its own file.

Same plan and losses as one process on the same global batches; resume before and after the switch, from checkpoints of earlier
versions too; a process that raises at any edit leaves all as before on all; what cannot be is refused before the first step.
"""

import importlib.util
import json
import tarfile
from pathlib import Path

import pytest

import contract
from launch import ON_CPU, PLAIN, launch

OLD = Path(__file__).parents[1] / "data" / "checkpoints"
ENGINES = tuple(contract.PROCESSES)
WRAPPERS = {
    "one process": {"BertForSequenceClassification"}, "nn.DataParallel": {"DataParallel"}, "DDP": {"DistributedDataParallel"},
    "ZeroRedundancyOptimizer": {"ZeroRedundancyOptimizer in DistributedDataParallel"},
    "FSDP2": {"FSDPBertForSequenceClassification"}, "FSDP1": {"FullyShardedDataParallel"}, "DeepSpeed": {"DeepSpeedEngine"},
    "tensor parallel": {"LlamaForCausalLM"},
}  # fmt: skip
"""What is around the model, so that no engine is tested that is not there."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What each process says of all runs, by engine; each engine is launched once."""
    made = {}

    def results(engine):
        if engine not in made:
            folder = tmp_path_factory.mktemp(engine.replace(" ", "_"))
            old = unpacked(engine, folder)
            if contract.PROCESSES[engine] == 1:
                made[engine] = [contract.promises(engine, folder, old)]
            else:
                if engine == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
                    pytest.skip("deepspeed is not installed (pip install deepspeed)")
                environment = PLAIN if engine == "DeepSpeed" else ON_CPU
                launch(2, "contract.py", engine, folder, *([old] if old else []), environment=environment)
                made[engine] = json.loads((folder / "results.json").read_text())
        return made[engine]

    return results


def unpacked(engine, folder):
    """Checkpoints of an earlier version, if there are some of this engine."""
    archive = OLD / f"{engine.replace(' ', '_')}.tar.xz"
    if not archive.is_file():
        return None
    with tarfile.open(archive) as file:
        file.extractall(folder / "of old", filter="data")
    return folder / "of old"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in this one process."""
    made = {}

    def run(engine):
        key = (
            engine if engine in ("tensor parallel", "ZeroRedundancyOptimizer") else "one process"
        )  # another model, a loop
        if key not in made:
            made[key] = contract.run(key, tmp_path_factory.mktemp("alone") / "run")
        return made[key]

    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_plan_and_losses_are_those_of_one_process(kept, alone, engine):
    expected = alone(engine)
    assert expected["switched"] == contract.SWITCH and len(expected["plan"]) >= 5
    for results in kept(engine):
        run = results["whole"]
        assert set(run["wrapped"]) == WRAPPERS[engine] and len(run["wrapped"]) == 1 + (engine in contract.BY_RESTART)
        assert run["plan"] == expected["plan"] and run["switched"] == contract.SWITCH and run["low rank"]
        assert len(run["losses"]) == contract.STEPS and run["losses"] == pytest.approx(expected["losses"], abs=2e-6)


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "ZeroRedundancyOptimizer"])
def test_samples_wait_for_the_end_of_backward_only_where_weights_do(kept, engine):
    """FSDP1 frees a weight's storage in backward, and what read it later found other memory, on a GPU."""
    for results in kept(engine):
        assert results["whole"]["together"] is (engine not in ("FSDP1", "FSDP2", "tensor parallel", "DeepSpeed"))


@pytest.mark.parametrize("engine", [e for e in ENGINES if e not in ("ZeroRedundancyOptimizer", "tensor parallel")])
def test_what_trainer_saves_at_the_end_loads(kept, engine):
    """Under its own names: FSDP1's wrappers stood in config.json's. The card is beside it."""
    for results in kept(engine):
        saved = results["whole"]["saved"]
        assert saved["ranks"] == results["whole"]["plan"] and saved["card"]


@pytest.mark.parametrize(
    ("engine", "step"), [(engine, step) for engine in ENGINES for step in contract.saved_at(engine)]
)
def test_a_run_resumes_before_and_after_the_switch(kept, engine, step):
    """Before it, among the steps that gather statistics. Losses are the same numbers."""
    for results in kept(engine):
        run, again = results["whole"], results[f"resumed at {step}"]
        assert again["plan"] == run["plan"] and again["switched"] == contract.SWITCH and again["low rank"]
        assert again["losses"] == run["losses"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_raises_at_an_edit_leaves_all_as_before_on_all(kept, engine):
    """Whichever edit it is: training goes on as without a switch, to the bit."""
    for results in kept(engine):
        assert results["none"]["switched"] == contract.SWITCH and results["none"]["low rank"]
        failed = {name: run for name, run in results.items() if name.startswith("fails at")}
        assert len(failed) >= (2 if engine in contract.BY_RESTART else 4) and any(
            "SwapModules" in name for name in failed
        )
        for name, run in failed.items():
            assert run["switched"] is None and "injected" in run["reason"] and not run["low rank"], name
            assert len(run["losses"]) == contract.AFTER, name
            # By restart, a switch at the very last step leaves one more step to the run that goes on.
            assert run["losses"] == results["dense"]["losses"][: contract.AFTER], name


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_is_refused_before_the_first_step(kept, engine):
    for results in kept(engine):
        assert "switch_step is 99, but the run has 10 steps" in results["refusals"]["too late"]
        if contract.PROCESSES[engine] > 1:
            said = results["refusals"]["other config"]
            assert "disagree on config" in said and "rank_multiple=2 on process 0" in said


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpoints_of_an_earlier_version_resume(kept, engine):
    """Written by data/checkpoints/write.py at the commit that it names, which also notes how the run went on then."""
    expected = json.loads((OLD / "expected.json").read_text())[engine]
    for results in kept(engine):
        old = {name: run for name, run in results.items() if name.startswith("old ")}
        assert len(old) == len(contract.saved_at(engine))
        for name, run in old.items():
            assert run["plan"] == expected["plan"] and run["switched"] == contract.SWITCH and run["low rank"]
            # From before the switch this version chooses factors and goes on in its own way.
            near = 1e-3 if name.endswith(f"-{contract.BEFORE}") else 2e-6
            assert run["losses"] == pytest.approx(expected["losses"], abs=near), name
