"""Statistics of a language model are the same whether texts share a row or have one each, padded; only answers count."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.moments import MomentCollector

LENGTHS, PROMPTS = (7, 5, 9), (3, 0, 4)


@pytest.fixture
def model():
    """Grouped-query attention, SwiGLU, tied embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, tie_word_embeddings=True, **sizes))


def texts():
    torch.manual_seed(1)
    ids = [torch.randint(4, 40, (length,)) for length in LENGTHS]
    labels = [torch.where(torch.arange(len(i)) < max(1, p), -100, i) for i, p in zip(ids, PROMPTS, strict=True)]
    return ids, labels


def padded():
    ids, labels = texts()
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
    }


def packed():
    ids, labels = texts()
    positions = torch.cat([torch.arange(len(i)) for i in ids])
    rows = {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": positions}
    return {
        **{name: row[None] for name, row in rows.items()},
        "use_cache": False,
    }  # with a cache texts would see each other


def gather(model, batch, **more):
    collector = MomentCollector(model, find_targets(model))
    collector.start()
    loss = model(**batch, **more).loss
    loss.backward()
    collector.step()
    collector.stop()
    model.zero_grad()
    return collector.moments(), float(loss.detach())


def apart(one, other):
    return float((one - other).norm() / other.norm())


def test_packed_texts_give_the_moments_of_padded_ones(model):
    one, loss = gather(model, padded())
    other, packed_loss = gather(model, packed())
    assert packed_loss == pytest.approx(loss, rel=1e-5) and set(one) == set(other) and len(one) == 14
    for name, moments in one.items():
        assert other[name].tokens == pytest.approx(moments.tokens), name
        # What flows is the same. Gradients are weighted by example, and a row of several texts is one example.
        m, n = find_targets(model)[name].weight.shape
        flow = "signal" if m <= n else "metric"
        assert apart(getattr(moments, flow), getattr(other[name], flow)) < 1e-4, name


def test_answers_alone_count_in_the_last_block(model):
    """Before it the prompt reaches the loss through attention; past it only positions that predict an answer do."""
    moments, _ = gather(model, padded())
    answers = sum(int((labels != -100).sum()) for labels in texts()[1])
    assert moments["model.layers.1.mlp.down_proj"].tokens == pytest.approx(1.0)
    tokens = {name: round(found.tokens * answers) for name, found in moments.items()}
    assert tokens["model.layers.1.self_attn.q_proj"] == answers
    assert tokens["model.layers.0.mlp.down_proj"] > answers  # keys and values of prompts


def test_the_number_of_items_of_a_step_does_not_change_them(model):
    one, _ = gather(model, padded())
    items = torch.tensor(sum(int((labels != -100).sum()) for labels in texts()[1]) * 3)  # of three micro-batches
    other, _ = gather(model, padded(), num_items_in_batch=items)
    for name, moments in one.items():
        assert apart(moments.metric, other[name].metric) < 1e-4, name
        assert apart(moments.signal, other[name].signal) < 1e-4, name
