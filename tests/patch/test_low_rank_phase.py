"""The low-rank phase: the quicker form of running stays, and slower steps are said once, with the reason."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_cuttlefish import CuttlefishConfig, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.eager import has_cuda_graphs
from hf_cuttlefish.measure.pace import BEFORE, LEAST, STEPS, UNCOUNTED, Pace
from hf_cuttlefish.measure.watch import Watch
from hf_cuttlefish.patch import low_rank_phase
from hf_cuttlefish.patch.low_rank_phase import TRIED, WARM, Found, LowRankPhase, quicker_form
from hf_cuttlefish.report import lines


class Clock:
    """Time that passes when it is told to; `pace` and the trial read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.backlog = 100.0, 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(low_rank_phase, "_synchronize", self.wait)
        monkeypatch.setattr(low_rank_phase, "can_try", lambda engine: True)

    def wait(self) -> None:
        self.now, self.backlog = self.now + self.backlog, 0.0


class Run:
    """A run in its low-rank phase, whose steps take so many seconds in each form."""

    def __init__(self, clock: Clock, multiplied: float, pairs: float, before: float = 0.04) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
        self.model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes))  # type: ignore[arg-type]
        factorize(self.model, dict.fromkeys(find_targets(self.model), 4))
        self.clock, self.takes = clock, {True: multiplied, False: pairs}
        self.engine = SimpleNamespace(model=self.model, processes=SimpleNamespace(is_main=True, size=1), replicas=1)
        self.schedule = SimpleNamespace(total_steps=1000)
        self.global_step, self.switch_step, self.restarts = 100, 100, False
        self.config, self.report = CuttlefishConfig(), None
        self.watch = Watch(self.model, {}, self.engine, self.config)  # type: ignore[arg-type]
        for _ in range(STEPS + 1):
            clock.now += before
            self.watch.pace.step()
        self.watch.pace.mark()
        self.phase = LowRankPhase(self.watch)

    def go(self, steps: int) -> list[Found]:
        found = []
        for _ in range(steps):
            form = self.phase.multiplied
            self.clock.now += self.takes[form is not None and form.is_on]
            self.watch.pace.step()
            found.append(self.phase.step(self))  # type: ignore[arg-type]
        return [f for f in found if f is not None]


ALL = 2 * (WARM + TRIED) + 1


@pytest.mark.parametrize(
    ("waits", "share", "form"), [(True, 0.95, "multiplied"), (True, 0.85, "pairs"), (False, 0.95, "pairs")]
)
def test_what_launches_less_runs_where_the_host_scatters(waits: bool, share: float, form: str) -> None:
    assert quicker_form({"multiplied": 50.0, "pairs": 50.0 * share}, waits) == form


def test_the_line_names_the_form_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Clock(monkeypatch), 0.05, 0.0475)
    (found,) = run.go(ALL)
    assert found.form == "multiplied" and run.phase.multiplied is not None and run.phase.multiplied.is_on
    assert "run multiplied out from here on" in lines.low_rank_phase(found)[1]


@pytest.mark.parametrize(("multiplied", "pairs"), [(0.035, 0.05), (0.05, 0.035)])
def test_the_quicker_form_stays(monkeypatch: pytest.MonkeyPatch, multiplied: float, pairs: float) -> None:
    run = Run(Clock(monkeypatch), multiplied, pairs)
    (found,) = run.go(ALL)
    assert found.tried == pytest.approx({"multiplied": 1000 * multiplied, "pairs": 1000 * pairs})
    assert (run.phase.multiplied is not None and run.phase.multiplied.is_on) is (multiplied < pairs)
    level, line = lines.low_rank_phase(found)
    assert level == logging.INFO
    assert "35 ms" in line and "50 ms" in line and "cuda_graphs=True" in line
    run.phase.stop()
    assert not run.model._forward_pre_hooks


def test_an_evaluation_among_the_steps_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    run = Run(clock, 0.035, 0.05)
    run.go(WARM + 3)
    clock.now += 60
    (found,) = run.go(ALL)
    assert found.tried == pytest.approx({"multiplied": 35, "pairs": 50})


