"""The tasks of the benchmark: data, model and recipe. All rows of a task lie on the device as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from .packed import unpack

EVALUATION_BATCH = 256
POOL = 32
"""Batches whose rows are sorted by length together: little padding, and still another order in every epoch."""
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Task:
    """A data set, the model trained on it and the recipe, the same for all methods.

    Attributes:
        kind: "text" or "image". file: arrays, inside the data folder; None: synthetic.
        model: folder of the pretrained model inside the data folder, or None to start from random weights.
        shape: sizes of a model with random weights. image_size: images are resized to it; channels likewise.
        rows: most rows of train, validation and test that are used.
        padding: number of the token that fills texts up. shift_positions: position embeddings are rolled by one before the first
            step, so that the run has much to learn anew.
        warmup: share of the steps over which the learning rate rises; afterwards it falls to zero in a straight line.
    """

    kind: str
    file: str | None
    model: str | None = None
    shape: dict[str, int] | None = None
    learning_rate: float = 1e-4
    epochs: int = 3
    batch: int = 32
    warmup: float = 0.0
    weight_decay: float = 0.01
    image_size: int = 28
    channels: int = 1
    rows: tuple[int | None, int | None, int | None] = (None, None, None)
    padding: int = 0
    shift_positions: bool = False

    def limited(self, rows: int | None) -> Task:
        """The same task with at most so many rows in each split."""
        return self if rows is None else replace(self, rows=tuple(min(rows, r or rows) for r in self.rows))


def shape(hidden: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    """Sizes of a transformer under the names that configs have, its MLP four times as wide as the rest."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        **more,
    }


TASKS: dict[str, Task] = {
    "trec": Task("text", "text/trec.npz", "text/minilm"),
    "movie_snippets": Task("text", "text/movie_snippets.npz", "text/minilm"),
    "reuters_r8": Task("text", "text/reuters_r8.npz", "text/minilm"),
    "fashion_mnist_vit": Task(
        "image",
        "images/fashion_mnist.npz",
        "vit/vit_s14",
        learning_rate=5e-5,
        image_size=56,
        channels=3,
        rows=(12_000, 2_000, None),
    ),
    "fashion_mnist_scratch": Task(
        "image",
        "images/fashion_mnist.npz",
        None,
        shape(192, 6, 3, patch_size=4),
        1e-3,
        12,
        256,
        warmup=0.05,
        weight_decay=0.05,
    ),
    "digits_scratch": Task(
        "image",
        "images/digits.npz",
        None,
        shape(96, 4, 3, patch_size=2),
        1e-3,
        40,
        64,
        warmup=0.05,
        weight_decay=0.05,
        image_size=8,
    ),
    "smoke_text": Task("text", None, None, shape(64, 2, 2), 1e-3, 3, 16, rows=(256, 64, 64)),
    "smoke_image": Task(
        "image", None, None, shape(48, 2, 2, patch_size=2), 1e-3, 3, 16, image_size=8, rows=(256, 64, 64)
    ),
}

for _data in ("trec", "movie_snippets", "reuters_r8"):
    TASKS[f"{_data}_3e-5"] = replace(TASKS[_data], learning_rate=3e-5)
    for _rate in ("2e-5", "5e-5", "1e-4"):
        _task = Task("text", f"mpnet/{_data}.npz", "mpnet/mpnet_base", learning_rate=float(_rate), padding=1)
        TASKS[f"mpnet_{_data}_{_rate}"] = _task
        TASKS[f"mpnet_{_data}_{_rate}_relearn"] = replace(_task, shift_positions=True)
TASKS["fashion_mnist_vit_2e-4"] = replace(TASKS["fashion_mnist_vit"], learning_rate=2e-4)


