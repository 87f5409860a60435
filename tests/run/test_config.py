"""Every field is checked, every error names the field, the value and what to do; JSON round trip and versions."""

import pytest

from hf_cuttlefish import CuttlefishConfig


def test_round_trip():
    config = CuttlefishConfig(
        target_modules=["query", "value"], rank_pattern={"query": 4}, switch_step=7, target_ratio=0.3
    )
    assert CuttlefishConfig.from_json(config.to_json()) == config
    assert CuttlefishConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["version"] == 1
    assert CuttlefishConfig.from_dict(CuttlefishConfig.paper().to_dict()) == CuttlefishConfig.paper()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"rank_rule": "stabel_rank"}, ValueError, "'stabel_rank'.*did you mean 'stable_rank'"),
        ({"rank_ratio": 0.0}, ValueError, "rank_ratio is 0.0"),
        ({"rank_ratio": 1.5}, ValueError, "rank_ratio is 1.5.*at most 1"),
        ({"rank_ratio": "a"}, TypeError, "rank_ratio.*'a'"),
        ({"accumulative_share": -0.1}, ValueError, "accumulative_share"),
        ({"energy_share": float("nan")}, ValueError, "energy_share"),
        ({"target_ratio": 0}, ValueError, "target_ratio is 0"),
        ({"max_loss_increase": -1.0}, ValueError, "max_loss_increase"),
        ({"target_ratio": 0.5, "max_loss_increase": 0.1}, ValueError, "target_ratio.*max_loss_increase"),
        ({"rank_rule": "ratio", "target_ratio": 0.2}, ValueError, "target_ratio is 0.2.*rank_rule='ratio'"),
        ({"switch_step": 0}, ValueError, "switch_step is 0.*call factorize"),
        ({"switch_step": True}, TypeError, "switch_step"),
        ({"switch_step": 2.5}, TypeError, "switch_step.*2.5"),
        ({"earliest_switch": 0.5, "latest_switch": 0.2}, ValueError, "earliest_switch.*after latest_switch"),
        ({"latest_switch": 1.2}, ValueError, "latest_switch is 1.2"),
        ({"stable_rank_tolerance": 0}, ValueError, "stable_rank_tolerance"),
        ({"rank_multiple": 0}, ValueError, "rank_multiple is 0"),
        ({"optimizer_state": "keep"}, ValueError, "'keep'.*carry, reset"),
        ({"switch": "inplace"}, ValueError, "did you mean 'in_place'"),
        ({"stable_rank_scale": "w0"}, ValueError, "stable_rank_scale"),
        ({"on_error": "ignore"}, ValueError, "on_error"),
        ({"target_modules": []}, ValueError, "empty"),
        ({"target_modules": ""}, ValueError, "empty"),
        ({"target_modules": 3}, TypeError, "target_modules.*int"),
        ({"target_modules": [3]}, TypeError, "target_modules"),
        ({"target_modules": "("}, ValueError, "regular expression"),
        ({"exclude_modules": "["}, ValueError, "exclude_modules"),
        ({"rank_pattern": {"a": 0}}, ValueError, r"rank_pattern\['a'\] is 0"),
        ({"rank_pattern": {"a": 1.0}}, TypeError, "rank_pattern"),
        ({"rank_pattern": ["a"]}, TypeError, "rank_pattern"),
        ({"rank_pattern": {"(": 1}}, ValueError, "regular expression"),
        ({"statistics_steps": -1}, ValueError, "statistics_steps"),
        ({"check_steps": 0}, ValueError, "check_steps"),
    ],
)
def test_bad_fields(fields, error, words):
    with pytest.raises(error, match=words):
        CuttlefishConfig(**fields)


def test_reading_what_was_not_written_here():
    with pytest.raises(ValueError, match=r"version 99.*upgrade"):
        CuttlefishConfig.from_dict({"version": 99})
    with pytest.raises(ValueError, match=r"unknown field 'rank_rul'.*rank_rule"):
        CuttlefishConfig.from_dict({"rank_rul": "ratio"})
    with pytest.raises(TypeError, match="list"):
        CuttlefishConfig.from_dict([])
    with pytest.raises(ValueError, match="JSON"):
        CuttlefishConfig.from_json("{")
