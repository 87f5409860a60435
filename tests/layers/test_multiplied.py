"""Multiplied out: the same outputs and gradients as pairs, fewer kernels, and pairs wherever it cannot be."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from hf_cuttlefish import LowRankLinear, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.layers.multiplied import MOST_BYTES, in_batches
from hf_cuttlefish.patch.running import RunMultiplied


def make_bert(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 60,
    }
    return BertForSequenceClassification(BertConfig(**sizes | changes))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    bert = make_bert().double().eval()
    factorize(bert, {name: 2 + 2 * (i % 3) for i, name in enumerate(find_targets(bert))})
    return bert.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids[:, 0] % 2}


def no_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def gradients(model: Any, **autocast: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
        out = model(**batch())
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def run_multiplied(model: Any) -> RunMultiplied:
    """In this form; a first forward shows what flows."""
    form = RunMultiplied(model)
    assert form.start() and form.batches is None
    model(**batch())
    assert form.batches
    return form


def test_outputs_and_gradients_are_those_of_pairs(model: Any) -> None:
    no_dropout(model)
    pairs, wanted = gradients(model)
    form = run_multiplied(model)
    found, gradient = gradients(model)
    torch.testing.assert_close(found, pairs, rtol=1e-10, atol=1e-12)
    for name, value in wanted.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-12)
    form.stop()
    assert torch.equal(gradients(model)[0], pairs)


def test_even_ranks_take_the_short_way_to_the_same_end(model: Any) -> None:
    layers = [LowRankLinear(6, 5, 3).double() for _ in range(3)]
    (one,) = in_batches([[layer] for layer in layers])
    x = torch.randn(7, 6, dtype=torch.float64)
    wanted = [layer(x) for layer in layers]
    one.start()
    one.open()
    torch.testing.assert_close([layer(x) for layer in layers], wanted)
    torch.autograd.gradcheck(lambda w: layers[1](w), x.clone().requires_grad_())
    one.stop()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_differs_by_rounding_alone(model: Any, dtype: torch.dtype) -> None:
    layers = [LowRankLinear(64, 48, rank) for rank in (8, 16)]
    (one,) = in_batches([[layer] for layer in layers])
    x = torch.randn(32, 64, requires_grad=True)
    exact = layers[0](x).detach()
    one.start()
    one.open()
    with torch.autocast("cpu", dtype=dtype):
        y = layers[0](x)
    one.stop()
    assert y.dtype == dtype
    assert float((y.detach().float() - exact).norm() / exact.norm()) < 0.01
    y.float().sum().backward()
    assert layers[0].down.weight.grad.dtype == torch.float32
    assert layers[1].down.weight.grad is None  # it did not run


def test_layers_that_read_one_tensor_run_as_one_product(model: Any) -> None:
    form = run_multiplied(model)
    assert form.batches is not None
    assert sorted(len(group) for batch in form.batches for group in batch.groups) == [1] * 6 + [3, 3]
    query = model.bert.encoder.layer[0].attention.self.query
    (own,) = [batch for batch in form.batches if query in batch.layers]
    x, other = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    key = model.bert.encoder.layer[0].attention.self.key
    wanted = query(x), key(x), query(other), key(2 * x), query(2 * x)
    own.open()
    found = [query(x), key(x), query(other)]
    found[0].mul_(1.0)  # in place on a part, as Longformer does on its query
    x.mul_(2)  # in place on what was read: worked out anew
    found += [key(x), query(x)]
    own.close()
    torch.testing.assert_close(found, list(wanted))
    assert all(y.is_contiguous() for y in found)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (3, 0, 6), (2, 1, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_group_takes_inputs_of_every_shape(shape: tuple[int, ...], bias: bool) -> None:
    layers = [LowRankLinear(6, 5, rank, bias=bias).double() for rank in (2, 3, 4)]
    (one,) = in_batches([layers[:2], layers[2:]])
    x = torch.randn(shape, dtype=torch.float64)
    wanted = [layer(x) for layer in layers]
    one.start()
    one.open()
    found = [layer(x) for layer in layers]
    one.stop()
    torch.testing.assert_close(found, wanted)
    found[0].mul_(2)  # in place on one leaves the others alone
    torch.testing.assert_close(found[1:], wanted[1:])


def test_gradients_come_to_those_that_ran_alone() -> None:
    layers = [LowRankLinear(6, 6, rank).double() for rank in (2, 3, 4, 2, 3)]
    (one,) = in_batches([layers[:2], layers[2:4], layers[4:]])
    x = torch.randn(4, 6, dtype=torch.float64)
    used, idle = [layers[0], layers[1], layers[4]], layers[2:4]
    wanted = torch.autograd.grad(_squares(used, x), [p for layer in used for p in layer.parameters()])
    one.start()
    one.open()
    _squares(used, x).backward()
    one.stop()
    torch.testing.assert_close([p.grad for layer in used for p in layer.parameters()], list(wanted))
    assert all(p.grad is None for layer in idle for p in layer.parameters())


def _squares(layers: list[LowRankLinear], x: torch.Tensor) -> torch.Tensor:
    return torch.stack([layer(x).square().sum() for layer in layers]).sum()


def test_second_derivatives_are_those_of_pairs() -> None:
    layers = [LowRankLinear(4, 3, 2).double() for _ in range(2)]
    (one,) = in_batches([layers])
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def penalty() -> list[torch.Tensor]:
        y = layers[0](x).square().sum() + layers[1](x).pow(3).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), [p for layer in layers for p in layer.parameters()]))

    wanted = penalty()
    one.start()
    one.open()
    torch.testing.assert_close(penalty(), wanted)
    one.stop()


class Count(TorchDispatchMode):
    """Operations that launch something, by name; views and empty memory launch nothing."""

    VIEWS = (
        "view",
        "t",
        "transpose",
        "unsqueeze",
        "expand",
        "detach",
        "alias",
        "slice",
        "select",
        "unbind",
        "split",
        "set_",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.VIEWS and "view" not in name and "empty" not in name:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def launches(model: Any) -> int:
    with Count() as count:
        gradients(model, on=True)
    return count.found.total()


def test_it_launches_less_than_dense_layers_do() -> None:
    torch.manual_seed(0)
    model = make_bert(num_hidden_layers=6).train()
    dense = launches(model)
    factorize(model, dict.fromkeys(find_targets(model), 8))
    pairs = launches(model)
    run_multiplied(model)
    multiplied = launches(model)
    assert multiplied < 0.8 * dense < dense < pairs


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_run_as_pairs(model: Any, reentrant: bool) -> None:
    no_dropout(model)
    _, wanted = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    RunMultiplied(model).start()
    gradients(model)
    _, found = gradients(model)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_of_ones_own_is_seen() -> None:
    layers = nn.ModuleList([LowRankLinear(6, 6, 2) for _ in range(2)])
    (one,) = in_batches([[layer] for layer in layers])
    x = torch.randn(3, 6, requires_grad=True)
    one.start()
    one.open()
    y = checkpoint(layers[0], x, use_reentrant=False)
    one.stop()
    y.sum().backward()
    assert layers[0].up.weight.grad is not None


def test_adapters_and_hooks_on_factors_are_heard(model: Any) -> None:
    called: list[int] = []
    run_multiplied(model)
    layer = next(iter(low_rank_layers(model).values()))
    handle = layer.down.register_forward_hook(lambda *_: called.append(1))
    model(**batch())
    assert called
    handle.remove()
    model(**batch())
    assert len(called) == 1


def test_hooks_of_the_layer_itself_fire(model: Any) -> None:
    run_multiplied(model)
    called: list[int] = []
    next(iter(low_rank_layers(model).values())).register_forward_hook(lambda *_: called.append(1))
    model(**batch())
    assert called == [1]


def test_nothing_stays_behind_when_a_forward_fails(model: Any) -> None:
    form = run_multiplied(model)
    with pytest.raises(AttributeError):
        model(input_ids="wrong")
    assert all(not batch.is_open and batch.made is None for batch in form.batches or ())


def test_a_copy_runs_by_itself(model: Any) -> None:
    no_dropout(model)
    run_multiplied(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    wanted, found = gradients(model)[0], gradients(twin)[0]
    assert not torch.equal(wanted, found)
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)


def test_compiled_code_runs_pairs(model: Any) -> None:
    no_dropout(model)
    pairs, wanted = gradients(model)
    run_multiplied(model)
    compiled = torch.compile(model, backend="eager")
    found, _ = gradients(compiled)
    torch.testing.assert_close(found, pairs)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name])
    torch._dynamo.reset()


def test_batches_are_bounded_by_bytes() -> None:
    with torch.device("meta"):
        assert in_batches([[LowRankLinear(4, 4, 2) for _ in range(3)]]) == []
    layers = [LowRankLinear(8, 8, 2) for _ in range(3)] + [LowRankLinear(8, 8, 2, bias=False), LowRankLinear(8, 4, 2)]
    (one,) = in_batches([[layer] for layer in layers])
    assert len(one.layers) == 3
    frozen = [LowRankLinear(8, 8, 2).requires_grad_(False) for _ in range(2)]
    assert in_batches([frozen]) == []
    large = [LowRankLinear(4096, 4096, 1) for _ in range(5)]
    assert [len(b.layers) * 4096 * 4096 * 2 <= MOST_BYTES for b in in_batches([[layer] for layer in large])] == [
        True,
        True,
    ]


def test_in_evaluation_pairs_run(model: Any) -> None:
    form = run_multiplied(model)
    model.eval()
    called: list[int] = []
    next(iter(low_rank_layers(model).values())).down.register_forward_pre_hook(lambda *_: called.append(1))
    with torch.no_grad():
        model(**batch())
    assert called == [1] and not any(b.is_open for b in form.batches or ())


def test_a_first_forward_that_is_broken_off_leaves_no_hooks(model: Any) -> None:
    layers = low_rank_layers(model).values()
    form = RunMultiplied(model)
    form.start()
    model.bert.encoder.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    form.stop()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers) and not model._forward_hooks


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class Break:
    """A hook that ends a forward as Ctrl-C does; torch calls no hooks that are always called then."""

    def __call__(self, *_: Any) -> None:
        raise KeyboardInterrupt


def break_off(model: Any) -> None:
    with model.classifier.register_forward_hook(Break()), pytest.raises(KeyboardInterrupt):
        model(**batch())


def test_of_an_interrupted_forward_nothing_is_used_later(model: Any) -> None:
    no_dropout(model)
    form = RunMultiplied(model)
    form.start()
    gradients(model)
    break_off(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    found = gradients(model.eval())
    assert form.batches and not any(one.is_open or one.made for one in form.batches)
    form.stop()
    torch.testing.assert_close(found, gradients(model))


def test_an_interrupted_first_forward_leaves_no_hooks_behind_the_next(model: Any) -> None:
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules() if name}
    form = RunMultiplied(model)
    form.start()
    break_off(model)
    gradients(model)
    form.stop()
    after = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules() if name}
    assert after == before


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_parametrized_factor_runs_as_a_pair(model: Any) -> None:
    no_dropout(model)
    form = RunMultiplied(model)
    form.start()
    gradients(model)
    nn.utils.parametrize.register_parametrization(next(iter(low_rank_layers(model).values())).up, "weight", Doubled())
    found = gradients(model)
    form.stop()
    torch.testing.assert_close(found, gradients(model))


def test_blocks_that_are_compiled_later_are_whole_graphs(model: Any) -> None:
    form = RunMultiplied(model)
    form.start()
    gradients(model)
    for layer in model.bert.encoder.layer:
        layer.compile(backend="eager", fullgraph=True)
    assert torch.isfinite(gradients(model)[0]).all()
    form.stop()


def test_in_inference_mode_pairs_run(model: Any) -> None:
    """Blocks in evaluation inside a model that trains: their inputs have no version to compare."""
    no_dropout(model)
    form = RunMultiplied(model)
    form.start()
    gradients(model)
    model.bert.eval()
    with torch.inference_mode():
        found = model(**batch()).logits
    form.stop()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, found.clone())
