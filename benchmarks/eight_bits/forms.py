"""The ways in which a folder is made to run: fp32 or int8, by torch (torchao) or by ONNX Runtime."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_cuttlefish.saving.onnx_export import export_onnx, onnx_session

Run = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Batch -> scores, (examples, classes) or (examples, length, vocabulary), on the CPU."""


@dataclass(frozen=True)
class Form:
    """A model that runs, and what it takes on disk: tensors and graph, without a tokenizer."""

    run: Run
    bytes: int


def make_form(scheme: str, folder: Path, auto: Any, scratch: Path, threads: int, device: str) -> Form:
    """The folder's model by one of `SCHEMES`."""
    model = auto.from_pretrained(folder).eval()
    if scheme.startswith("onnx"):
        scratch.mkdir()
        export_onnx(model, scratch / "model.onnx", int8=scheme == "onnx int8")
        session = onnx_session(scratch / "model.onnx", threads)
        return Form(
            lambda batch: torch.from_numpy(session(batch)[0]),
            sum(f.stat().st_size for f in scratch.glob("model.onnx*")),
        )
    model.to(device)
    SCHEMES[scheme](model)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)

    def run(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return model(**batch).logits.cpu()

    return Form(run, saved.getbuffer().nbytes)


def _weight_only(model: torch.nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def _dynamic(model: torch.nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


SCHEMES: dict[str, Callable[[torch.nn.Module], None]] = {
    "fp32": lambda model: None,
    "torchao int8 weights": _weight_only,
    "torchao int8 dynamic": _dynamic,
    "onnx fp32": lambda model: None,
    "onnx int8": lambda model: None,
}
