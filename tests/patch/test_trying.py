"""Pairs take layers' places for a while: what runs then, and that nothing stays of them."""

from __future__ import annotations

import copy

import torch
from transformers import BertForMaskedLM

from hf_cuttlefish import CuttlefishConfig, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.measure.whole_steps import Candidate
from hf_cuttlefish.patch.trying import TriedPairs
from tiny_trainer import tiny_bert
from untouched import assert_untouched, snapshot

IDS = torch.arange(3, 13).repeat(4, 1)


def test_candidates_come_and_go() -> None:
    model = tiny_bert()
    layers = find_targets(model)
    layers["bert.encoder.layer.0.output.dense"].register_forward_hook(lambda *_: None)
    before, state = snapshot(model), torch.get_rng_state()
    order = [list(m._modules) for m in model.modules()]
    tried = TriedPairs(model, layers, dict.fromkeys(layers, 4))
    for some in (list(layers), list(layers)[:3], []):
        tried.put(Candidate("", frozenset(some)))
        assert list(low_rank_layers(model)) == some
        assert torch.isfinite(model(input_ids=IDS).logits).all()
        tried.take_back()
        assert_untouched(dict(before), model)
    assert [list(m._modules) for m in model.modules()] == order
    torch.set_rng_state(state)


def test_random_pairs_draw_from_no_random_state_and_are_of_the_weights_size() -> None:
    model = tiny_bert()
    layers, state = find_targets(model), torch.get_rng_state()
    tried = TriedPairs(model, layers, dict.fromkeys(layers, 8))
    assert torch.equal(torch.get_rng_state(), state)
    for name, pair in tried.pairs.items():
        ratio = float(pair.product().std() / layers[name].weight.detach().std())
        assert 0.7 < ratio < 1.4, name
        assert pair.bias is layers[name].bias


def test_tables_come_with_what_is_tied_to_them() -> None:
    torch.manual_seed(0)
    config = tiny_bert().config
    model = BertForMaskedLM(config)
    layers = find_targets(model, CuttlefishConfig(embeddings=True))
    before = snapshot(model)
    tried = TriedPairs(model, layers, dict.fromkeys(layers, 4))
    tried.put(Candidate("", frozenset(layers)))
    expected = copy.deepcopy(model)
    names = [type(m).__name__ for m in model.modules()]
    tried.take_back()
    assert_untouched(before, model)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    factorize(model, dict.fromkeys(layers, 4))
    assert [type(m).__name__ for m in model.modules()] == names
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in expected.parameters())


def test_multiplied_out_it_gives_what_pairs_do() -> None:
    model = tiny_bert().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    layers = find_targets(model)
    tried = TriedPairs(model, layers, dict.fromkeys(layers, 4))
    before, outputs = snapshot(model), []
    for multiplied in (False, True, False):
        tried.put(Candidate("", frozenset(layers), multiplied))
        for _ in range(2):  # the first forward shows which layers read one tensor
            outputs.append(model(input_ids=IDS).logits)
        form = next(iter(low_rank_layers(model).values())).form  # type: ignore[attr-defined]
        assert (form is not None) is multiplied
        tried.take_back()
        assert_untouched(dict(before), model)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)
