"""The rows of a task, as tensors on the device: what all kinds of data have in common, texts and images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

POOL = 32
"""Batches whose rows are sorted by length together: little padding, and still another order in every epoch."""
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pixels(Protocol):
    """What a task says of its images."""

    image_size: int
    channels: int


class Split:
    """Rows of one split on the device; `batches` gives what a model takes, labels among it.

    Attributes:
        evaluation_batch: rows of a batch of `batches`. measured_rows: rows of the training split to measure a loss on.
    """

    evaluation_batch = 256
    measured_rows = 1024

    def __init__(self, labels: np.ndarray, device: torch.device) -> None:
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        self.lengths = np.zeros(len(labels), dtype=np.int64)
        self.device = device

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, rows: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Inputs of the model for these rows, padded to `length`."""
        raise NotImplementedError

    def terms(self, scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (terms, classes) and labels (terms,) of the loss."""
        return scores, labels

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
        yield from self._take([rows[i : i + self.evaluation_batch] for i in range(0, len(rows), self.evaluation_batch)])

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

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, task: Pixels, white: float, device: torch.device
    ) -> None:
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
