"""The tasks on which eight bits are judged: test accuracy of the examples' sets, or perplexity of a language model on dialogs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .forms import Run

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

PIECES = "pieces.npz"
"""In a run of `eight_bits.prepare`: what it is scored on."""

Batch = dict[str, torch.Tensor]
Data = list[tuple[Batch, torch.Tensor]]
"""Batches of 32 with their labels."""


@dataclass(frozen=True)
class Task:
    """What is scored, and how. batch: the batch at which it is timed."""

    auto: Any
    metric: str
    load: Callable[[Path, int | None], Data]
    batch: Callable[[Data, int], Batch]
    score: Callable[[Data, Run, str], float]


def load_trec(folder: Path, limit: int | None) -> Data:
    """Test questions, sorted by length, as the demo cuts them."""
    from bundled_data import TEXT_DATASETS

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = TEXT_DATASETS["trec"]()["test"].to_list()[:limit]
    rows.sort(key=lambda row: len(row["text"]))  # little padding
    data = []
    for i in range(0, len(rows), 32):
        some = rows[i : i + 32]
        batch = tokenizer([r["text"] for r in some], truncation=True, max_length=48, padding=True, return_tensors="pt")
        kept = {key: batch[key] for key in ("input_ids", "attention_mask")}
        data.append((kept, torch.tensor([row["label"] for row in some])))
    return data


def load_images(name: str) -> Callable[[Path, int | None], Data]:
    """Test images of a bundled set, prepared by the processor that lies beside the model."""

    def load(folder: Path, limit: int | None) -> Data:
        from image_classification import DataArguments, load_processor, load_splits, to_picture

        processor = load_processor(str(folder), transformers.AutoConfig.from_pretrained(folder).image_size)
        rows = load_splits(DataArguments(dataset_name=name, max_eval_samples=limit))["test"]
        brightest = max(int(row.max()) for row in rows[:256]["image"])
        data = []
        for i in range(0, len(rows), 32):
            some = rows[i : i + 32]
            pictures = [to_picture(image, brightest) for image in some["image"]]
            data.append((dict(processor(pictures, return_tensors="pt")), torch.as_tensor(some["labels"])))
        return data

    return load


def load_dialogs(folder: Path, limit: int | None) -> Data:
    """Blocks of 256 tokens of the film dialogs' test split (or as many as the model has positions for), 4 at once; 128 of them."""
    from bundled_data import movie_dialogs

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "\n".join(movie_dialogs()["test"]["text"])
    ids = torch.tensor(tokenizer(text[:2_000_000])["input_ids"])
    length = min(256, transformers.AutoConfig.from_pretrained(folder).max_position_embeddings)
    blocks = ids[: len(ids) // length * length].view(-1, length)[: limit or 128]
    return [
        ({"input_ids": some, "attention_mask": torch.ones_like(some)}, some) for some in blocks.split(4) if len(some)
    ]


def load_pieces(folder: Path, limit: int | None) -> Data:
    """The pieces of text that `eight_bits.prepare` has put into the run, 4 at once; of 256 tokens, begun by <bos>."""
    with np.load(folder.parents[1] / PIECES) as stored:
        pieces = torch.from_numpy(stored["pieces"].astype(np.int64))[:limit]
    return [({"input_ids": some, "attention_mask": torch.ones_like(some)}, some) for some in pieces.split(4)]


def beginnings(data: Data, size: int) -> Batch:
    """The first 16 tokens of texts: what is timed of a language model."""
    return {key: value[:, :16] for key, value in padded(data, size).items()}


def padded(data: Data, size: int) -> Batch:
    """A batch of the middle of the data."""
    batch = data[len(data) // 2][0]
    return {key: value.repeat(-(-size // len(value)), *[1] * (value.ndim - 1))[:size] for key, value in batch.items()}


def accuracy(data: Data, run: Run, device: str) -> float:
    """Share of right answers, percent."""
    right = sum(int((run(_on(batch, device)).argmax(-1) == labels).sum()) for batch, labels in data)
    return 100 * right / sum(len(labels) for _, labels in data)


def perplexity(data: Data, run: Run, device: str) -> float:
    """exp of the mean loss of a token."""
    loss, count = 0.0, 0
    for batch, ids in data:
        logits = run(_on(batch, device))[:, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(loss / count)


def _on(batch: Batch, device: str) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


TASKS = {
    "trec": Task(transformers.AutoModelForSequenceClassification, "test accuracy, %", load_trec, padded, accuracy),
    **{
        name: Task(
            transformers.AutoModelForImageClassification, "test accuracy, %", load_images(name), padded, accuracy
        )
        for name in ("digits", "fashion_mnist")
    },
    "dialogs": Task(transformers.AutoModelForCausalLM, "perplexity", load_dialogs, beginnings, perplexity),
    "gemma": Task(transformers.AutoModelForCausalLM, "perplexity", load_pieces, beginnings, perplexity),
}
