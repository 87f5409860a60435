"""Tables of docs/fast-on-a-gpu.md, from records of `benchmarks.steps`."""

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
    "llama-8b-blocks": "Llama-8B shapes, 2 blocks alone, 4 x 1024",
}
FORMS = {
    "dense": "dense",
    "pairs": "pairs",
    "multiplied": "multiplied out",
    "uneven": "the same, ranks differ",
    "mlp": "pairs in the MLP alone",
    "lora": "LoRA, rank 16",
}
MODES = {
    "eager": "eager",
    "compiled": "compiled",
    "graphs": "CUDA graphs",
    "graphs-waiting": "CUDA graphs, Trainer waits",
    "blocks-graphs": "blocks as CUDA graphs",
    "step-graph": "a graph a step",
    "blocks-step-graph": "compiled blocks, a graph a step",
    "compiled-step-graph": "compiled, a graph a step",
    "autotuned-step-graph": "max-autotune, a graph a step",
    "max-autotune": "max-autotune",
    "max-autotune-no-cudagraphs": "max-autotune without graphs",
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


def ratios_table(records: Iterable[Record]) -> str:
    """One row a model and mode: a dense step, and those of pairs at each size and of LoRA as its shares. "" where there is none."""
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        variant, checkpointed, _ = r["variant"].partition(" checkpointed")
        rows.setdefault((NAMES[r["case"]] + (", checkpointed" if checkpointed else ""), r["mode"]), {})[variant] = r
    found = {variant for row in rows.values() for variant in row if variant.startswith("pairs ")}
    sizes = sorted(found, key=lambda variant: -float(variant.split()[1]))
    cells = [
        [
            name,
            MODES[mode],
            f"{row['dense']['ms']:.1f} ({row['dense']['gpu_ms']:.1f})",
            *(f"{row[v]['of_dense']:.2f} ({row[v]['gpu_ms']:.1f})" if v in row else "" for v in (*sizes, "lora")),
        ]
        for (name, mode), row in rows.items()
        if "dense" in row
    ]
    header = ["model", "mode", "dense, ms (GPU ms)", *(f"rank {size.split()[1]} (GPU ms)" for size in sizes)]
    header.append(f"{FORMS['lora']} (GPU ms)")
    return markdown_table(header, cells) if cells else ""
