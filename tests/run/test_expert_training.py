"""A mixture of experts in a real Trainer: one callback, resume on the same bits, the folder, the card and the plan."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cuttlefish import CuttlefishConfig, RankPlan, factorize, merge, save_merged, write_model_card
from hf_cuttlefish.decide.targets import skipped_parameters
from hf_cuttlefish.layers.low_rank import low_rank_layers
from tiny_experts import build, stacks, tokens
from tiny_models import aligned
from tiny_trainer import STEPS, SWITCH, assert_same_run, run

CONFIG = CuttlefishConfig(switch_step=SWITCH, rank_multiple=4, target_ratio=0.5)


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = tokens(rows=80, length=12)["input_ids"]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


@pytest.fixture(scope="module", params=["mixtral", "gpt-oss"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    trainer, callback = run(folder, CONFIG, build(request.param).train(), rows=Texts(), save_total_limit=None)
    return request.param, folder, trainer, callback


def test_experts_are_factorized_on_the_way(finished):
    name, _, trainer, callback = finished
    report = callback.cuttlefish.report
    experts = {n: layer for n, layer in low_rank_layers(trainer.model).items() if layer.count == 4}
    assert set(experts) == set(stacks(build(name)))
    decisions = report.plan.decisions
    assert all(decisions[n].count == 4 and decisions[n].rank == layer.rank for n, layer in experts.items())
    assert report.target_parameters_after / report.target_parameters_before <= 0.5
    assert "state carried for" in report.optimizer and not report.skipped
    assert RankPlan.from_json(report.plan.to_json()) == report.plan
    assert any("loss on the last" in note for note in report.plan.notes)
    assert sum(d.predicted_loss_increase for n, d in decisions.items() if n in experts) > 0


def test_factors_are_no_dense_experts(finished):
    """In a report of what is factorized later."""
    name, *_ = finished
    model = build(name)
    assert set(skipped_parameters(model)) >= set(stacks(model))
    factorize(model, dict.fromkeys(stacks(model), 2))
    assert low_rank_layers(model) and not skipped_parameters(model)


@pytest.mark.parametrize("step", [2, SWITCH + 2])
def test_a_run_resumes_on_the_same_bits(finished, tmp_path, step):
    name, folder, trainer, _ = finished
    again, callback = run(
        tmp_path, CONFIG, build(name).train(), rows=Texts(), resume=str(folder / f"checkpoint-{step}")
    )
    assert callback.cuttlefish.switch_step == SWITCH
    assert_same_run(trainer, again)


def test_the_folder_loads_and_ships(finished, tmp_path):
    _, _, trainer, callback = finished
    model = trainer.model.eval()
    wanted = model(**tokens()).logits
    model.save_pretrained(tmp_path / "pairs")
    card = write_model_card(tmp_path / "pairs", model, report=callback.cuttlefish.report)
    assert "experts.gate_up_proj" in (tmp_path / "pairs" / "README.md").read_text() and card is not None
    note = json.loads((tmp_path / "pairs" / "config.json").read_text())["quantization_config"]
    assert set(stacks(merge(AutoModelForCausalLM.from_pretrained(tmp_path / "pairs")))) <= set(note["ranks"])
    loaded = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / "pairs", experts_implementation="eager"))
    assert torch.equal(loaded(**tokens()).logits, wanted)
    save_merged(model, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", experts_implementation="eager")
    assert not low_rank_layers(dense) and low_rank_layers(model)
    torch.testing.assert_close(dense(**tokens()).logits, wanted, rtol=1e-4, atol=1e-5)
    assert STEPS > SWITCH
