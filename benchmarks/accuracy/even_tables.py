"""Table of what few distinct ranks cost: runs that go on from one dense model with even ranks and with free ones."""

from __future__ import annotations

from collections.abc import Sequence

from ..markdown import markdown_table
from .records import Record, grouped, show


def even_table(records: Sequence[Record]) -> str:
    """Size, distinct shapes, predicted and test figures of free ranks and even ones, of the seeds that have both; a row for each form."""
    rows = []
    forms = {(r["dataset"], r["budget"], r["seed"], r["even_ranks"]) for r in records}
    paired = [r for r in records if (r["dataset"], r["budget"], r["seed"], not r["even_ranks"]) in forms]
    by_form = grouped(paired, lambda r: (r["dataset"], r["budget"], r["even_ranks"]))
    for (dataset, budget, even), runs in by_form.items():
        size = "0.30" if budget is None else f"{budget:.2g}"
        rows.append(
            [
                f"{dataset}, {size}",
                "even" if even else "free",
                show([r["kept"] for r in runs], 3),
                "-".join(map(str, sorted({r["distinct_shapes"] for r in runs}))),
                show([r["predicted_loss_increase"] for r in runs], 4),
                show([100 * r["test_split"]["accuracy"] for r in runs], 2),
                show([r["test_split"]["loss"] for r in runs], 3),
                len(runs),
            ]
        )
    header = ["run", "ranks", "kept", "distinct shapes", "predicted rise", "test accuracy", "test loss", "seeds"]
    return markdown_table(header, rows)
