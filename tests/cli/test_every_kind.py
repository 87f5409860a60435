"""Each kind of layer, and the vocabulary tied or not: inspect, factorize by a plan, merge, the card, and the report of a run."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from benchmarks.robustness.fuzz.good_files import OTHERS, RUN, inputs_of, other, settings_of, train
from hf_cuttlefish import Cuttlefish, RankPlan
from hf_cuttlefish.cli import main as cli
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.report.plotting import plot_stable_ranks


@torch.no_grad()
def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    return model(**inputs_of(model)).logits


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_is_inspected_factorized_and_merged(name, tmp_path, capsys):
    cls, model = getattr(hf, OTHERS[name][0]), other(name)
    model.save_pretrained(tmp_path / "dense")
    targets = list(find_targets(model, settings_of(name)))
    kept = targets[-1]
    options = ["--exclude-modules", kept, "--rank-multiple", "1", "--rule", "ratio"]
    options += ["--embeddings"] if name.startswith("embeddings") else []
    files = {"--plot": "map.png", "--plot-spectra": "spectra.svg", "--save-plan": "plan.json"}
    drawn = [part for option, file in files.items() for part in (option, str(tmp_path / file))]
    assert cli.main(["inspect", str(tmp_path / "dense"), *options, *drawn]) == 0
    assert targets[0] in capsys.readouterr().out
    plan = RankPlan.from_json(tmp_path / "plan.json")
    assert plan and set(plan) <= set(targets) - {kept} and RankPlan.from_json(plan.to_json()) == plan
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "spectra.svg").read_text()

    command = ["factorize", str(tmp_path / "dense"), str(tmp_path / "small"), "--plan", str(tmp_path / "plan.json")]
    assert cli.main(command) == 0
    small = cls.from_pretrained(tmp_path / "small").eval()
    assert {n: layer.rank for n, layer in low_rank_layers(small).items()} == dict(plan)
    card = Path(tmp_path / "small" / "README.md").read_text()
    assert all(name_of.rpartition(".")[2] in card for name_of in plan)

    assert cli.main(["merge", str(tmp_path / "small"), str(tmp_path / "merged")]) == 0
    merged = cls.from_pretrained(tmp_path / "merged").eval()
    assert not low_rank_layers(merged) and not hasattr(merged.config, "quantization_config")
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(logits(merged), logits(small), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_is_told_drawn_and_its_optimizers_state_is_carried(name, tmp_path):
    model = other(name)
    first = next(iter(find_targets(model, settings_of(name))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cuttlefish = Cuttlefish(model, optimizer, settings_of(name, rank_pattern={first: 2}, **RUN), total_steps=8)
    train(model, optimizer, cuttlefish, 8)
    cuttlefish.close()
    report = cuttlefish.report
    pairs = low_rank_layers(model)
    assert report is not None and dict(report.plan) == {n: layer.rank for n, layer in pairs.items()}
    assert pairs[first].rank == 2
    assert f"state carried for {len(pairs)} of {len(pairs)} layers" in str(report)
    assert all(optimizer.state[factor]["step"] == 8 for layer in pairs.values() for factor in layer.factors)
    page = report.to_html(tmp_path / "report.html", history=cuttlefish.history)
    assert first.rpartition(".")[2] in page and "<svg" in page
    plot_stable_ranks(cuttlefish.history, switch_step=cuttlefish.switch_step, path=tmp_path / "ranks.svg")
    assert "<svg" in (tmp_path / "ranks.svg").read_text()
    json.dumps(cuttlefish.state_dict())
