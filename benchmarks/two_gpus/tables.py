"""Tables of docs/engines/measured.md, from the record of `benchmarks.two_gpus`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..markdown import markdown_table

Record = Mapping[str, Any]
NOT_EXAMPLES = ("scaling, 1 processes", "scaling, 2 processes", "llama fsdp2", "generate")
WHOLE = {
    "fsdp2 bf16, resumed": "fsdp2 bf16",
    "fsdp2 bf16 sharded, resumed": "fsdp2 bf16 sharded",
    "killed, resumed": "ddp bf16",
}
"""Runs that go on from a checkpoint, and the run that was not interrupted."""


def launches_table(record: Record) -> str:
    """One row a launch: where it switched, what it came to, and how it compares with a run that was not interrupted."""
    rows = []
    for name, run in record["runs"].items():
        if name in NOT_EXAMPLES:
            continue
        whole = WHOLE.get(name)
        apart = "" if whole is None else f"{_apart(run['losses'], record['runs'][whole]['losses']):.1g} from {whole}"
        rows.append([name, _number(run.get("switch_step")), _size(run), _score(run), apart or run.get("note", "")])
    return markdown_table(
        ["launch", "switch after step", "parameters", "test", "largest difference of a loss, or what happened"], rows
    )


def scaling_table(record: Record) -> str:
    """One row a model and size: a step on one GPU and on two, what is exchanged, and a step over slower links."""
    one, two = (record["runs"][f"scaling, {n} processes"]["scaling"] for n in (1, 2))
    rows = []
    for model, kept in two.items():
        for name, found in kept.items():
            links = found["step over a simulated link, by Gbit/s"]
            cells = [one[model][name]["step"], found["step"], found["all-reduce alone"], *links.values()]
            megabytes = f"{found['gradient bytes'] / 1e6:.0f}"
            rows.append([model, name, megabytes, *(f"{1000 * seconds:.{_digits(seconds)}f}" for seconds in cells)])
    links = [
        f"{g} Gbit/s, ms"
        for g in next(iter(next(iter(two.values())).values()))["step over a simulated link, by Gbit/s"]
    ]
    head = ["model", "blocks", "gradients, MB", "one GPU, ms", "two, ms", "all-reduce alone, ms", *links]
    return markdown_table(head, rows)


def llama_table(record: Record) -> str:
    """Llama-1B's shapes under FSDP2 on two GPUs, before the switch and after it."""
    found = record["runs"]["llama fsdp2"]["llama"]
    phases = (found["before"], found["after"])
    rows = [
        ["a step, ms", *(f"{1000 * p['step']:.0f}" for p in phases)],
        ["the switch, s", f"{phases[0]['switch']:.1f}", ""],
        ["peak memory a GPU, GiB", *(f"{p['peak bytes'] / 2**30:.1f}" for p in phases)],
    ]
    return markdown_table([f"{found['rows a GPU']} x {found['length']} tokens a GPU", "dense", "low rank"], rows)


def _apart(mine: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _size(run: Record) -> str:
    return f"{run['total_parameters'] / 1e6:.2f}M" if "total_parameters" in run else ""


def _score(run: Record) -> str:
    if "test_accuracy" in run:
        return f"{run['test_accuracy']:.1%}"
    return f"loss {run['test_loss']:.3f}" if "test_loss" in run else ""


def _digits(seconds: float) -> int:
    return 1 if seconds < 0.01 else 0
