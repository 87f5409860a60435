"""What whole steps decide: numbers in, a plan out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_cuttlefish.decide.plan import RankDecision, RankPlan
from hf_cuttlefish.decide.speed import candidates_for, keep_faster, quickest
from hf_cuttlefish.measure.shapes import FlowRecorder, Group
from hf_cuttlefish.measure.timing import Timing
from hf_cuttlefish.measure.whole_steps import Candidate, UnableError

DENSE, ALL, MIX = Candidate("dense"), Candidate("as planned", frozenset("ab")), Candidate("mixed", frozenset("a"))


def test_the_quickest_wins_if_it_is_so_much_quicker() -> None:
    assert quickest({DENSE: 10.0, ALL: 8.0, MIX: 7.0}, 1.05) is MIX
    assert quickest({DENSE: 10.0, ALL: 6.0, MIX: 7.0}, 1.05) is ALL
    assert quickest({DENSE: 10.0, ALL: 9.6, MIX: 11.0}, 1.05) is DENSE
    assert quickest({DENSE: 10.5, ALL: 10.0}, 1.05) is ALL
    assert quickest({DENSE: 10.0, ALL: 12.0, MIX: 11.0}, 1.0) is DENSE


def test_only_candidates_that_differ_are_measured() -> None:
    def words(*sets: str, multiplies: bool = False) -> list[str]:
        return [c.words for c in candidates_for(*map(frozenset, sets), multiplies)]

    assert words("abc", "a") == ["dense", "as planned", "with 2 of 3 layers dense"]
    assert words("abc", "abc") == words("abc", "") == ["dense", "as planned"]
    assert words("ab", "ab", multiplies=True) == ["dense", "as planned", "as planned and multiplied out"]


class Trial:
    def __init__(self, times: dict[str, float] | None, multiplies: bool = False) -> None:
        self.times, self.multiplies = times, multiplies

    def __call__(self, plan: RankPlan, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        if self.times is None:
            raise UnableError("there is no batch")
        return {candidate: self.times[candidate.words] for candidate in candidates}


def kept(trial: Trial | None) -> RankPlan:
    """Of three layers one is faster by itself, one slower, and one never ran where groups were looked at."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    flow = FlowRecorder(model, dict(model.items()))
    flow.start()
    model["b"](model["a"](torch.ones(1, 8, requires_grad=True)))
    flow.step()
    plan = RankPlan({name: RankDecision(8, 8, 2, "planned") for name in "abc"})

    def timer(group: Group, ranks: Sequence[int | None], compiled: bool) -> Timing:
        return Timing(1.0 if ranks[0] is None or group.layers == ("b",) else 0.5)

    # The cache knows no names: a timer of its own for each call, and a group of another key.
    model["b"].weight.requires_grad_(False)
    return keep_faster(plan, flow, 1.05, timer, trial)


MIXED = "with 2 of 3 layers dense"


def test_whole_steps_decide_and_the_table_is_told() -> None:
    assert set(kept(None)) == set(kept(Trial(None))) == {"a"}
    assert "and groups of layers decide: there is no batch" in kept(Trial(None)).notes[0]
    mixed = kept(Trial({"dense": 48.1, "as planned": 37.3, MIXED: 35.9}))
    assert set(mixed) == {"a"}
    assert mixed.notes[0] == f"a step takes 48.1 ms dense, 37.3 ms as planned, 35.9 ms {MIXED}"
    everything = kept(Trial({"dense": 48.1, "as planned": 30.0, MIXED: 35.9}))
    assert set(everything) == set("abc") and everything.decisions["b"].reason == "planned"
    many = {"dense": 48.1, "as planned": 50.0, "as planned and multiplied out": 40.0, MIXED: 47.0}
    assert set(kept(Trial(many, multiplies=True))) == set("abc")


def test_without_a_gain_the_reason_has_the_milliseconds() -> None:
    nothing = kept(Trial({"dense": 48.1, "as planned": 47.9, MIXED: 47.0}))
    assert not nothing
    assert nothing.notes[-1] == (
        f"a step takes 48.1 ms dense, 47.9 ms as planned, 47 ms {MIXED}; nothing is 1.05 times faster than dense"
    )
    assert "1.00 times as fast" in nothing.decisions["b"].reason
