"""What a file or a folder asks for: a task, with its rows in two splits, its model, and what turns rows into batches."""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset

from .data import check_tokenizer, read_rows
from .files import load_config
from .images import image_processor, open_picture
from .talking import bar, warn
from .texts import TextRow, read_conversations

HELD_OUT = 0.2
"""Share of the rows that is held out to evaluate on where no other file is given; of each class the same share."""


@dataclass(frozen=True)
class Task:
    """All that training needs.

    Attributes:
        kind: "text classes", "image classes" or "language". train, evaluation: data sets of features.
        processing: tokenizer or image processor, saved with the model. collator: features -> a batch.
        new_model: makes the model, its head from the seed that is set. metrics: as Trainer's compute_metrics, or None.
        classes: their names; none for a language model.
    """

    kind: str
    train: Any
    evaluation: Any
    processing: Any
    collator: Any
    new_model: Callable[[], Any]
    metrics: Any
    classes: tuple[str, ...] = ()


def make_task(options: argparse.Namespace) -> Task:
    """Read the data, and check all that can be checked before training.

    Raises:
        FileNotFoundError: no such file, folder or model. ImportError: an extra is missing; it is named.
        ValueError: an empty file, no label column, fewer than two classes, a class in --eval-data that is not in --data, labels
            that are no classes, images that do not open, a model without tokenizer or image processor.
    """
    config = load_config(options.model)
    is_language = any("CausalLM" in name or "LMHead" in name for name in getattr(config, "architectures", None) or [])
    path = Path(options.data)
    if not path.exists():
        raise FileNotFoundError(f"{options.data}: no such file or folder")
    if not path.is_dir() and (conversations := read_conversations(path, options.samples)) is not None:
        return _language(options, conversations)
    rows = read_rows(options)
    if all(row.label is None for row in rows):
        if is_language and not path.is_dir():
            return _language(options, [row.text for row in rows])
        where = "has no folders for classes" if path.is_dir() else f"has no column {options.label_column!r}"
        raise ValueError(
            f"{options.data} {where}, and {options.model} is not a language model that learns from texts alone: "
            + (
                "put each class into a folder of its name"
                if path.is_dir()
                else "say which holds the classes with --label-column"
            )
        )
    others = [] if options.eval_data is None else list(read_rows(options, options.eval_data))
    classes = _classes(options, rows, others)
    train, evaluation = (list(rows), others) if others else _two_splits(options, rows)
    return (_images if path.is_dir() else _texts)(options, train, evaluation, classes)


