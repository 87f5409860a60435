"""Rank rules, break-even and alignment, the plan and its JSON."""

import json
import math

import pytest
import torch
from torch import nn

from hf_cuttlefish import CuttlefishConfig, RankPlan, estimate_ranks, factorize
from hf_cuttlefish.decide.plan import RankDecision, break_even_rank
from hf_cuttlefish.decide.ranks import plan_ranks
from hf_cuttlefish.decide.rules import (
    DEFAULT_RATIO,
    RANK_FLOOR,
    RULES,
    LayerSpectrum,
    allowed_rank,
    random_matrix_scale,
)


class Blocks(nn.Module):
    def __init__(self, sizes=((64, 64), (64, 256), (256, 64)), depth=2):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.layers = nn.ModuleList(
            nn.ModuleDict({f"p{i}": nn.Linear(*s) for i, s in enumerate(sizes)}) for _ in range(depth)
        )


def spectra(count=4, m=64, n=64, decay=0.9, loss=True):
    values = decay ** torch.arange(min(m, n), dtype=torch.float64)
    return {
        f"layers.{i}.a": LayerSpectrum(n, m, None if loss else values, values * 10.0**-i if loss else None, tokens=5.0)
        for i in range(count)
    }


@pytest.mark.parametrize(("n", "m"), [(64, 64), (64, 256), (768, 3072), (1, 9), (2, 2)])
def test_break_even_is_where_a_pair_stops_being_smaller(n, m):
    r = break_even_rank(n, m)
    assert r * (m + n) < m * n <= (r + 1) * (m + n)


def test_allowed_ranks():
    assert allowed_rank(9, 64, 64, 8) == (16, "rule")
    assert allowed_rank(16.0, 64, 64, 8)[0] == 16
    assert allowed_rank(30, 64, 64, 8)[0] == 24  # 32 is not below break-even
    assert allowed_rank(32, 64, 64, 8)[0] is None
    assert allowed_rank(0.0, 64, 64, 8)[0] == 8
    assert allowed_rank(3, 12, 12, 8) == (3, "rule (too small to align)")
    assert allowed_rank(1, 1, 9, 1)[0] is None


def test_stable_and_scaled_stable_rank():
    s = spectra(1, loss=False)
    values = s["layers.0.a"].singular_values
    expected = float(values.square().sum() / values[0] ** 2)
    config = CuttlefishConfig(rank_rule="stable_rank", rank_multiple=1)
    plan = plan_ranks(s, config)
    assert plan["layers.0.a"] == math.ceil(expected)
    scaled = plan_ranks(s, CuttlefishConfig(rank_rule="scaled_stable_rank", rank_multiple=1))
    assert scaled["layers.0.a"] == math.ceil(random_matrix_scale(64, 64) * expected)
    assert "random-matrix" in scaled.notes[0]


def test_xi_is_chosen_by_what_the_run_started_from():
    """Random weights: xi from W0, as in the paper. Pretrained ones, far below a random matrix: from theory."""
    values = 0.9 ** torch.arange(64, dtype=torch.float64)
    sr = float(values.square().sum() / values[0] ** 2)
    for first, xi in ((15.0, 64 / 15.0), (sr, random_matrix_scale(64, 64))):
        s = {"layers.0.a": LayerSpectrum(64, 64, values, initial_stable_rank=first)}
        plan = plan_ranks(s, CuttlefishConfig(rank_rule="scaled_stable_rank", rank_multiple=1))
        assert plan["layers.0.a"] == math.ceil(xi * sr)
    with pytest.raises(ValueError, match="initial_stable_ranks"):
        plan_ranks(
            spectra(1, loss=False), CuttlefishConfig(rank_rule="scaled_stable_rank", stable_rank_scale="initial")
        )


def test_accumulative_energy_and_paper():
    s = spectra(1, loss=False)
    values = s["layers.0.a"].singular_values

    def fewest(v, share):
        return int((v.cumsum(0) / v.sum() < share).sum()) + 1

    for rule, expected in (("accumulative", fewest(values, 0.8)), ("energy", fewest(values.square(), 0.9))):
        assert plan_ranks(s, CuttlefishConfig(rank_rule=rule, rank_multiple=1))["layers.0.a"] == expected
    paper = plan_ranks(s, CuttlefishConfig.paper(rank_multiple=1))
    scaled = plan_ranks(s, CuttlefishConfig(rank_rule="scaled_stable_rank", rank_multiple=1))
    assert paper["layers.0.a"] == max(fewest(values, 0.8), scaled["layers.0.a"])


