"""Weights in eight bits, for models that have to be carried in parts: `pack(tensors, folder)`, and `unpack(folder)` for from_pretrained.

A matrix becomes whole numbers with one step a row, a sixteenth of the row's standard deviation or what its largest entry needs,
and these are Huffman-coded: 6 bits an entry, an error of 1.8% of the row's deviation, far below what a fine-tune changes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

SMALL = 4096
"""Tensors of so few entries stay as they are."""
LARGEST_PART = 48 * 2**20
"""Bytes of one file."""


def pack(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the tensors to weights-0.npz, weights-1.npz, ... in the folder."""
    part: dict[str, np.ndarray] = {}
    parts = [part]
    for name, tensor in tensors.items():
        arrays = _coded(name, tensor)
        if sum(a.nbytes for a in (*part.values(), *arrays.values())) > LARGEST_PART and part:
            part = {}
            parts.append(part)
        part |= arrays
    folder.mkdir(parents=True, exist_ok=True)
    for i, arrays in enumerate(parts):
        np.savez(folder / f"weights-{i}.npz", **arrays)


def unpack(folder: Path) -> None:
    """Write model.safetensors beside the parts, unless it is there; several processes may do so at a time."""
    from safetensors.torch import save_file

    whole, files = folder / "model.safetensors", sorted(folder.glob("weights-*.npz"))
    if whole.exists() or not files:
        return
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        with np.load(file) as stored:
            arrays |= {name: stored[name] for name in stored.files}
    tensors = {}
    for name, array in arrays.items():
        name, _, kind = name.partition("|")
        if kind == "codes":
            codes = np.frombuffer(zlib.decompress(array.tobytes()), np.int8)
            values = codes.reshape(arrays[f"{name}|shape"]).astype(np.float32) * arrays[f"{name}|steps"][:, None]
            tensors[name] = torch.from_numpy(values)
        elif not kind:
            tensors[name] = torch.from_numpy(array)
    mine = folder / f"model.{os.getpid()}.tmp"
    save_file(tensors, mine, metadata={"format": "pt"})
    mine.replace(whole)


def _coded(name: str, tensor: torch.Tensor) -> dict[str, np.ndarray]:
    if tensor.ndim != 2 or tensor.numel() <= SMALL or not tensor.is_floating_point():
        return {name: tensor.numpy()}
    values = tensor.float()
    steps = torch.maximum(values.std(1) / 16, values.abs().amax(1) / 127).clamp_min(1e-12)
    codes = (values / steps[:, None]).round().clamp(-127, 127).to(torch.int8)
    coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    stream = coder.compress(codes.numpy().tobytes()) + coder.flush()
    return {
        f"{name}|codes": np.frombuffer(stream, np.uint8),
        f"{name}|shape": np.array(values.shape),
        f"{name}|steps": steps.numpy(),
    }
