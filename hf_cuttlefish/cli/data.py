"""The rows that `--data` names, texts or images, and batches of them for a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from ..config import CuttlefishConfig
from ..decide.targets import find_targets
from ..maths.factors import Moments
from ..measure.gathering import gather_statistics
from ..saving.companions import TOKENIZER, companions
from .images import image_batches, image_processor, read_images
from .talking import bar, warn
from .texts import read_texts, text_batches


def read_rows(options: argparse.Namespace, path: str | None = None) -> Any:
    """The rows of `--data` (or of another path), None without it: of a folder images, else texts. Raises as the readers do."""
    path = path or options.data
    if path is None:
        return None
    if Path(path).is_dir():
        return read_images(path, options.samples)
    return read_texts(path, options.text_column, options.label_column, options.samples)


def make_batches(model: Any, options: argparse.Namespace, rows: Sequence[Any]) -> list[Any]:
    """Batches for `gather_statistics`, with labels where the model has a use for them.

    Raises ValueError where the model has no tokenizer or image processor, or does not know a label.
    """
    if hasattr(rows[0], "path"):
        processor = image_processor(options.model, model)
        return image_batches(model, processor, rows, options.batch_size)
    check_tokenizer(options.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    batches = text_batches(model, tokenizer, list(rows), options.batch_size, options.max_length)
    if any(row.label is not None for row in rows) and "labels" not in batches[0]:
        warn(f"the labels in {options.data} are not used: {type(model).__name__} has no use for them")
    return batches


def check_tokenizer(name: str) -> None:
    """Raises ValueError where a model comes with none: AutoTokenizer makes an empty one, without a word."""
    if not any(Path(file).match(pattern) for file in companions(name, fetch=True) for pattern in TOKENIZER):
        raise ValueError(
            f"{name} has no tokenizer, so --data of texts cannot be used; for images give a folder, and for the like see "
            "hf_cuttlefish.measure.gathering.gather_statistics"
        )


def statistics(
    model: Any,
    options: argparse.Namespace,
    config: CuttlefishConfig,
    rows: Sequence[Any] | None = None,
    names: list[str] | None = None,
) -> dict[str, Moments] | None:
    """Statistics of the target layers (or the named ones) from the rows; None without data."""
    rows = rows or read_rows(options)
    if rows is None:
        return None
    batches = make_batches(model, options, rows)
    if names:
        config = CuttlefishConfig(target_modules=names)
    return gather_statistics(model, batches, find_targets(model, config), config.statistics_tokens, bar("batches"))