def test_what_the_device_is_behind_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has launched pairs in 20 ms a step, and the device works at them for 50."""
    clock = Clock(monkeypatch)
    run = Run(clock, 0.04, 0.02)
    original = run.phase.step

    def step(of: Any) -> Any:
        form = run.phase.multiplied
        if form is not None and not form.is_on:
            clock.backlog += 0.03
        return original(of)

    monkeypatch.setattr(run.phase, "step", step)
    (found,) = run.go(ALL)
    assert found.tried == pytest.approx({"multiplied": 40, "pairs": 50})


@pytest.mark.parametrize(("now", "words"), [(0.0407, None), (0.0423, "42.3 ms, and took 40 ms before the switch.")])
def test_slower_steps_are_said_once_with_both_times(
    monkeypatch: pytest.MonkeyPatch, now: float, words: str | None
) -> None:
    run = Run(Clock(monkeypatch), now, 0.06)
    run.go(ALL)
    found = run.go(UNCOUNTED + 3 * STEPS)
    assert [words in lines.low_rank_phase(f)[1] for f in found if words] == [True] * (words is not None)
    assert len(found) == (words is not None)
    assert LEAST <= STEPS


def without_trial(monkeypatch: pytest.MonkeyPatch, pairs: float, before: float = 0.04) -> Run:
    """A run that tries no form: on a CPU, compiled, or in several processes."""
    run = Run(Clock(monkeypatch), pairs, pairs, before)
    monkeypatch.setattr(low_rank_phase, "can_try", lambda engine: False)
    return run


def steps(run: Run, count: int, seconds: float, data: float = 0.0, between: float = 0.0) -> list[Found]:
    """Steps that say when they begin, after their data have come; every third one after an evaluation."""
    found = []
    for i in range(count):
        run.clock.now += data + (between if i % 3 == 0 else 0)
        run.watch.pace.begin()
        run.clock.now += seconds
        run.watch.pace.step()
        if run.watch.pace.is_after or run.phase._has_begun:
            found.append(run.phase.step(run))  # type: ignore[arg-type]
    return [f for f in found if f is not None]


AFTER = UNCOUNTED + STEPS


@pytest.mark.parametrize(
    ("seconds", "data", "words"),
    [
        (0.06, 1.0, "60 ms, and took 40 ms"),  # 6% of what passes from step to step
        (0.04, 2.0, None),  # the loader alone has become slower
        (0.042, 1.0, None),
    ],
)
def test_the_time_of_the_data_is_not_the_steps(
    monkeypatch: pytest.MonkeyPatch, seconds: float, data: float, words: str | None
) -> None:
    run = without_trial(monkeypatch, 0.0)
    run.watch.pace = Pace()
    steps(run, STEPS + 2, 0.04, data=1.0)
    run.watch.pace.mark()
    found = steps(run, AFTER, seconds, data)
    assert [words in lines.low_rank_phase(f)[1] for f in found if words] == [True] * (words is not None)
    assert len(found) == (words is not None)


def test_a_longer_step_that_a_loader_hides_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers fetch the next batch meanwhile: 100 ms pass from step to step, before and after."""
    run = without_trial(monkeypatch, 0.0)
    run.watch.pace = Pace()
    steps(run, STEPS + 2, 0.04, data=0.06)
    run.watch.pace.mark()
    assert steps(run, AFTER, 0.06, data=0.04) == []


@pytest.mark.parametrize(("seconds", "count"), [(0.04, 0), (0.05, 1)])
def test_evaluations_in_between_are_not_the_steps(monkeypatch: pytest.MonkeyPatch, seconds: float, count: int) -> None:
    run = without_trial(monkeypatch, 0.0)
    run.watch.pace = Pace()
    steps(run, STEPS + 2, 0.04)
    run.watch.pace.mark()
    assert len(steps(run, AFTER, seconds, between=5.0)) == count


def test_a_trial_leaves_out_data_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Clock(monkeypatch), 0.0, 0.0)
    (found,) = steps(run, ALL, 0.04, data=1.0, between=9.0)
    assert found.tried == pytest.approx({"multiplied": 40, "pairs": 40})