def test_ratio_needs_no_weights():
    with torch.device("meta"):
        model = Blocks(((768, 768), (768, 3072), (3072, 768)))
    plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_ratio=0.25))
    assert dict(plan) == {f"layers.{i}.p{j}": 192 for i in range(2) for j in range(3)}


def test_one_threshold_for_the_whole_model(monkeypatch):
    """Layers whose directions matter ten times less get the ranks that one common threshold gives them."""
    monkeypatch.setattr("hf_cuttlefish.decide.rules.RANK_FLOOR", 0.0)
    s = spectra(3)
    config = CuttlefishConfig(target_ratio=0.4, rank_multiple=1)
    plan = plan_ranks(s, config)
    before, after = plan.parameters()
    assert after <= 0.4 * before
    assert plan["layers.0.a"] > plan["layers.1.a"] > plan["layers.2.a"] >= 1
    # Exchange: giving any layer one rank more and another one less never lowers the predicted loss.
    dropped = {n: s[n].loss_spectrum.square() for n in s}
    worst_kept = min(float(dropped[n][plan[n] - 1]) for n in s if plan[n] > 1)
    best_dropped = max(float(dropped[n][plan[n]]) for n in s)
    assert best_dropped <= worst_kept
    total = sum(2.5 * float(dropped[n][plan[n] :].sum()) for n in s)
    assert plan.predicted_loss_increase == pytest.approx(total)


def test_no_layer_falls_below_its_floor():
    """The layer that hardly matters now still gets half of what an even spread of the same size would give it."""
    s = {
        **spectra(3, 256, 256, decay=0.98),
        "layers.9.a": LayerSpectrum(256, 256, None, torch.full((256,), 1e-9).double(), 5.0),
    }
    plan = plan_ranks(s, CuttlefishConfig(target_ratio=0.4, rank_multiple=1))
    before, after = plan.parameters()
    assert 0.4 * before * 0.97 <= after <= 0.4 * before
    assert plan["layers.9.a"] == pytest.approx(RANK_FLOOR * 0.4 * 128, rel=0.3)


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.3, 0.2])
def test_target_ratio_is_met_and_used_up(ratio):
    s = spectra(6, 128, 64, decay=0.97)
    plan = plan_ranks(s, CuttlefishConfig(target_ratio=ratio))
    before, after = plan.parameters()
    assert after <= ratio * before
    assert after >= (ratio - 0.1) * before


def test_loss_bound_is_kept_and_grows_the_model_as_it_tightens():
    s = spectra(4)
    sizes = []
    for bound in (1.0, 0.1, 0.01, 0.001):
        plan = plan_ranks(s, CuttlefishConfig(max_loss_increase=bound, rank_multiple=1), training_loss=2.0)
        assert plan.predicted_loss_increase <= bound * 2.0
        sizes.append(plan.parameters()[1])
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_the_default_is_a_fixed_share_that_a_flat_spectrum_makes_grow():
    """Redundant layers get the default share; where every direction matters alike, the prediction asks for more."""
    before, after = plan_ranks(spectra(3, 256, 256, decay=0.9), CuttlefishConfig()).parameters()
    assert 0.35 * before <= after <= DEFAULT_RATIO * before
    flat = {f"layers.{i}.a": LayerSpectrum(256, 256, None, torch.ones(256).double() + 0.01 * i, 5.0) for i in range(3)}
    before, after = plan_ranks(flat, CuttlefishConfig()).parameters()
    assert after > 0.9 * before
    with_note = plan_ranks(spectra(3), CuttlefishConfig(max_loss_increase=0.1))
    assert "returned no loss" in with_note.notes[0]


