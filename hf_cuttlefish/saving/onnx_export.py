"""Export: a model as an ONNX file with free batch and length, held against torch at several shapes; in eight bits, if asked."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..measure.serving import example_inputs
from ..patch.structure import configs_of

TOLERANCE = 1e-3
"""Of the largest output: how far ONNX Runtime's may be from torch's. Sums in another order give about 1e-6, a wrong graph 0.1 and more."""


def check_onnx() -> None:
    """Raises ImportError, which names the extra, if a package is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"ONNX needs {package}: pip install hf-cuttlefish[onnx]") from error


def export_onnx(model: Any, file: str | os.PathLike[str], int8: bool = False) -> dict[str, float]:
    """Write the model as ONNX, as it is: factors stay factors. Batch and length are free; images keep their size.

        export_onnx(model, "model.onnx")  # {"2 x 16": 3e-7, "1 x 5": 2e-7, "3 x 9": 3e-7}

    Args:
        model: on the CPU, in fp32. file: ends in .onnx; weights of more than 2 GB come beside it. int8: the matrices become
            eight bits by ONNX Runtime's dynamic quantization; activations follow while it runs.

    Returns:
        for each of three shapes the largest difference from torch, as a share of the largest output. With int8 the file in fp32
        was held against torch before, and these are what eight bits add.

    Raises:
        ImportError: a package of the extra "onnx" is missing. ValueError: the graph's outputs are not the model's.
    """
    check_onnx()
    path = Path(file)
    shapes = [(2, 16), (1, 5), (3, 9)] if model.main_input_name == "input_ids" else [(2, None), (1, None), (3, None)]
    batches = [example_inputs(model, *shape) for shape in shapes]
    if "attention_mask" in batches[2]:
        batches[2]["attention_mask"][0, -3:] = 0  # a graph that has lost its mask is to be seen
    exact = path if not int8 else path.with_name(f"{path.stem}.fp32.onnx")
    with _as_served(model):
        names = _write_graph(model, batches[0], exact)
        found = _differences(model, exact, batches, names)
        worst = max(found.values())
        if not worst <= TOLERANCE:
            raise ValueError(
                f"the exported graph of {type(model).__name__} answers otherwise than torch: {worst:.1e} of the largest output, at "
                f"most {TOLERANCE:.0e} is right"
            )
        if int8:
            _quantize(exact, path)
            found = _differences(model, path, batches, names)
            for spare in path.parent.glob(f"{exact.name}*"):
                spare.unlink()
    return found


@contextlib.contextmanager
def _as_served(model: Any) -> Iterator[None]:
    """In eval mode, and without a cache of keys and values, which would come out as many more outputs."""
    training = model.training
    configs = [config for _, config in configs_of(model) if hasattr(config, "use_cache")]
    before = [config.use_cache for config in configs]
    model.eval()
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        for config, value in zip(configs, before, strict=True):
            config.use_cache = value


def _write_graph(model: nn.Module, batch: Mapping[str, torch.Tensor], file: Path) -> list[str]:
    """Writes the file; returns the names of its outputs."""
    free = torch.export.Dim.DYNAMIC
    shapes = {name: dict.fromkeys(range(2 if value.ndim == 2 else 1), free) for name, value in batch.items()}
    with torch.no_grad():
        output = model(**batch)
    names = [name for name, value in output.items() if isinstance(value, torch.Tensor)]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model, (), kwargs=dict(batch), dynamo=True, dynamic_shapes=shapes, output_names=names, verbose=False
            )
            program.save(file)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"torch.onnx cannot export {type(model).__name__} with free sizes, dense or low rank: "
            f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]:.300}"
        ) from error
    finally:
        logger.setLevel(level)
    return names


def _differences(
    model: nn.Module, file: Path, batches: list[dict[str, torch.Tensor]], names: list[str]
) -> dict[str, float]:
    """Largest difference from torch at each shape, as a share of the largest output."""
    run = onnx_session(file)
    found = {}
    for batch in batches:
        with torch.no_grad():
            expected = model(**batch)
        worst = 0.0
        for name, value in zip(names, run(batch), strict=False):
            wanted, got = expected[name].float(), torch.from_numpy(value).float()
            if wanted.shape != got.shape:
                raise ValueError(
                    f"the exported graph gives {name} as {tuple(got.shape)}, torch as {tuple(wanted.shape)}"
                )
            if not bool(got.isfinite().all()):
                raise ValueError(f"the exported graph gives {name} that is not finite")
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)))
        first = next(iter(batch.values()))
        found[" x ".join(str(n) for n in first.shape)] = worst
    return found


def onnx_session(file: str | os.PathLike[str], threads: int = 0) -> Any:
    """A function that takes a batch of tensors and returns a list of arrays, by ONNX Runtime on the CPU.

    Args:
        threads: for one operator; 0: as ONNX Runtime chooses.
    """
    check_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    wanted = {given.name for given in session.get_inputs()}

    def run(batch: Mapping[str, torch.Tensor]) -> list[Any]:
        return session.run(None, {name: value.numpy() for name, value in batch.items() if name in wanted})

    return run


def _quantize(exact: Path, file: Path) -> None:
    """Weights of all matrix products in signed eight bits, one scale an output."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises to preprocess, which dynamic quantization does not need
    try:
        quantize_dynamic(exact, file, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        root.setLevel(level)
