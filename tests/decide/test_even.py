"""Even ranks: few distinct shapes, the same size, the least predicted loss that they allow, and who asks for them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from hf_cuttlefish import CuttlefishConfig, estimate_ranks
from hf_cuttlefish.decide.even import PARTS, even_groups, note_of_even, parts_of, runs, together
from hf_cuttlefish.decide.plan import RankPlan
from hf_cuttlefish.decide.ranks import plan_ranks
from hf_cuttlefish.decide.rules import RULES, LayerSpectrum, dropped_loss
from hf_cuttlefish.switch import why_even_ranks

ROLES = {"q": (64, 64, 0.3), "v": (64, 64, 1.0), "up": (64, 256, 1.0), "down": (256, 64, 0.6)}


def spectra(depth: int = 4, width: int = 1, **more: Any) -> dict[str, LayerSpectrum]:
    """Blocks of four layers each, of which later blocks matter more and fall off more slowly. width: times that of `ROLES`."""
    found = {}
    for i, (role, (n, m, scale)) in itertools.product(range(depth), ROLES.items()):
        values = scale * (1 + i) * (0.92 + 0.04 * i / depth) ** (torch.arange(64.0 * width).double() / width)
        found[f"h.{i}.{role}"] = LayerSpectrum(n * width, m * width, values, values, tokens=5.0, **more)
    return found


def shapes(plan: RankPlan) -> set[tuple[int, int, int | None]]:
    return {(d.in_features, d.out_features, d.rank) for d in plan.decisions.values()}


def ranks_of(plan: RankPlan, role: str) -> list[int | None]:
    """By block; None: dense."""
    return [d.rank for name, d in plan.decisions.items() if name.endswith(role)]


@pytest.mark.parametrize("ratio", [0.5, 0.4, 0.25])
def test_few_distinct_shapes_at_the_same_size(ratio: float) -> None:
    free = plan_ranks(spectra(9, 4), CuttlefishConfig(target_ratio=ratio))
    even = plan_ranks(spectra(9, 4), CuttlefishConfig(target_ratio=ratio, even_ranks=True))
    blocks = {tuple(ranks_of(even, role)[i] for role in ROLES) for i in range(9)}
    assert len(blocks) <= PARTS < len({tuple(ranks_of(free, role)[i] for role in ROLES) for i in range(9)})
    assert len(shapes(even)) <= PARTS * len(ROLES)
    assert all(d.rank is None or (d.rank % 8 == 0 and d.rank <= d.break_even) for d in even.decisions.values())
    (size, after), (_, wanted) = even.parameters(), free.parameters()
    assert after / size <= ratio and after > 0.97 * wanted
    assert (even.predicted_loss_increase or 0) < 1.5 * (free.predicted_loss_increase or 0)


def test_no_other_even_plan_of_that_size_is_predicted_to_lose_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all of them, in one part. Without the floor, which is there for what is not predicted."""
    monkeypatch.setattr("hf_cuttlefish.decide.even.RANK_FLOOR", 0.0)
    monkeypatch.setattr("hf_cuttlefish.decide.even.parts_of", lambda spectra, wanted: dict.fromkeys(spectra, 1))
    layers = spectra()
    even = plan_ranks(layers, CuttlefishConfig(target_ratio=0.4, even_ranks=True))
    stacks = {role: together([s for name, s in layers.items() if name.endswith(role)]) for role in ROLES}
    room = even.parameters()[1]
    losses = []
    for ranks in itertools.product((*range(8, 49, 8), None), repeat=len(ROLES)):
        given = list(zip(stacks.values(), ranks, strict=True))
        fits = all(rank is None or rank * s.rank_size < s.size for s, rank in given)
        if fits and sum(s.size if rank is None else rank * s.rank_size for s, rank in given) <= room:
            losses.append(sum(0.0 if rank is None else dropped_loss(s, rank) or 0.0 for s, rank in given))
    assert even.predicted_loss_increase == pytest.approx(min(losses), rel=0.05)


def test_runs_of_neighbours() -> None:
    assert runs([1, 1, 5, 5, 9, 9], 3) == [0, 2, 4]
    assert runs([1, 2], 3) == [0, 1] and runs([3], 3) == [0] and runs([], 3) == []
    assert runs([1, 1, 5, 5, 9, 9], 2) in ([0, 2], [0, 4])


def test_parts_are_runs_of_blocks_of_one_container() -> None:
    layers = {f"{kind}.{i}.a": LayerSpectrum(64, 64) for kind in ("encoder.layer", "decoder.layer") for i in range(4)}
    wanted = {name: 24.0 if name[-3] in "01" else 8.0 for name in layers}
    assert parts_of(layers, wanted, 2) == {name: 1 if name[-3] in "01" else 2 for name in layers}
    assert parts_of({"a": LayerSpectrum(4, 4), "0": LayerSpectrum(4, 4)}, {"a": 1.0, "0": 1.0}) == {"a": 0, "0": 1}


