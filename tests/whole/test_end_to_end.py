"""The benchmark of whole runs and that of steps: every path at tiny sizes on the CPU, the sums, and the tables of the records."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.end_to_end import __main__ as command
from benchmarks.end_to_end.cases import CASES, Rows
from benchmarks.end_to_end.phases import computed, even_after, fixed, ordinary, split
from benchmarks.end_to_end.run import measured, run
from benchmarks.end_to_end.tables import (
    computed_table,
    gain_table,
    host_parts_table,
    large_table,
    runs_table,
    trial_table,
)
from benchmarks.steps import __main__ as steps
from benchmarks.steps.tables import ratios_table
from benchmarks.write_docs import write_gpu_page
from hf_cuttlefish.config import CuttlefishConfig
from hf_cuttlefish.decide.schedule import Schedule

ROOT = Path(__file__).parents[2]


def record(method: str = "cuttlefish", **changes) -> dict:
    """Of a run of 100 steps: 10 and 8 ms a step, 30 ms while it gathers, 5 + 4 s of compilation, a switch of 2 s at step 30."""
    ours = method != "dense"
    took = [5.0] + [0.01] * 21 + [0.03] * 8 + [4.0] + [0.008] * 69 if ours else [5.0] + [0.01] * 99
    took[29] += 2.0 if ours else 0.0
    ends = [sum(took[: n + 1]) for n in range(100)]
    gathers = [ours and 21 <= n < 29 for n in range(100)]
    phases = split(ends, gathers, ends[-1] + 0.5, 30 if ours else None, 2.0)
    found = {
        "case": "llama-1b",
        "mode": "graphs",
        "method": method,
        "blocks": 8,
        "of_blocks": 16,
        "rows": 8,
        "length": 1024,
    }
    found |= {
        "steps": 100,
        "steps_asked": 100,
        "seconds": ends[-1] + 0.5,
        "phases": phases,
        "ms_before": 10.0,
        "peak_memory": 2**31,
    }
    found |= {"ms_gathering": 30.0 if ours else None, "ms_after": 8.0 if ours else None, "statistics_needed": 8}
    found |= {"switch_step": 30 if ours else None, "switch_seconds": {"total": 2.0} if ours else None}
    return found | {"slow_steps": [[31, 4000.0]], "notes": [], "told": [], "reason": ""} | changes


def test_the_step_of_the_switch_is_none_of_the_ordinary_ones():
    # Steps 18 to 20 gather; the switch is in the last of them.
    took = [5.0] + [0.01] * 16 + [0.03] * 2 + [7.0] + [4.0] + [0.008] * 19
    ends = [sum(took[: n + 1]) for n in range(40)]
    ours = SimpleNamespace(switch_step=20, report=SimpleNamespace(seconds={"total": 6.97}))
    gathers = [17 <= n < 20 for n in range(1, 41)]
    found = measured(SimpleNamespace(ours=ours, ends=ends, gathers=gathers, compile_seconds=[0.0, 0.0]), sum(took), 40)
    assert [round(found[name], 6) for name in ("ms_before", "ms_gathering", "ms_after")] == [10.0, 30.0, 8.0]


@pytest.mark.parametrize("method", ["dense", "cuttlefish"])
def test_the_phases_hold_all_seconds_of_a_run(method):
    r = record(method)
    assert sum(phase["seconds"] for phase in r["phases"].values()) == pytest.approx(r["seconds"])
    assert sum(phase["steps"] for phase in r["phases"].values()) == 100
    if method == "cuttlefish":
        steps_of = {name: phase["steps"] for name, phase in r["phases"].items()}
        assert steps_of == {"start": 8, "before": 14, "gathering": 8, "switch": 0, "restart": 8, "after": 62, "end": 0}
        assert r["phases"]["gathering"]["seconds"] == pytest.approx(8 * 0.03)


@pytest.mark.parametrize("method", ["dense", "cuttlefish"])
def test_what_is_computed_for_the_run_that_was_measured_is_what_was_measured(method):
    assert computed(record(method), 100) == pytest.approx(record(method)["seconds"])


def test_what_is_fixed_and_what_is_not():
    dense, ours = record("dense"), record()
    assert fixed(dense) == pytest.approx(5.0 - 0.01 + 0.5)
    assert fixed(ours) == pytest.approx(5.0 - 0.01 + 4.0 - 0.008 + 2.0 + 0.5)
    # 24 steps gather in a run of 10,000; a switch at 30% spares 2 ms in each of 7,000 steps.
    assert computed(ours, 10000) == pytest.approx(fixed(ours) + 2976 * 0.01 + 24 * 0.03 + 7000 * 0.008)
    even = even_after(dense, ours)
    assert even is not None
    assert computed(ours, even) < computed(dense, even)
    assert computed(ours, even - 100) >= computed(dense, even - 100)
    slower = record(phases=ours["phases"] | {"after": {"steps": 62, "seconds": 62 * 0.012}})
    assert even_after(dense, slower) is None


def test_checks_cost_a_long_run_no_more_than_a_short_one():
    """A step that measures takes 50 ms more; in a run of 10,000 there are as many of them as in one of 100."""
    checks = [n for n in range(2, 31) if Schedule(CuttlefishConfig(), 100).is_check(n) or n % 12 == 0]
    took = [0.01 + 0.05 * (n in checks) for n in range(2, 22)] + [0.03] * 8 + [4.01] + [0.008] * 69
    before = sum(took[7:20])
    phases = record()["phases"] | {"before": {"steps": 13, "seconds": before}}
    measured_too = record(phases=phases, gathering_steps=9, ms=" ".join(str(1000 * s) for s in took))
    usual, measuring = ordinary(measured_too)
    assert usual == pytest.approx(0.01)
    assert measuring == pytest.approx(before - 13 * 0.01)
    assert measuring > 0.1
    assert computed(measured_too, 10000) == pytest.approx(computed(record(), 10000) + measuring)


def test_an_eager_dense_run_of_the_same_call_is_the_one_to_compare_with():
    eager, slow_host = record("dense", mode="eager"), record("dense", mode="eager", call="b")
    ours, others = record(mode="step-graph", call="b"), record(mode="blocks-step-graph", call="c")
    found = computed_table([eager, slow_host, ours, others]).splitlines()[2:]
    assert [row.split(" | ")[1] for row in found] == [
        "eager / a graph a step",
        "eager / compiled blocks, a graph a step",
    ]


def test_tables_have_what_was_measured_and_leave_out_the_rest():
    assert large_table([]) == computed_table([]) == trial_table([]) == ratios_table([]) == gain_table([]) == ""
    blocks = [record(method, mode="blocks-graphs") for method in ("dense", "cuttlefish")]
    (row,) = gain_table([*blocks, record("dense", mode="eager"), record()]).splitlines()[2:]
    assert (
        row == "| Llama-1B shapes, 8 of 16 blocks, 8 x 1024 | blocks as CUDA graphs | 10 | 8 (mean 8) | 4,700 | 1.08 |"
    )
    failed = {"case": "vit-large", "mode": "graphs", "method": "dense", "error": "no room"}
    early = record(switch_step=None, case="bert-large")
    assert large_table([failed, early]) == ""
    rows = large_table([failed, early, record(), record("dense")]).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| Llama-1B shapes, 8 of 16 blocks, 8 x 1024", "dense"],
        ["| Llama-1B shapes, 8 of 16 blocks, 8 x 1024", "Cuttlefish"],
    ]
    assert computed_table([record(), failed]) == ""
    assert "| 5 | 11 | 4,700 | 0.75 | 1.08 | 1.15 |" in computed_table([record(), record("dense")])
    eager = record("dense", mode="eager")
    assert [row.split(" | ")[1] for row in computed_table([record("dense"), record(), eager]).splitlines()[2:]] == [
        "eager / CUDA graphs",
        "CUDA graphs / CUDA graphs",
    ]
    parts = {
        "train": 0.5,
        "forward": 2.0,
        "backward": 4.0,
        "clip": 3.0,
        "optimizer": 2.0,
        "zero_grad": 1.0,
        "count": 1.5,
    }
    timed = record(host_parts=parts, tensors=200, gpu_ms=8.0)
    assert host_parts_table([timed, record("dense")]).endswith(
        "| 200 | 2.0 | 4.0 | 3.0 | 2.0 | 1.0 | 2.0 | 14.0 | 70 | 8.0 |"
    )
    told = "a step takes 48.1 ms dense, 37.3 ms as planned"
    assert told.removeprefix("a step takes ") in trial_table([record("speed", notes=[told])])
    nothing = record("speed", told=[f"Cuttlefish: no switch: {told}; nothing is"], switch_seconds=None, ms_after=None)
    assert trial_table([nothing]).endswith("| 48.1 ms dense, 37.3 ms as planned | 10.0 |  | 4.0 |")


@pytest.mark.parametrize("second", ["dense", "cuttlefish"])
def test_what_one_run_found_compiled_both_pay_for(second):
    """Where Cuttlefish's run came second its compilation counted as next to nothing."""
    runs = {method: record(method, cache="shared") for method in ("dense", "cuttlefish")}
    phases = runs[second]["phases"]
    runs[second] = record(second, cache="shared", phases=phases | {"start": phases["start"] | {"seconds": 0.5}})
    own = computed_table([record("dense"), record()])
    assert computed_table(runs.values()) == own
    (row,) = [line for line in large_table(runs.values()).splitlines() if "(cached)" in line]
    assert f"| {'dense' if second == 'dense' else 'Cuttlefish'} |" in row


