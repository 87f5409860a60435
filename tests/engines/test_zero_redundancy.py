"""ZeroRedundancyOptimizer under DDP (real processes, gloo), beside an ordinary optimizer on the same batches."""

import json

import pytest

import loops
import zero_redundancy_loops
from launch import launch


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("redundant") / "results.json"
    launch(2, "zero_redundancy_loops.py", path)
    return json.loads(path.read_text())


def check(everywhere, states_after_the_switch=53, slots=2):
    """The switch, the state right after it and at the end, the losses and the parameters are the ordinary optimizer's."""
    processes = len(everywhere)
    for run in everywhere:
        assert run["plan"][0] == run["plan"][1] == everywhere[0]["plan"][0] and len(run["plan"][0]) == 12
        assert run["switched"] == [loops.SWITCH] * 2 and run["unequal"] == [] and run["kept"]
        assert run["loss"] < 1e-6 and run["parameter"] < 2e-5 and run["rates"][0] == run["rates"][1]
        assert run["states"] == [states_after_the_switch, 53]
        assert run["state"] < 1e-5 and run["state at the end"] < 1e-3
        assert run["report"][0].partition("(")[0] == "ZeroRedundancyOptimizer"
        assert run["report"][0].partition(": ")[2] == run["report"][1].partition(": ")[2]
        here, whole = run["parameters here"]
        assert run["strangers"] == 0 and run["numbers here"] == [slots * here, slots * whole]
        assert here < 1.3 * whole / processes
    assert sum(run["parameters here"][0] for run in everywhere) == everywhere[0]["parameters here"][1]


def test_state_is_divided_anew_and_carried(two):
    check(two["AdamW"])
    assert "carried for 12 of 12" in two["AdamW"][0]["report"][0]


def test_groups_buckets_accelerate_and_the_learning_rate_scale_go_along(two):
    """Three groups, parameters_as_bucket_view, AcceleratedOptimizer, a scheduler whose rates are scaled at the switch."""
    check(two["groups"])
    expected = [
        scale * base * (1 - i / 20) for i, scale in enumerate([1] * 5 + [1.5] * 5) for base in (1e-2, 1e-2, 5e-3)
    ]
    assert [rate for step in two["groups"][0]["rates"][0] for rate in step] == pytest.approx(expected)


def test_momentum_is_carried(two):
    check(two["SGD"], slots=1)


def test_state_of_the_factors_can_start_anew(two):
    check(two["reset"], states_after_the_switch=53 - 24)
    assert "carried for 0 of 12" in two["reset"][0]["report"][0]


def test_four_processes(tmp_path):
    launch(4, "zero_redundancy_loops.py", tmp_path / "results.json", "AdamW")
    check(json.loads((tmp_path / "results.json").read_text())["AdamW"])


@pytest.mark.parametrize("name", zero_redundancy_loops.VERDICTS)
def test_verdicts(two, name):
    """Resuming, refusals, and errors on one process: each process says "ok", or what went wrong."""
    assert two[name] == ["ok", "ok"]
