"""The low-rank layer itself: what it is made from, its read-only weight, and the dense layer that it becomes again."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from hf_cuttlefish import LowRankLinear, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers import low_rank as low_rank_file
from hf_cuttlefish.layers.kinds import kind_of
from hf_cuttlefish.maths.factors import Factors, factor_weight
from tiny_models import BY_NAME, assert_close, make_linear, outputs


def matrix(layer: nn.Module) -> torch.Tensor:
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize(("n", "m"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_from_linear_is_the_best_stand_in_of_its_rank(kind, n, m, rank):
    linear = make_linear(kind, n, m)
    low = LowRankLinear.from_linear(linear, rank)
    assert (low.in_features, low.out_features, low.rank, low.origin) == (n, m, rank, kind)
    assert type(low.down) is nn.Linear and low.down.weight.shape == (rank, n) and low.down.bias is None
    assert type(low.up) is nn.Linear and low.up.weight.shape == (m, rank) and low.bias is low.up.bias is linear.bias
    s = torch.linalg.svdvals(matrix(linear))
    assert low.weight.shape == (m, n)
    error = torch.linalg.norm(matrix(linear) - low.weight.detach())
    assert float(error) == pytest.approx(float(s[rank:].square().sum().sqrt()), rel=1e-4, abs=1e-4)  # Eckart and Young
    gram = low.up.weight.T @ low.up.weight  # sqrt of the singular values on both sides
    torch.testing.assert_close(gram, torch.diag(s[:rank]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low.down.weight @ low.down.weight.T, gram, rtol=1e-4, atol=1e-4)
    x = torch.randn(3, 7, n)
    torch.testing.assert_close(low(x), x @ low.weight.T + linear.bias, rtol=1e-4, atol=1e-4)
    if rank == min(m, n):
        torch.testing.assert_close(low(x), linear(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_from_linear_keeps_what_the_layer_was(kind, dtype):
    linear = make_linear(kind).to(dtype).eval()
    linear.weight.requires_grad_(False)
    low = LowRankLinear.from_linear(linear, 3)
    assert {p.dtype for p in low.parameters()} == {dtype} and not low.training and not low.up.training
    assert [name for name, p in low.named_parameters() if p.requires_grad] == ["up.bias"]
    dense = low.to_dense()
    assert type(dense) is type(linear) and dense.weight.shape == linear.weight.shape and dense.weight.dtype == dtype
    assert not dense.training and not dense.weight.requires_grad and dense.bias is linear.bias
    assert low.weight.dtype == dtype


def test_a_layer_without_bias():
    low = LowRankLinear.from_linear(make_linear(bias=False), 3)
    assert low.bias is None and list(low.state_dict()) == ["down.weight", "up.weight"] and low.to_dense().bias is None


def with_nan() -> nn.Module:
    linear = make_linear()
    linear.weight.data[3, 4] = torch.nan
    return linear


@pytest.mark.parametrize(
    ("make", "rank", "error", "message"),
    [
        (make_linear, 0, ValueError, "rank of the layer is 0: it must lie between 1 and"),
        (make_linear, -3, ValueError, "rank of the layer is -3"),
        (make_linear, 13, ValueError, r"is 13: .*min\(12, 20\)"),
        (make_linear, 10**12, ValueError, "is 1000000000000"),
        (make_linear, 2.0, TypeError, "must be a whole number, got 2.0"),
        (make_linear, True, TypeError, "must be a whole number, got True"),
        (make_linear, "4", TypeError, "must be a whole number, got '4'"),
        (with_nan, 3, ValueError, "NaN or Inf"),
        (lambda: make_linear().to("meta"), 3, ValueError, "meta device: load its weights"),
        (lambda: nn.LayerNorm(12), 3, TypeError, "LayerNorm: only nn.Linear"),
        (lambda: nn.Embedding(12, 20), 3, TypeError, "Embedding: only nn.Linear"),
        (lambda: type("Mine", (nn.Linear,), {})(12, 20), 3, TypeError, "Mine: only nn.Linear"),
        (lambda: LowRankLinear(12, 20, 4), 3, TypeError, "LowRankLinear: only nn.Linear"),
        (lambda: prune.identity(make_linear(), "weight"), 3, ValueError, "computed from other parameters"),
    ],
)
def test_from_linear_refuses(make, rank, error, message):
    with pytest.raises(error, match=message):
        LowRankLinear.from_linear(make(), rank)


def test_the_constructor_checks_before_it_allocates():
    with pytest.raises(ValueError, match="is 1000000000000"):
        LowRankLinear(10**12 - 1, 10**13, 10**12)
    with pytest.raises(ValueError, match=r"origin is 'Conv2d': it must be one of \['Conv1D', 'Linear'\]"):
        LowRankLinear(4, 4, 2, origin="Conv2d")


class TestWeight:
    """The read-only product."""

    def test_it_is_multiplied_out_only_for_its_values(self, monkeypatch):
        """T5 asks for wo.weight.dtype three times in each forward: that must not cost a product of the dense size."""
        low, count = LowRankLinear.from_linear(make_linear(), 4), []
        multiply = low_rank_file._multiply
        monkeypatch.setattr(low_rank_file, "_multiply", lambda *a: count.append(1) or multiply(*a))
        weight = low.weight
        assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float32 and weight.device.type == "cpu"
        assert weight.shape == (20, 12) == weight.size() and weight.ndim == 2 and weight.numel() == 240
        assert weight.is_floating_point() and not weight.is_meta
        assert not count
        weight.sum()
        assert len(count) == 1
        t5 = BY_NAME["t5"].build()
        factorize(t5, dict.fromkeys(find_targets(t5), 4))
        del count[:]
        outputs(t5, BY_NAME["t5"].inputs())
        assert not count

    def test_it_is_a_plain_differentiable_tensor_in_every_operation(self):
        low = LowRankLinear.from_linear(make_linear(), 4)
        product = low.up.weight @ low.down.weight
        x = torch.randn(3, 12)
        for result, expected in [
            (low.weight + 0, product),
            (low.weight[2:5], product[2:5]),
            (x @ low.weight.T, x @ product.T),
            (nn.functional.linear(x, low.weight, low.bias), x @ product.T + low.bias),
            (torch.cat(low.weight.chunk(4, dim=0)), product),
            (low.weight.detach(), product),
            (low.weight.double(), product.double()),
            (copy.deepcopy(low.weight.detach()), product),
            (torch.from_numpy(low.weight.detach().numpy()), product),
        ]:
            torch.testing.assert_close(result, expected, check_dtype=True)
            assert type(result) is torch.Tensor
        assert low.weight.requires_grad and "grad_fn" in repr(low.weight)
        low.weight.square().sum().backward()
        expected = torch.autograd.grad(product.square().sum(), [low.down.weight, low.up.weight])
        assert_close([low.down.weight.grad, low.up.weight.grad], list(expected), 1e-5)

    def test_autocast_does_not_change_its_type(self):
        low = LowRankLinear.from_linear(make_linear(), 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert low.weight.dtype == torch.float32 and (low.weight + 0).dtype == torch.float32
            assert low(torch.randn(2, 12)).dtype == torch.bfloat16

    def test_it_can_not_be_set(self):
        low = LowRankLinear.from_linear(make_linear(), 4)
        for value in (torch.zeros(20, 12), nn.Parameter(torch.zeros(20, 12))):
            with pytest.raises((AttributeError, KeyError)):
                low.weight = value
        assert list(low.state_dict()) == ["down.weight", "up.weight", "up.bias"]

    def test_compiled_code_reads_it(self):
        low = LowRankLinear.from_linear(make_linear(), 4)

        def forward(x: torch.Tensor) -> torch.Tensor:
            return low(x.to(low.weight.dtype)) + low.weight.sum()

        x = torch.randn(2, 12)
        compiled = torch.compile(forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), forward(x))


def test_merge_multiplies_half_precision_in_fp32(monkeypatch):
    """Also under autocast."""
    low, types = LowRankLinear.from_linear(make_linear(n=64, m=64), 32).to(torch.bfloat16), []
    exact = low.up.weight.float() @ low.down.weight.float()
    multiply = low_rank_file._multiply
    monkeypatch.setattr(low_rank_file, "_multiply", lambda *a: types.extend(t.dtype for t in a) or multiply(*a))
    with torch.autocast("cpu", torch.bfloat16):
        dense = low.to_dense()
    assert torch.equal(dense.weight, exact.to(torch.bfloat16)) and types == [torch.float32] * 2


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_dense_layer_answers_as_its_factors_would(kind):
    layer = make_linear(kind, 6, 5)
    x, seen = torch.randn(3, 6), []
    dense, factors = layer(x), factor_weight(matrix(layer), 2)
    factors = Factors(factors.down.float(), factors.up.float(), torch.ones(5))
    wanted = x @ factors.down.T @ factors.up.T + layer.bias + 1
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    plain = layer.forward
    for own in (None, lambda x: plain(x)):  # somebody else's forward, as accelerate's hooks set it
        if own is not None:
            layer.forward = own
        handle = kind_of(layer).standing_in(factors)
        assert_close(layer(x), wanted)
        handle.remove()
        assert_close(layer(x), dense)
        assert vars(layer).get("forward") is own
    assert len(seen) == 4


def test_the_mode_of_training_reaches_whatever_stands_in_the_layer():
    low = LowRankLinear(6, 5, 2)
    low.up = nn.Sequential(low.up, nn.Dropout())  # as an adapter wraps it
    for mode in (False, True, False):
        assert low.train(mode) is low
        assert {module.training for module in low.modules()} == {mode}
    plain = LowRankLinear(6, 5, 2)
    plain.down.eval()  # by itself
    assert {module.training for module in plain.train().modules()} == {True}
    assert {module.training for module in plain.eval().modules()} == {False}
    for own, holder in [(LowRankLinear(6, 5, 2), ""), (LowRankLinear(6, 5, 2), "up")]:
        own.get_submodule(holder).add_module("noise", nn.Dropout().eval())  # beside the factors, or in one
        assert {module.training for module in own.train().modules()} == {True}
