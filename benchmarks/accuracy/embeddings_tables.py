"""Table of the suite "embeddings": size of the whole model against accuracy, with the vocabulary cut and without."""

from __future__ import annotations

from collections.abc import Sequence

from ..markdown import markdown_table
from .records import Record, grouped, mean_and_error, score, show

TEXTS = {
    "trec_whole": "TREC",
    "movie_snippets_whole": "movie snippets",
    "reuters_r8_whole": "Reuters R8",
    "movie_snippets_short": "movie snippets, 1,024 rows",
    "reuters_r8_short": "Reuters R8, 640 rows of 40 tokens",
}


def vocabulary_table(records: Sequence[Record]) -> str:
    """Share of the whole model's parameters, rank of the table and test accuracy; a row for each form, set and device."""
    rows = []
    order = sorted(records, key=lambda r: (list(TEXTS).index(r["dataset"]), -r["parameters"]["after"]["model"]))
    for (dataset, what, device), runs in grouped(order, lambda r: (r["dataset"], form_of(r), device_of(r))).items():
        sizes = [r["parameters"]["after"]["model"] / r["parameters"]["before"]["model"] for r in runs]
        ranks = sorted({rank for r in runs if (rank := table_rank(r))})
        accuracy = show([score(r) for r in runs]) + (f" (n {len(runs)})" if len(runs) != 3 else "")
        rows.append(
            [
                TEXTS[dataset],
                what,
                f"{mean_and_error(sizes)[0]:.0%}",
                ", ".join(map(str, ranks)),
                accuracy,
                device,
            ]
        )
    return markdown_table(["data", "run", "whole model", "rank of the table", "test accuracy", "device"], rows)


def form_of(record: Record) -> str:
    """What was cut, and the size asked for."""
    if record["method"] == "dense":
        return "dense"
    size = "at a bound of a tenth" if record["budget"] is None else f"{record['budget']:.2g} of the targets"
    return f"{'blocks and vocabulary' if record['options'].get('embeddings') else 'blocks'}, {size}"


def device_of(record: Record) -> str:
    """GPU (bf16) or CPU (fp32)."""
    return "CPU, fp32" if record["device"] == "CPU" else "H100, bf16"


def table_rank(record: Record) -> int | None:
    """Rank of the table of tokens; None where it is dense."""
    ranks = record["method_notes"].get("ranks") or {}
    return next((rank for name, rank in ranks.items() if name.endswith("word_embeddings")), None)