class Split:
    """Rows of one split on the device; `batches` gives what a model takes, labels among it."""

    def __init__(self, labels: np.ndarray, device: torch.device) -> None:
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        self.lengths = np.zeros(len(labels), dtype=np.int64)
        self.device = device

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, rows: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Inputs of the model for these rows, padded to `length`."""
        raise NotImplementedError

    def epoch(self, batch: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """All rows once, in an order that follows from the seed, rows of like length together."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self))
        chunks = []
        for start in range(0, len(order), batch * POOL):
            pool = order[start : start + batch * POOL]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            chunks += [pool[i : i + batch] for i in range(0, len(pool), batch)]
        rng.shuffle(chunks)
        yield from self._take(chunks)

    def batches(self, most_rows: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """All rows once (or the first so many), in large batches, for evaluation."""
        rows = np.arange(len(self))[:most_rows]
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        yield from self._take([rows[i : i + EVALUATION_BATCH] for i in range(0, len(rows), EVALUATION_BATCH)])

    def _take(self, chunks: list[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        if not chunks:
            return
        rows = torch.from_numpy(np.concatenate(chunks)).to(self.device)  # one transfer an epoch
        start = 0
        for chunk in chunks:
            part = rows[start : start + len(chunk)]
            start += len(chunk)
            yield {**self.inputs(part, int(self.lengths[chunk].max())), "labels": self.labels[part]}


class TextSplit(Split):
    """Texts as token numbers."""

    def __init__(
        self, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray, padding: int, device: torch.device
    ) -> None:
        super().__init__(labels, device)
        self.lengths = -(-lengths.astype(np.int64) // 8) * 8  # few different shapes, and widths that tensor cores like
        table = np.full((len(lengths), int(self.lengths.max())), padding, dtype=np.int32)
        table[np.arange(table.shape[1]) < lengths[:, None]] = tokens
        self.tokens = torch.from_numpy(table).to(device)
        self.ends = torch.from_numpy(lengths.astype(np.int64)).to(device)

    def inputs(self, rows: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask, (rows, length)."""
        mask = torch.arange(length, device=self.device) < self.ends[rows, None]
        return {"input_ids": self.tokens[rows, :length].long(), "attention_mask": mask.long()}


class ImageSplit(Split):
    """Grey images as bytes; they are resized and normalized batch by batch."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, task: Task, white: float, device: torch.device) -> None:
        super().__init__(labels, device)
        self.images, self.task, self.white = torch.from_numpy(images).to(device), task, white
        self.mean = torch.tensor(IMAGE_MEAN if task.channels == 3 else (0.5,), device=device)[:, None, None]
        self.std = torch.tensor(IMAGE_STD if task.channels == 3 else (0.5,), device=device)[:, None, None]

    def inputs(self, rows: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """pixel_values, (rows, channels, size, size)."""
        pixels, size = self.images[rows, None].float() / self.white, self.task.image_size
        if pixels.shape[-1] != size:
            pixels = functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
        return {"pixel_values": (pixels - self.mean) / self.std}


def load(task: Task, folder: Path | None, device: torch.device) -> tuple[dict[str, Split], int]:
    """The splits train, validation and test, and the number of classes.

    Raises:
        FileNotFoundError: the data folder lacks the task's file.
    """
    if task.file is None:
        arrays = _synthetic(task)
    else:
        path = _in_folder(folder, task.file)
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
    splits: dict[str, Split] = {}
    for split, most in zip(("train", "validation", "test"), task.rows, strict=True):
        labels = arrays[f"{split}_labels"][:most]
        if task.kind == "text":
            lengths = arrays[f"{split}_lengths"][:most]
            tokens = arrays[f"{split}_tokens"][: int(lengths.sum(dtype=np.int64))]
            splits[split] = TextSplit(tokens, lengths, labels, task.padding, device)
        else:
            white = 16.0 if task.image_size == 8 else 255.0  # digits have 17 shades
            splits[split] = ImageSplit(arrays[f"{split}_images"][:most], labels, task, white, device)
    return splits, len(arrays["classes"])


def build(task: Task, classes: int, folder: Path | None) -> nn.Module:
    """A fresh classifier, in fp32 on the CPU; what is random in it comes from torch's global generator."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if task.model is not None:
        source = _in_folder(folder, task.model)
        unpack(source)
        pretrained = AutoModelForSequenceClassification if task.kind == "text" else ViTForImageClassification
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = pretrained.from_pretrained(source, num_labels=classes, dtype=torch.float32)
        if task.shift_positions:
            positions = next(m for name, m in model.named_modules() if name.endswith("position_embeddings"))
            with torch.no_grad():
                positions.weight.copy_(positions.weight.roll(1, 0))
        return model
    cls = BertForSequenceClassification if task.kind == "text" else ViTForImageClassification
    sizes = dict(task.shape or {})
    if task.kind == "text":
        return cls(BertConfig(vocab_size=200, max_position_embeddings=64, num_labels=classes, **sizes))
    return cls(ViTConfig(image_size=task.image_size, num_channels=task.channels, num_labels=classes, **sizes))


def _in_folder(folder: Path | None, name: str) -> Path:
    if folder is None or not (folder / name).exists():
        place = f"{folder} holds no {name}" if folder else "this task reads prepared data"
        raise FileNotFoundError(f"{place}: run `python -m benchmarks.accuracy.prepare FOLDER` and pass --data FOLDER")
    return folder / name


def _synthetic(task: Task) -> dict[str, np.ndarray]:
    """Small random data with something to learn: a marked token, or a bright corner."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"classes": np.array(["0", "1", "2", "3"])}
    for split, rows in zip(("train", "validation", "test"), task.rows, strict=True):
        labels = rng.integers(0, 4, rows or 64).astype(np.uint8)
        if task.kind == "text":
            lengths = rng.integers(6, 20, len(labels)).astype(np.uint16)
            texts = [rng.integers(10, 200, length).astype(np.uint16) for length in lengths]
            for text, label in zip(texts, labels, strict=True):
                text[0], text[int(rng.integers(1, len(text)))] = 1, 2 + int(label)
            arrays |= {f"{split}_tokens": np.concatenate(texts), f"{split}_lengths": lengths}
        else:
            images = rng.integers(0, 8, (len(labels), 8, 8)).astype(np.uint8)
            for image, label in zip(images, labels, strict=True):
                image[label // 2 * 4 : label // 2 * 4 + 4, label % 2 * 4 : label % 2 * 4 + 4] += 6
            arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = labels
    return arrays
