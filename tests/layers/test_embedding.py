"""The low-rank vocabulary: what it stands for, what is tied to it, and how transformers ties, resizes, saves and loads it."""

import copy

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from hf_cuttlefish import CuttlefishConfig, factorize, merge, save_merged
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.embedding import LowRankEmbedding, LowRankOutput
from hf_cuttlefish.layers.kinds import kind_of
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.maths.factors import Factors, factor_weight

TOKENS, WIDTH, RANK = 60, 24, 5
SHAPE = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
T5 = {
    "vocab_size": TOKENS,
    "d_model": WIDTH,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "d_kv": 12,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": TOKENS, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "scale_embedding": True,
}  # fmt: skip
GPT2 = {
    "vocab_size": TOKENS,
    "n_embd": WIDTH,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "BERT, no output": (hf.BertForSequenceClassification, SHAPE, {"bert.embeddings.word_embeddings"}),
    "BERT, tied with a bias": (hf.BertForMaskedLM, SHAPE, {"bert.embeddings.word_embeddings"}),
    "DistilBERT, tied with a bias of its own": (
        hf.DistilBertForMaskedLM,
        {"vocab_size": TOKENS, "dim": WIDTH, "hidden_dim": 48, "n_layers": 1, "n_heads": 2},
        {"distilbert.embeddings.word_embeddings"},
    ),
    "GPT-2, tied": (hf.GPT2LMHeadModel, GPT2, {"transformer.wte"}),
    "Llama, tied": (hf.LlamaForCausalLM, {**SHAPE, "tie_word_embeddings": True}, {"model.embed_tokens"}),
    "Llama, not tied": (hf.LlamaForCausalLM, SHAPE, {"model.embed_tokens", "lm_head"}),
    "Gemma, scaled": (hf.Gemma3ForCausalLM, {**SHAPE, "num_key_value_heads": 1, "head_dim": 12}, {"model.embed_tokens"}),
    "BART, scaled, three tables": (hf.BartForConditionalGeneration, BART, {"model.shared"}),
    "T5, three tables": (hf.T5ForConditionalGeneration, T5, {"shared"}),
}  # fmt: skip


def build(name):
    cls, sizes, names = MODELS[name]
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes)).eval()
    return model, names


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, TOKENS - 10, (2, 7), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def count(model):
    return sum(p.numel() for p in model.parameters())


def table(padding_idx=None, **more):
    torch.manual_seed(0)
    return nn.Embedding(TOKENS, WIDTH, padding_idx=padding_idx, **more)


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_it_gives_rows_of_the_product(padding_idx):
    dense = table(padding_idx)
    factors = factor_weight(kind_of(dense).weight, RANK)
    low = kind_of(dense).stand_in(factors.down, factors.up)
    ids = torch.tensor([[0, 3, 59], [7, 7, 0]])
    assert low.down.weight.shape == (TOKENS, RANK) and low.up.weight.shape == (WIDTH, RANK)
    assert (low.in_features, low.out_features, low.rank, kind_of(low).size) == (TOKENS, WIDTH, RANK, (WIDTH, TOKENS))
    torch.testing.assert_close(low(ids), functional.embedding(ids, low.product().mT), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low(ids), kind_of(dense).answer(ids, factors), rtol=1e-5, atol=1e-6)
    merged = low.to_dense()
    assert type(merged) is nn.Embedding and (merged.num_embeddings, merged.embedding_dim) == (TOKENS, WIDTH)
    torch.testing.assert_close(merged(ids), low(ids), rtol=1e-5, atol=1e-6)
    assert merged.padding_idx == low.padding_idx == padding_idx
    low(ids).sum().backward()
    assert bool((low.down.weight.grad[0] == 0).all()) is (padding_idx == 0)


def test_gradients_are_those_of_the_product():
    dense = table().double()
    factors = factor_weight(kind_of(dense).weight, RANK)
    low = kind_of(dense).stand_in(factors.down, factors.up)
    output = LowRankOutput(low, nn.Parameter(torch.randn(TOKENS, dtype=torch.float64)))
    ids = torch.tensor([[0, 3, 59, 3]])
    output(low(ids).tanh()).square().sum().backward()
    down, up = (p.detach().clone().requires_grad_() for p in low.factors)
    whole = down @ up.mT
    (functional.linear(functional.embedding(ids, whole).tanh(), whole, output.bias)).square().sum().backward()
    torch.testing.assert_close(low.down.weight.grad, down.grad)
    torch.testing.assert_close(low.up.weight.grad, up.grad)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_tied_saved_loaded_and_merged(name, tmp_path):
    model, names = build(name)
    size, config = count(model), CuttlefishConfig(embeddings=True)
    targets = find_targets(model, config)
    assert names <= set(targets) and targets.keys() - names == set(find_targets(model))
    factorize(model, dict.fromkeys(targets, RANK))
    after, low = logits(model), low_rank_layers(model)
    assert low.keys() == targets.keys()
    model.tie_weights()
    assert torch.equal(logits(model), after)
    model.save_pretrained(tmp_path / "low")
    saved = load_file(tmp_path / "low" / "model.safetensors")
    assert sum(t.numel() for n, t in saved.items() if n != "final_logits_bias") == count(model)  # of BART, a buffer
    loaded = type(model).from_pretrained(tmp_path / "low").eval()
    assert torch.equal(logits(loaded), after) and count(loaded) == count(model)
    loaded.tie_weights()
    assert torch.equal(logits(loaded), after)
    save_merged(model, tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense").eval()
    merge(loaded)
    for other in (dense, loaded):
        assert count(other) == size and not low_rank_layers(other)
        torch.testing.assert_close(logits(other), after, rtol=1e-4, atol=1e-5)
        other.tie_weights()
        assert count(other) == size
    fresh = type(model)(type(model.config)(**MODELS[name][1]))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in fresh.modules()] or "tables" in name
    assert loaded.all_tied_weights_keys == fresh.all_tied_weights_keys
    assert torch.equal(logits(model), after)


