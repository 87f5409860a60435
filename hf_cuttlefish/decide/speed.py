"""Is low rank faster here? Keep dense what would not make a training step faster.

Groups of layers are timed alone and predict which mix is the quickest; whole steps of a few candidates decide. The paper measures, on the device, which layer stacks get faster (arXiv 2305.02538, section 3.4; its K). Here the unit is
what runs together: layers that read one tensor (q, k and v; gate and up), found by what flows and not by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..measure.shapes import FlowRecorder, StepTime
from ..measure.timing import GroupTiming, Timer, measure_groups, table, time_group
from ..measure.whole_steps import Candidate, UnableError
from .plan import RankPlan

MIN_SPEEDUP = 1.05
"""Default of `min_speedup`: a margin for noise, not yet fitted to measurements on a GPU (docs/speed.md); the paper took 1.5."""

PAPER_RULES = ("paper", "scaled_stable_rank")
"""Under these layers timed alone decide, as in the paper: its 1.5 is asked of layers, and no whole step would come to it."""


@dataclass(frozen=True)
class Selection:
    """What `choose` found.

    Attributes:
        rows: every group. faster: names of the layers to factorize.
        reason: why nothing is to be switched, or "". predicted: step after / before, as far as the groups tell, or None.
    """

    rows: tuple[GroupTiming, ...]
    faster: frozenset[str]
    reason: str = ""
    predicted: float | None = None
    notes: tuple[str, ...] = field(default=())


def choose(rows: Sequence[GroupTiming], step: StepTime | None = None, min_speedup: float = MIN_SPEEDUP) -> Selection:
    """Which groups make a step faster when factorized (a pure function).

    Args:
        rows: the measured groups.
        step: time of a whole step, where host and device both matter (a GPU, not compiled); None: only the device counts.
        min_speedup: a group that is not so much faster on the device stays dense.
    """
    if not rows:
        return Selection((), frozenset(), "no layer that is to be factorized was seen to run")
    quick = [row for row in rows if row.speedup >= min_speedup]
    slow = len(rows) - len(quick)
    if not quick:
        return Selection(
            tuple(rows), frozenset(), f"no group of layers is {min_speedup:g} times faster at its planned ranks"
        )
    if step is None:
        saved = sum((row.dense.device_ms - row.low_rank.device_ms) * row.group.calls for row in quick)
        notes = (f"measured: {saved:.3g} ms a step saved on the device, {slow} of {len(rows)} groups stay dense",)
        return Selection(tuple(rows), _names(quick), notes=notes)
    # The step lasts as long as the busier of the two. Take first what saves most of the device for what it costs the host.
    gain = {id(row): (row.dense.device_ms - row.low_rank.device_ms) * row.group.calls for row in quick}
    cost = {id(row): (row.low_rank.host_ms - row.dense.host_ms) * row.group.calls for row in quick}
    order = sorted(quick, key=lambda row: gain[id(row)] / max(cost[id(row)], 1e-6), reverse=True)
    best, best_count, host, total = step.total_ms, 0, step.host_ms, step.total_ms
    for count, row in enumerate(order, 1):
        host, total = host + cost[id(row)], total - gain[id(row)]
        after = max(host, total)
        if after < best:
            best, best_count = after, count
    if step.total_ms / best < min_speedup:
        return Selection(
            tuple(rows),
            frozenset(),
            f"a step takes {step.total_ms:.1f} ms, in {step.host_ms:.1f} of which the host launches kernels: pairs launch "
            f"more, and at best a step would take {best:.1f} ms (torch.compile, larger batches or larger layers change that)",
        )
    notes = (f"measured: a step of {step.total_ms:.1f} ms is predicted to take {best:.1f} ms",)
    return Selection(tuple(rows), _names(order[:best_count]), predicted=best / step.total_ms, notes=notes)


class Trial(Protocol):
    """Measures whole steps (milliseconds) with candidates in the places of the layers; raises UnableError where it cannot."""

    @property
    def multiplies(self) -> bool: ...
    def __call__(self, plan: RankPlan, candidates: Sequence[Candidate]) -> dict[Candidate, float]: ...


def candidates_for(planned: frozenset[str], faster: frozenset[str], multiplies: bool = False) -> list[Candidate]:
    """What is worth whole steps: the dense model, all pairs of the plan, and the mix that the groups predict, if it differs.

    Args:
        planned: layers of the plan. faster: those that `choose` would factorize.
        multiplies: whether the run will try its pairs multiplied out.
    """
    found = [Candidate("dense"), Candidate("as planned", planned)]
    if multiplies:
        found.append(Candidate("as planned and multiplied out", planned, multiplied=True))
    mix = faster & planned
    if mix and mix != planned:
        found.append(Candidate(f"with {len(planned) - len(mix)} of {len(planned)} layers dense", mix))
    return found


def quickest(times: Mapping[Candidate, float], min_speedup: float = MIN_SPEEDUP) -> Candidate:
    """The candidate with the shortest step, or the dense one where that is not `min_speedup` times faster (a pure function).

    Args:
        times: milliseconds of a whole step of each, the dense model among them.
    """
    dense = next(candidate for candidate in times if not candidate.layers)
    best = min(times, key=lambda candidate: times[candidate])
    return best if times[dense] >= min_speedup * times[best] else dense


def keep_faster(
    plan: RankPlan,
    flow: FlowRecorder,
    min_speedup: float = MIN_SPEEDUP,
    timer: Timer = time_group,
    trial: Trial | None = None,
) -> RankPlan:
    """The plan without the layers that would not make a step faster; the notes hold the tables, or why nothing is left.

    Groups of layers are timed, and predict a mix. Then whole steps decide: of the dense model, of the plan, of the mix. Without
    a trial, or where it cannot run, the prediction does; layers that have not been seen to run stay dense then.
    """
    rows = measure_groups(flow.groups(), plan, bool(flow.compiled), timer)
    found = choose(rows, flow.step_time, min_speedup)
    kept, reason, notes, tried = found.faster, found.reason, [*found.notes], False
    if trial is not None and plan:
        candidates = candidates_for(frozenset(plan), found.faster, trial.multiplies)
        try:
            times = trial(plan, candidates)
        except UnableError as error:
            notes.insert(0, f"whole steps were not measured, and groups of layers decide: {error}")
        else:
            best, tried = quickest(times, min_speedup), True
            told = _told(times)
            kept = best.layers
            notes = [*notes, *([reason] if reason else [])]
            notes = [told, *notes] if kept else [f"by groups of layers alone: {note}" for note in notes]
            reason = "" if kept else f"{told}; nothing is {min_speedup:g} times faster than dense"
    speedups = {name: f"{row.speedup:.2f}" for row in rows for name in row.group.layers}
    decisions = {}
    for name, d in plan.decisions.items():
        if d.rank is not None and name not in kept:
            alone = f"{speedups[name]} times as fast alone" if name in speedups else "never seen to run"
            why = f"rank {d.rank} makes no whole step faster, and is {alone}" if tried else f"rank {d.rank}: {alone}"
            d = replace(d, rank=None, reason=why, predicted_loss_increase=0.0)
        decisions[name] = d
    notes = [*plan.notes, *notes, *table(rows), *([reason] if reason else [])]
    known = [d.predicted_loss_increase for d in decisions.values()]
    total = None if plan.predicted_loss_increase is None else sum(v or 0.0 for v in known)
    return RankPlan(decisions, plan.rule, notes, total)


def _told(times: Mapping[Candidate, float]) -> str:
    return "a step takes " + ", ".join(f"{ms:.3g} ms {candidate.words}" for candidate, ms in times.items())


def _names(rows: Iterable[GroupTiming]) -> frozenset[str]:
    return frozenset(
        name for row in rows for name, rank in zip(row.group.layers, row.ranks, strict=True) if rank is not None
    )
