"""Convolutions: the pair against the dense layer and autograd, patches against unfold, state, sizes and what stays dense."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_cuttlefish.layers.convolution import LowRankConv2d
from hf_cuttlefish.layers.kinds import dense_weight, kind_of
from hf_cuttlefish.maths.factors import Factors, factor_weight
from hf_cuttlefish.maths.projection import project

FORMS = {
    "plain": {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1},
    "stride": {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1, "stride": 2},
    "oblong": {"in_channels": 8, "out_channels": 12, "kernel_size": (3, 1), "padding": (2, 0), "stride": (1, 2)},
    "dilated": {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    "same": {"in_channels": 8, "out_channels": 12, "kernel_size": 4, "padding": "same"},
    "circular": {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "pointwise": {"in_channels": 8, "out_channels": 12, "kernel_size": 1},
    "grouped": {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1, "groups": 2},
    "grouped, stride": {
        "in_channels": 8,
        "out_channels": 16,
        "kernel_size": 3,
        "stride": 2,
        "groups": 4,
        "bias": False,
    },
}


@pytest.fixture(params=list(FORMS))
def conv(request):
    torch.manual_seed(0)
    return nn.Conv2d(**FORMS[request.param])


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 8, 9, 10)


def pair_of(conv, rank):
    factors = factor_weight(dense_weight(conv), rank)
    return kind_of(conv).stand_in(factors.down, factors.up)


def test_a_pair_of_full_rank_is_the_convolution(conv, images):
    pair = pair_of(conv, min(kind_of(conv).size))
    assert torch.allclose(pair(images), conv(images), atol=1e-5)
    assert pair.bias is conv.bias and pair.count == conv.groups
    dense = pair.to_dense()
    assert type(dense) is nn.Conv2d and dense.extra_repr() == conv.extra_repr()
    assert torch.allclose(dense.weight, conv.weight, atol=1e-6) and dense.bias is conv.bias


def test_gradients_are_those_of_the_product(conv, images):
    pair = pair_of(conv, 1)
    weight = pair.weight
    by_hand = functional.conv2d(
        kind_of(conv)._padded(images), weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups
    )
    assert torch.allclose(pair(images), by_hand, atol=1e-5)
    signs = torch.randn_like(by_hand)
    wanted = torch.autograd.grad((by_hand * signs).sum(), pair.factors)
    found = torch.autograd.grad((pair(images) * signs).sum(), pair.factors)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_state_of_the_optimizer_follows_the_gradients(conv, images):
    pair, kind = pair_of(conv, 1), kind_of(conv)
    weight = nn.Parameter(pair.weight.detach())
    out = functional.conv2d(kind._padded(images), weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
    (dense,) = torch.autograd.grad(out.square().sum(), weight)
    wanted = torch.autograd.grad(pair(images).square().sum(), pair.factors)
    state = project({"exp_avg": dense}, *pair.factors, kind)
    for own, gradient in zip(state, wanted, strict=True):
        assert torch.allclose(own["exp_avg"], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pick", [slice(0, None, 1), slice(3, None, 7)])
def test_rows_are_the_patches_that_the_outputs_come_from(conv, images, pick):
    kind = kind_of(conv)
    x, y = kind.rows(images, "input", pick), kind.rows(conv(images), "output", pick)
    weight, bias = dense_weight(conv), 0.0 if conv.bias is None else conv.bias.detach()
    by_rows = x @ weight.mT
    if conv.groups > 1:
        bias = 0.0 if conv.bias is None else bias.unflatten(0, (conv.groups, -1))[:, None]
    assert torch.allclose(by_rows + bias, y, atol=1e-5)
    whole = kind.features_last(conv(images)).flatten(0, -2)[pick]
    assert torch.equal(y if conv.groups == 1 else y.movedim(0, 1).flatten(1), whole)


def test_the_dense_layer_answers_as_its_factors(conv, images):
    f = factor_weight(dense_weight(conv), 2)
    shift = None if conv.bias is None else torch.randn(conv.groups, conv.out_channels // conv.groups).squeeze(0)
    handle = kind_of(conv).standing_in(Factors(f.down, f.up, shift))
    answer = conv(images)
    handle.remove()
    pair = pair_of(conv, 2)
    wanted = pair(images) + (0.0 if shift is None else shift.reshape(-1, 1, 1))
    assert torch.allclose(answer, wanted, atol=1e-4)


def test_sizes_and_ranks_of_shapes(conv):
    kind = kind_of(conv)
    for rank in (1, 2, 3):
        shapes = kind.shapes(rank)
        assert kind.rank_of("down", shapes["down"]) == kind.rank_of("up", shapes["up"]) == rank
    assert kind.rank_of("down", (3, 4)) == 0
    assert kind_of(pair_of(conv, 2)).shapes(2) == kind.shapes(2)


def test_a_depthwise_convolution_says_why_it_stays_dense():
    assert "depthwise" in kind_of(nn.Conv2d(8, 8, 3, groups=8)).why_dense()
    assert not kind_of(nn.Conv2d(8, 8, 3, groups=2)).why_dense()


def test_one_image_without_a_batch():
    conv = nn.Conv2d(4, 6, 3)
    rows = kind_of(conv).rows(torch.randn(4, 8, 8), "input", slice(0, None, 5))
    assert rows.shape == (8, 36)


def test_a_pair_says_its_sizes():
    pair = LowRankConv2d(nn.Conv2d(8, 12, 3, groups=2), rank=5)
    assert (pair.rank, pair.in_features, pair.out_features, pair.count) == (5, 36, 6, 2)