def _two_splits(options: argparse.Namespace, rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The rows to train on and those to evaluate on, a fifth of each class."""
    rows = list(rows)
    random.Random(0).shuffle(rows)
    left = {label: round(HELD_OUT * count) for label, count in Counter(row.label for row in rows).items()}
    train: list[Any] = []
    held_out: list[Any] = []
    for row in rows:
        (held_out if left[row.label] else train).append(row)
        left[row.label] = max(0, left[row.label] - 1)
    if not held_out:
        raise ValueError(f"{options.data} has {len(rows)} rows, too few to hold some out: give more, or --eval-data")
    return train, held_out


def _classes(options: argparse.Namespace, train: Sequence[Any], evaluation: Sequence[Any]) -> tuple[str, ...]:
    """The classes in order. evaluation: of --eval-data, if given. Raises ValueError for labels that make none."""
    what = f"--label-column {options.label_column}"
    missing = sum(row.label is None or not row.label.strip() for row in (*train, *evaluation))
    if missing:
        raise ValueError(f"{missing} rows of {options.data} have no label: fill in the column, or leave them out")
    counts = Counter(row.label for row in train)
    if len(counts) < 2:
        raise ValueError(
            f"all rows of {options.data} are of one class, {next(iter(counts))!r}: there is nothing to learn"
        )
    if _are_scores(counts):
        raise ValueError(f"{what} of {options.data} holds scores such as {next(iter(counts))}, and no classes")
    if len(counts) > max(50, len(train) // 2):
        raise ValueError(
            f"{what} of {options.data} has {len(counts)} different values in {len(train)} rows: is it the column of the classes?"
        )
    unknown = sorted({row.label for row in evaluation} - set(counts))
    if unknown:
        raise ValueError(
            f"the class {unknown[0]!r} of the rows to evaluate on is not among those to train on: {_some(counts)}"
        )
    numbers = all(name.lstrip("-").isdigit() for name in counts)
    return tuple(sorted(counts, key=int) if numbers else sorted(counts))


def _are_scores(counts: Counter[str]) -> bool:
    """Whether the labels are numbers with a fraction."""
    try:
        return any(not float(name).is_integer() for name in counts)
    except ValueError:
        return False


def _some(names: Any) -> str:
    return ", ".join(sorted(map(str, names))[:12])


class _Images(Dataset):
    """Images opened and prepared when they are asked for."""

    def __init__(self, rows: Sequence[Any], processor: Any, number: dict[str, int]) -> None:
        self.rows, self.processor, self.number = rows, processor, number

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        pixels = self.processor(open_picture(row.path), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.number[row.label]}


def _images(
    options: argparse.Namespace, train: Sequence[Any], evaluation: Sequence[Any], classes: tuple[str, ...]
) -> Task:
    auto = transformers.AutoModelForImageClassification
    processor = image_processor(options.model, auto)
    number = {name: i for i, name in enumerate(classes)}
    seen, held_out = _Images(train, processor, number), _Images(evaluation, processor, number)
    collator = transformers.DefaultDataCollator()
    return Task(
        "image classes",
        seen,
        held_out,
        processor,
        collator,
        _new_classifier(options, auto, classes),
        _accuracy,
        classes,
    )


def _texts(
    options: argparse.Namespace, train: Sequence[TextRow], evaluation: Sequence[TextRow], classes: tuple[str, ...]
) -> Task:
    tokenizer = _tokenizer(options)
    number = {name: i for i, name in enumerate(classes)}

    def encode(rows: Sequence[TextRow]) -> list[dict[str, Any]]:
        cut = {"truncation": True, "max_length": options.max_length}
        return [{**tokenizer(r.text, r.pair, **cut), "labels": number[str(r.label)]} for r in bar("rows")(rows)]

    collator = transformers.DataCollatorWithPadding(tokenizer)
    new_model = _new_classifier(options, transformers.AutoModelForSequenceClassification, classes, tokenizer)
    return Task("text classes", encode(train), encode(evaluation), tokenizer, collator, new_model, _accuracy, classes)


def _language(options: argparse.Namespace, texts: Sequence[Any]) -> Task:
    """A causal language model on texts, or on conversations by the tokenizer's chat template."""
    tokenizer = _tokenizer(options)
    if isinstance(texts[0], list):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {options.model} has no chat template, so conversations cannot become texts: take a chat model, or "
                "give texts"
            )
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in texts]
    held_out = list(texts)
    if options.eval_data is None:
        random.Random(0).shuffle(held_out)
        count = max(1, round(HELD_OUT * len(held_out)))
        texts, held_out = held_out[count:], held_out[:count]
        if not texts:
            raise ValueError(f"{options.data} has one row, too few to hold some out: give more, or --eval-data")
    else:
        read = read_conversations(Path(options.eval_data), options.samples)
        held_out = (
            [row.text for row in read_rows(options, options.eval_data)]
            if read is None
            else [tokenizer.apply_chat_template(messages, tokenize=False) for messages in read]
        )

    def encode(rows: Sequence[str]) -> list[dict[str, Any]]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        found = [
            tokenizer(text, truncation=True, max_length=options.max_length - 1)["input_ids"] + end
            for text in bar("rows")(rows)
        ]
        return [{"input_ids": ids, "labels": list(ids)} for ids in found]

    collator = transformers.DataCollatorForSeq2Seq(
        tokenizer
    )  # pads labels with -100, and leaves the end of a text its label

    def new_model() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)

    return Task("language", encode(texts), encode(held_out), tokenizer, collator, new_model, None)


def _tokenizer(options: argparse.Namespace) -> Any:
    check_tokenizer(options.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = getattr(tokenizer, "model_max_length", None)
    if longest and longest < options.max_length:
        warn(f"{options.model} reads at most {longest} tokens: longer texts are cut there")
        options.max_length = int(longest)
    return tokenizer


def _new_classifier(
    options: argparse.Namespace, auto: Any, classes: tuple[str, ...], tokenizer: Any = None
) -> Callable[[], Any]:
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}

    def new_model() -> Any:
        model = auto.from_pretrained(
            options.model, num_labels=len(classes), **names, dtype=torch.float32, ignore_mismatched_sizes=True
        )
        if tokenizer is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model

    return new_model


def _accuracy(found: Any) -> dict[str, float]:
    scores = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return {"accuracy": float(np.mean(np.argmax(scores, -1) == found.label_ids))}


def perplexity(loss: float) -> float:
    """Of a language model with this mean loss."""
    return math.exp(min(loss, 50.0))
