"""The data: all rows of Fashion-MNIST (Debian's dataset-fashion-mnist), and scikit-learn's digits. Tensors on the device."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional


@dataclass
class Images:
    """Images (rows, 1, height, width) in fp32, mean 0 and variance 1 over the training rows, and labels."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    flip: bool

    def batch(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Training images, each shifted by up to a twelfth of its width and perhaps flipped."""
        x = self.train[rows]
        by = max(1, x.shape[-1] // 12)
        padded = functional.pad(x, (by, by, by, by))
        at = torch.randint(0, 2 * by + 1, (2, len(x)), generator=generator, device=x.device)
        size = torch.arange(x.shape[-1], device=x.device)
        example = torch.arange(len(x), device=x.device)[:, None, None]
        shifted = padded[example, 0, (at[0][:, None] + size)[:, :, None], (at[1][:, None] + size)[:, None]][:, None]
        if not self.flip:
            return shifted
        mirrored = torch.rand(len(x), generator=generator, device=x.device) < 0.5
        return torch.where(mirrored[:, None, None, None], shifted.flip(-1), shifted)


def load(task: str, folder: Path | None, device: torch.device) -> Images:
    """ "fashion" (folder: of its four ubyte.gz files) or "digits".

    Raises FileNotFoundError where the files are not there, ValueError for another task.
    """
    if task == "digits":
        images, labels = _digits(folder)
        order = np.random.default_rng(0).permutation(len(labels))
        images, labels = images[order].astype(np.float32), labels[order]
        return _images((images[:1400], labels[:1400], images[1400:], labels[1400:]), False, device)
    if task != "fashion":
        raise ValueError(f"task is {task!r}: it must be fashion or digits")
    if folder is None:
        raise FileNotFoundError("Fashion-MNIST needs --data, the folder of Debian's dataset-fashion-mnist")
    parts = [
        _read(folder / f"{part}-ubyte.gz")
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ]
    return _images(tuple(parts), True, device)


def _digits(folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels: of digits.npz in the folder, where scikit-learn is not installed."""
    if folder is not None and (folder / "digits.npz").is_file():
        with np.load(folder / "digits.npz") as found:
            return found["images"], found["labels"]
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def _read(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        raw = file.read()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _images(parts: tuple[np.ndarray, ...], flip: bool, device: torch.device) -> Images:
    train, train_labels, test, test_labels = (torch.tensor(np.array(p), device=device) for p in parts)
    train, test = train.float()[:, None], test.float()[:, None]
    mean, deviation = train.mean(), train.std()
    return Images((train - mean) / deviation, train_labels.long(), (test - mean) / deviation, test_labels.long(), flip)
