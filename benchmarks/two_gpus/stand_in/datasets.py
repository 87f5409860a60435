"""A stand-in for `datasets` on a machine that has none: as much of it as the text examples ask for, over lists.

The benchmark's own; its records say where it was used.
"""

# ruff: noqa: D101, D103 (as documented there)

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__version__ = "4.0.0"


class Value:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and type(other) is type(self) and other.dtype == self.dtype

    __hash__ = None  # type: ignore[assignment]


class ClassLabel(Value):
    def __init__(self, names: list[str]) -> None:
        super().__init__("int64")
        self.names, self.num_classes = names, len(names)


class Features(dict):
    """Column -> its kind."""


class Image(Value):
    def __init__(self) -> None:
        super().__init__("image")


class Array2D(Value):
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(dtype)
        self.shape = shape


class Dataset:
    """Rows as columns of lists."""

    def __init__(self, columns: dict[str, list[Any]], features: Features | None = None) -> None:
        self._columns = columns
        self.features = features or Features({name: _kind(values) for name, values in columns.items()})

    @classmethod
    def from_dict(cls, columns: dict[str, list[Any]], features: Features | None = None) -> Dataset:
        return cls(columns, features)

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        return [self[key] for key in keys]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def select(self, rows: Any) -> Dataset:
        rows = list(rows)
        return Dataset({n: [v[i] for i in rows] for n, v in self._columns.items()}, self.features)

    def shuffle(self, seed: int | None = None) -> Dataset:
        rows = list(range(len(self)))
        random.Random(seed).shuffle(rows)
        return self.select(rows)

    def train_test_split(self, test_size: float, seed: int | None = None) -> DatasetDict:
        shuffled = self.shuffle(seed)
        held = round(test_size * len(self))
        return DatasetDict(train=shuffled.select(range(held, len(self))), test=shuffled.select(range(held)))

    def unique(self, column: str) -> list[Any]:
        return list(dict.fromkeys(self._columns[column]))

    def filter(self, keep: Callable[[dict[str, Any]], Any]) -> Dataset:
        return self.select([i for i, row in enumerate(self) if keep(row)])

    def select_columns(self, names: list[str]) -> Dataset:
        return Dataset({n: self._columns[n] for n in names}, Features({n: self.features[n] for n in names}))

    def remove_columns(self, names: list[str]) -> Dataset:
        return self.select_columns([n for n in self._columns if n not in names])

    def rename_columns(self, names: dict[str, str]) -> Dataset:
        columns = {names.get(n, n): v for n, v in self._columns.items()}
        return Dataset(columns, Features({names.get(n, n): k for n, k in self.features.items()}))

    def rename_column(self, old: str, new: str) -> Dataset:
        return self.rename_columns({old: new})

    def map(
        self,
        function: Callable[[dict[str, list[Any]]], Any],
        batched: bool = False,
        batch_size: int = 1000,
        remove_columns: list[str] | None = None,
        features: Features | None = None,
        desc: str | None = None,
    ) -> Dataset:
        if not batched:
            raise NotImplementedError("only maps of batches")
        kept = {n: v for n, v in self._columns.items() if n not in (remove_columns or ())}
        made = {n: list(v) for n, v in dict(function(dict(self._columns))).items()}
        columns = {**({} if any(len(v) != len(self) for v in made.values()) else kept), **made}
        known = Features({n: self.features[n] for n in columns if n in self.features and n not in made})
        return Dataset(columns, features or Features({n: known.get(n) or _kind(v) for n, v in columns.items()}))


class IterableDataset:
    """There are none here."""


class DatasetDict(dict):
    """Split -> its rows; what is asked of it is asked of each."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("map", "filter", "select_columns", "remove_columns", "rename_column", "rename_columns"):
            raise AttributeError(name)
        return lambda *args, **kwargs: DatasetDict({k: getattr(v, name)(*args, **kwargs) for k, v in self.items()})


def load_dataset(kind: str, name: str | None = None, data_files: dict[str, str] | None = None, **_: Any) -> DatasetDict:
    if data_files is None:  # a folder
        data_files = {path.stem: str(path) for path in sorted(Path(kind).glob("*.csv"))}
        kind = "csv"
    read = {"csv": _read_csv, "text": _read_text}[kind]
    return DatasetDict({split: read(Path(path)) for split, path in data_files.items()})


def load_from_disk(path: str) -> DatasetDict:
    raise NotImplementedError(path)


def _read_csv(path: Path) -> Dataset:
    with open(path, encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    return Dataset({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def _read_text(path: Path) -> Dataset:
    return Dataset({"text": path.read_text("utf-8").split("\n")})


def _kind(values: list[Any]) -> Value:
    first = next(itertools.chain(values), None)
    return Value({str: "string", float: "float64"}.get(type(first), "int64"))
