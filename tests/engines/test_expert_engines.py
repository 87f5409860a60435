"""Experts under DDP and FSDP2, in two processes: the same plan, losses and weights as in one process on the same batches."""

import json

import pytest

import expert_loops
from launch import launch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    launch(2, "expert_loops.py", folder)
    return json.loads((folder / "experts.json").read_text())


@pytest.fixture(scope="module")
def alone():
    return expert_loops.run("one process")


@pytest.mark.parametrize("engine", expert_loops.ENGINES[1:])
def test_experts_switch_as_in_one_process(results, alone, engine):
    found = results[engine]
    assert found["switched"] == alone["switched"] == expert_loops.SWITCH
    assert len(alone["experts"]) == 4 and found["experts"] == alone["experts"] and found["plan"] == alone["plan"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert found["optimizer"] == alone["optimizer"] and "carried for" in alone["optimizer"]
    for what in ("norms", "moments"):
        assert set(found[what]) == set(alone[what])
        for name, value in alone[what].items():
            assert found[what][name] == pytest.approx(value, rel=0.02, abs=1e-4), name
    assert found["sharded"] == (1.0 if engine == "FSDP2" else 0.0)
