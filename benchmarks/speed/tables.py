"""The record as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..markdown import markdown_table


def tables(record: dict[str, Any]) -> Iterator[str]:
    """The record as Markdown, piece by piece."""
    e = record.get("environment") or {}
    yield (
        f"{e.get('device')}, {e.get('precision')}, {e.get('threads')} CPU threads, torch {e.get('torch')}, "
        f"transformers {e.get('transformers')}. Medians; in brackets the quartiles.\n"
    )
    peaks = next((job["peaks"] for job in record.get("layers", [])), None)
    yield steps_table(record["steps"], peaks)
    for job in record.get("layers", []):
        p = job["peaks"]
        yield (
            "One layer (or three of one input), forward and backward; measured peaks "
            f"{p['flops'] / 1e12:.2f} TFLOP/s, {p['bytes'] / 1e9:.0f} GB/s.\n"
        )
        yield layers_table(job["rows"])
    if record.get("tracking"):
        yield tracking_table(record["tracking"], record.get("switch", []))
    if record.get("switch"):
        yield switch_table(record["switch"])
        yield from switch_parts(record["switch"])
    yield from selections(record.get("select", []))
    for what in ("errors", "not_run"):
        if record.get(what):
            yield f"{what}: {record[what]}\n"


def steps_table(steps: list[dict[str, Any]], peaks: dict[str, float] | None) -> str:
    """A row for each variant in each setting, beside the dense one of the same wave."""
    dense = {(r["wave"], r["model"], r["mode"], r["batch"]): r for r in steps if r["variant"] == "dense"}
    rows = []
    for r in steps:
        base = dense.get((r["wave"], r["model"], r["mode"], r["batch"]))
        rows.append(
            (
                r["model"],
                r["mode"],
                r["batch"],
                r["variant"] + (f" 1/{1 / r['ratio']:g}" if r["ratio"] else ""),
                f"{r['parameters'] / 1e6:.1f}M",
                f"{r['ms']:.2f} ({r['q1']:.2f}-{r['q3']:.2f})",
                f"{r['ms'] / base['ms']:.2f}" if base else "",
                f"{r['ms'] / 1000 / _floor(r, peaks):.2f}" if peaks and "flops" in r else "",
                f"{r['gpu_ms']:.2f}" if "gpu_ms" in r else "",
                f"{r['kernels']:.0f}" if "kernels" in r else "",
                f"{r['peak_mb']:.0f}" if "peak_mb" in r else "",
            )
        )
    rows.sort(key=lambda row: (row[0], row[1].startswith("infer"), row[1], row[2]))
    header = ("model", "mode", "batch", "layers", "parameters", "ms", "/ dense", "/ floor")
    return _markdown((*header, "GPU ms", "kernels", "peak MiB"), rows)


def _floor(r: dict[str, Any], peaks: dict[str, float]) -> float:
    """Seconds that the step must take at the measured peaks."""
    return max(r["flops"] / peaks["flops"], r["parameter_bytes"] / peaks["bytes"])


def layers_table(rows: list[dict[str, Any]]) -> str:
    """A row for each way to run one layer, beside the dense one of the same size."""

    def place(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["in"], r["out"], r["count"], r["tokens"], r["weights"]

    dense = {place(r): r["ms"] for r in rows if r["rank"] is None}
    header = (
        "in x out",
        "layers",
        "tokens",
        "weights",
        "variant",
        "rank",
        "ms",
        "dense / it",
        "floor ms",
        "it / floor",
    )
    cells = [
        (
            f"{r['in']} x {r['out']}",
            r["count"],
            r["tokens"],
            r["weights"],
            r["variant"],
            r["rank"] or "",
            f"{r['ms']:.3f}",
            f"{dense[place(r)] / r['ms']:.2f}",
            f"{r['floor_ms']:.3f}",
            f"{r['ms'] / r['floor_ms']:.2f}",
        )
        for r in rows
    ]
    return _markdown(header, cells)


def tracking_table(checks: list[dict[str, Any]], switches: list[dict[str, Any]]) -> str:
    """What one check of all stable ranks costs, and a run's checks together, in dense steps."""
    steps = {j["model"]: j["step_ms"] for j in switches}
    header = ("model", "matrices", "cold ms", "warm ms", "svdvals ms", "largest relative error")
    rows = [
        (
            j["model"],
            j["matrices"],
            f"{j['cold_ms']:.1f}",
            f"{j['warm_ms']:.1f}",
            ", ".join(f"{where} {ms:.0f}" for where, ms in j["svdvals_ms"].items()),
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
    keys = ("step_ms", "gathering_step_ms", "low_rank_step_ms", "switch_ms")
    keys += ("step_peak_mb", "gathering_peak_mb", "switch_peak_mb", "low_rank_peak_mb")
    header = ("model", *(key.replace("_", " ") for key in keys))
    return _markdown(header, [(j["model"], *(f"{j[key]:.1f}" for key in keys)) for j in switches if "step_ms" in j])


def switch_parts(switches: list[dict[str, Any]]) -> Iterator[str]:
    """What the switch's time is made of."""
    for j in switches:
        for key in ("parts_ms", "pieces_ms"):
            if j.get(key):
                yield f"{j['model']}, {key}: " + ", ".join(f"{k} {v:.1f}" for k, v in j[key].items()) + "\n"


def selections(selects: list[dict[str, Any]]) -> Iterator[str]:
    """What measured selection chose, how long that took, and the step it led to."""
    for j in selects:
        for row in j.get("plans", []):
            times = [
                f"{key[:-3]} {row[key]['low_rank']:.2f} ms, dense {row[key]['dense']:.2f} ms"
                for key in row
                if key.endswith("_ms")
            ]
            yield (
                f"Measured selection, {j['model']} batch {j['batch']}, ratio {row['ratio']:g}, "
                f"{'compiled' if row['compiled'] else 'eager'}: {row['chosen']} of {row['planned']} layers chosen in "
                f"{row['seconds']:.2f} s. {'; '.join(times)}\n"
            )
            yield "\n".join(f"- {note}" for note in row["notes"]) + "\n"


def _markdown(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table without the columns that are empty."""
    used = [i for i in range(len(header)) if not rows or any(row[i] != "" for row in rows)]
    return markdown_table([header[i] for i in used], [[row[i] for i in used] for row in rows], rule="| --- ") + "\n"
