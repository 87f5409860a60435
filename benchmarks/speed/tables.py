"""The record as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..markdown import markdown_table

SHOWN = ("dense", "pairs", "sequential", "mlp", "lora")
"""Variants in the table of steps; prototypes are in the record alone."""


def tables(record: dict[str, Any]) -> Iterator[str]:
    """The record as Markdown, piece by piece."""
    e = record.get("environment") or {}
    yield (
        f"{e.get('device')}, {e.get('precision')}, {e.get('threads')} CPU threads, torch {e.get('torch')}, "
        f"transformers {e.get('transformers')}. Medians; in brackets the quartiles.\n"
    )
    yield steps_table(record["steps"])
    for job in record.get("layers", []):
        p = job["peaks"]
        yield (
            "One layer (or three of one input), forward and backward. Columns: rank as a share of the smaller side. Floor: by the "
            f"measured peaks of {p['flops'] / 1e12:.2f} TFLOP/s and {p['bytes'] / 1e9:.0f} GB/s.\n"
        )
        yield layers_table(job["rows"])
    if record.get("tracking"):
        yield "Checks of the stable ranks of all layers:\n"
        yield tracking_table(record["tracking"], record.get("switch", []))
    if record.get("switch"):
        yield "Around the switch:\n"
        yield switch_table(record["switch"])
    if record.get("select"):
        yield '`objective="speed"`:\n'
        yield selections_table(record["select"])
    if record.get("not_run"):
        yield "Not run:\n\n" + "\n".join(f"- {name}" for name in record["not_run"]) + "\n"


def steps_table(steps: list[dict[str, Any]]) -> str:
    """A row for each variant in each setting, beside the dense one of the same wave."""
    dense = {(r["wave"], r["model"], r["mode"], r["batch"]): r for r in steps if r["variant"] == "dense"}
    rows = []
    for r in steps:
        base = dense.get((r["wave"], r["model"], r["mode"], r["batch"]))
        if r["variant"] not in SHOWN:
            continue
        rows.append(
            (
                r["model"],
                r["mode"],
                r["batch"],
                r["variant"] + (f" 1/{1 / r['ratio']:g}" if r["ratio"] else ""),
                f"{r['ms']:.2f} ({r['q1']:.2f}-{r['q3']:.2f})",
                f"{r['ms'] / base['ms']:.2f}" if base else "",
                f"{r['gpu_ms']:.2f}" if "gpu_ms" in r else "",
                f"{r['kernels']:.0f}" if "kernels" in r else "",
                f"{r['peak_mb']:.0f}" if "peak_mb" in r else "",
            )
        )
    rows.sort(key=lambda row: (row[0], row[1].startswith("infer"), row[1], row[2]))
    header = ("model", "mode", "batch", "layers", "ms", "/ dense", "GPU ms", "kernels", "peak MiB")
    return _markdown(header, rows)


def layers_table(rows: list[dict[str, Any]]) -> str:
    """A row for each size of layer: the pair's time over the dense one's at three ranks, and over its floor at a quarter."""
    cells = []
    for (width, out, count, tokens, weights), found in _grouped(
        rows, "in", "out", "count", "tokens", "weights"
    ).items():
        dense = next(r for r in found if r["rank"] is None)
        pairs = {r["rank"] / min(width, out): r for r in found if r["variant"] == "pairs"}
        times = [f"{pairs[share]['ms'] / dense['ms']:.2f}" if share in pairs else "" for share in (1 / 8, 1 / 4, 1 / 2)]
        floors = [f"{r['ms'] / r['floor_ms']:.2f}" if r else "" for r in (dense, pairs.get(1 / 4))]
        cells.append((f"{width} x {out}", count, tokens, weights, f"{dense['ms']:.3g}", *times, *floors))
    header = (
        "in x out",
        "layers",
        "tokens",
        "weights",
        "dense ms",
        "1/8",
        "1/4",
        "1/2",
        "dense / floor",
        "1/4 / floor",
    )
    return _markdown(header, cells)


def _grouped(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by the values under these keys."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def tracking_table(checks: list[dict[str, Any]], switches: list[dict[str, Any]]) -> str:
    """What one check of all stable ranks costs, and a run's checks together, in dense steps."""
    steps = {j["model"]: j["step_ms"] for j in switches}
    header = ("model", "matrices", "first check ms", "later ms", "largest relative error")
    rows = [
        (
            j["model"],
            j["matrices"],
            f"{j['cold_ms']:.1f}",
            f"{j['warm_ms']:.1f}",
            f"{j['largest_relative_error']:.1e}",
            # 30% of 30 checks come before the switch, the first of them cold.
            f"{(j['cold_ms'] + 9 * j['warm_ms']) / steps[j['model']]:.2f}" if j["model"] in steps else "",
        )
        for j in checks
        if "cold_ms" in j
    ]
    return _markdown((*header, "dense steps that a run's checks cost"), rows)


def switch_table(switches: list[dict[str, Any]]) -> str:
    """Time and memory of steps before, at and after the switch."""
    keys = ("step_ms", "gathering_step_ms", "low_rank_step_ms", "switch_ms", "step_peak_mb", "gathering_peak_mb")
    header = ("model", *(key.replace("_", " ").replace(" mb", " MiB") for key in keys))
    return _markdown(header, [(j["model"], *(f"{j[key]:.0f}" for key in keys)) for j in switches if "step_ms" in j])


def selections_table(selects: list[dict[str, Any]]) -> str:
    """What measured selection chose, how long that took, and how many times faster each group of layers is as pairs."""
    rows = []
    for j in selects:
        for row in j.get("plans", []):
            gains = [GAIN.search(note) for note in row["notes"]]
            step = row.get("all_ms")
            rows.append(
                (
                    j["model"],
                    j["batch"],
                    f"{row['ratio']:g}",
                    "compiled" if row["compiled"] else "eager",
                    f"{row['chosen']} of {row['planned']}",
                    f"{row['seconds']:.1f}",
                    ", ".join(f"{gain[1]} {gain[2]}" for gain in gains if gain),
                    f"{step['low_rank'] / step['dense']:.2f}" if step else "",
                )
            )
    header = (
        "model",
        "batch",
        "kept",
        "runs",
        "layers chosen",
        "s",
        "gain on the device",
        "step, all as pairs / dense",
    )
    return _markdown(header, rows)


GAIN = re.compile(r"^\d+ x (\S+) \(.*?, ([\d.]+)x")
"""Name of a group of layers and its gain, in a note of measured selection."""


def _markdown(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table without the columns that are empty."""
    used = [i for i in range(len(header)) if not rows or any(row[i] != "" for row in rows)]
    return markdown_table([header[i] for i in used], [[row[i] for i in used] for row in rows], rule="| --- ") + "\n"
