"""Data for the examples from wherever a name points: a bundled set, a file, a folder, or the hub; and models from GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict, Features, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""The reader of `datasets` for a single file, by its ending."""

VALIDATION_NAMES = ("validation", "validation_matched", "dev", "val", "valid")
"""What the validation split is called; GLUE's MNLI has two, and `validation_matched` is the usual one."""

HELD_OUT = 0.2
"""Share of the rows that a set without validation and test splits gives up for both."""


def load_raw(name: str, config: str | None, bundled: Mapping[str, Callable[[], DatasetDict]]) -> DatasetDict:
    """All splits of a data set.

    Args:
        name: a bundled set; a file (csv, tsv, json, jsonl, parquet, txt); a folder of such files or of images, or one that
            `DatasetDict.save_to_disk` wrote; or a hub name.
        config: configuration of a hub data set, as `mrpc` of `nyu-mll/glue`.
        bundled: the sets that installed packages carry, by name.

    Raises:
        ValueError: a file of another kind; nothing of that name here, and no hub that holds it or can be reached.
    """
    if name in bundled:
        return bundled[name]()
    path = Path(name)
    if path.is_file():
        kind = FILE_FORMATS.get(path.suffix)
        if kind is None:
            raise ValueError(
                f"--dataset_name {name} ends in {path.suffix!r}; files that can be read: {[*FILE_FORMATS]}."
            )
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(kind, data_files={"train": str(path)}, **options)
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    try:
        return load_dataset(name, config)
    except (FileNotFoundError, ConnectionError) as error:
        what = "is a folder without data files" if path.is_dir() else "is no local file or folder, and no hub holds it"
        raise ValueError(
            f"--dataset_name {name} {what} (or the hub can't be reached). Without a hub, choose a bundled set: "
            f"{', '.join(bundled)}."
        ) from error


def three_splits(raw: DatasetDict, name: str, label_column: str | None = None) -> DatasetDict:
    """The splits train, validation and test from those that there are.

    Where there is no test split, or its labels are hidden (GLUE marks them -1), test is the validation split; where there
    is no validation split, it is the test split. A set with a train split alone gives up a fifth of it for both.

    Raises:
        ValueError: no train split, or no such label column; the message names what there is.
    """
    if "train" not in raw:
        raise ValueError(f"--dataset_name {name} has the splits {list(raw)}; needed: train, and validation or test.")
    if label_column is not None and label_column not in raw["train"].column_names:
        raise ValueError(f"--label_column {label_column} is not among {raw['train'].column_names}.")
    validation = next((raw[split] for split in VALIDATION_NAMES if split in raw), None)
    test = raw.get("test")
    if test is not None and label_column is not None and _are_hidden(test, label_column):
        test = None
    if validation is None and test is None:
        halves = raw["train"].train_test_split(HELD_OUT, seed=0)
        return DatasetDict(train=halves["train"], validation=halves["test"], test=halves["test"])
    return DatasetDict(train=raw["train"], validation=validation or test, test=test or validation)


def _are_hidden(split: Any, label_column: str) -> bool:
    return label_column not in split.column_names or any(label in (-1, None) for label in split[label_column])


def with_classes(splits: DatasetDict, label_column: str) -> DatasetDict:
    """The splits with the label column as a ClassLabel: the same classes, in the same order, in every split.

    `class_encode_column` of `datasets` numbers each split by itself, so a class that one split lacks would shift all others.

    Raises:
        ValueError: the labels are scores, no classes.
    """
    label = splits["train"].features[label_column]
    if isinstance(label, ClassLabel):
        return splits
    if str(getattr(label, "dtype", "")).startswith(("float", "double")):
        raise ValueError(f"--label_column {label_column} holds {label.dtype} scores, no classes.")
    names = sorted({value for split in splits.values() for value in split.unique(label_column)})
    number = {value: i for i, value in enumerate(names)}
    kind = ClassLabel(names=[str(value) for value in names])

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[int]]:
        return {label_column: [number[value] for value in rows[label_column]]}

    return DatasetDict(
        {
            name: split.map(encode, batched=True, features=Features({**split.features, label_column: kind}))
            for name, split in splits.items()
        }
    )


def limited(splits: DatasetDict, most_train: int | None, most_eval: int | None) -> DatasetDict:
    """At most so many rows of each split, drawn with a fixed seed; None keeps all."""

    def part(split: Any, most: int | None) -> Any:
        return split if most is None else split.shuffle(seed=0).select(range(min(most, len(split))))

    return DatasetDict(
        {name: part(split, most_train if name == "train" else most_eval) for name, split in splits.items()}
    )


def from_gguf(name: str, file: str) -> PreTrainedModel:
    """A decoder from a GGUF file, its weights as fp32 numbers; one that can be trained and saved like any other (needs gguf).

    Transformers reads such a file into full weights, and still takes the model for a quantized one, which the Trainer refuses.

    Args:
        name: folder or hub name. file: in it.

    Raises:
        ValueError: as `check_gguf`.
    """
    check_gguf(name, file)
    read = AutoModelForCausalLM.from_pretrained(name, gguf_file=file, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model


def check_gguf(name: str, file: str) -> None:
    """Look at a GGUF file before anything is made of it; one on the hub is not looked at.

    Raises:
        ImportError: gguf is not installed. ValueError: no such file in the folder, no GGUF file, or one of an architecture that
            transformers cannot read.
    """
    path = Path(name) / file
    if not Path(name).is_dir():
        return
    if not path.is_file():
        raise ValueError(f"--gguf_file {file}: {name} holds {[f.name for f in sorted(Path(name).glob('*.gguf'))]}.")
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files are read with gguf: pip install gguf") from error
    try:
        architecture = gguf.GGUFReader(path).fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is no GGUF file, or was cut off: {error}.") from error
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{path} holds a model of the architecture {architecture!r}, which transformers cannot read from GGUF; give its folder of "
            f"safetensors, or one of {', '.join(GGUF_SUPPORTED_ARCHITECTURES)}."
        )
