"""Read texts from a file, and make batches of them for a model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

MASKED_SHARE = 0.15
"""Share of the tokens that a masked language model has to guess, as in BERT's own training."""


@dataclass(frozen=True)
class TextRow:
    """One example: a text, the second text of a pair or None, and a label (as it stands in the file) or None."""

    text: str
    pair: str | None = None
    label: str | None = None


def read_texts(
    path: str | Path, text_columns: list[str] | None = None, label_column: str = "label", most: int | None = None
) -> list[TextRow]:
    """Examples from a file: CSV or TSV with a header, JSONL or JSON (a list of objects), or any other file as lines of text.

    A .csv may be parted by semicolons or tabs and begin with a byte order mark, as spreadsheets write it.

    Args:
        text_columns: one column, or two for pairs. None: "text", or the only other column beside the label.
        label_column: used where the file has it. most: read no more rows than that.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not UTF-8, a column that is missing, a row with more cells than columns, a line that is no
            JSON object, or no text at all; the message names the place.
    """
    path = Path(path)
    try:
        return _read(path, text_columns, label_column, most)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): say what it is to "
            f"`iconv -f latin1 -t utf-8 {path} > NEW`, or save it as UTF-8"
        ) from error


def _read(path: Path, text_columns: list[str] | None, label_column: str, most: int | None) -> list[TextRow]:
    kind = path.suffix.lower()
    records: Iterable[Any]
    with path.open(encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            records = _table_rows(path, file, "\t" if kind == ".tsv" else ",;\t")
        elif kind in (".jsonl", ".json"):
            records = _json_records(path, file.read(), lines=kind == ".jsonl")
        else:
            records = ({"text": line.strip()} for line in file)
        rows = []
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict):
                raise ValueError(f"{path}: entry {number} is no object with columns: {record!r:.60}")
            if text_columns is None:
                text_columns = _guess_text_columns(path, record, label_column)
            texts = []
            for column in text_columns:
                if column not in record:
                    raise ValueError(
                        f"{path}: entry {number} has no column {column!r}, but {', '.join(map(repr, record))}"
                    )
                texts.append(str(record[column] or ""))
            label = record.get(label_column)
            if texts[0].strip():
                rows.append(
                    TextRow(texts[0], texts[1] if len(texts) > 1 else None, None if label is None else str(label))
                )
            if most is not None and len(rows) >= most:
                break
    if not rows:
        raise ValueError(f"{path} holds no text")
    return rows


def read_conversations(path: Path, most: int | None = None) -> list[list[dict[str, Any]]] | None:
    """Of a JSONL or JSON file whose entries hold `messages`, as chat models are trained on: these; None for any other file.

    Raises ValueError for an entry without messages among others with some; it is named.
    """
    if path.suffix.lower() not in (".jsonl", ".json"):
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return None  # `read_texts` says so
    records = _json_records(path, text, lines=path.suffix.lower() == ".jsonl")[:most]
    if not records or not isinstance(records[0], dict) or "messages" not in records[0]:
        return None
    found = []
    for number, record in enumerate(records, start=1):
        messages = record.get("messages") if isinstance(record, dict) else None
        whole = isinstance(messages, list) and all(
            isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
        )
        if not whole or not messages:
            raise ValueError(
                f"{path}: entry {number} holds no messages, a list of objects with role and content: {record!r:.80}"
            )
        found.append(messages)
    return found


def text_batches(model: nn.Module, tokenizer: Any, rows: list[TextRow], batch_size: int, max_length: int) -> list[Any]:
    """Batches for `gather_statistics`, with labels where the model has a use for them.

    Args:
        model: a PreTrainedModel; its class and config say what the labels are.
        tokenizer: of the model. Where it has no padding token, its end-of-text token serves.
        batch_size: rows in a batch. max_length: longer texts are cut to this many tokens.

    Raises:
        ValueError: a label that the model does not know, or an encoder-decoder model without pairs (source, target).
    """
    config: Any = model.config
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    name = type(model).__name__
    batches = []
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        texts, pairs = [row.text for row in chunk], [row.pair for row in chunk]
        options = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}
        if config.is_encoder_decoder and "SequenceClassification" not in name:
            if None in pairs:
                raise ValueError(f"{name} maps texts to texts: give two text columns, source and target")
            batch = tokenizer(texts, text_target=pairs, **options)
            batch["labels"] = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)
        else:
            batch = tokenizer(texts, None if None in pairs else pairs, **options)
            if "CausalLM" in name or "LMHead" in name:
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            elif "MaskedLM" in name and tokenizer.mask_token_id is not None:
                _mask(batch, tokenizer, generator)
            elif "SequenceClassification" in name and all(row.label is not None for row in chunk):
                batch["labels"] = torch.tensor([_label_id(row.label or "", config) for row in chunk])
        batches.append(dict(batch))
    return batches


def _mask(batch: Any, tokenizer: Any, generator: torch.Generator) -> None:
    """Hide a share of the tokens and make them the labels, in place."""
    ids = batch["input_ids"]
    ordinary = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    hidden = ordinary & (torch.rand(ids.shape, generator=generator) < MASKED_SHARE)
    batch["labels"] = ids.masked_fill(~hidden, -100)
    batch["input_ids"] = ids.masked_fill(hidden, tokenizer.mask_token_id)


def _label_id(label: str, config: Any) -> float | int:
    """The number of a class: as a number, or as its name in the model's config; the value itself in a regression."""
    known = {str(k): int(v) for k, v in (config.label2id or {}).items()}
    try:
        if config.num_labels == 1:
            return float(label)
        number = known[label] if label in known else int(label)
    except ValueError:
        number = -1
    if not 0 <= number < config.num_labels:
        raise ValueError(
            f"the label {label!r} is none that the model knows: {', '.join(sorted(known, key=lambda name: known[name])[:12])} or 0 to {config.num_labels - 1}"
        )
    return number


def _json_records(path: Path, text: str, lines: bool) -> list[Any]:
    place = ""
    try:
        if not lines:
            data = json.loads(text)
            if not isinstance(data, list):
                raise ValueError(
                    f"{path}: a JSON file of texts is a list of objects; use .jsonl for an object in each line"
                )
            return data
        records: list[Any] = []
        for number, line in enumerate(text.splitlines(), start=1):
            place = f", line {number}"
            if line.strip():
                records.append(json.loads(line))
        return records
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}{place}: no JSON: {error}") from error


def _table_rows(path: Path, file: TextIO, delimiters: str) -> Iterator[dict[str, Any]]:
    """Rows of a table, whose delimiter is the one of these that its header has most of (the first if it has none)."""
    header = file.readline()
    file.seek(0)
    delimiter = max(delimiters, key=header.count)
    for number, record in enumerate(csv.DictReader(file, delimiter=delimiter), start=1):
        if None in record:
            raise ValueError(
                f"{path}: entry {number} has more cells than the {len(record) - 1} columns of the first line: a text that holds "
                f"{delimiter!r} stands in double quotes"
            )
        yield record


def _guess_text_columns(path: Path, record: Mapping[str, Any], label_column: str) -> list[str]:
    others = [column for column in record if column != label_column]
    if "text" in record:
        return ["text"]
    if len(others) == 1:
        return others
    raise ValueError(
        f"{path} has the columns {', '.join(map(repr, record))} (the first line names them): say which hold the text with "
        "--text-column, and which the classes with --label-column"
    )
