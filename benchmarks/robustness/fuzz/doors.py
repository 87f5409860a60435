"""The doors: each takes a folder with good files and a random source, spoils one file, and reads it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, RankPlan, estimate_ranks, factorize, follow_checkpoints
from hf_cuttlefish.saving.checkpoints import STATISTICS_FILE

from .good_files import (
    OTHERS,
    RUN,
    STATE,
    WrongLoadError,
    check_structure,
    new_trainer,
    other,
    settings_of,
    tiny,
    train,
)
from .mutations import Gentle, dump, mutate_bytes, mutate_header, mutate_json


class NotAskedError(Exception):
    """The file no longer says that it is ours, so transformers loads a dense model, and warns of the weights that are left."""


def door_structure(folder: Path, rng: random.Random) -> None:
    """config.json of a factorized folder: the part that is ours, and the file cut off."""
    path = folder / "model" / "config.json"
    text = path.read_bytes()
    data = json.loads(text)
    if rng.random() < 0.5:
        data["quantization_config"] = mutate_json(data["quantization_config"], rng)
        path.write_bytes(dump(data))
    elif rng.random() < 0.9:
        ours = dump(data.pop("quantization_config"))
        rest = dump(data)[:-1]
        path.write_bytes(rest + b', "quantization_config": ' + mutate_bytes(ours, rng) + b"}")
    else:
        path.write_bytes(mutate_bytes(text[: rng.randrange(len(text))], rng) if not isinstance(rng, Gentle) else text)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    note = json.loads(path.read_bytes()).get("quantization_config")
    if not isinstance(note, dict) or note.get("quant_method") != "cuttlefish":
        raise NotAskedError(f"{note!r:.60}")
    check_structure(model)


def door_header(folder: Path, rng: random.Random) -> None:
    """model.safetensors of a factorized folder, and the index of shards."""
    if rng.random() < 0.2:
        path = folder / "sharded" / "model.safetensors.index.json"
        path.write_bytes(dump(mutate_json(json.loads(path.read_bytes()), rng)))
        check_structure(hf.AutoModelForSequenceClassification.from_pretrained(folder / "sharded"))
        return
    path = folder / "model" / "model.safetensors"
    path.write_bytes(mutate_header(path.read_bytes(), rng))
    if rng.random() < 0.5:
        check_structure(hf.AutoModelForSequenceClassification.from_pretrained(folder / "model"))
        return
    model = tiny()
    follow_checkpoints(model)
    model.load_state_dict(load_file(path), strict=False)
    check_structure(model)


def door_plan(folder: Path, rng: random.Random) -> None:
    """A plan file: read it, print it, carry it out."""
    path = folder / "plan.json"
    text = path.read_bytes()
    path.write_bytes(dump(mutate_json(json.loads(text), rng)) if rng.random() < 0.6 else mutate_bytes(text, rng))
    plan = RankPlan.from_json(path)
    plan.summary()
    if RankPlan.from_json(plan.to_json()) != plan and "NaN" not in plan.to_json():
        raise WrongLoadError("the plan does not come back")
    model = tiny()
    factorize(model, plan)
    check_structure(model)


def door_kinds(folder: Path, rng: random.Random) -> None:
    """What there is of models with other kinds of layers, or a low-rank vocabulary: plan, config, folder, run."""
    name = rng.choice(list(OTHERS))
    return rng.choice((plan_of_kind, config_of_kind, structure_of_kind, header_of_kind, run_of_kind))(folder, name, rng)


def plan_of_kind(folder: Path, name: str, rng: random.Random) -> None:
    """A plan, carried out."""
    path = folder / f"{name}.json"
    path.write_bytes(dump(mutate_json(json.loads(path.read_bytes()), rng)))
    model = other(name)
    factorize(model, RankPlan.from_json(path))
    check_structure(model)


def config_of_kind(folder: Path, name: str, rng: random.Random) -> None:
    """A config: its rank_pattern, exclude_modules and embeddings."""
    path = folder / f"{name}, config.json"
    path.write_bytes(dump(mutate_json(json.loads(path.read_bytes()), rng, patterns=True)))
    estimate_ranks(other(name), CuttlefishConfig.from_json(path.read_text("utf-8")))


def structure_of_kind(folder: Path, name: str, rng: random.Random) -> None:
    """config.json of a factorized folder."""
    path = folder / name / "config.json"
    data = json.loads(path.read_bytes())
    note = data["quantization_config"] = mutate_json(data["quantization_config"], rng)
    path.write_bytes(dump(data))
    if not isinstance(note, dict) or note.get("quant_method") != "cuttlefish":
        raise NotAskedError(f"{note!r:.60}")
    check_structure(getattr(hf, OTHERS[name][0]).from_pretrained(folder / name))


def header_of_kind(folder: Path, name: str, rng: random.Random) -> None:
    """model.safetensors of a factorized folder."""
    path = folder / name / "model.safetensors"
    path.write_bytes(mutate_header(path.read_bytes(), rng))
    check_structure(getattr(hf, OTHERS[name][0]).from_pretrained(folder / name))


def run_of_kind(folder: Path, name: str, rng: random.Random) -> None:
    """State and statistics of a run, which goes on to its end: before the switch through it, with the optimizer's state."""
    run = folder / f"{name}, {rng.choice(('before', 'after'))}"
    state, statistics = mutate_json(json.loads((run / STATE).read_bytes()), rng), run / STATISTICS_FILE
    if statistics.exists() and rng.random() < 0.5:
        state = json.loads((run / STATE).read_bytes())
        statistics.write_bytes(mutate_header(statistics.read_bytes(), rng))
    model = getattr(hf, OTHERS[name][0]).from_pretrained(run)
    go_on(model, state, load_file(statistics) if statistics.exists() else None, settings_of(name, **RUN))


