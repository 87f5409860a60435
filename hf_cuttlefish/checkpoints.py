"""Find: the newest checkpoint that a run can be resumed from, after it was killed at any moment."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

STATISTICS_FILE = "cuttlefish_statistics.safetensors"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def last_whole_checkpoint(output_dir: str | os.PathLike[str], processes: int | None = None) -> str | None:
    """The newest `checkpoint-N` that is whole; None if there is none, so that a run starts from its beginning.

        trainer.train(resume_from_checkpoint=last_whole_checkpoint(args.output_dir))

    Trainer (transformers 5.23) writes a checkpoint file by file into the folder where it stays. If it is killed, or the disk
    is full, the newest folder is a part of a checkpoint, and `resume_from_checkpoint=True` takes it and fails. Folders passed
    over are logged with what they lack. Nothing is changed, and only the headers of files are read.

    Args:
        output_dir: the Trainer's output folder; it need not exist.
        processes: how many processes will resume (each has saved its random state); None: as torchrun has set WORLD_SIZE.

    Raises:
        TypeError, ValueError: `processes` is no whole number of at least 1.
    """
    if processes is None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(processes, bool) or not isinstance(processes, int):
        raise TypeError(f"processes must be a whole number, got {processes!r}")
    if processes < 1:
        raise ValueError(f"processes is {processes}: it must be at least 1")
    steps: dict[int, Path] = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        name = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if name and folder.is_dir():
            steps[int(name[1])] = folder
    for step in sorted(steps, reverse=True):
        lack = what_is_missing(steps[step], processes)
        if lack is None:
            return str(steps[step])
        logger.warning("Cuttlefish: %s is not whole and is passed over: %s.", steps[step], lack)
    return None


def what_is_missing(folder: str | os.PathLike[str], processes: int = 1) -> str | None:
    """Why a run can't go on exactly from this checkpoint, or None if it can.

    For what Trainer itself writes, with FSDP's and DeepSpeed's checkpoints.
    Looked at: trainer_state.json (written last of all), weights, optimizer, scheduler, the random state of each process, and
    our statistics where they were being gathered. A file that was cut off is found by its header or its end.
    """
    folder = Path(folder)
    if (folder / "checkpoint-is-incomplete.txt").exists():  # enable_jit_checkpoint removes it when all is written
        return "checkpoint-is-incomplete.txt says that it was being written"
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        step = state["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "trainer_state.json is missing or cut off"
    if f"{PREFIX_CHECKPOINT_DIR}-{step}" != folder.name and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return f"trainer_state.json is of step {step}"
    sharded = [d for d in folder.iterdir() if d.is_dir() and d.name.startswith(("pytorch_model_fsdp", "optimizer_"))]
    for part in sharded:
        if not (part / ".metadata").is_file():  # torch.distributed.checkpoint writes it last
            return f"{part.name} holds no .metadata"
    if sharded:
        names = ["scheduler.pt"]
    elif any(folder.glob("global_step*")):
        names, lack = _deepspeed(folder, processes)
        if lack:
            return lack
    elif (folder / "pytorch_model_fsdp.bin").exists():  # FSDP with FULL_STATE_DICT
        names = ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt"]
    else:
        names = [*_weights(folder), "optimizer.pt", "scheduler.pt"]
    names += ["scaler.pt"] if (folder / "scaler.pt").exists() else []
    names += ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    for name in names:
        if not _is_whole(folder / name):
            return f"{name} is missing or cut off"
    if _gathering(state) and not _is_whole(folder / STATISTICS_FILE, step=str(step)):
        return f"{STATISTICS_FILE} is missing, cut off or of another step"
    return None


def is_weights_file(name: str) -> bool:
    """Whether a file of this name holds weights, whole or a shard of them, or says where they are."""
    return re.fullmatch(r"(adapter_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name) is not None


def _deepspeed(folder: Path, processes: int) -> tuple[list[str], str | None]:
    """Names of DeepSpeed's files in the folder that `latest` names, or what it lacks."""
    try:
        tag = (folder / "latest").read_text("utf-8").strip()
    except OSError:
        return [], "latest, which names DeepSpeed's folder, is missing"
    files = [f"{tag}/{file.name}" for file in sorted((folder / tag).glob("*.pt"))]
    if not any(name.endswith("model_states.pt") for name in files):
        return [], f"{tag} holds no model_states.pt"
    parts = sum(name.endswith("optim_states.pt") for name in files)
    if parts not in (0, processes):  # none: ZeRO is off, and the state is with the weights
        return [], f"{tag} holds optimizer state of {parts} processes, and {processes} resume"
    weights = [name for name in _weights(folder) if (folder / name).exists()]  # ZeRO-3 may save none of them
    return [*files, *weights, *(["scheduler.pt"] if (folder / "scheduler.pt").exists() else [])], None


def _weights(folder: Path) -> list[str]:
    """Names of the files that hold the weights, with those that an index names."""
    for name in INDEXES:
        if (folder / name).is_file():
            try:
                return sorted({str(n) for n in json.loads((folder / name).read_text("utf-8"))["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return [name]
    return [name for name in WEIGHTS if (folder / name).is_file()][:1] or [WEIGHTS[0]]


def _is_whole(path: Path, step: str | None = None) -> bool:
    """Whether a safetensors file is as long as its header says, or a file of torch.save has its directory at the end."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return step is None or (file.metadata() or {}).get("step") == step
        return zipfile.is_zipfile(path)
    except (OSError, SafetensorError):
        return False


def _gathering(state: dict[str, Any]) -> bool:
    """Whether a Cuttlefish callback was gathering statistics in this state."""
    callbacks = state.get("stateful_callbacks")
    entries = list(callbacks.values()) if isinstance(callbacks, dict) else []
    for entry in [e for one in entries for e in (one if isinstance(one, list) else [one])]:
        attributes = entry.get("attributes") if isinstance(entry, dict) else None
        saved = attributes.get("_saved") if isinstance(attributes, dict) else None
        if isinstance(saved, dict) and saved.get("gathering"):
            return True
    return False
