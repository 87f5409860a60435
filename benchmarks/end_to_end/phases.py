"""Where the seconds of a run went, and what a longer run would take by them: numbers only."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hf_cuttlefish.config import CuttlefishConfig
from hf_cuttlefish.decide.schedule import Schedule

SETTLE = 8
"""Steps after the start and after the switch in which something is compiled, captured or warmed up."""
Record = Mapping[str, Any]


def split(
    ends: Sequence[float], gathers: Sequence[bool], seconds: float, switch_step: int | None, switch_seconds: float
) -> dict[str, dict[str, float]]:
    """Phase -> its steps and seconds. All seconds of the run are in one of them.

    `start` and `restart` are the first `SETTLE` steps of the run and after the switch, with all that comes before them;
    `end` is what comes after the last step.

    Args:
        ends: seconds since the run's start at which each step ended. gathers: whether the next step gathers, for each step.
        seconds: of the whole run. switch_step: after which the switch came, or None. switch_seconds: that it took.
    """
    names = ("start", "before", "gathering", "switch", "restart", "after", "end")
    phases = {name: {"steps": 0, "seconds": 0.0} for name in names}
    switched = switch_step or len(ends)
    for step, took in enumerate((b - a for a, b in itertools.pairwise([0.0, *ends])), start=1):
        if step > switched:
            name = "restart" if step <= switched + SETTLE else "after"
        elif step <= SETTLE:
            name = "start"
        else:
            name = "gathering" if gathers[step - 2] else "before"
        phases[name]["steps"] += 1
        phases[name]["seconds"] += took - (switch_seconds if step == switch_step else 0.0)
    phases["switch"]["seconds"] = switch_seconds if switch_step else 0.0
    phases["end"]["seconds"] = seconds - (ends[-1] if ends else 0.0)
    return phases


def per_step(record: Record, phase: str) -> float:
    """Mean seconds of a step of one phase; 0 where it has none."""
    found = record["phases"][phase]
    return found["seconds"] / found["steps"] if found["steps"] else 0.0


def ordinary(record: Record) -> tuple[float, float]:
    """Seconds of a step before the switch in which nothing is measured, and what measuring took in all of them together.

    A run checks the stable ranks 30 times however long it is, and samples the weights about as often: seconds that do not grow.
    """
    before = record["phases"]["before"]
    usual = per_step(record, "before")
    if record["switch_step"] is None or "ms" not in record:
        return usual, 0.0
    schedule = Schedule(CuttlefishConfig(), record["steps_asked"])
    steps = range(SETTLE + 1, record["switch_step"] - record["gathering_steps"] + 1)
    seconds = dict(enumerate((float(ms) / 1000 for ms in record["ms"].split()), start=2))
    plain = [seconds[n] for n in steps if not schedule.is_check(n) and n % schedule.stretch]
    if not plain or schedule.stretch == 1:
        return usual, 0.0
    usual = statistics.fmean(plain)
    return usual, before["seconds"] - before["steps"] * usual


def compiling(record: Record) -> tuple[float, float]:
    """Seconds that the first steps and those after the switch took beyond ordinary ones: compilation, capture, warm-up."""
    first, again = record["phases"]["start"], record["phases"]["restart"]
    return (
        first["seconds"] - first["steps"] * ordinary(record)[0],
        again["seconds"] - again["steps"] * per_step(record, "after"),
    )


def fixed(record: Record, first: float | None = None) -> float:
    """Seconds that do not grow with the run: compilation twice, the switch, what comes after the last step.

    Args:
        first: of the first compilation, where the record's own found its code in a cache that another run had filled.
    """
    own, again = compiling(record)
    compiled = (own if first is None else first) + again
    return compiled + record["phases"]["switch"]["seconds"] + record["phases"]["end"]["seconds"]


def computed(record: Record, steps: int, first: float | None = None) -> float:
    """Seconds that a run of so many steps would take: fixed seconds + what measuring took + steps of each kind x what one took.

    It switches at the same share of the run, and gathers for as many steps as the schedule of such a run says. At the record's
    own number of steps it is what was measured, but for what scheduling rounds. `first` is as in `fixed`.
    """
    if record["switch_step"] is None:
        return fixed(record, first) + steps * per_step(record, "before")
    schedule = Schedule(CuttlefishConfig(), steps)
    schedule.statistics_needed = record["statistics_needed"]
    switched = round(steps * record["switch_step"] / record["steps_asked"])
    gathered = min(schedule.statistics_steps, switched)
    usual, measuring = ordinary(record)
    return (
        fixed(record, first)
        + measuring
        + (switched - gathered) * usual
        + gathered * per_step(record, "gathering")
        + (steps - switched) * per_step(record, "after")
    )


def even_after(dense: Record, ours: Record, most: int = 1_000_000) -> int | None:
    """The shortest run, in hundreds of steps, that ours would end first; None: none up to `most`."""
    first = shared_compilation(dense, ours)
    steps = range(100, most + 1, 100)
    return next((n for n in steps if computed(ours, n, first) < computed(dense, n, first)), None)


def shared_compilation(dense: Record, ours: Record) -> float | None:
    """Seconds to compile the dense model, which both pay, where one found the code that the other had made; else None."""
    shared = "shared" in (dense.get("cache"), ours.get("cache")) and dense["mode"] == ours["mode"]
    return max(compiling(dense)[0], compiling(ours)[0]) if shared else None
