"""Generation: a factorized decoder under every cache, with beams, and as its own dense model's draft."""

import copy

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from hf_cuttlefish import estimate_ranks, factorize, merge

IDS = torch.tensor([[2, 5, 9, 11], [2, 7, 7, 8]])
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))


def gemma():
    """Sliding and full attention in turn, one head of keys and values, tied embeddings."""
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(num_key_value_heads=1, head_dim=16, sliding_window=4, layer_types=kinds, **SIZES)
    )


@pytest.fixture(params=[llama, gemma], ids=["llama", "gemma3"])
def pair(request):
    """A dense decoder and its factorized copy."""
    torch.manual_seed(0)
    dense = request.param().eval()
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(0.2 * torch.randn_like(p))
    small = copy.deepcopy(dense)
    factorize(small, dict.fromkeys(estimate_ranks(small), 6))
    return dense, small.eval()


def generate(model, ids=IDS, **options):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
    ],
    ids=lambda o: str(next(iter(o.values()))),
)
def test_every_cache_gives_the_same_text(pair, options):
    _, small = pair
    merged = merge(copy.deepcopy(small)).eval()
    expected = generate(merged)
    assert torch.equal(generate(small, **options), expected)
    assert len(expected[:, 4:].unique()) > 1


def test_beams(pair):
    _, small = pair
    merged = merge(copy.deepcopy(small)).eval()
    assert torch.equal(generate(small, num_beams=3), generate(merged, num_beams=3))


def test_a_factorized_draft_leaves_the_dense_model_s_text_as_it_is(pair):
    dense, small = pair
    one, same, forwards = IDS[:1], copy.deepcopy(dense), []
    dense.register_forward_hook(lambda *args: forwards.append("dense"))
    small.register_forward_hook(lambda *args: forwards.append("draft"))
    expected = generate(dense, one)
    assert forwards == ["dense"] * 10
    assert torch.equal(generate(dense, one, assistant_model=small), expected) and "draft" in forwards
    # A draft that is the same model is accepted whole: fewer forwards than tokens.
    forwards.clear()
    assert torch.equal(generate(dense, one, assistant_model=same), expected)
    assert len(forwards) < 10
