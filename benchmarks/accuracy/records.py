"""Numbers out of the records of runs, and how they are shown."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]

LABELS = {
    "dense": "full rank",
    "cuttlefish": "Cuttlefish (ours)",
    "former": "Cuttlefish, former defaults",
    "paper": "paper's rule",
    "paper_at_budget": "paper's stable ranks, scaled",
    "reference_bert": "reference code's BERT recipe",
    "pufferfish": "Pufferfish (fixed ratio)",
    "sifd": "spectral init + Frobenius decay",
    "svd_after": "SVD after 2/3",
    "whitened_after": "whitened SVD after 2/3",
    "lora": "LoRA (merged size)",
}


def score(record: Record, key: str = "accuracy") -> float:
    """Accuracy in percent (or the loss) on the test split, or on the validation split if that is all it may see."""
    value = (record["test_split"] or record["validation"])[key]
    return 100 * value if key == "accuracy" else value


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (nan for one value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def base_of(record: Record) -> tuple[Any, ...]:
    """What a run and the full-rank run that it is compared with have in common."""
    return record["dataset"], record["seed"], record["test"]


def paired(record: Record, dense: dict[Any, Record], key: str) -> float | None:
    """Difference from the full-rank run of the same data and seed."""
    base = dense.get(base_of(record))
    return None if base is None else score(record, key) - score(base, key)


def measured(record: Record) -> tuple[float, float] | None:
    """Increase of the loss at the switch, on the training split and on the validation split."""
    around = record["around_switch"]
    if not around["before"] or not around["after"]:
        return None
    train, validation = (around["after"][s]["loss"] - around["before"][s]["loss"] for s in ("train", "validation"))
    return train, validation


def show(values: Iterable[float | None], digits: int = 1, sign: bool = False) -> str:
    """Mean and standard error in figures; "" where nothing is known."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    mean, error = mean_and_error(known)
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records by their key."""
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def method_key(record: Record) -> tuple[str, float]:
    """What the records of a row have in common."""
    return record["method"], record["budget"] or 0.0
