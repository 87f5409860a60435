"""Moments gathered by hooks in training steps, against the same moments computed by hand from autograd."""

import pytest
import torch
from torch import nn

from hf_cuttlefish.layers.kinds import dense_weight
from hf_cuttlefish.maths.factors import LayerMoments
from hf_cuttlefish.measure.moments import MomentCollector


class Classifier(nn.Module):
    """Token-wise layers of all shapes, mean pooling over the tokens that count, per-batch mean loss."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.wide, self.narrow, self.square = nn.Linear(6, 10, bias), nn.Linear(10, 6, bias), nn.Linear(6, 6, bias)
        self.head = nn.Linear(6, 3)

    def forward(self, x, labels, mask=None):
        mask = torch.ones(x.shape[:2]) if mask is None else mask
        y = self.square(torch.tanh(self.narrow(torch.relu(self.wide(x)))))
        pooled = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"loss": nn.functional.cross_entropy(self.head(pooled), labels)}


NAMES = ("wide", "narrow", "square")


def by_hand(model, batches):
    """Per-token moments of inputs and of the per-example loss' output gradients, tokens with zero gradient left out.

    An example's squares are divided by the norm of its gradient at `square`, the layer that backward reaches first.
    """
    seen = {name: ([], []) for name in NAMES}
    examples = norms = squares = 0
    for batch in batches:
        kept, handles = {}, []
        for name in NAMES:

            def hook(module, args, output, name=name, kept=kept):
                output.retain_grad()
                kept[name] = (args[0].detach(), output)

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        loss = model(**batch)["loss"] * len(batch["labels"])  # the sum of the examples' losses
        loss.backward()
        examples += len(batch["labels"])
        for handle in handles:
            handle.remove()
        model.zero_grad()
        norm = kept["square"][1].grad.double().square().sum((1, 2)).sqrt()
        norms, squares = norms + norm.sum(), squares + norm.square().sum()
        for name, (x, y) in kept.items():
            g = (y.grad / norm.sqrt()[:, None, None]).reshape(-1, y.shape[-1])
            used = (g != 0).any(-1)
            seen[name][0].append(x.reshape(-1, x.shape[-1])[used])
            seen[name][1].append(g[used])
    result = {}
    for name, (x, g) in seen.items():
        x, g = torch.cat(x).double(), torch.cat(g).double()
        layer = model.get_submodule(name)
        mean = x.mean(0) if layer.bias is not None else None
        centred = x - mean if mean is not None else x
        c, g2 = centred.mT @ centred / len(x), g.mT @ g / len(x) * squares / norms
        result[name] = LayerMoments.from_full(dense_weight(layer), c, g2, mean, len(x) / examples)
    return result


def make_batches(count=3, rows=4, tokens=5, padded=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        batch = {"x": torch.randn(rows, tokens, 6, generator=g) + 0.7, "labels": torch.randint(3, (rows,), generator=g)}
        if padded:
            lengths = torch.randint(1, tokens + 1, (rows, 1), generator=g)
            batch["mask"] = (torch.arange(tokens) < lengths).float()
        batches.append(batch)
    return batches


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, a in ours.items():
        b = theirs[name]
        torch.testing.assert_close(
            a.signal.double(), b.signal, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n} signal {m}"
        )
        torch.testing.assert_close(
            a.metric.double(), b.metric, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n} metric {m}"
        )
        assert a.other_level == pytest.approx(b.other_level, rel=1e-4)
        assert a.tokens == pytest.approx(b.tokens)
        assert (a.mean is None) == (b.mean is None)
        if a.mean is not None:
            torch.testing.assert_close(a.mean.double(), b.mean, rtol=1e-4, atol=1e-6)


def gather(model, batches, accumulate=1, scale=1.0, **kwargs):
    collector = MomentCollector(model, {n: model.get_submodule(n) for n in NAMES}, **kwargs)
    collector.start()
    collector.batches.loss_scale = scale
    for i, batch in enumerate(batches):
        (model(**batch)["loss"] / accumulate * scale).backward()
        if (i + 1) % accumulate == 0:
            collector.step()
    collector.stop()
    return collector


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_moments_equal_those_by_hand(bias, padded):
    model, batches = Classifier(bias), make_batches(padded=padded)
    assert_same(gather(model, batches).moments(), by_hand(model, batches))


def test_accumulation_and_loss_scaling_are_undone():
    model, batches = Classifier(), make_batches(count=6)
    assert_same(gather(model, batches, accumulate=3, scale=2.0**12).moments(), by_hand(model, batches))


def test_padding_does_not_count():
    model, batches = Classifier(), make_batches(padded=True)
    longer = [
        {
            "x": torch.cat([b["x"], torch.full((4, 7, 6), 9.0)], 1),
            "labels": b["labels"],
            "mask": torch.cat([b["mask"], torch.zeros(4, 7)], 1),
        }
        for b in batches
    ]
    assert_same(gather(model, longer).moments(), by_hand(model, batches))


def test_overflow_step_is_left_out():
    model, batches = Classifier(), make_batches(count=4)
    collector = MomentCollector(model, {n: model.get_submodule(n) for n in NAMES})
    collector.start()
    for batch in batches:
        model(**batch)["loss"].backward()
    spoilt = {**batches[0], "x": batches[0]["x"].clone()}
    (model(**spoilt)["loss"] * torch.inf).backward()
    moments = collector.moments()
    assert set(moments) == set(NAMES) and all(torch.isfinite(m.signal).all() for m in moments.values())


def test_weights_of_examples_follow_them_into_windows_and_keep_the_sum_of_squares():
    model = Classifier()
    collector = MomentCollector(model, {n: model.get_submodule(n) for n in NAMES})
    grad = torch.randn(4, 5, 6) * torch.tensor([1.0, 10.0, 0.0, 0.1])[:, None, None]
    norms = grad.flatten(1).norm(dim=1)

    def weighted(batch, grad, rows=4):
        return grad * collector.batches.factors(batch, grad, rows).reshape(*grad.shape[:-1], 1)

    first = weighted(1, grad)
    torch.testing.assert_close(first.flatten(1).norm(dim=1), norms.sqrt())
    squares, total = float(collector.batches.squares), float(collector.batches.norms)
    assert (squares, total) == pytest.approx((float(norms.square().sum()), float(norms.sum())))
    assert float(first.square().sum()) * squares / total == pytest.approx(float(grad.square().sum()))
    torch.testing.assert_close(weighted(1, grad.reshape(4 * 5, 1, 6)).reshape(4, 5, 6), first)
    elsewhere = weighted(1, grad[:3])  # examples that cannot be told apart: the same number for all
    torch.testing.assert_close(elsewhere, grad[:3] * (total / squares) ** 0.5)
    assert not len(weighted(1, grad[:0]))
    flat_first = weighted(2, grad.reshape(4 * 5, 6))  # as OPT has its MLPs
    torch.testing.assert_close(flat_first.reshape(4, 5, 6), first)
    assert float(collector.batches.squares) == pytest.approx(2 * squares)
    assert not weighted(3, torch.zeros(4, 5, 6)).any() and not weighted(3, torch.ones(3, 5, 6)).any()
    spoilt = weighted(4, torch.full((4, 5, 6), torch.inf))
    assert not torch.isfinite(spoilt).any()  # and `add` leaves it out
    assert float(collector.batches.squares) == pytest.approx(2 * squares)


def test_sampling_tokens_keeps_the_scale():
    model, batches = Classifier(), make_batches(count=40, rows=16, tokens=8)
    exact, sampled = by_hand(model, batches), gather(model, batches, max_tokens=32).moments()
    for name in NAMES:
        assert sampled[name].tokens == pytest.approx(exact[name].tokens, rel=0.01)
        assert float(sampled[name].signal.trace()) == pytest.approx(float(exact[name].signal.trace()), rel=0.2)
        assert float(sampled[name].metric.trace()) == pytest.approx(float(exact[name].metric.trace()), rel=0.2)


def test_state_dict_round_trip_goes_on_exactly():
    model, batches = Classifier(), make_batches(count=4)
    whole = gather(model, batches)
    half = gather(model, batches[:2])
    other = MomentCollector(model, {n: model.get_submodule(n) for n in NAMES})
    other.load_state_dict(half.state_dict())
    other.start()
    for batch in batches[2:]:
        model(**batch)["loss"].backward()
        other.step()
    other.stop()
    for name, m in whole.moments().items():
        assert torch.equal(m.signal, other.moments()[name].signal) and torch.equal(
            m.metric, other.moments()[name].metric
        )
    assert other.mean_loss() == whole.mean_loss()
    fewer = MomentCollector(model, {"wide": model.wide})
    fewer.load_state_dict(half.state_dict())  # the others have been excluded since
    assert set(fewer.sums) == {"wide"}
    elsewhere = {key.replace("/wide/", "/elsewhere/"): value for key, value in half.state_dict().items()}
    with pytest.raises(ValueError, match="'elsewhere', which is no target layer"):
        fewer.load_state_dict(elsewhere)


def test_hooks_are_gone_after_stop_and_nothing_random_is_drawn():
    model = Classifier()
    state = torch.random.get_rng_state()
    gather(model, make_batches())
    assert torch.equal(state, torch.random.get_rng_state())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_gradient_checkpointing_gathers_the_same():
    model, batches = Classifier(), make_batches()
    plain = gather(model, batches).moments()
    inner = model.narrow.forward
    for reentrant in (False, True):

        class Checkpointed(Classifier):
            def forward(self, x, labels, mask=None, reentrant=reentrant):
                def block(x):
                    return torch.tanh(self.narrow(torch.relu(self.wide(x))))

                x = x.requires_grad_()
                y = self.square(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant))
                return {"loss": nn.functional.cross_entropy(self.head(y.mean(1)), labels)}

        import torch.utils.checkpoint

        other = Checkpointed()
        other.load_state_dict(model.state_dict())
        assert_same_moments = gather(other, batches).moments()
        for name in NAMES:
            torch.testing.assert_close(assert_same_moments[name].signal, plain[name].signal, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(assert_same_moments[name].metric, plain[name].metric, rtol=1e-4, atol=1e-6)
    assert inner == model.narrow.forward


def test_language_model_terms():
    """Labels of two dimensions count tokens; the Trainer's num_items_in_batch replaces that and the accumulation."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, labels=None, num_items_in_batch=None):
            return {"loss": self.a(x).sum()}

    model = Root()
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    collector = MomentCollector(model, {"a": model.a})
    collector.start()
    model(torch.randn(2, 3, 4), labels=labels)["loss"].backward()
    assert float(collector.batches.total) == 3
    model(torch.randn(2, 3, 4), labels=labels, num_items_in_batch=torch.tensor(10))["loss"].backward()
    assert float(collector.batches.total) == 6 and float(collector.batches.terms) == 10
    collector.stop()


