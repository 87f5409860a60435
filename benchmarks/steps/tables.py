"""Tables of docs/fast-on-a-gpu.md, from records of `benchmarks.steps` and `benchmarks.end_to_end`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..markdown import markdown_table

NAMES = {
    "bert-base": "BERT-base, 32 x 128",
    "bert-large": "BERT-large shapes, 6 blocks, 64 x 128",
    "vit-large": "ViT-large shapes, 6 blocks, 64 images",
    "llama-1b": "Llama-1B shapes, 4 blocks, 8 x 1024",
    "llama-8b": "Llama-8B shapes, 2 blocks, 4 x 1024",
}
FORMS = {
    "dense": "dense",
    "pairs": "pairs",
    "multiplied": "multiplied out",
    "uneven": "the same, ranks differ",
    "mlp": "pairs in the MLP alone",
    "lora": "LoRA, rank 16",
}
Record = Mapping[str, Any]


def steps_table(records: Iterable[Record], modes: Sequence[str]) -> str:
    """One row a case and form: wall time of a step, the device's own, kernels, memory, and time to compile where there is any."""
    compiled = "graphs" in modes
    header = ["model", "layers", "ms", "/ dense", "GPU ms", "kernels", "peak MiB"]
    rows = []
    for r in records:
        form = FORMS.get(r["variant"].partition(" ")[0])  # prototypes are in the record alone
        if (
            r["mode"] not in modes
            or form is None
            or ("infer" in modes and form not in (FORMS["dense"], FORMS["pairs"]))
        ):
            continue
        batch = f", batch {r['rows']}" if r["mode"].startswith("infer") else ""
        batch += ", CUDA graph" if r["mode"] == "infer-graphs" else ""
        digits = 2 if r["ms"] < 5 else 1
        spread = f"{r['ms']:.{digits}f} ({r['quartiles'][0]:.{digits}f}-{r['quartiles'][1]:.{digits}f})"
        name = NAMES[r["case"]].rpartition(",")[0] if batch else NAMES[r["case"]]
        cells = [f"{name}{batch}", form, spread, f"{r['of_dense']:.2f}", f"{r['gpu_ms']:.1f}", f"{r['kernels']:.0f}"]
        rows.append([*cells, f"{r['peak_mib']:.0f}", *([f"{r['first_seconds']:.0f}"] if compiled else [])])
    return markdown_table([*header, *(["first steps, s"] if compiled else [])], rows)


def runs_table(records: Sequence[Record]) -> str:
    """One column a run through the Trainer, everything counted."""
    modes = {"eager": "eager", "graphs": "CUDA graphs"}
    rows: dict[str, list[str]] = {
        "a step before the switch, ms": [_number(r["ms_before"]) for r in records],
        "a step that gathers statistics, ms": [_number(r.get("ms_gathering")) for r in records],
        "a step after the switch, ms": [_number(r["ms_after"]) for r in records],
        "the switch, s": [_number((r["switch_seconds"] or {}).get("total")) for r in records],
        "whole run, s": [_number(r["seconds"]) for r in records],
        "peak memory, GiB": [f"{r['peak_memory'] / 2**30:.1f}" for r in records],
    }
    heads = [f"{'dense' if r['method'] == 'dense' else 'Cuttlefish'}, {modes[r['mode']]}" for r in records]
    lines = ["| | " + " | ".join(heads) + " |", "|" + " --- |" * (1 + len(records))]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
