"""Language models: what a default run does where a cut would not be trained back, and that more can be asked for."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.decide.targets import find_targets

STEPS, SWITCH = 8, 4


def make(pretrained):
    """A Llama whose scores are sharp; pretrained: one direction of each weight stands out, as it does in trained ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, num_key_value_heads=1, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        for layer in find_targets(model).values():
            layer.weight.mul_(10)
            if pretrained:
                m, n = layer.weight.shape
                layer.weight.add_(torch.outer(torch.randn(m), torch.randn(n)) * 0.2)
    return model


def run(model, **config):
    settings = {"switch_step": SWITCH, "statistics_steps": 3, "rank_multiple": 1, "on_error": "raise", **config}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    cuttlefish = Cuttlefish(model, optimizer, CuttlefishConfig(**settings), total_steps=STEPS)
    for _ in range(STEPS):
        ids = torch.randint(50, (4, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
    cuttlefish.end()
    return cuttlefish


def test_a_pretrained_model_stays_dense_where_a_cut_would_not_be_trained_back(caplog):
    with caplog.at_level(logging.WARNING, "hf_cuttlefish"):
        cuttlefish = run(make(pretrained=True))
    assert cuttlefish.switch_step is None and "would bring back (set target_ratio" in cuttlefish.reason
    assert "no size is within bounds, measured on" in caplog.text  # and what was measured
    assert cuttlefish.model.config.to_dict().get("quantization_config") is None


@pytest.mark.parametrize(
    ("pretrained", "config"), [(False, {}), (True, {"target_ratio": 0.5}), (True, {"rank_pattern": {".*q_proj": 4}})]
)
def test_one_from_random_weights_is_cut_and_what_is_said_by_hand_holds(pretrained, config):
    cuttlefish = run(make(pretrained), **config)
    assert cuttlefish.switch_step == SWITCH
    if "rank_pattern" in config:
        assert set(cuttlefish.plan.values()) == {4} and len(cuttlefish.plan) == 2
