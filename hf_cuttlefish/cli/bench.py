"""The command `bench`: how long a folder takes to answer on this machine, beside its dense form or another folder."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from ..layers.low_rank import low_rank_layers
from ..measure.serving import DECODED, Latency, decoding, example_inputs, time_calls, writes_text
from ..patch.merge import merge_layers
from ..saving.onnx_export import check_onnx, export_onnx, onnx_session
from .files import load_model

BACKENDS = ("torch", "onnx", "compile")
Inputs = Mapping[str, torch.Tensor]
Runner = Callable[[Inputs], Any]
"""Takes a batch, gives the model's answer."""


def bench(options: argparse.Namespace) -> None:
    """Time a folder and what it is compared with, in turn; print a table or JSON."""
    _check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    ours = load_model(options.model, options.device)
    if options.against:
        other = load_model(options.against, options.device)
    elif low_rank_layers(ours):
        other = merge_layers(copy.deepcopy(ours), "all", None)
    else:
        raise ValueError(f"{options.model} is no factorized model, so it has no dense form: give --against FOLDER")
    models = {"ours": ours, "against": other.eval()}
    device = next(ours.parameters()).device
    if device.type != "cpu" and "onnx" in options.backend:
        raise ValueError(f"the backend onnx runs on the CPU, and the models are on {device}: give --device cpu")
    rows = [row for backend in options.backend for row in _rows(backend, models, device, options)]
    facts = {
        "model": options.model,
        "against": options.against or "its dense form",
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(next(ours.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rounds": options.rounds,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "bytes": {name: _bytes(model) for name, model in models.items()},
        "rows": rows,
    }
    print(json.dumps(facts, indent=2) if options.json else "\n".join(table(facts)))


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for an unknown backend, ImportError for one that is not installed."""
    unknown = [name for name in options.backend if name not in BACKENDS]
    if unknown:
        raise ValueError(f"--backend {','.join(unknown)}: it must be some of {','.join(BACKENDS)}")
    if "onnx" in options.backend:
        check_onnx()


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _rows(backend: str, models: Mapping[str, Any], device: torch.device, options: argparse.Namespace) -> list[dict]:
    """Both models under one backend, at every batch size."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="hf-cuttlefish-bench-") as scratch:
        runners = {name: _runner(backend, model, Path(scratch) / name) for name, model in models.items()}
        for batch in options.batch:
            inputs = {name: example_inputs(model, batch, options.length) for name, model in models.items()}
            calls = {name: _bound(runners[name], inputs[name]) for name in models}
            sizes = [tuple(next(iter(given.values())).shape) for given in inputs.values()]
            if sizes[0] != sizes[1]:
                raise ValueError(f"the two models take other shapes, {sizes[0]} and {sizes[1]}: give --length")
            with _compiling():
                times = time_calls(calls, options.rounds, device)
            rows.append(_row(backend, "forward", sizes[0], batch, times))
            if backend == "torch" and all(map(writes_text, models.values())):
                decode = {name: decoding(model, _prompt(inputs[name])) for name, model in models.items()}
                times = time_calls(decode, options.rounds, device)
                rows.append(_row(backend, "decode", sizes[0], batch * DECODED, times))
    return rows


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Says in a line what torch.compile lacks; a model is compiled when it is called first. Raises ValueError."""
    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.compile cannot compile the model here: {reason}: mend that (on a CPU it needs a C++ compiler), or leave "
            "compile out of --backend"
        ) from error


def _prompt(inputs: Inputs) -> Inputs:
    """The first tokens: what is timed is the writing."""
    return {name: value[:, :16] for name, value in inputs.items()}


def _runner(backend: str, model: Any, folder: Path) -> Runner:
    if backend == "onnx":
        folder.mkdir()
        export_onnx(copy.deepcopy(model).float(), folder / "model.onnx")
        return onnx_session(folder / "model.onnx", torch.get_num_threads())
    return torch.compile(model) if backend == "compile" else model


def _bound(runner: Runner, inputs: Inputs) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return runner(**inputs) if isinstance(runner, torch.nn.Module) else runner(inputs)

    return call


def _row(backend: str, what: str, shape: tuple[int, ...], count: int, times: Mapping[str, Latency]) -> dict[str, Any]:
    """One line. count: examples in a call, or tokens that it writes."""
    return {
        "backend": backend,
        "what": what,
        "shape": list(shape),
        "count": count,
        **{name: {"ms": t.median, "low": t.low, "high": t.high} for name, t in times.items()},
        "ratio": times["ours"].median / times["against"].median,
    }


def table(facts: Mapping[str, Any]) -> list[str]:
    """What `bench` prints."""
    size, held = facts["bytes"], facts["parameters"]
    lines = [
        f"{facts['model']} beside {facts['against']}: {held['ours']:,} and {held['against']:,} parameters, "
        f"{size['ours'] / 2**20:.0f} and {size['against'] / 2**20:.0f} MiB",
        f"{facts['device']}, {facts['threads']} threads, {facts['dtype']}, torch {facts['torch']}; median of {facts['rounds']} rounds, "
        "both in turn",
        "",
        f"{'backend':<9}{'what':<9}{'shape':<16}{'ours ms':>10}{'against ms':>12}{'of it':>7}{'ours a second':>16}{'against':>10}",
    ]
    for row in facts["rows"]:
        ours, other = row["ours"]["ms"], row["against"]["ms"]
        rates = [1000 * row["count"] / ms for ms in (ours, other)]
        shape = " x ".join(map(str, row["shape"]))
        lines.append(
            f"{row['backend']:<9}{row['what']:<9}{shape:<16}{ours:>10.2f}{other:>12.2f}{row['ratio']:>7.2f}{rates[0]:>16.1f}"
            f"{rates[1]:>10.1f}"
        )
    clear = [row for row in facts["rows"] if row["ours"]["high"] < row["against"]["low"]]
    worse = [row for row in facts["rows"] if row["ours"]["low"] > row["against"]["high"]]
    return [*lines, "", _verdict(len(clear), len(worse), len(facts["rows"]))]


def _verdict(faster: int, slower: int, of: int) -> str:
    """In words; a row counts where its rounds do not overlap."""
    return f"faster in {faster} of {of} rows, slower in {slower}; in {of - faster - slower} the rounds overlap"