@pytest.mark.parametrize(("backlog", "words"), [(0.0, "The host launches"), (0.2, "The device sets the pace")])
def test_the_reason_is_looked_for_where_no_trial_has_told_it(
    monkeypatch: pytest.MonkeyPatch, backlog: float, words: str
) -> None:
    """Compiled, or in several processes: some steps between two synchronizations, and only where there is something to say."""
    run = without_trial(monkeypatch, 0.06)
    cuda = [SimpleNamespace(device=SimpleNamespace(type="cuda"))]
    monkeypatch.setattr(run.model, "parameters", lambda: iter(cuda))
    assert run.go(AFTER) == []
    run.clock.backlog = 0.0
    assert run.go(WARM + TRIED) == []
    run.clock.backlog = backlog
    (found,) = run.go(1)
    level, line = lines.low_rank_phase(found)
    assert level == logging.WARNING and words in line and "60 ms, and took 40 ms" in line
    assert run.go(2 * STEPS) == []


def test_a_resumed_run_knows_the_time_before_from_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    run = without_trial(monkeypatch, 0.05)
    run.watch.pace = Pace()
    assert run.go(2 * AFTER) == []  # nothing known, nothing said
    again = without_trial(monkeypatch, 0.05)
    again.watch.pace = Pace()
    again.report = SimpleNamespace(seconds={BEFORE: 0.04})  # type: ignore[assignment]
    (found,) = again.go(2 * AFTER)
    assert (
        "50 ms, and took 40 ms before the switch in the run that this one goes on from"
        in lines.low_rank_phase(found)[1]
    )


def test_a_run_that_switched_by_restart_is_told_once_its_model_is_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed and FSDP1: the run that switches stays dense in memory, the one that goes on has the pairs."""
    run = without_trial(monkeypatch, 0.05)
    run.restarts, run.watch.pace = True, Pace()
    run.report = SimpleNamespace(seconds={BEFORE: 0.04})  # type: ignore[assignment]
    assert len(run.go(2 * AFTER)) == 1
    dense = without_trial(monkeypatch, 0.05)
    dense.restarts = True
    dense.engine.model = torch.nn.Linear(2, 2)
    assert dense.go(2 * AFTER) == []


def test_speed_is_held_against_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = without_trial(monkeypatch, 0.03)
    run.config = CuttlefishConfig(objective="speed")
    (found,) = run.go(2 * AFTER)
    level, line = lines.low_rank_phase(found)
    assert level == logging.INFO and "30 ms, and took 40 ms" in line and "whole steps" in line
    slow = without_trial(monkeypatch, 0.05)
    slow.config = CuttlefishConfig(objective="speed")
    (found,) = slow.go(2 * AFTER)
    level, line = lines.low_rank_phase(found)
    assert level == logging.WARNING and "min_speedup" in line and "objective='speed'" not in line


@pytest.mark.parametrize(
    ("device", "waits", "how", "words"),
    [
        (
            "cuda",
            True,
            "",
            "The host launches kernels one by one, and the device waits for it. CuttlefishCallback(cuda_graphs=True)",
        ),
        ("cuda", True, "compiled", "GraphedStep in a loop of your own, with fixed lengths launches them all at once"),
        ("cuda", True, "compiled", "logging_nan_inf_filter=False and accelerator_config={'non_blocking': True}"),
        (
            "cuda",
            True,
            "graphs",
            "with these CUDA graphs it works for each parameter tensor, and pairs have more of them",
        ),
        (
            "cuda",
            True,
            "graphs",
            "torch_compile_mode='default' with CuttlefishCallback(cuda_graphs=True) makes forward, backward",
        ),
        ("cuda", True, "step graphs", "although forward and backward are one CUDA graph"),
        ("cuda", False, "step graphs", "The device sets the pace"),
        ("cuda", True, "graphs", "logging_nan_inf_filter=False and accelerator_config={'non_blocking': True}"),
        ("cuda", False, "", "The device sets the pace"),
        ("cuda", False, "graphs", "The device sets the pace"),
        ("cpu", None, "", "pairs take longer than dense layers here. Use larger batches"),
    ],
)
def test_the_line_says_why_and_what_to_do(device: str, waits: bool | None, how: str, words: str) -> None:
    times = (0.04, 0.05)
    graphs = {"has_graphs": how == "graphs", "has_step_graphs": how == "step graphs"}
    found = Found(waits, device, None, times, is_slower=True, is_compiled=bool(how), **graphs)
    level, line = lines.low_rank_phase(found)
    assert level == logging.WARNING and words in line and "objective='speed'" in line and "larger batches" in line
    if "graphs" in how:
        assert "one by one" not in line
    if how == "step graphs":
        assert "cuda_graphs" not in line


@pytest.mark.parametrize("graphs", [False, True])
def test_several_processes_are_not_sent_to_what_is_refused_there(graphs: bool) -> None:
    found = Found(True, "cuda", None, (0.04, 0.05), is_slower=True, is_compiled=True, has_graphs=graphs, is_alone=False)
    _, line = lines.low_rank_phase(found)
    assert "cuda_graphs" not in line and "logging_nan_inf_filter=False" in line
    assert ("reduce-overhead" in line) is not graphs


def test_graphs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps a container for each device; one without a manager holds no graph."""
    container = SimpleNamespace(tree_manager=None)
    trees = SimpleNamespace(local=None, get_obj=lambda local, name: {0: container})
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)  # type: ignore[arg-type]
    assert not has_cuda_graphs()
    container.tree_manager = object()
    assert has_cuda_graphs()
    monkeypatch.delattr(trees, "get_obj")
    assert not has_cuda_graphs()


