"""Layers of one shape in one batch at the switch: the same plan and factors as one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_cuttlefish import CuttlefishConfig, switch
from hf_cuttlefish.decide import ranks
from hf_cuttlefish.decide.ranks import spectra_of
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.kept import KeptBatches
from hf_cuttlefish.measure.moments import MomentCollector
from hf_cuttlefish.switch import plan_and_factors


def gathered() -> tuple[Any, Any, MomentCollector]:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 60,
    }
    model = BertForSequenceClassification(BertConfig(**sizes)).train()
    layers = find_targets(model)
    collector = MomentCollector(model, layers)
    collector.start()
    for i in range(3):
        ids = torch.randint(5, 60, (6, 8), generator=torch.Generator().manual_seed(i))
        model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        collector.step()
    collector.stop()
    return model, layers, collector


def decide(rule: str, model: Any, layers: Any, collector: MomentCollector) -> Any:
    config = CuttlefishConfig(rank_rule=rule, rank_multiple=1)
    return plan_and_factors(layers, config, collector, {}, None, "found", KeptBatches(model), None)


@pytest.mark.parametrize("rule", ["loss", "energy"])
@pytest.mark.parametrize("size", [2**29, 60_000])
def test_the_plan_and_the_factors_are_the_same(monkeypatch: pytest.MonkeyPatch, rule: str, size: int) -> None:
    model, layers, collector = gathered()
    plan, factors = decide(rule, model, layers, collector)
    for module in (ranks, switch):
        monkeypatch.setattr(module, "BATCHED_ON", "cpu")
        monkeypatch.setattr(module, "BATCH_BYTES", size)
    batched, together = decide(rule, model, layers, collector)
    assert dict(batched) == dict(plan) and list(together) == list(factors) == list(plan)
    for name, f in factors.items():
        torch.testing.assert_close(together[name].up @ together[name].down, f.up @ f.down, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(together[name].up, f.up, rtol=1e-3, atol=1e-5)


def test_a_layer_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layers, _ = gathered()
    monkeypatch.setattr(ranks, "BATCHED_ON", "cpu")
    name = list(layers)[7]
    with torch.no_grad():
        layers[name].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"^{name} cannot be factorized: the weight holds NaN"):
        list(spectra_of(layers, CuttlefishConfig(), {}, {}))