@pytest.mark.parametrize("name", [name for name in MODELS if "no output" not in name])
def test_a_table_is_resized_with_its_output(name, tmp_path):
    model, _ = build(name)
    factorize(model, dict.fromkeys(find_targets(model, CuttlefishConfig(embeddings=True)), RANK))
    before, copied = logits(model), copy.deepcopy(model)
    for tokens in (TOKENS + 9, TOKENS - 8):
        copied.resize_token_embeddings(tokens)
        assert logits(copied).shape[-1] == tokens == copied.get_input_embeddings().num_embeddings
        same = min(tokens, TOKENS)
        torch.testing.assert_close(logits(copied)[..., :same], before[..., :same])
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(copied))
    assert torch.equal(logits(model), before)


def test_factors_above_break_even_and_other_ranks_load_too(tmp_path):
    model, _ = build("Llama, tied")
    factorize(model, {"model.embed_tokens": WIDTH})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_standing_in_covers_what_is_tied():
    model, _ = build("BERT, tied with a bias")
    name = "bert.embeddings.word_embeddings"
    layer, factors = model.get_submodule(name), factor_weight(kind_of(model.get_submodule(name)).weight, RANK)
    (output,) = kind_of(layer).tied(model)
    handles = [
        kind_of(layer).standing_in(factors),
        kind_of(output).standing_in(Factors(factors.up.mT, factors.down.mT)),
    ]
    standing = logits(model)
    for handle in handles:
        handle.remove()
    factorize(model, {name: RANK}, factors={name: factors})
    torch.testing.assert_close(standing, logits(model), rtol=1e-4, atol=1e-5)
    assert isinstance(model.get_output_embeddings(), LowRankOutput) and isinstance(
        model.get_input_embeddings(), LowRankEmbedding
    )


def test_a_switch_that_fails_puts_ties_back(monkeypatch):
    from hf_cuttlefish.patch import structure

    model, _ = build("BERT, tied with a bias")
    before, keys, state = logits(model), dict(model.all_tied_weights_keys), [id(m) for m in model.modules()]
    write = structure.write_structure

    def fail(given):
        write(given)
        raise OSError("no")

    monkeypatch.setattr(structure, "write_structure", fail)
    with pytest.raises(OSError, match="no"):
        factorize(model, {"bert.embeddings.word_embeddings": RANK})
    assert model.all_tied_weights_keys == keys and [id(m) for m in model.modules()] == state
    assert torch.equal(logits(model), before)
    monkeypatch.undo()
    model.tie_weights()
    assert torch.equal(logits(model), before)


class Odd(nn.Embedding):
    embed_scale = 1.0

    def forward(self, ids):
        return super().forward(ids).sin()


def with_more(module, name, more):
    setattr(module, name, more)
    return module


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (table(sparse=True), "gradients are sparse"),
        (table(max_norm=1.0), "max_norm"),
        (table(scale_grad_by_freq=True), "scale_grad_by_freq"),
        (Odd(TOKENS, WIDTH), "Odd gives more than its rows"),
        (nn.Embedding(8, WIDTH), "fewer rows than columns"),
        (with_more(table(), "adapter", nn.Linear(2, 2)), "Embedding gives more than its rows"),
        (with_more(table(), "forward", lambda ids: torch.zeros(*ids.shape, WIDTH)), "replaced its forward"),
    ],
)
def test_what_a_low_rank_table_cannot_be_is_refused_by_name(made, why):
    model, _ = build("BERT, no output")
    model.bert.embeddings.word_embeddings = made
    with pytest.raises(ValueError, match=f"embeddings=True cannot factorize bert.embeddings.word_embeddings: .*{why}"):
        find_targets(model, CuttlefishConfig(embeddings=True))
    with pytest.raises(ValueError, match=why):
        factorize(model, {"bert.embeddings.word_embeddings": RANK})


def test_a_model_without_a_table_is_refused_by_name():
    model = hf.ViTForImageClassification(
        hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ValueError, match="embeddings=True finds no table of tokens in ViTForImageClassification"):
        find_targets(model, CuttlefishConfig(embeddings=True))
    with pytest.raises(TypeError, match="embeddings must be True or False, got 'yes'"):
        CuttlefishConfig(embeddings="yes")


class WithRow(nn.Embedding):
    """As T5Gemma 2's: a row apart, of its own parameter, for a token far down the table."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.embed_scale, self.row = 2.0, nn.Parameter(torch.ones(sizes[1]))

    def forward(self, ids):
        return torch.where((ids == 40)[..., None], self.row, 2.0 * super().forward(ids))


def test_a_table_with_a_parameter_besides_its_rows_cannot_be_cut():
    with torch.device("meta"):
        empty = WithRow(TOKENS, WIDTH)
    for table in (WithRow(TOKENS, WIDTH), empty):
        assert kind_of(table).why_dense() == "WithRow gives more than its rows times a scale"


def test_an_output_layer_whose_bias_another_module_has_stays_dense():
    """Untied BERT registers the bias of its output twice; the table is cut all the same."""
    model = hf.BertForMaskedLM(hf.BertConfig(**SHAPE, tie_word_embeddings=False))
    model.cls.predictions.decoder.bias = model.cls.predictions.bias
    targets = find_targets(model, CuttlefishConfig(embeddings=True))
    assert "bert.embeddings.word_embeddings" in targets and "cls.predictions.decoder" not in targets
    factorize(model, dict.fromkeys(targets, RANK))
    assert type(model.cls.predictions.decoder) is nn.Linear