def go_on(model: Any, state: Any, statistics: dict[str, torch.Tensor] | None, config: CuttlefishConfig) -> None:
    """Load the state of a run of eight steps, and go on to its end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cuttlefish = Cuttlefish(model, optimizer, config, total_steps=8)
    try:
        cuttlefish.load_state_dict(state, statistics)
        train(model, optimizer, cuttlefish, 8 - min(cuttlefish.global_step, 8))
        cuttlefish.end()
        json.dumps(cuttlefish.state_dict())
        str(cuttlefish.report)
    finally:
        cuttlefish.close()
    check_structure(model)


def door_config(folder: Path, rng: random.Random) -> None:
    """A CuttlefishConfig as JSON, with patterns that explode: read it, choose layers and ranks by it."""
    path = folder / "config.json"
    text = path.read_bytes()
    if rng.random() < 0.7:
        path.write_bytes(dump(mutate_json(json.loads(text), rng, patterns=True)))
    else:
        path.write_bytes(mutate_bytes(text, rng))
    config = CuttlefishConfig.from_json(path.read_text("utf-8"))
    if CuttlefishConfig.from_json(config.to_json()) != config:
        raise WrongLoadError("the config does not come back")
    estimate_ranks(tiny(), config)


def door_state(folder: Path, rng: random.Random) -> None:
    """The state of a run in trainer_state.json: load it, and go on to the end of the run."""
    name = rng.choice(("before", "after"))
    path = folder / name / "trainer_state.json"
    full = json.loads(path.read_bytes())
    ours = full["stateful_callbacks"]["CuttlefishCallback"]["attributes"]["_saved"]
    saved, gap = full["stateful_callbacks"]["CuttlefishCallback"]["attributes"], "the state"
    saved["_saved"] = gap
    ours = dump(mutate_json(ours, rng))
    path.write_bytes(dump(full).replace(dump(gap), mutate_bytes(ours, rng) if rng.random() < 0.3 else ours))
    state = hf.TrainerState.load_from_json(str(path)).stateful_callbacks["CuttlefishCallback"]["attributes"]["_saved"]
    model = tiny()
    follow_checkpoints(model)
    model.load_state_dict(load_file(folder / name / "model.safetensors"))
    statistics = None
    if (folder / name / STATISTICS_FILE).exists():
        statistics = load_file(folder / name / STATISTICS_FILE)
        if rng.random() < 0.3:
            spoiled = folder / "spoiled.safetensors"
            save_file(statistics, spoiled)
            spoiled.write_bytes(mutate_header(spoiled.read_bytes(), rng))
            statistics = load_file(spoiled)
    go_on(model, state, statistics, CuttlefishConfig(**RUN))


def door_resume(folder: Path, rng: random.Random) -> None:
    """trainer_state.json, the structure and the statistics in a checkpoint that a real Trainer resumes."""
    name = rng.choice(("before", "after"))
    checkpoint = folder / name
    what = rng.randrange(4)
    statistics = checkpoint / STATISTICS_FILE
    if what == 0:
        path = checkpoint / "model.safetensors"
        path.write_bytes(mutate_header(path.read_bytes(), rng))
    elif what == 1 and statistics.exists():
        statistics.write_bytes(mutate_header(statistics.read_bytes(), rng))
    else:
        path = checkpoint / "trainer_state.json"
        data = json.loads(path.read_bytes())
        data["stateful_callbacks"]["CuttlefishCallback"] = mutate_json(
            data["stateful_callbacks"]["CuttlefishCallback"], rng, patterns=True
        )
        path.write_bytes(dump(data))
    model = tiny()
    trainer = new_trainer(folder / "resumed", restore=rng.random() < 0.5, model=model)
    trainer.args.save_strategy = "no"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    check_structure(model)


DOORS: dict[str, tuple[int, Callable[[Path, random.Random], None]]] = {
    "structure": (22, door_structure),
    "header": (22, door_header),
    "plan": (16, door_plan),
    "kinds": (10, door_kinds),
    "config": (15, door_config),
    "state": (12, door_state),
    "resume": (3, door_resume),
}
"""Name -> share of the mutations in percent, and the function."""