def test_a_run_of_another_length_says_so_beside_its_seconds():
    """A run that was broken off after 602 steps stood beside runs of 300, as quicker."""
    other = [record(), record(steps=300, steps_asked=300), record(steps=602, steps_asked=1000)]
    row = next(line for line in runs_table(other).splitlines() if line.startswith("| whole run"))
    assert "(602 steps of 1000)" in large_table(other[2:])
    assert re.sub(r"\b[\d.]+ ?(?=[(|])", "", row) == "| whole run, s | | (300 steps) | (602 steps of 1000) |", row


def test_runs_with_other_loaders_stand_side_by_side(tmp_path):
    for workers in (0, 2, 0):
        command.add(tmp_path / "runs.json", record(loader_workers=workers))
    assert [r["loader_workers"] for r in json.loads((tmp_path / "runs.json").read_text("utf-8"))] == [2, 0]
    two = run("bert-tiny", "eager", "dense", steps=4, workers=1)
    assert two["loader_workers"] == 1


def test_ratios_stand_in_one_row():
    step = {"case": "bert-large", "mode": "graphs", "gpu_ms": 11.8}
    rows = [step | {"variant": "dense", "ms": 12.0, "of_dense": 1.0}]
    rows += [step | {"variant": f"pairs {r}", "ms": 12 * r, "of_dense": r} for r in (0.125, 0.5)]
    head, _, row = ratios_table(rows).splitlines()
    assert "rank 0.5 (GPU ms) | rank 0.125 (GPU ms) | LoRA, rank 16 (GPU ms)" in head
    assert row.endswith("| 12.0 (11.8) | 0.50 (11.8) | 0.12 (11.8) |  |")
    *_, row = ratios_table([*rows, step | {"variant": "lora", "ms": 11.0, "of_dense": 0.92}]).splitlines()
    assert row.endswith("| 0.92 (11.8) |")