def test_a_bound_on_the_predicted_loss_holds() -> None:
    for bound in (0.1, 1.0):
        config = CuttlefishConfig(max_loss_increase=bound, even_ranks=True, rank_multiple=1)
        plan = plan_ranks(spectra(), config, training_loss=20.0)
        assert (plan.predicted_loss_increase or 0.0) <= bound * 20.0


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"loss"}))
def test_other_rules_keep_their_size(rule: str) -> None:
    layers = spectra(initial_stable_rank=20.0)
    free, even = (
        plan_ranks(layers, CuttlefishConfig(rank_rule=rule, rank_multiple=1, even_ranks=on)) for on in (False, True)
    )
    assert all(len(set(ranks_of(even, role))) <= PARTS for role in ROLES)
    (size, after), (_, wanted) = even.parameters(), free.parameters()
    assert after / size == pytest.approx(wanted / size, abs=0.03)


def test_rank_pattern_wins_and_layers_left_dense_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cuttlefish.decide.even.parts_of", lambda spectra, wanted: dict.fromkeys(spectra, 1))
    config = CuttlefishConfig(target_ratio=0.4, even_ranks=True, rank_pattern={r"h\.1\.q": 5})
    plan = plan_ranks(spectra(), config, left={"h.2.q": "frozen"})
    assert plan["h.1.q"] == 5 and "h.2.q" not in plan
    assert plan["h.0.q"] == plan["h.3.q"] != 5


def test_stacks_of_experts_share_a_rank_with_stacks() -> None:
    layers = {
        f"h.{i}.{what}": LayerSpectrum(
            64, 64, None, (1 + i) * 0.9 ** torch.arange(64.0).double(), 5.0, count=count, blind=blind
        )
        for i in range(3)
        for what, count, blind in (("experts.up", 4, (1,) if i == 2 else ()), ("shared.up", 1, ()))
    }
    assert [len(names) for names in even_groups(layers, dict.fromkeys(layers, 0))] == [3, 3]
    plan = plan_ranks(layers, CuttlefishConfig(target_ratio=0.3, even_ranks=True))
    assert plan["h.2.experts.up"] >= 15  # no less than what a matrix cut by its weight alone gets


def test_layers_without_statistics_are_apart() -> None:
    layers = {**spectra(), "h.4.q": LayerSpectrum(64, 64)}
    plan = plan_ranks(layers, CuttlefishConfig(target_ratio=0.4, even_ranks=True))
    assert len(plan.notes) == 1 and "1 of 17 layers, h.4.q" in plan.notes[0] and plan["h.4.q"] == 8
    alone = plan_ranks({"h.4.q": LayerSpectrum(64, 64)}, CuttlefishConfig(even_ranks=True))
    assert dict(alone) == {"h.4.q": 16}


def test_prices_of_a_group_add_up() -> None:
    one, two = (LayerSpectrum(4, 4, None, torch.ones(4).double(), price=price) for price in (1.0, 2.0))
    assert together([one, two]).price == 3.0 and together([one, LayerSpectrum(4, 4, None, torch.ones(4))]).price is None


def test_estimates_obey_true_and_the_note_counts() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128)) for _ in range(8)))
    with torch.no_grad():
        for i, block in enumerate(model):
            block[0].weight.mul_(torch.logspace(0, -i / 4, 64))
    free, plan = (estimate_ranks(model, CuttlefishConfig(rank_rule="energy", even_ranks=on)) for on in (False, True))
    assert len(shapes(plan)) < len(shapes(free)) and estimate_ranks(model, CuttlefishConfig(rank_rule="energy")) == free
    told = note_of_even(plan, "why")
    assert told.startswith(f"even ranks (why): {len(plan)} layers in") and "even_ranks=False" in told


def test_auto_is_on_where_blocks_are_compiled_one_by_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, model = CuttlefishConfig(), nn.Linear(2, 2)
    assert why_even_ranks(auto, model) == "" != why_even_ranks(CuttlefishConfig(even_ranks=True), model)
    monkeypatch.setattr("hf_cuttlefish.switch.compiles_blocks", lambda model: True)
    assert "graph" in why_even_ranks(auto, model)
    assert why_even_ranks(CuttlefishConfig(even_ranks=False), model) == ""
    assert why_even_ranks(CuttlefishConfig.paper(), model) == ""


@pytest.mark.parametrize("value", ["on", 1, None])
def test_another_word_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="even_ranks must be True or False or 'auto'"):
        CuttlefishConfig(even_ranks=value)
