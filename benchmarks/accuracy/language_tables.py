"""Tables of the suite "language": perplexity by size, and how much of a cut's damage the rest of a run repairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..markdown import markdown_table
from .records import Record, grouped, mean_and_error, measured, show

TEXTS = {"dialogs": "film dialogs", "snippets": "reviews and editorials"}
CONTROL = "whitened SVD after 2/3"
Column = tuple[str, float]
"""Method and size."""


def perplexity_table(records: Sequence[Record]) -> str:
    """Perplexity on the test split, and how far it lies above dense; a row for each text and learning rate."""
    columns = sorted({column_of(r) for r in records if r["method"] != "dense"}, key=lambda c: (c[0] == CONTROL, -c[1]))
    rows = []
    for cell, runs in grouped(records, cell_of).items():
        dense = {r["seed"]: r["test_split"]["loss"] for r in runs if r["method"] == "dense"}
        row = [*cell, f"{_perplexity(list(dense.values())):.1f}"]
        for column in columns:
            losses = {r["seed"]: r["test_split"]["loss"] for r in runs if column_of(r) == column}
            gaps = [losses[seed] - dense[seed] for seed in losses if seed in dense]
            more = 100 * (math.exp(mean_and_error(gaps)[0]) - 1) if gaps else math.nan
            row.append(f"{_perplexity(list(losses.values())):.1f} ({more:+.1f}%)" if losses else "")
        rows.append(row)
    names = [f"{size:.2g} kept" if method != CONTROL else f"{CONTROL}, {size:.2g}" for method, size in columns]
    return markdown_table(["text", "learning rate", "dense", *names], rows)


def repair_table(records: Sequence[Record]) -> str:
    """What a cut adds to the validation loss at the switch, what is left of it at the end (nats a token), and how much came back."""
    dense = {(cell_of(r), r["seed"]): r["validation"]["loss"] for r in records if r["method"] == "dense"}
    ours = [r for r in records if r["method"] == "cuttlefish"]
    sizes = sorted({column_of(r)[1] for r in ours}, reverse=True)

    def change(runs: Sequence[Record]) -> str:
        rises = [both[1] for r in runs if (both := measured(r)) is not None]
        if not rises:
            return ""
        rise = mean_and_error(rises)[0]
        gap = mean_and_error([r["validation"]["loss"] - dense[cell_of(r), r["seed"]] for r in runs])[0]
        return f"{rise:.3f}, {gap:.3f} ({1 - gap / rise:.0%})"

    rows = [
        [*cell, *(change([r for r in runs if column_of(r)[1] == size]) for size in sizes)]
        for cell, runs in grouped(ours, cell_of).items()
    ]
    return markdown_table(["text", "learning rate", *(f"{size:.2g} kept" for size in sizes)], rows)


def cell_of(record: Record) -> tuple[str, str]:
    """Text and learning rate."""
    text = next(label for name, label in TEXTS.items() if name in record["dataset"])
    return text, f"{record['task']['learning_rate']:.0e}".replace("e-0", "e-")


def default_table(runs: Sequence[Record], records: Sequence[Record]) -> str:
    """What the default kept and came to, by text and learning rate; against the dense run of `records`, which is of one seed."""
    dense = {cell_of(r): r["test_split"]["loss"] for r in records if r["method"] == "dense"}
    rows = []
    for cell, found in grouped(runs, cell_of).items():
        kept = ", ".join("dense" if r["kept"] == 1 else f"{r['kept']:.2g}" for r in found)
        more = [100 * (math.exp(r["test_split"]["loss"] - dense[cell]) - 1) for r in found]
        rows.append([*cell, kept, f"{math.exp(dense[cell]):.1f}", show(more, 1, sign=True) + "%"])
    return markdown_table(["text", "learning rate", "kept", "dense", "above dense"], rows)


def column_of(record: Record) -> Column:
    """Method and the size that came of it."""
    method = CONTROL if record["method"] == "ablation" else record["method"]
    return method, round(record["kept"], 2)


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(mean_and_error(losses)[0])


def chats_table(record: Mapping[str, Any]) -> str:
    """What `examples/sft.py --method both` has measured: a column each; LoRA and an answer below."""
    dense, ours = record["runs"]
    lines = [
        ["test perplexity", *(f"{run['test_perplexity']:.2f}" for run in (dense, ours))],
        ["after LoRA on the factors", "", f"{ours['lora']['perplexity_after']:.2f}"],
        [
            "parameters of the blocks",
            f"{dense['encoder_parameters']:,}",
            f"{ours['encoder_parameters']:,} ({ours['encoder_parameters'] / dense['encoder_parameters']:.0%})",
        ],
        [
            "saved folder, MB",
            f"{dense['saved_bytes'] / 1e6:.1f}",
            f"{ours['saved_bytes'] / 1e6:.1f} ({ours['saved_bytes'] / dense['saved_bytes']:.0%})",
        ],
        ["switch", "", f"step {ours['switch_step']} of {ours['train_steps']}"],
        [f'"{dense["generated"][1]["prompt"]}"', *(f'"{run["generated"][1]["after"]}"' for run in (dense, ours))],
    ]
    return markdown_table(["", "dense", "Cuttlefish"], lines)
