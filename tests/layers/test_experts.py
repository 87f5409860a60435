"""Experts: the models' own code multiplies by a stack of pairs as by the product, forward and backward, in every implementation."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_cuttlefish import factorize, merge
from hf_cuttlefish.layers.experts import ExpertStack, LowRankExperts, is_transposed
from hf_cuttlefish.layers.kinds import find_layers, kind_of, layer_at
from hf_cuttlefish.layers.stack_views import Pairs, StackView
from tiny_experts import IMPLEMENTED, MODELS, build, stacks, tokens
from tiny_models import aligned

RANK = 4
E, OUT, IN = 3, 16, 24


def cases():
    for name in MODELS:
        for implementation in ("eager", "batched_mm", "grouped_mm") if name in IMPLEMENTED else ("eager",):
            yield name, implementation


@pytest.mark.parametrize(("name", "implementation"), list(cases()))
def test_pairs_do_as_their_product_does(name, implementation, monkeypatch):
    """Logits to rounding, and the gradients of the factors are those that the product's gradient gives: dW down^T, up^T dW."""
    pairs = build(name)
    factorize(pairs, dict.fromkeys(stacks(pairs), RANK))
    dense = merge(copy.deepcopy(pairs))
    if implementation != "eager":
        pairs.set_experts_implementation(implementation)
        dense.set_experts_implementation(implementation)
    wanted = dense(**tokens())
    wanted.loss.backward()
    refused = property(lambda self: pytest.fail("the product was multiplied out"))
    monkeypatch.setattr(Pairs, "dense", refused)
    found = pairs(**tokens())
    found.loss.backward()
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    weights = stacks(dense)
    assert weights
    for layer_name, layer in weights.items():
        pair = layer_at(pairs, layer_name)
        gradient = kind_of(layer).matrix(layer.weight.grad)
        down, up = (factor.detach() for factor in pair.factors)
        for factor, expected in zip(pair.factors, (up.mT @ gradient, gradient @ down.mT), strict=True):
            assert expected.abs().max() > 0
            torch.testing.assert_close(factor.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_loads_and_merges_back(name, tmp_path):
    """Equal logits after saving and loading; merged, the stacks are parameters in their old places, and that loads, too."""
    model = build(name)
    before = {n: tuple(p.shape) for n, p in model.named_parameters()}
    factorize(model, dict.fromkeys(stacks(model), RANK))
    wanted = model(**tokens()).logits
    model.save_pretrained(tmp_path / "pairs")
    loaded, info = type(model).from_pretrained(
        tmp_path / "pairs", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()) and {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    for again in (aligned(loaded), copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(again(**tokens()).logits, wanted)
    merge(loaded)
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == before
    assert not [m for m in loaded.modules() if isinstance(m, LowRankExperts)]
    torch.testing.assert_close(loaded(**tokens()).logits, wanted, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    dense = aligned(type(model).from_pretrained(tmp_path / "dense", experts_implementation="eager"))
    assert torch.equal(dense(**tokens()).logits, loaded(**tokens()).logits)


def test_the_order_of_parameters_is_that_of_the_optimizer():
    """gpt-oss: the biases, which stay the experts' own, come before the factors; a state that goes by position fits again."""
    model = build("gpt-oss")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**tokens()).loss.backward()
    optimizer.step()
    names = list(stacks(model))
    factorize(model, {names[0]: RANK, names[3]: RANK}, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert optimizer.state[layer_at(model, names[0]).down.weight]["exp_avg"].shape == (4, RANK, 32)
    merge(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in build("gpt-oss").named_parameters()]


def test_layouts_are_told_by_the_class_or_by_the_sizes():
    for name in MODELS:
        for layer in stacks(build(name)).values():
            assert layer.transposed is (name in ("gpt-oss", "llama4")), name
    plain = nn.Module()
    plain.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 12))
    plain.down_proj = nn.Parameter(torch.zeros(2, 6, 8))
    assert is_transposed(plain, "down_proj")


def test_a_dense_stack_is_freed_with_its_parameter():
    model = build("mixtral")
    weight = weakref.ref(next(iter(stacks(model).values())).weight)
    factorize(model, dict.fromkeys(stacks(model), RANK))
    gc.collect()
    assert weight() is None
    names = [n for n, layer in find_layers(model) if isinstance(layer, LowRankExperts)]
    assert len(names) == 4 and not stacks(model)


# --- the view ---


@pytest.fixture
def factors():
    torch.manual_seed(0)
    return torch.randn(E, OUT, 8), torch.randn(E, 8, IN)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_view_answers_as_the_product(factors, flipped):
    up, down = factors
    view = StackView(Pairs(up, down), flipped=flipped)
    product = (up @ down).mT if flipped else up @ down
    assert view.shape == product.shape and view.size(-1) == product.shape[-1] and view.dim() == 3 and len(view) == E
    assert view[1].shape == product[1].shape and view[torch.tensor([0, 2])].shape == (2, *product.shape[1:])
    torch.testing.assert_close(view.multiplied_out(), product)
    torch.testing.assert_close(view.mT.multiplied_out(), product.mT)
    torch.testing.assert_close(torch.mul(view, 2), product * 2)
    torch.testing.assert_close(torch.stack([one.multiplied_out() for one in view]), product)
    torch.testing.assert_close(view[:, 1], product[:, 1])
    torch.testing.assert_close(view.float().to(torch.float64).multiplied_out(), product.double())
    with pytest.raises(AttributeError):
        view.no_such_thing  # noqa: B018


def test_a_view_multiplies_in_two_steps_or_by_the_product(factors):
    up, down = factors
    view, product = StackView(Pairs(up, down)), up @ down
    x, bias = torch.randn(5, IN), torch.randn(OUT)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(functional.linear(x, view[2], bias), functional.linear(x, product[2], bias), **close)
    torch.testing.assert_close(x @ view[2].T, x @ product[2].T, **close)
    torch.testing.assert_close(torch.matmul(view[2], x.T), product[2] @ x.T, **close)
    torch.testing.assert_close(torch.bmm(view, x.T.expand(E, IN, 5)), product @ x.T, **close)
    torch.testing.assert_close(torch.einsum("ti,eoi->teo", x, view), torch.einsum("ti,eoi->teo", x, product), **close)


@pytest.mark.parametrize("rank", [3, 8])
def test_a_grouped_product_takes_any_rank(rank):
    """Its kernels want rows of whole 16 bytes: a rank that is none is filled up with zeros."""
    torch.manual_seed(0)
    up, down = torch.randn(E, OUT, rank), torch.randn(E, rank, IN)
    x, ends = torch.randn(9, IN), torch.tensor([4, 4, 9], dtype=torch.int32)
    found = functional.grouped_mm(x, StackView(Pairs(up, down)).mT, offs=ends)
    torch.testing.assert_close(found, functional.grouped_mm(x, (up @ down).mT, offs=ends), rtol=1e-4, atol=1e-4)
    # Sizes are tried with the first ranks of larger factors, whose rows are of any length.
    part = Pairs(functional.pad(up, (0, 3))[..., : up.shape[2]], functional.pad(down, (0, 0, 0, 3))[:, : down.shape[1]])
    again = functional.grouped_mm(x, StackView(part).mT, offs=ends)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_runs_pairs_without_a_break():
    model = build("mixtral")
    factorize(model, dict.fromkeys(stacks(model), RANK))
    model.set_experts_implementation("batched_mm")
    experts = model.model.layers[0].mlp.experts
    x, where, weights = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    with torch.no_grad():
        compiled = torch.compile(experts, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, where, weights), experts(x, where, weights))


def test_a_stack_that_is_gone_says_so():
    layer = next(iter(stacks(build("mixtral")).values()))
    assert isinstance(layer, ExpertStack)
    gc.collect()
    with pytest.raises(ReferenceError, match="gate_up_proj is gone"):
        layer.owner  # noqa: B018
