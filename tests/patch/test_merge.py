"""Merging back: what stays, and what cannot be replaced."""

import pytest
import torch
from torch import nn

from hf_cuttlefish import LowRankLinear, factorize, merge
from tiny_models import BY_NAME, aligned, assert_close, make_linear, outputs, text

QUERY = "bert.encoder.layer.0.attention.self.query"
OUTPUT = "bert.encoder.layer.1.output.dense"
PLAN = {QUERY: 4, "bert.encoder.layer.0.intermediate.dense": 8, OUTPUT: 4}


@pytest.fixture
def bert():
    return BY_NAME["bert"].build().train()


def test_merge_keeps_bias_freezing_and_mode(bert):
    bert.get_submodule(QUERY).weight.requires_grad_(False)
    bias = bert.get_submodule(QUERY).bias
    factorize(bert, PLAN)
    expected = outputs(aligned(bert.eval()), text())
    product = bert.get_submodule(OUTPUT).weight.detach()
    merge(bert)
    query = bert.get_submodule(QUERY)
    assert type(query) is nn.Linear and query.bias is bias and not query.weight.requires_grad and not query.training
    assert bert.get_submodule(OUTPUT).weight.requires_grad
    torch.testing.assert_close(bert.get_submodule(OUTPUT).weight.detach(), product)
    assert_close(outputs(bert, text()), expected)
    assert not hasattr(bert.config, "quantization_config")
    with pytest.raises(ValueError, match="BertForSequenceClassification has no factorized layer to merge"):
        merge(bert)


@pytest.mark.parametrize("action", [lambda m: merge(m), lambda m: factorize(m, {"": 2})], ids=["merge", "factorize"])
def test_a_bare_layer_cannot_be_replaced_in_place(action):
    layer = make_linear()
    for bare in (LowRankLinear.from_linear(layer, 2), layer):
        with pytest.raises(ValueError, match=r"to_dense\(\)|has no factorized layer|from_linear|already factorized"):
            action(bare)
