"""Trackers and progress bars: what they show of a run, read back from their own files. No account and no network."""

import json
import os
import statistics
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig
from tiny_models import BY_NAME, text

STEPS, SWITCH, EVERY = 12, 6, 3
CONFIG = CuttlefishConfig(earliest_switch=0.5, latest_switch=0.5, check_steps=1, statistics_steps=1, rank_multiple=4)
RANK = "stable_rank"


def train(folder: Path, tracker: str) -> CuttlefishCallback:
    """A run of 12 steps, logged at 3, 6 (the switch), 9 and 12."""
    callback = CuttlefishCallback(CONFIG)
    settings = hf.TrainingArguments(
        output_dir=str(folder / "run"), run_name="tiny", max_steps=STEPS, logging_steps=EVERY, per_device_train_batch_size=4,
        report_to=[tracker], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": text()["input_ids"][i % 2], "labels": i % 2} for i in range(16)]
    hf.Trainer(model=BY_NAME["bert"].build(), args=settings, train_dataset=rows, callbacks=[callback]).train()
    assert callback.switch_step == SWITCH
    return callback


def check(seen: dict[str, dict[int, float]], callback: CuttlefishCallback) -> None:
    """Name -> step -> value, as the tracker has them: the run's own numbers at the steps where they were logged."""
    report = callback.report
    sizes = [report.parameters_before, *[report.parameters_after] * 3]
    assert seen["train/parameters"] == dict(zip((3, 6, 9, 12), sizes, strict=True))
    assert seen["train/switch_step"] == dict.fromkeys((6, 9, 12), SWITCH)
    measured: dict[int, list[float]] = {}
    for record in callback.history:
        measured.setdefault(record["step"], []).append(record["stable_rank"])
    last = {3: statistics.mean(measured[3]), 6: statistics.mean(measured[5])}  # nothing is measured after the switch
    assert seen[f"train/{RANK}"] == pytest.approx(last, abs=1e-3)
    assert sum(name.startswith("train/stable_rank") for name in seen) == 1  # a line of the log stays readable


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of the event files under a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen: dict[str, dict[int, float]] = {}
    for path in sorted({p.parent for p in folder.rglob("events.out.tfevents.*")}):
        events = accumulator.EventAccumulator(str(path))
        events.Reload()
        for name in events.Tags()["scalars"]:
            seen.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return seen


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = train(tmp_path, "tensorboard")
    check(scalars(tmp_path / "board"), callback)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    callback = train(tmp_path, "wandb")
    wandb.teardown()  # waits until its process has written the file
    (path,) = tmp_path.rglob("*.wandb")
    check(_read_wandb(path), callback)


def _read_wandb(path: Path) -> dict[str, dict[int, float]]:
    """The file is a log in blocks of 32 KiB after a header of 7 bytes: parts of (checksum, length, type) and data."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    seen: dict[str, dict[int, float]] = {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            parsed, record = wandb_internal_pb2.Record.FromString(record), b""
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in parsed.history.item}
            for name, value in row.items():
                seen.setdefault(name, {})[row["train/global_step"]] = value
    return seen


def test_mlflow_in_a_local_database(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tiny")
    callback = train(tmp_path, "mlflow")
    if mlflow.active_run() is not None:
        mlflow.end_run()
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    seen = {}
    for name in run.data.metrics:
        seen[name if name.startswith("train/") else f"train/{name}"] = {
            m.step: m.value for m in client.get_metric_history(run.info.run_id, name)
        }
    check(seen, callback)


def test_trackio_in_a_local_folder(tmp_path):
    """In a process of its own: trackio fixes its folder when it is imported."""
    pytest.importorskip("trackio")
    code = (
        "import json, sys, pathlib, test_tracking as t; c = t.train(pathlib.Path(sys.argv[1]), 'trackio');"
        "from trackio.sqlite_storage import SQLiteStorage as S; seen = {};"
        "(project,) = S.get_projects(); (run,) = S.get_runs(project);"
        "[seen.setdefault(k, {}).update({row['train/global_step']: v}) for row in S.get_logs(project, run)"
        " if 'train/global_step' in row for k, v in row.items()];"
        "t.check(seen, c); print('checked', len(seen))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "checked" in result.stdout, result.stderr[-2000:]


def test_a_loop_of_ones_own_with_a_tracker_of_accelerate(tmp_path):
    """`logs()` gives what the callback adds to Trainer's log."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("tiny")
    model = BY_NAME["bert"].build()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    cuttlefish = Cuttlefish(model, optimizer, CONFIG, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        loss = model(**text()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
        accelerator.log({"loss": loss.item(), **cuttlefish.logs()}, step=step)
    accelerator.end_training()
    seen = scalars(tmp_path)
    assert set(seen["loss"]) == set(range(1, STEPS + 1)) and set(seen[RANK]) == set(range(1, SWITCH))
    assert seen["switch_step"] == dict.fromkeys(range(SWITCH, STEPS + 1), SWITCH)
    assert set(seen["parameters"].values()) == {cuttlefish.report.parameters_before, cuttlefish.report.parameters_after}


BARS = """
import sys, torch, transformers as hf
from tqdm import tqdm
from tiny_models import BY_NAME, text
from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig

config = CuttlefishConfig(switch_step=3, rank_multiple=4)
rows = [{"input_ids": text()["input_ids"][i % 2], "labels": i % 2} for i in range(16)]
settings = hf.TrainingArguments(output_dir=sys.argv[1], max_steps=6, per_device_train_batch_size=4, logging_steps=2,
                                report_to=[], save_strategy="no", use_cpu=True)
callbacks = [CuttlefishCallback(config)]
hf.Trainer(model=BY_NAME["bert"].build(), args=settings, train_dataset=rows, callbacks=callbacks).train()

model = BY_NAME["bert"].build()
optimizer = torch.optim.AdamW(model.parameters())
cuttlefish = Cuttlefish(model, optimizer, config, total_steps=6)
for _ in tqdm(range(6), mininterval=0):
    model(**text()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    cuttlefish.step()
"""


def test_a_progress_bar_stays_below_our_lines(tmp_path):
    """Without care the first line of the table stood behind the bar: " 50%|#####     | 3/6 [...]Cuttlefish factorized"."""
    result = subprocess.run(
        [sys.executable, "-c", BARS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [_as_shown(line) for line in result.stderr.split("\n")]
    headlines = [line for line in lines if "Cuttlefish factorized" in line]
    assert len(headlines) == 2 and all(line.startswith("Cuttlefish factorized") for line in headlines)
    assert not any("%|" in line and "layers" in line for line in lines)
    assert "6/6" in lines[-2]  # the bar stays, below them


def _as_shown(line: str) -> str:
    """What a terminal shows of a line in which carriage returns go back to its start."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()