def test_layers_without_statistics_get_the_ratio_and_a_note():
    s = {**spectra(2), "layers.9.a": LayerSpectrum(64, 64)}
    plan = plan_ranks(s, CuttlefishConfig(target_ratio=0.5))
    assert plan["layers.9.a"] == 16 and "layers.9.a" in plan.notes[0]
    assert dict(plan_ranks({"layers.9.a": LayerSpectrum(64, 64)}, CuttlefishConfig())) == {"layers.9.a": 16}


def test_every_rule_on_a_model_and_every_rank_is_allowed():
    model = Blocks()
    for rule in RULES:
        plan = estimate_ranks(model, CuttlefishConfig(rank_rule=rule))
        for name, decision in plan.decisions.items():
            if decision.rank is None:
                assert name not in plan and "not make it smaller" in decision.reason
            else:
                assert 1 <= decision.rank <= decision.break_even and decision.rank % 8 == 0
        assert "p1" in plan.summary() and rule in plan.summary()


def test_rank_pattern_overrides_the_rule():
    plan = estimate_ranks(Blocks(), CuttlefishConfig(rank_pattern={"p0": 5, r"1\.p1": 60}))
    assert plan["layers.0.p0"] == plan["layers.1.p0"] == 5 and plan["layers.1.p1"] == 60 and plan["layers.0.p1"] == 16
    with pytest.raises(ValueError, match=r"rank of layers\.0\.p0 is 65"):
        estimate_ranks(Blocks(), CuttlefishConfig(rank_pattern={"p0": 65}))
    with pytest.raises(ValueError, match="close names: p0"):
        estimate_ranks(Blocks(), CuttlefishConfig(rank_pattern={"q0": 5}))


def test_plan_round_trips_through_json(tmp_path):
    plan = estimate_ranks(Blocks(), CuttlefishConfig(rank_rule="energy"))
    again = RankPlan.from_json(plan.to_json(tmp_path / "plan.json"))
    assert again == plan == RankPlan.from_json(tmp_path / "plan.json")
    assert json.loads(plan.to_json())["version"] == 1
    model = Blocks()
    factorize(model, RankPlan.from_json(tmp_path / "plan.json"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"layers": 3}',
        '{"layers": {"a": {"rank": 2}}}',
        '{"layers": {"a": {"in_features": 4, "out_features": 4, "rank": 9, "reason": ""}}}',
        '{"layers": {"a": {"in_features": 4, "out_features": 4, "rank": 1000000000000, "reason": ""}}}',
        '{"layers": {"a": {"in_features": 4, "out_features": 4, "rank": 1.5, "reason": ""}}}',
        '{"layers": {"a": {"in_features": -4, "out_features": 4, "rank": 1, "reason": ""}}}',
        '{"layers": {}, "version": 2}',
        '{"layers": {}, "notes": 3}',
    ],
)
def test_bad_plans_are_refused(text):
    with pytest.raises((ValueError, FileNotFoundError, IsADirectoryError)):
        RankPlan.from_json(text)


def test_a_plan_for_another_shape_is_refused():
    plan = RankPlan({"layers.0.p0": RankDecision(64, 128, 8, "rule")})
    model = Blocks()
    with pytest.raises(ValueError, match=r"another model: layers\.0\.p0 is \(128, 64\) there and \(64, 64\) here"):
        factorize(model, plan)
    assert type(model.layers[0]["p0"]) is nn.Linear


def test_the_default_estimate_shows_numbers_and_says_what_it_lacks():
    model = Blocks()
    plan = estimate_ranks(model)
    assert all(d.stable_rank > 1 for d in plan.decisions.values()) and "no usable statistics" in plan.summary()
    sizes = [estimate_ranks(model, {"target_ratio": r}).parameters() for r in (0.2, 0.45)]
    assert all(after <= r * before for (before, after), r in zip(sizes, (0.2, 0.45), strict=True))
    model.layers[0]["p0"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.p0 cannot be factorized"):
        estimate_ranks(model)


def test_a_plan_equals_a_mapping_of_its_ranks_and_refuses_bare_ranks():
    plan = estimate_ranks(Blocks())
    assert plan == dict(plan) and plan != {"a": 1}
    with pytest.raises(TypeError, match="RankDecision for a"):
        RankPlan({"a": 8})
