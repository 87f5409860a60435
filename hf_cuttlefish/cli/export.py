"""The command `export`: a folder in the form that a server takes: dense, ONNX or GGUF."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..layers.low_rank import low_rank_layers
from ..patch.structure import QUANT_METHOD
from ..report.inspection import present_plan
from ..saving.companions import TOKENIZER, copy_companions
from ..saving.gguf_export import check_gguf, export_gguf, find_converter
from ..saving.merged import save_merged
from ..saving.onnx_export import check_onnx, export_onnx
from .files import load_config, load_model, naming, output

MARGIN = 1.1
"""Room that is asked for beyond the weights: graph, tokenizer, headers."""


def export(options: argparse.Namespace) -> None:
    """Write a folder in another form, whole or not at all."""
    _check_options(options)
    config = load_config(options.model)
    _check_note(options.model, config)
    {"dense": _dense, "onnx": _onnx, "gguf": _gguf}[options.format](options)


def _check_options(options: argparse.Namespace) -> None:
    """What can be asked before anything is loaded. Raises ValueError, ImportError or FileNotFoundError."""
    if options.int8 and options.format != "onnx":
        raise ValueError(f"--int8 goes with --format onnx, not with {options.format}; for gguf say --outtype q8_0")
    if options.format != "gguf" and (options.converter or options.outtype != "f16"):
        raise ValueError(f"--converter and --outtype go with --format gguf, not with {options.format}")
    if options.format == "onnx":
        check_onnx()
    if options.format == "gguf":
        check_gguf()
        find_converter(options.converter)
        if Path(options.out).suffix != ".gguf":
            raise ValueError(f"OUT is {options.out}: with --format gguf it is a file that ends in .gguf")


def _check_note(name: str, config: Any) -> None:
    """Raises ValueError for weights in few bits: they have no dense form, and torch.onnx does not know them."""
    note = getattr(config, "quantization_config", None)
    method = note.get("quant_method") if isinstance(note, dict) else getattr(note, "quant_method", None)
    if note is not None and method != QUANT_METHOD:
        raise ValueError(f"{name} is quantized ({method}): export the model from before it was quantized")


def _dense(options: argparse.Namespace) -> None:
    with output(options) as folder:
        model = _load(options, folder)
        layers = len(low_rank_layers(model))
        before = sum(p.numel() for p in model.parameters())
        _write_dense(options.model, model, folder)
        after = before + _gained(model)
    print(f"merged {layers} layers, {before:,} -> {after:,} parameters; saved in {options.out}, which loads without us")


def _onnx(options: argparse.Namespace) -> None:
    with output(options) as folder:
        model = _load(options, folder, times=1.3 if options.int8 else 1.0).float()
        found = export_onnx(model, folder / "model.onnx", options.int8)
        config = copy.deepcopy(model.config)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # the graph holds the factors; a reader of config.json need not know
        config.save_pretrained(folder)
        copy_companions(options.model, folder, fetch=True)
        size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        layers = len(low_rank_layers(model))
    added = "eight bits change" if options.int8 else "differs from torch by"
    print(
        f"{options.out}/model.onnx: {size:,} bytes, {layers} low-rank layers; free batch"
        + (" and length" if "input_ids" in model.main_input_name else "")
    )
    for shape, difference in found.items():
        print(f"  {shape}: {added} {difference:.1e} of the largest output")


def _gguf(options: argparse.Namespace) -> None:
    converter = find_converter(options.converter)
    with _file(options) as file, tempfile.TemporaryDirectory(prefix=".partial-", dir=file.parent) as scratch:
        folder = Path(scratch)
        model = _load(options, folder, times=2.0)
        layers = len(low_rank_layers(model))
        _write_dense(options.model, model, folder)
        if not any(found for pattern in TOKENIZER for found in folder.glob(pattern)):
            raise ValueError(f"{options.model} has no tokenizer, which a GGUF file has to hold")
        del model
        architecture, tensors = export_gguf(folder, file, converter, options.outtype)
        size = file.stat().st_size
    print(f"{options.out}: {architecture}, {tensors} tensors, {options.outtype}, {size:,} bytes")
    if layers:
        print(
            f"note: GGUF has no low-rank layers, so {layers} were multiplied out: the file is as large and as slow as that of the "
            "dense model"
        )


def _load(options: argparse.Namespace, folder: Path, times: float = 1.0) -> Any:
    """The model on the CPU, once there is room for it. Raises OSError if there is none."""
    model = load_model(options.model, "cpu")
    layers = low_rank_layers(model)
    if options.format == "dense" and not layers:
        raise ValueError(f"{options.model} is no factorized model: its config.json names no low-rank layers")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if options.format != "onnx":
        size += _gained(model) * next(model.parameters()).element_size()
    needed, free = int(size * times * MARGIN), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"no room for {options.out}: {needed:,} bytes are needed, and the disk has {free:,}")
    return model


def _gained(model: Any) -> int:
    """Parameters that the dense form has more."""
    if not low_rank_layers(model):
        return 0
    full, low_rank = present_plan(model).parameters()
    return full - low_rank


def _write_dense(name: str, model: Any, folder: Path) -> None:
    if low_rank_layers(model):
        save_merged(model, folder)
    else:
        model.save_pretrained(folder)
    copy_companions(name, folder, fetch=True)


@contextlib.contextmanager
def _file(options: argparse.Namespace) -> Iterator[Path]:
    """The file to write, in a folder that exists; folders made for it go again if there is an error.

    Raises FileExistsError: it is there, and no --force. PermissionError or OSError: its folder cannot be written.
    """
    out = Path(options.out)
    if out.exists() and not options.force:
        raise FileExistsError(f"{out} is there: give another name, or --force to replace it")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise type(error)(f"{out} cannot be written: {error.strerror}") from error
    try:
        with naming(out):
            yield out
        made = []
    finally:
        for folder in made:
            folder.rmdir()
