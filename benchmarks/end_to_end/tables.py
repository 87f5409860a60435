"""Tables of docs/fast-on-a-gpu.md, from records of `benchmarks.end_to_end`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..markdown import markdown_table
from ..steps.tables import MODES
from .phases import SETTLE, compiling, computed, even_after, fixed, per_step, shared_compilation

NAMES = {
    "bert-base": "BERT-base",
    "bert-large": "BERT-large shapes",
    "vit-large": "ViT-large shapes",
    "llama-1b": "Llama-1B shapes",
}
DEFAULTS = {"bert-base": "32 x 128", "bert-base-questions": "32 questions of 6 to 48 tokens"}
METHODS = {"dense": "dense", "cuttlefish": "Cuttlefish", "speed": 'Cuttlefish, objective "speed"'}
RECIPES = ("step-graph", "blocks-step-graph", "blocks-graphs")
LENGTHS = (1000, 10000, 100000)
Record = Mapping[str, Any]


def runs_table(records: Sequence[Record]) -> str:
    """One column a run through the Trainer, everything counted."""
    rows: dict[str, list[str]] = {
        "a step before the switch, ms": [_number(r["ms_before"]) for r in records],
        "a step that gathers statistics, ms": [_number(r.get("ms_gathering")) for r in records],
        "a step after the switch, ms": [_number(r["ms_after"]) for r in records],
        "the switch, s": [_number((r["switch_seconds"] or {}).get("total")) for r in records],
        "whole run, s": [_number(r["seconds"]) + _length(r, records) for r in records],
        "peak memory, GiB": [f"{r['peak_memory'] / 2**30:.1f}" for r in records],
    }
    heads = [f"{'dense' if r['method'] == 'dense' else 'Cuttlefish'}, {_mode(r)}" for r in records]
    lines = ["| | " + " | ".join(heads) + " |", "|" + " --- |" * (1 + len(records))]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())])


def _length(r: Record, records: Sequence[Record]) -> str:
    """How many steps the run had, where it is not as long as the first one."""
    return "" if r["steps"] == records[0]["steps"] else f" ({_steps(r)})"


def _steps(r: Record) -> str:
    """How many steps there were, and of how many, where the run was broken off."""
    asked = r.get("steps_asked", r["steps"])
    return f"{r['steps']} steps" + (f" of {asked}" if asked != r["steps"] else "")


def unasked_table(records: Iterable[Record]) -> str:
    """One row a run as it is, with the dense runs of its call, and the same run with `cuda_graphs` off and on. "" where there is none."""
    groups: dict[tuple[Any, ...], dict[tuple[str, str], list[Record]]] = {}
    for r in records:
        run = groups.setdefault((r["case"], r["steps"], r["call"]), {})
        run.setdefault((r["method"], r["mode"].replace("eager-no-graphs", "no graphs")), []).append(r)
    rows = []
    for (_, steps, call), runs in groups.items():
        dense = [r for (method, mode), some in runs.items() if method == "dense" and mode != "step-graph" for r in some]
        (ours,) = runs["cuttlefish", "eager"]
        size = f"{ours['ratio']:.0%}" if ours["ratio"] else "as measured"
        ways = ("cuttlefish", "no graphs"), ("cuttlefish", "step-graph"), ("dense", "step-graph")
        others = [runs.get(way, [{}])[0].get("seconds") for way in ways]
        times = [_number(ours[name]) for name in ("ms_before", "ms_after")]
        whole = ", ".join(f"{r['seconds']:.1f}" for r in dense)
        rows.append(
            [
                f"{DEFAULTS[ours['case']]}, {steps} steps, {call}",
                size,
                whole,
                _number(ours["seconds"]),
                *map(_number, others),
                *times,
            ]
        )
    header = [
        "run",
        "kept",
        "dense, s",
        "ours, s",
        "cuda_graphs=False, s",
        "cuda_graphs=True, s",
        "dense with it, s",
        "before, ms",
        "after, ms",
    ]
    return markdown_table(header, rows) if rows else ""


def large_table(records: Iterable[Record]) -> str:
    """One row a run, everything counted; runs that failed are left out. "" where there is none."""
    rows = []
    runs = sorted(_whole(records), key=_order)
    cached = [min(pair, key=lambda r: compiling(r)[0]) for pair in _pairs(runs) if shared_compilation(*pair)]
    for r in runs:
        first, again = compiling(r)
        compiled = f"{first:.0f}" + (" (cached)" if r in cached else "")
        compiled += f" + {again:.0f}" if r["switch_step"] else ""
        switch = _number((r["switch_seconds"] or {}).get("total"))
        times = [_number(r[name]) for name in ("ms_before", "ms_gathering", "ms_after")]
        whole = f"{r['seconds']:.0f} ({_steps(r)})"
        rows.append([_name(r), METHODS[r["method"]], _mode(r), *times, compiled, switch, whole, _memory(r)])
    header = ["model", "layers", "mode", "before, ms", "gathering, ms", "after, ms", "compiling, s", "switch, s"]
    return markdown_table([*header, "whole run, s", "peak GiB"], rows) if rows else ""


def computed_table(records: Iterable[Record]) -> str:
    """What longer runs would take by those parts: dense / Cuttlefish, one row a model and modes. "" for none."""
    rows = []
    for dense, ours in _pairs(_whole(records)):
        even, first = even_after(dense, ours), shared_compilation(dense, ours)
        modes = f"{_mode(dense)} / {_mode(ours)}"
        row = [
            _name(ours),
            modes,
            f"{fixed(dense, first):.0f}",
            f"{fixed(ours, first):.0f}",
            "never" if even is None else f"{even:,}",
        ]
        rows.append([*row, *(f"{computed(dense, n, first) / computed(ours, n, first):.2f}" for n in LENGTHS)])
    header = ["model", "dense / Cuttlefish", "fixed, dense, s", "fixed, Cuttlefish, s", "as fast after, steps"]
    return markdown_table([*header, *(f"{n:,} steps" for n in LENGTHS)], rows) if rows else ""


def trial_table(records: Iterable[Record]) -> str:
    """One row a run with objective "speed": what it measured, and what it did. "" where there is none."""
    rows = []
    for r in records:
        if r["method"] == "speed" and "error" not in r:
            texts = " ; ".join([*r["notes"], *r["told"]])
            found = re.search(r"a step takes ([^;]* ms dense[^;\n]*)", texts)
            said = found.group(1).strip() if found else "not made"
            slow = [
                ms / 1000 for step, ms in r["slow_steps"] if step > SETTLE
            ]  # a trial that switches nothing is in its step
            took = _number((r["switch_seconds"] or {}).get("total") or max(slow, default=None))
            rows.append([_name(r), MODES[r["mode"]], said, _number(r["ms_before"]), _number(r["ms_after"]), took])
    header = [
        "model",
        "mode",
        "the trial, forward and backward",
        "a step before, ms",
        "after, ms",
        "trial and switch, s",
    ]
    return markdown_table(header, rows) if rows else ""


def _whole(records: Iterable[Record]) -> list[Record]:
    """Those that have parts, and came to low rank if they were to."""
    return [
        r
        for r in records
        if "phases" in r and (r["method"] == "dense" or (r["method"] == "cuttlefish" and r["switch_step"]))
    ]


def _pairs(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """(dense, ours) of the same model: dense in the same mode, and as it runs without a setting."""
    runs = sorted(records, key=_order)
    dense = [r for r in runs if r["method"] == "dense"]
    ours = [r for r in runs if r["method"] != "dense"]
    found = [(d, r) for r in ours for d in dense if _is_pair(d, r)]
    # Hosts differ: an eager run of the same call is the one to compare with, where there is one.
    with_own = {id(r) for d, r in found if d["mode"] == "eager" and d.get("call") and d["call"] == r.get("call")}
    return [
        (d, r)
        for d, r in found
        if d["mode"] != "eager" or d.get("call") == (r.get("call") if id(r) in with_own else None)
    ]


def _is_pair(dense: Record, ours: Record) -> bool:
    model = all(dense[name] == ours[name] for name in ("case", "blocks"))
    alike = all(dense.get(name) == ours.get(name) for name in ("mode", "steps_asked", "loader_workers"))
    return model and (alike or dense["mode"] == "eager")


def _mode(r: Record) -> str:
    workers = r.get("loader_workers") if r["case"] != "vit-large" else 0
    return MODES[r["mode"]] + (f", {workers} loader workers" if workers else "")


def shares_table(records: Iterable[Record]) -> str:
    """What a step takes through Trainer, without it, and the device alone: dense, ours, and ours / dense. "" for none."""
    rows = []
    for dense, ours in _pairs(_whole(records)):
        if "bare_ms" not in dense or "bare_ms" not in ours:
            continue
        times = [(1000 * per_step(dense, "before"), 1000 * per_step(ours, "after"))]
        times += [(dense[name], ours[name]) for name in ("bare_ms", "gpu_ms")]
        rows.append([_name(ours), _mode(ours), *(f"{a:.1f}, {b:.1f} ({b / a:.2f})" for a, b in times)])
    header = ["model", "mode", "through Trainer, mean", "without Trainer", "the device alone"]
    return markdown_table(header, rows) if rows else ""


def host_parts_table(records: Iterable[Record]) -> str:
    """Milliseconds that the host needs for each part of a step, and microseconds for each parameter tensor. "" for none."""
    rows = []
    for r in sorted((r for r in records if "host_parts" in r), key=_order):
        parts = r["host_parts"]
        rest = parts["train"] + parts["count"]
        own = [parts[name] for name in ("forward", "backward", "clip", "optimizer", "zero_grad")]
        total = sum(parts.values())
        each = f"{1000 * total / r['tensors']:.0f}"
        layers = METHODS[r["method"]] + ("" if r["method"] == "dense" else ", after")
        cells = [_name(r), layers, _mode(r), str(r["tensors"]), *(f"{ms:.1f}" for ms in (*own, rest, total))]
        rows.append([*cells, each, f"{r['gpu_ms']:.1f}"])
    header = ["model", "layers", "mode", "tensors", "forward", "backward", "clipping", "optimizer", "zero_grad"]
    return markdown_table([*header, "Trainer", "all", "us a tensor", "the device"], rows) if rows else ""


def gain_table(records: Iterable[Record]) -> str:
    """What the recipe gives: a step before and after, and when a run ends first; one row a model and mode. "" for none."""
    rows = []
    for dense, ours in _pairs(_whole(records)):
        if dense["mode"] != ours["mode"] or dense["mode"] not in RECIPES:
            continue
        even, first = even_after(dense, ours), shared_compilation(dense, ours)
        after = f"{ours['ms_after']:.0f} (mean {1000 * per_step(ours, 'after'):.0f})"
        longer = f"{computed(dense, 10000, first) / computed(ours, 10000, first):.2f}"
        ends = "never" if even is None else f"{even:,}"
        rows.append([_name(ours), _mode(ours), f"{dense['ms_before']:.0f}", after, ends, longer])
    header = [
        "model",
        "mode",
        "a step, dense, ms",
        "after the switch, ms",
        "ends first, from",
        "dense / ours, 10,000 steps",
    ]
    return markdown_table(header, sorted(rows, key=lambda row: -float(row[-1]))) if rows else ""


def _order(r: Record) -> tuple[Any, ...]:
    by_name = [list(known).index(r[name]) for name, known in (("case", NAMES), ("mode", MODES), ("method", METHODS))]
    return by_name[0], by_name[1], r.get("loader_workers", 0), by_name[2], r.get("call", "")


def _name(r: Record) -> str:
    blocks = "" if r["blocks"] == r["of_blocks"] else f", {r['blocks']} of {r['of_blocks']} blocks"
    batch = f"{r['rows']} x {r['length']}" if r["length"] else f"{r['rows']} images"
    return f"{NAMES[r['case']]}{blocks}, {batch}"


def _memory(r: Record) -> str:
    return "" if r["peak_memory"] is None else f"{r['peak_memory'] / 2**30:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