def test_torch_keeps_its_graphs_where_they_are_looked_for() -> None:
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    assert isinstance(trees.get_obj(trees.local, "tree_manager_containers"), dict)
    assert trees.TreeManagerContainer(0).tree_manager is None


def test_short_runs_and_full_rank_ones_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Clock(monkeypatch), 0.01, 0.02)
    run.schedule.total_steps = run.global_step + low_rank_phase.LEAST - 1
    assert run.go(ALL) == [] and run.phase.tried == {}
    dense = Run(Clock(monkeypatch), 0.01, 0.02)
    dense.switch_step = None
    assert dense.go(ALL) == [] and dense.phase.multiplied is None


def graphed(monkeypatch: pytest.MonkeyPatch, run: Run) -> dict[str, Any]:
    """Let the run's steps be recorded; what is returned says how many are, and whether recording goes on."""
    state: dict[str, Any] = {"on": True, "made": 0}
    monkeypatch.setattr(low_rank_phase, "is_graphed", lambda model: state["on"])
    monkeypatch.setattr(low_rank_phase, "graphs_made", lambda model: state["made"])
    return state


def test_recorded_steps_run_as_pairs_and_count_once_they_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 60 ms that warm up, for shapes that come late, do not make a run slower whose recorded steps take 10."""
    run = Run(Clock(monkeypatch), 0.06, 0.06)
    state = graphed(monkeypatch, run)
    assert not run.go(20)
    state["made"] = 1
    assert not run.go(UNCOUNTED + 2)
    state["made"], run.takes = 2, {True: 0.01, False: 0.01}
    assert not run.go(3 * STEPS)
    assert run.phase.multiplied is None and not run.phase.tried
    assert run.watch.seconds == pytest.approx((0.04, 0.01))


def test_shapes_that_go_on_coming_do_not_put_off_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Clock(monkeypatch), 0.06, 0.06)
    state = graphed(monkeypatch, run)
    found = []
    for _ in range(low_rank_phase.RECORDING + 4 * STEPS):
        state["made"] += 1
        run.global_step += 1
        found += run.go(1)
    assert [f.is_slower for f in found] == [True]


def test_the_forms_are_tried_where_steps_can_not_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Clock(monkeypatch), 0.035, 0.05)
    state = graphed(monkeypatch, run)
    run.go(5)
    state["on"] = False
    (found,) = run.go(ALL)
    assert found.form == "multiplied" and run.phase.multiplied is not None and run.phase.multiplied.is_on


def test_nothing_is_tried_on_a_cpu() -> None:
    engine = {"processes": SimpleNamespace(size=1), "holds_whole_weights": True, "fixed": ""}
    run = SimpleNamespace(model=torch.nn.Linear(2, 2), **engine)
    assert not low_rank_phase.can_try(run)