class _Gather(torch.autograd.Function):
    """As ZeRO-3 does it: before a layer's backward its weight is gathered again, after the taps have run."""

    @staticmethod
    def forward(ctx, y, layer):
        ctx.layer = layer
        return y.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.layer.weight.data = ctx.layer.held
        return gradient, None


@pytest.mark.parametrize(("m", "n"), [(4, 8), (8, 4), (4, 4)])
def test_weights_may_be_gone_between_forward_and_backward(m, n):
    """A tap looked at the shape of an empty weight."""

    def take_away(module, args, y):
        module.weight.data = torch.empty(0)
        return _Gather.apply(y, module)

    sums = []
    for is_divided in (False, True):
        torch.manual_seed(0)
        layer, x = nn.Linear(n, m), torch.randn(5, n, requires_grad=True)
        net = nn.Sequential(layer)
        if is_divided:
            layer.weight.ds_shape, layer.held = layer.weight.shape, layer.weight.data
            layer.weight.data = torch.empty(0)
            layer.register_forward_pre_hook(lambda module, args: setattr(module.weight, "data", module.held))
            layer.register_forward_hook(take_away)
        collector = MomentCollector(net, {"0": layer}, in_parts=is_divided)
        collector.start()
        net(x).square().sum().backward()
        collector.stop()
        sums.append(collector.sums["0"])
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value)


def test_a_model_in_double_precision_is_gathered():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6)).double()
    collector = MomentCollector(model, {"0": model[0], "1": model[1]})
    collector.start()
    model(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
    collector.step()
    collector.stop()
    assert set(collector.moments()) == {"0", "1"}