def test_the_page_has_the_tables_of_the_records(monkeypatch, tmp_path):
    page = (ROOT / "docs" / "fast-on-a-gpu.md").read_text("utf-8")
    for folder in ("docs", "benchmarks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    (tmp_path / "docs" / "fast-on-a-gpu.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr("benchmarks.write_docs.ROOT", tmp_path)
    write_gpu_page()
    written = (tmp_path / "docs" / "fast-on-a-gpu.md").read_text("utf-8")
    assert written == page, "run python -m benchmarks.write_docs"


@pytest.mark.parametrize("case", ["bert-tiny", "vit-tiny", "llama-tiny"])
def test_a_row_is_one_of_a_batch_that_returns(case):
    rows = Rows(CASES[case], CASES[case].model(torch.device("cpu")).config, steps=10)
    assert len(rows) == 40
    assert all(torch.equal(value, rows[32][name]) for name, value in rows[0].items())
    assert set(rows[0]) >= {"labels"}


@pytest.mark.parametrize(
    ("case", "mode", "method"),
    [
        ("vit-tiny", "eager", "cuttlefish"),
        ("llama-tiny", "graphs", "cuttlefish"),
        ("bert-tiny", "blocks-graphs", "cuttlefish"),
    ],
)
def test_a_run_switches_and_is_timed(nothing_compiled, case, mode, method):
    found = run(case, mode, method, steps=40, blocks=1)
    assert json.loads(json.dumps(found)) == found | {"slow_steps": [list(pair) for pair in found["slow_steps"]]}
    assert (found["blocks"], found["of_blocks"], found["steps"]) == (1, 2, 40)
    assert sum(phase["seconds"] for phase in found["phases"].values()) == pytest.approx(found["seconds"])
    assert 0 < found["phases"]["gathering"]["steps"] <= found["gathering_steps"]
    assert found["phases"]["after"]["steps"] == 40 - found["switch_step"] - 8
    assert all((seconds > 0) == (mode != "eager") for seconds in found["compile_seconds"])
    assert "Llama" not in large_table([found | {"case": "bert-base"}])


def test_the_trial_of_whole_steps_is_in_the_record():
    found = run("bert-tiny", "eager", "speed", steps=40)
    assert any("a step takes" in note for note in found["notes"]) or "a step takes" in (found["reason"] or "")


def test_a_run_that_comes_to_its_limit_ends_with_its_step():
    found = run("bert-tiny", "eager", "dense", steps=1000, limit=0.2)
    assert 0 < found["steps"] < found["steps_asked"] == 1000


def test_the_command_writes_after_each_run_and_says_what_failed(monkeypatch, tmp_path, capsys):
    out = tmp_path / "runs" / "large.json"
    given = [
        "benchmarks.end_to_end",
        "--cases",
        "bert-tiny:1",
        "--modes",
        "eager",
        "--methods",
        "dense",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", [*given, "--steps", "12"])
    command.main()
    (first,) = json.loads(out.read_text("utf-8"))
    assert (first["steps"], first["blocks"], first["cache"]) == (12, 1, "its own")
    monkeypatch.setattr(sys, "executable", "/bin/echo")  # a process that prints, and ends without a record
    made = command.finish(command.start(tmp_path), {"case": "bert-tiny", "mode": "graphs", "method": "dense"}, 60.0)
    assert "-m benchmarks.end_to_end --wait" in made["error"]
    command.add(out, made)
    command.add(out, first | {"seconds": 0.5})
    assert [r.get("seconds") for r in json.loads(out.read_text("utf-8"))] == [None, 0.5]
    monkeypatch.setattr(sys, "argv", [*given, "--deadline", "-1"])
    command.main()
    assert "not begun" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["bert-huge", "bert-tiny:3", "bert-tiny:0", "bert-tiny:few"])
def test_a_case_that_is_not_there_is_refused(wrong):
    with pytest.raises(Exception, match="is none of bert-tiny"):
        command.case_and_blocks(wrong)


@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs"])
def test_steps_take_other_sizes_and_modes(nothing_compiled, monkeypatch, mode):
    monkeypatch.setattr(steps, "STEPS", 2)
    variants = ["dense", "pairs 0.5", "pairs 0.125", "pairs 0.125 checkpointed"]
    found = steps.run("tiny", mode, 2, variants, torch.device("cpu"), float("inf"), rounds=2)
    assert [r["variant"] for r in found] == variants
    assert found[1]["parameters"] > found[2]["parameters"] == found[3]["parameters"]


def test_a_checkpointed_variant_runs_its_blocks_again_in_backward():
    plain, again = (steps.Job("tiny", f"dense{end}", "eager", 2, torch.device("cpu")) for end in ("", " checkpointed"))
    calls = []
    for job in (plain, again):
        calls.append(0)
        at = len(calls) - 1
        layer = job.model.bert.encoder.layer[0].intermediate
        layer.register_forward_hook(lambda *_, at=at: calls.__setitem__(at, calls[at] + 1))
        job.step()
    assert calls == [1, 2]


def test_all_is_compiled_before_the_first_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    asked = []
    monkeypatch.setattr(
        steps.subprocess,
        "run",
        lambda command, **_: asked.append(command) or SimpleNamespace(returncode="lora" in command),
    )
    steps.compile_first(["tiny"], ["eager", "graphs"], ["dense", "lora"], 2)
    assert sorted(command[command.index("--variants") + 1] for command in asked) == ["dense", "lora"]
    assert "('tiny', 'graphs', 'lora')" in capsys.readouterr().out
