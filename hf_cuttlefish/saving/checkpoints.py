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

from ..engines.find import checkpoint_files

logger = logging.getLogger(__name__)

STATISTICS_FILE = "cuttlefish_statistics.safetensors"


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
    names, lack = checkpoint_files(folder, processes)
    if lack:
        return lack
    names += ["scaler.pt"] if (folder / "scaler.pt").exists() else []
    names += ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    for name in names:
        if not _is_whole(folder / name):
            return f"{name} is missing or cut off"
    if _measured(state) and not _is_whole(folder / STATISTICS_FILE, step=str(step)):
        return f"{STATISTICS_FILE} is missing, cut off or of another step"
    return None


def _is_whole(path: Path, step: str | None = None) -> bool:
    """Whether a safetensors file is as long as its header says, or a file of torch.save has its directory at the end."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return step is None or (file.metadata() or {}).get("step") == step
        return zipfile.is_zipfile(path)
    except (OSError, SafetensorError):
        return False


def _measured(state: dict[str, Any]) -> bool:
    """Whether a Cuttlefish callback had measurements to keep in this state."""
    callbacks = state.get("stateful_callbacks")
    entries = list(callbacks.values()) if isinstance(callbacks, dict) else []
    for entry in [e for one in entries for e in (one if isinstance(one, list) else [one])]:
        attributes = entry.get("attributes") if isinstance(entry, dict) else None
        saved = attributes.get("_saved") if isinstance(attributes, dict) else None
        if isinstance(saved, dict) and (saved.get("gathering") or saved.get("measured")):
            return True
    return False
