"""Of which number ranks are multiples."""

import pytest
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_cuttlefish import CuttlefishConfig, estimate_ranks
from hf_cuttlefish.decide.aligning import aligned
from hf_cuttlefish.decide.targets import find_targets

NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE = {"hidden_size": 512, "intermediate_size": 640, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "wide decoder": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=9, num_key_value_heads=1, **WIDE)), 32),
    "with Conv1D": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=512, n_layer=1, n_head=4)), 32),
    "narrow decoder": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=9, **NARROW)), 8),
    "decoder that classifies": (lambda: LlamaForSequenceClassification(LlamaConfig(vocab_size=9, **WIDE)), 8),
    "encoder": (lambda: BertModel(BertConfig(vocab_size=9, **WIDE)), 8),
    "encoder and decoder": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=512, d_kv=64, num_layers=1, num_heads=8)),
        8,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_multiple_follows_the_model(name):
    build, expected = MODELS[name]
    model = build()
    layers = find_targets(model, CuttlefishConfig())
    assert aligned(CuttlefishConfig(), model, layers).rank_multiple == expected
    assert aligned(CuttlefishConfig(rank_multiple=3), model, layers).rank_multiple == 3


def test_ranks_of_a_wide_decoder_fit_blocks_of_32():
    model = MODELS["wide decoder"][0]()
    plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio"))
    assert plan and all(rank % 32 == 0 for rank in plan.values())
    assert {
        rank % 8 for rank in estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_multiple=8)).values()
    } == {0}
