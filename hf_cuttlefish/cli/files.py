"""In and out of the command: models, folders, plans and runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from ..decide.plan import RankPlan
from .talking import one_line, warn

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A disk, a quota or a limit of files."""


def load_config(name: str) -> Any:
    """The config of a local folder or a hub name.

    Raises:
        FileNotFoundError: no such folder, or no name that the cache or the hub has. ValueError: a folder that is no model.
    """
    if is_local(name):
        folder = Path(name)
        if folder.is_file():
            hint = "load it with from_pretrained(FOLDER, gguf_file=NAME), save_pretrained, and give that folder"
            raise ValueError(
                f"{name} is a file: {hint if folder.suffix == '.gguf' else 'give the folder that holds it'}"
            )
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: no such folder")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} is no model: it holds no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        if is_local(name):
            raise
        offline = " (HF_HUB_OFFLINE is set)" if transformers.utils.hub.is_offline_mode() else ""
        raise FileNotFoundError(
            f"{name} is no folder here, and no model of that name is in the cache or can be fetched from the hub{offline}"
        ) from error
    return config


def load_model(name: str, device: str | None) -> Any:
    """The model in the class that its config names, on the device (None: a GPU if there is one).

    Raises: as `load_config`; ValueError for a class that transformers does not have, or a device that is not there.
    """
    config = load_config(name)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    cls = getattr(transformers, architecture, None) if architecture else transformers.AutoModel
    if cls is None:
        raise ValueError(f"{name} is a {architecture}, which is no class of transformers {transformers.__version__}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {one_line(error)}") from error
    model, info = cls.from_pretrained(name, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        warn(
            f"{name} holds no {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ": random numbers there"
        )
    return model.to(place).eval()


def is_local(name: str) -> bool:
    """Whether a name means a folder: it is there, or could be no hub name (owner/name)."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


@contextlib.contextmanager
def output(options: argparse.Namespace) -> Iterator[Path]:
    """A folder to write into, inside OUT; what is in it goes to OUT at the end, and nothing stays if there is an error.

    Raises:
        FileExistsError: OUT is not empty, and no --force. NotADirectoryError: it is a file. ValueError: it is the model
            itself. PermissionError or OSError: it cannot be written.
    """
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: give a folder")
    if out.is_dir():
        if os.path.isdir(options.model) and out.samefile(options.model):
            raise ValueError(f"{out} is the model itself: give another folder")
        if any(out.iterdir()) and not options.force:
            raise FileExistsError(f"{out} is not empty: give another folder, or --force to replace the model in it")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    except OSError as error:
        raise type(error)(f"{out} cannot be written: {error.strerror}") from error
    try:
        with naming(out):
            yield partial
        for old in [
            *out.glob("model*.safetensors"),
            *out.glob("model*.safetensors.index.json"),
            *out.glob("pytorch_model*"),
        ]:
            old.unlink()
        for new in partial.iterdir():
            target = out / new.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(new, target)
        made = []
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            folder.rmdir()


@contextlib.contextmanager
def naming(out: Path) -> Iterator[None]:
    """Names what was to be written where the disk is full or a limit is reached; the libraries' errors do not. Raises OSError."""
    try:
        yield
    except SafetensorError as error:
        if "while serializing" not in str(error):  # it was read
            raise
        raise OSError(f"{out} cannot be written: {error}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"{out} cannot be written: {error.strerror}") from error


def read_plan(path: str) -> Any:
    """A plan as `RankPlan.to_json` writes it, or a plain {"module name": rank}."""
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:  # of the JSON, or of the encoding
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(data, dict) and "layers" not in data:
        return data
    try:
        return RankPlan.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_run(folder: Path) -> tuple[dict[str, Any], Path]:
    """The Trainer's state in a checkpoint, or in the newest checkpoint below a folder.

    Raises:
        FileNotFoundError: no such folder, or none of the Trainer's. ValueError: the file is damaged.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = [folder] if folder.is_file() else [folder / "trainer_state.json"]
    if not files[0].is_file():
        files = sorted(folder.rglob("checkpoint-*/trainer_state.json"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no trainer_state.json and no checkpoint-* with one: it is no run of a Trainer"
        )
    try:
        state = json.loads(files[-1].read_text("utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(f"{files[-1]} is no state of a Trainer: {error}") from error
    return state, files[-1]


def cuttlefish_states(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What callbacks of ours (subclasses too) saved in the Trainer's state."""
    for entries in (state.get("stateful_callbacks") or {}).values():
        for entry in entries if isinstance(entries, list) else [entries]:
            saved = (entry.get("attributes") or {}).get("_saved") if isinstance(entry, dict) else None
            if isinstance(saved, dict) and "history" in saved and "switch_step" in saved:
                yield saved
