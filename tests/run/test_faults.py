"""Whatever happens around the switch and around a save, nothing is lost: kills, full disks, and an error anywhere of ours."""

import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_cuttlefish
from hf_cuttlefish import Cuttlefish, CuttlefishConfig, RankPlan
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.saving.checkpoints import STATISTICS_FILE, last_whole_checkpoint, what_is_missing
from tiny_trainer import CONFIG, SWITCH, assert_same_run, run, tiny_bert
from untouched import assert_untouched, snapshot

ROOT = Path(__file__).parents[2]
OURS = str(Path(hf_cuttlefish.__file__).parent)
EVERY_LINE = os.environ.get("CUTTLEFISH_EVERY_LINE") == "1"
"""Raise at every line of ours that a switch runs through, and not only in every function; minutes."""


# --- kill anywhere ---


def test_runs_that_are_killed_end_on_the_bits_of_a_run_left_alone(tmp_path):
    """Ten kills and two faults of the disk; benchmarks/robustness/kill does 200 of them (docs/robustness.md)."""
    command = [sys.executable, "-m", "benchmarks.robustness.kill", "--kills", "10", "--disk", "2"]
    command += [
        "--jobs",
        "every step",
        "every 2 steps, one kept",
        "two processes",
        "--out",
        str(tmp_path / "kill.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "kill.json").read_text())
    assert (record["kills"], record["disk_faults"], record["survived"], record["lost"]) == (10, 2, 12, 0)
    assert set(record["trainers_own_choice_then"]) <= {"refused"}  # never silently something else


# --- the newest checkpoint that is whole ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a checkpoint at every step; statistics are gathered in steps 5 to 7."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, _ = run(folder)
    return folder, trainer


def cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def step_of_another(path: Path) -> None:
    save_file(load_file(path), path, metadata={"step": "5"})


DAMAGE = {
    "no weights": ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    "weights": ("model.safetensors", cut_off, "model.safetensors is missing or cut off"),
    "no optimizer": ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    "optimizer": ("optimizer.pt", cut_off, "optimizer.pt is missing or cut off"),
    "scheduler": ("scheduler.pt", cut_off, "scheduler.pt"),
    "random state": ("rng_state.pth", cut_off, "rng_state.pth"),
    "no state": ("trainer_state.json", Path.unlink, "trainer_state.json is missing or cut off"),
    "state": ("trainer_state.json", lambda p: p.write_text(p.read_text()[:-20]), "trainer_state.json is missing or cut off"),
    "empty state": ("trainer_state.json", lambda p: p.write_text(""), "trainer_state.json is missing or cut off"),
    "state of another step": (
        "trainer_state.json", lambda p: p.write_text(p.read_text().replace('"global_step": 6', '"global_step": 5')),
        "trainer_state.json is of step 5",
    ),
    "no statistics": (STATISTICS_FILE, Path.unlink, f"{STATISTICS_FILE} is missing"),
    "statistics": (STATISTICS_FILE, cut_off, STATISTICS_FILE),
    "statistics of another step": (STATISTICS_FILE, step_of_another, STATISTICS_FILE),
    "sharded, one missing": (
        "model.safetensors", lambda p: p.with_name("model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'), "model-2.safetensors is missing",
    ),
    "marked by Trainer": (
        "checkpoint-is-incomplete.txt", lambda p: p.write_text("in progress"), "it was being written"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, caplog, case):
    for step in (5, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in (whole[0] / f"checkpoint-{step}").iterdir():
            (tmp_path / f"checkpoint-{step}" / file.name).write_bytes(file.read_bytes())
    newest = tmp_path / "checkpoint-6"
    assert what_is_missing(newest) is None and last_whole_checkpoint(tmp_path) == str(newest)
    name, damage, words = DAMAGE[case]
    damage(newest / name)
    assert words in what_is_missing(newest)
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert "checkpoint-6 is not whole" in caplog.text and words in caplog.text


def test_which_checkpoint_is_the_last(tmp_path, whole, monkeypatch):
    assert last_whole_checkpoint(tmp_path) is None and last_whole_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(whole[0]) == str(whole[0] / "checkpoint-20")  # by number, not by name
    # A run of two processes can't go on from the random state of one.
    assert last_whole_checkpoint(whole[0], processes=2) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_whole_checkpoint(whole[0]) is None and last_whole_checkpoint(whole[0], processes=1) is not None
    with pytest.raises(ValueError, match="processes is 0"):
        last_whole_checkpoint(tmp_path, processes=0)
    with pytest.raises(TypeError, match="processes must be a whole number, got '2'"):
        last_whole_checkpoint(tmp_path, processes="2")


# --- full disks ---


def writers(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> list[str]:
    """Let the `fail_at`-th write into checkpoint-6 stop in its middle for want of room; returns the names written so far."""
    import builtins

    import transformers.modeling_utils as modeling

    names: list[str] = []

    def full(path: Any, write: Any) -> None:
        inside = "checkpoint-6/" in str(path)
        names.extend([Path(str(path)).name] if inside else [])
        if inside and len(names) == fail_at:
            Path(str(path)).write_bytes(b"\x00" * 17)
            raise OSError(28, "No space left on device", str(path))
        write()

    save, safe, opened = torch.save, modeling.safe_save_file, builtins.open
    import safetensors.torch as st

    ours = st.save_file
    monkeypatch.setattr(torch, "save", lambda obj, f, *a, **k: full(f, lambda: save(obj, f, *a, **k)))
    monkeypatch.setattr(modeling, "safe_save_file", lambda t, f, *a, **k: full(f, lambda: safe(t, f, *a, **k)))
    monkeypatch.setattr(st, "save_file", lambda t, f, *a, **k: full(f, lambda: ours(t, f, *a, **k)))

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and "checkpoint-" in str(file) and not (names and names[-1] == Path(str(file)).name):
            full(file, lambda: None)
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_)
    return names


def test_a_full_disk_at_every_write_in_turn_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """Checkpoints of steps 5 and 6, both with statistics; each write of the second one stops in its middle."""
    options = {"max_steps": SWITCH, "logging_strategy": "no"}
    with monkeypatch.context() as patch:
        names = writers(patch, fail_at=0)
        expected, _ = run(tmp_path / "whole", **options)
    written = len(names)
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", f".{STATISTICS_FILE}.partial"} <= set(names)
    for nth in range(1, written + 1):
        folder = tmp_path / str(nth)
        with monkeypatch.context() as patch:
            names = writers(patch, fail_at=nth)
            with pytest.raises(OSError, match="No space left"):
                run(folder, **options)
        assert last_whole_checkpoint(folder) == str(folder / "checkpoint-5"), names[-1]
    again, _ = run(folder, resume=last_whole_checkpoint(folder), model=tiny_bert(seed=9), **options)
    assert_same_run(expected, again)


def test_a_plan_that_cannot_be_written_leaves_the_one_that_was(tmp_path, monkeypatch):
    plan = RankPlan.from_dict({"layers": {"a": {"in_features": 8, "out_features": 8, "rank": 2, "reason": ""}}})
    plan.to_json(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def full(self: Path, text: str, **kwargs: Any) -> None:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        RankPlan({}).to_json(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == before


# --- all or nothing ---


class Injected(Exception):
    pass


class Raiser:
    """Raises at the `nth` time that the switch comes by a place of ours: the start of a function, or a line."""

    def __init__(
        self, place: tuple[str, int] | None = None, nth: int = 1, error: type[BaseException] = Injected
    ) -> None:
        self.place, self.nth, self.error = place, nth, error
        self.seen: dict[tuple[str, int], int] = {}
        self.inside = False

    def __enter__(self) -> "Raiser":
        self.outer = sys.gettrace()
        sys.settrace(self.on_call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.outer)

    def on_call(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        self.inside |= frame.f_code.co_name == "_switch"
        if not self.inside:
            return None
        if not EVERY_LINE:
            self.come_by(frame, frame.f_code.co_firstlineno)
            return None
        return self.on_line

    def on_line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.come_by(frame, frame.f_lineno)
        return self.on_line

    def come_by(self, frame: FrameType, line: int) -> None:
        place = (Path(frame.f_code.co_filename).relative_to(OURS).as_posix(), line)
        self.seen[place] = self.seen.get(place, 0) + 1
        if place == self.place and self.seen[place] == self.nth:
            raise self.error(f"at {place}")


def before_the_switch(on_error: str, model: Any = None) -> tuple[Any, torch.optim.Optimizer, Cuttlefish]:
    """A model at the end of the step at which it will switch, with statistics gathered and gradients still there."""
    if model is None:
        model = tiny_bert()
        model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)  # stays, whatever comes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CuttlefishConfig(switch_step=1, rank_multiple=4, target_ratio=0.4, on_error=on_error)
    cuttlefish = Cuttlefish(model, optimizer, config, total_steps=10)
    model(**batch()).loss.backward()
    optimizer.step()
    return model, optimizer, cuttlefish


def as_before(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`snapshot` without the hooks that gather statistics, which end with the switch however it comes out."""
    before = snapshot(model, optimizer)
    before["hooks"] = [
        (
            name,
            table,
            [h for h in hooks if "hf_cuttlefish" not in f"{h!r} {getattr(h[1], '__module__', None)}"]
            if isinstance(hooks, list)
            else hooks,
        )
        for name, table, hooks in before["hooks"]
    ]
    return before


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(3, 50, (4, 8), generator=generator),
        "attention_mask": torch.ones(4, 8, dtype=torch.long),
        "labels": torch.tensor([0, 1, 2, 0]),
    }


def check_switched(model: Any, optimizer: torch.optim.Optimizer, cuttlefish: Cuttlefish) -> None:
    """Everything of the switch has happened, and the run knows it."""
    layers = low_rank_layers(model)
    assert len(layers) == 12 and dict(cuttlefish.plan) == {name: layer.rank for name, layer in layers.items()}
    assert cuttlefish.switch_step == 1 and cuttlefish.report is not None
    assert model.config.quantization_config["ranks"] == dict(cuttlefish.plan)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    # Where the trial of the optimizer on a miniature fails, factors begin afresh, and the report does not say "carried".
    stateful = {id(p) for p in optimizer.state}
    assert stateful == set(held) or (
        stateful < set(held) and "state carried for 12 of 12 layers" not in cuttlefish.report.optimizer
    )


ON_A_COPY = ("patch/rehearsal.py", "patch/miniature.py")
"""They try things on a miniature: an error there is an answer, and not one of the switch."""


def places() -> list[tuple[tuple[str, int], int]]:
    """Where a switch comes by, and how often."""
    _, _, cuttlefish = before_the_switch("raise")
    with Raiser() as counter:
        assert cuttlefish.step()
    return sorted(counter.seen.items())


@pytest.fixture
def few_objects():
    """Cuttlefish looks through all live objects for a wrapper: hide those of the test session, which are a million."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_an_error_anywhere_in_the_switch_changes_all_or_nothing(few_objects, caplog):
    """The first and the last time that each function of ours is called; then training goes on, full rank or low rank."""
    found = [one for one in places() if EVERY_LINE or one[0][0] not in ON_A_COPY]
    assert {name for (name, _), _ in found} >= {
        "cuttlefish.py", "switch.py", "measure/watch.py", "measure/moments.py", "maths/factors.py", "decide/ranks.py", "decide/plan.py",
        "layers/low_rank.py", "engines/base.py", "engines/around.py", "patch/edits.py", "patch/modules.py", "patch/optimizer.py",
        "patch/structure.py", "patch/surgery.py", "patch/learning_rate.py", "patch/report.py",
    }  # fmt: skip
    wrong, untouched, model = [], 0, None
    for place, count in found:
        for nth, on_error in ((1, "raise"), (count, "continue")):
            model, optimizer, cuttlefish = before_the_switch(on_error, model)
            before = as_before(model, optimizer)
            caplog.clear()
            raised = None
            with Raiser(place, nth) as raiser:
                try:
                    cuttlefish.step()
                except Injected as error:
                    raised = error
                except ValueError as error:
                    # Where something is tried on a copy, an error is an answer: "refused", with its words.
                    if place[0] not in ON_A_COPY or "Injected" not in str(error):
                        raise
                    raised = error
            try:
                # A search may take fewer turns on the weights of now, and the last one is not come to then.
                assert raiser.seen[place] >= 1
                if cuttlefish.switch_step is None:
                    untouched += 1
                    assert_untouched(before, model, optimizer)
                    assert (raised is not None) == (on_error == "raise")
                    assert on_error == "raise" or "goes on full rank, the model as before" in caplog.text
                else:
                    check_switched(model, optimizer, cuttlefish)
                    assert raised is None and "as before" not in caplog.text
                    model = None
            except AssertionError as error:
                wrong.append((place, nth, str(error)[:200]))
                model = None
            optimizer.zero_grad()
    assert not wrong, "\n".join(map(str, wrong))
    assert untouched > 0.8 * len(found)
    model, optimizer, cuttlefish = before_the_switch("raise", model)  # after all these failures, on the same objects
    assert cuttlefish.step()
    check_switched(model, optimizer, cuttlefish)


def test_ctrl_c_anywhere_in_the_switch_leaves_a_model_that_is_one_or_the_other(few_objects):
    """KeyboardInterrupt is never swallowed; a notebook goes on with what is there."""
    wrong, model = [], None
    for place, count in places():
        if not place[0].startswith(
            ("cuttlefish.py", "switch.py", "patch/", "engines/", "layers/low_rank.py", "processes.py")
        ):
            continue  # the others only work things out
        if place[0] in ON_A_COPY:
            continue
        model, optimizer, cuttlefish = before_the_switch("continue", model)
        before = as_before(model, optimizer)
        try:
            with Raiser(place, count, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                cuttlefish.step()
            if low_rank_layers(model):
                cuttlefish = Cuttlefish(model, optimizer, total_steps=10)
                held = [id(p) for g in optimizer.param_groups for p in g["params"]]
                assert sorted(held) == sorted(id(p) for p in model.parameters())
                assert len(model.config.quantization_config["ranks"]) == 12
                model = None
            else:
                cuttlefish.close()
                assert_untouched(before, model, optimizer)
        except (AssertionError, pytest.fail.Exception) as error:
            wrong.append((place, str(error)[:200]))
            model = None
        optimizer.zero_grad()
    assert not wrong, "\n".join(map(str, wrong))


def test_the_run_of_the_trainer_goes_on_full_rank_or_stops(tmp_path, monkeypatch, caplog):
    from hf_cuttlefish.patch import structure

    def fail(*_: Any) -> None:
        raise Injected("no memory")

    monkeypatch.setattr(structure, "write_structure", fail)
    with caplog.at_level(logging.WARNING):
        trainer, callback = run(tmp_path, CONFIG, save_strategy="no")
    assert trainer.state.global_step == 20 and callback.switch_step is None and "no memory" in caplog.text
    config = CuttlefishConfig.from_dict({**CONFIG.to_dict(), "on_error": "raise"})
    with pytest.raises(Injected, match="no memory"):
        run(tmp_path, config, save_strategy="no")
