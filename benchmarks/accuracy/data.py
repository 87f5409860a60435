"""The tasks of the benchmark: data, model and recipe. All rows of a task lie on the device as tensors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from .packed import unpack
from .pieces import LENGTH, PieceSplit
from .splits import ImageSplit, Split, TextSplit


@dataclass(frozen=True)
class Task:
    """A data set, the model trained on it and the recipe, the same for all methods.

    Attributes:
        kind: "text", "image" or "pieces" (of text, for a language model). file: arrays, inside the data folder; None: synthetic.
        model: folder of the pretrained model inside the data folder, or None to start from random weights.
        shape: sizes of a model with random weights. image_size: images are resized to it; channels likewise.
        rows: most rows of train, validation and test that are used.
        longest: tokens of a text that are used, its first ones; None: all that the file holds. Of texts, which lie sorted by
            their label in some files, the rows are evenly spaced.
        measured: training rows on which the loss is measured around the switch.
        padding: number of the token that fills texts up.
        shift_positions: position embeddings are rolled by one before the first step, so that the run has much to learn anew.
        shuffled_words: share of the vocabulary whose embeddings change places before the first step, to the same end.
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
    longest: int | None = None
    measured: int = 1024
    padding: int = 0
    shift_positions: bool = False
    shuffled_words: float = 0.0

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
    "smoke_pieces": Task("pieces", None, None, shape(64, 2, 2), 1e-3, 2, 8, rows=(128, 32, 32)),
    "smoke_image": Task(
        "image", None, None, shape(48, 2, 2, patch_size=2), 1e-3, 3, 16, image_size=8, rows=(256, 64, 64)
    ),
}

for _data in ("trec", "movie_snippets", "reuters_r8"):
    TASKS[f"{_data}_whole"] = Task("text", f"whole/{_data}.npz", "whole/minilm")
    TASKS[f"{_data}_3e-5"] = replace(TASKS[_data], learning_rate=3e-5)
    for _rate in ("2e-5", "5e-5", "1e-4"):
        _task = Task("text", f"mpnet/{_data}.npz", "mpnet/mpnet_base", learning_rate=float(_rate), padding=1)
        TASKS[f"mpnet_{_data}_{_rate}"] = _task
        TASKS[f"mpnet_{_data}_{_rate}_relearn"] = replace(_task, shift_positions=True)
        TASKS[f"mpnet_{_data}_{_rate}_shuffled"] = replace(_task, shuffled_words=0.5)
# Short enough for one core of a CPU.
TASKS["movie_snippets_short"] = replace(TASKS["movie_snippets_whole"], rows=(1024, 256, 800), measured=256)
TASKS["reuters_r8_short"] = replace(TASKS["reuters_r8_whole"], rows=(640, 256, 800), longest=40, measured=256)
for _data in ("dialogs", "snippets"):
    for _rate in ("5e-5", "1e-4"):
        _file, _model = f"gemma/{_data}.npz", "gemma/gemma_270m"
        _task = Task("pieces", _file, _model, learning_rate=float(_rate), epochs=2, batch=8, warmup=0.03)
        TASKS[f"gemma_{_data}_{_rate}"] = _task
TASKS["fashion_mnist_vit_2e-4"] = replace(TASKS["fashion_mnist_vit"], learning_rate=2e-4)


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
        if task.kind == "pieces":
            splits[split] = PieceSplit(arrays[f"{split}_pieces"][:most], device)
            continue
        labels = arrays[f"{split}_labels"]
        if task.kind == "text":
            count = min(most or len(labels), len(labels))
            rows = np.arange(count) * len(labels) // max(1, count)
            texts = chosen(arrays[f"{split}_tokens"], arrays[f"{split}_lengths"], rows, task.longest)
            splits[split] = TextSplit(*texts, labels[rows], task.padding, device)
            splits[split].measured_rows = task.measured
        else:
            white = 16.0 if task.image_size == 8 else 255.0  # digits have 17 shades
            splits[split] = ImageSplit(arrays[f"{split}_images"][:most], labels[:most], task, white, device)
    return splits, len(arrays["classes"])


def chosen(
    tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray, longest: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (of all texts, one after the other) and lengths of these rows, each cut to its first `longest` tokens."""
    sizes = lengths.astype(np.int64)
    starts, kept = (sizes.cumsum() - sizes)[rows], sizes[rows] if longest is None else np.minimum(sizes[rows], longest)
    return np.concatenate([tokens[a : a + n] for a, n in zip(starts, kept, strict=True)]), kept


def build(task: Task, classes: int, folder: Path | None) -> nn.Module:
    """A fresh classifier, in fp32 on the CPU; what is random in it comes from torch's global generator."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if task.model is not None:
        source = _in_folder(folder, task.model)
        unpack(source)
        if task.kind == "pieces":
            return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        pretrained = AutoModelForSequenceClassification if task.kind == "text" else ViTForImageClassification
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = pretrained.from_pretrained(source, num_labels=classes, dtype=torch.float32)
        if task.shift_positions:
            positions = next(m for name, m in model.named_modules() if name.endswith("position_embeddings"))
            with torch.no_grad():
                positions.weight.copy_(positions.weight.roll(1, 0))
        if task.shuffled_words:
            shuffle_words(model, task.shuffled_words)
        return model
    cls = BertForSequenceClassification if task.kind == "text" else ViTForImageClassification
    sizes = dict(task.shape or {})
    if task.kind == "pieces":
        return LlamaForCausalLM(LlamaConfig(vocab_size=classes, tie_word_embeddings=True, **sizes))
    if task.kind == "text":
        return cls(BertConfig(vocab_size=200, max_position_embeddings=64, num_labels=classes, **sizes))
    return cls(ViTConfig(image_size=task.image_size, num_channels=task.channels, num_labels=classes, **sizes))


@torch.no_grad()
def shuffle_words(model: nn.Module, share: float) -> None:
    """Let the embeddings of this share of the vocabulary change places, the same ones for every seed."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(table), generator=generator)[: round(share * len(table))]
    # Special tokens come first in these vocabularies: their places say what kind of token they are.
    chosen = chosen[chosen > 4]
    table[chosen] = table[chosen.roll(1)]


def _in_folder(folder: Path | None, name: str) -> Path:
    if folder is None or not (folder / name).exists():
        place = f"{folder} holds no {name}" if folder else "this task reads prepared data"
        raise FileNotFoundError(f"{place}: run `python -m benchmarks.accuracy.prepare FOLDER` and pass --data FOLDER")
    return folder / name


def _synthetic(task: Task) -> dict[str, np.ndarray]:
    """Small random data with something to learn: a marked token, or a bright corner."""
    rng = np.random.default_rng(0)
    if task.kind == "pieces":
        return _synthetic_pieces(task, rng)
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


def _synthetic_pieces(task: Task, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Counting in steps that differ from piece to piece."""
    arrays: dict[str, np.ndarray] = {"classes": np.arange(200)}
    for split, rows in zip(("train", "validation", "test"), task.rows, strict=True):
        starts, steps = rng.integers(0, 200, (2, rows or 32, 1))
        arrays[f"{split}_pieces"] = (starts + steps * np.arange(LENGTH // 8)) % 200
    return arrays
