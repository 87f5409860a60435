"""Statistics of experts: each from its own tokens, whatever multiplies by them; what saw too few is left alone, and named."""

import pytest
import torch

from hf_cuttlefish import CuttlefishConfig, estimate_ranks, factorize
from hf_cuttlefish.decide.left import left_blind
from hf_cuttlefish.decide.plan import break_even_rank
from hf_cuttlefish.layers.kinds import kind_of
from hf_cuttlefish.maths.factors import Factors, LayerMoments, cut, decompose
from hf_cuttlefish.measure.batches import Batches
from hf_cuttlefish.measure.gathering import gather_statistics
from hf_cuttlefish.measure.kept import KeptBatches
from hf_cuttlefish.measure.moments import MomentCollector
from tiny_experts import IMPLEMENTED, MODELS, build, stacks, tokens

ALL = ["gate_up_proj", "down_proj"]


class Noting(MomentCollector):
    """Keeps the products of gradients and inputs, which are the gradient of each expert's matrix."""

    def add_to(self, name, at, x, y, g, stride, weight):
        self.seen = getattr(self, "seen", {})
        self.seen[name, at] = self.seen.get((name, at), 0) + stride * g.mT @ x
        if y is not None:
            torch.testing.assert_close(y - y.mean(0), (x - x.mean(0)) @ weight.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(n, "eager") for n in MODELS] + [(n, i) for n in ("mixtral", "gpt-oss") for i in ("batched_mm", "grouped_mm")],
)
def test_each_expert_is_shown_its_tokens(name, implementation, monkeypatch):
    """Inputs and output gradients of each expert multiply to the gradient that autograd has for its matrix."""
    monkeypatch.setattr(Batches, "mean_factor", lambda self, number, device: torch.ones((), device=device))
    model = build(name)
    if implementation != "eager":
        model.set_experts_implementation(implementation)
    layers = stacks(model)
    wanted = model(**tokens()).logits
    collector = Noting(model, layers)
    collector.start()
    output = model(**tokens())
    assert torch.equal(output.logits, wanted)
    output.loss.backward()
    collector.stop()
    for layer_name, layer in layers.items():
        gradient = kind_of(layer).matrix(layer.weight.grad)
        for expert, expected in enumerate(gradient):
            found = collector.seen.get((layer_name, expert), torch.zeros_like(expected))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
        assert isinstance(vars(layer.owner).get(layer.attribute), type(None))
    assert torch.equal(model(**tokens()).logits, wanted)


@pytest.mark.parametrize("name", [n for n in IMPLEMENTED if n in ("mixtral", "gpt-oss", "deepseek-v3")])
def test_implementations_gather_the_same(name):
    found = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = build(name)
        model.set_experts_implementation(implementation)
        found[implementation] = gather_statistics(model, [tokens(i, 4) for i in range(3)], stacks(model))
    for layer_name, wanted in found["eager"].items():
        for other in (found["batched_mm"][layer_name], found["grouped_mm"][layer_name]):
            for one, two in zip(wanted, other, strict=True):
                assert (one is None) == (two is None)
                if one is not None:
                    assert one.tokens == pytest.approx(two.tokens)
                    scale = float(one.signal.abs().max())
                    torch.testing.assert_close(one.signal, two.signal, rtol=1e-3, atol=1e-4 * scale)


def test_a_sample_stands_for_all_tokens_and_is_bounded():
    model = build("mixtral")
    layers = stacks(model)
    counts = {}
    for most in (1024, 8):  # 8 * 8 / 4 tokens an expert
        collector = MomentCollector(model, layers, max_tokens=most)
        sizes = []
        add_to = collector.add_to
        collector.add_to = lambda *a, add_to=add_to, sizes=sizes: (sizes.append(len(a[2])), add_to(*a))[1]
        collector.start()
        model(**tokens(rows=8, length=32)).loss.backward()
        collector.step()
        collector.stop()
        counts[most] = {name: sums["count"] for name, sums in collector.sums.items()}
        assert max(sizes) <= max(16, 8 * most // 4)
    for name, whole in counts[1024].items():
        assert float((whole - counts[8][name]).abs().max()) <= 0.25 * float(whole.max())


def test_loss_aware_factors_lose_less_than_a_plain_cut():
    """What the statistics are for: at equal rank the loss on the tokens that were gathered rises less."""
    torch.manual_seed(0)
    model = build("mixtral")
    batches = [tokens(i, 8, 24) for i in range(4)]
    layers = stacks(model)
    statistics = gather_statistics(model, batches, layers)
    kept = KeptBatches(model)
    kept.start()
    for batch in batches:
        model(**batch)
    kept.stop()
    effects = {}
    for how in ("plain", "aware"):
        factors = {
            name: cut(decompose(kind_of(layer).weight, statistics[name] if how == "aware" else None), 6)
            for name, layer in layers.items()
        }
        effects[how] = kept.effect(layers, factors).divergence
    assert 0 < effects["aware"] < 0.8 * effects["plain"]


def test_standing_in_is_what_the_switch_makes():
    """gpt-oss, with biases: the trial of a cut gives the loss that the factorized model has."""
    model = build("gpt-oss")
    layers = stacks(model)
    statistics = gather_statistics(model, [tokens(i, 8, 24) for i in range(2)], layers)
    kept = KeptBatches(model)
    kept.start()
    model(**tokens())
    kept.stop()
    factors = {name: cut(decompose(kind_of(la).weight, statistics[name]), 6) for name, la in layers.items()}
    assert any(isinstance(f, Factors) and f.bias_shift is not None for f in factors.values())
    tried = kept.effect(layers, factors).loss
    factorize(model, dict.fromkeys(layers, 6), factors=factors)
    assert float(model(**tokens()).loss) == pytest.approx(tried, rel=1e-5)


# --- experts without tokens ---


def blinded(statistics, *experts):
    return {n: [None if i in experts else m for i, m in enumerate(each)] for n, each in statistics.items()}


@pytest.fixture(scope="module")
def gathered():
    model = build("mixtral", num_local_experts=6)
    return model, gather_statistics(model, [tokens(i, 8, 24) for i in range(4)], stacks(model))


def test_an_expert_without_tokens_is_cut_by_its_weight_at_a_safe_rank_and_named(gathered):
    model, statistics = gathered
    config = CuttlefishConfig(target_modules=ALL, target_ratio=0.1, rank_multiple=1)
    free = estimate_ranks(model, config, statistics=statistics)
    held = estimate_ranks(model, config, statistics=blinded(statistics, 1, 4))
    for name, layer in stacks(model).items():
        m, n = kind_of(layer).size
        assert free[name] < break_even_rank(n, m) // 2 <= held[name]
        note = next(note for note in held.notes if note.startswith(name))
        assert "2 of 6 experts saw too few tokens (1, 4) and are cut by their weights alone" in note
    assert not any("too few tokens" in note for note in free.notes)
    weights = torch.randn(3, 8, 10)
    moments = [LayerMoments.from_full(weights[0], torch.eye(10), 4 * torch.eye(8)), None, None]
    d = decompose(weights, moments)
    torch.testing.assert_close(d.spectrum, decompose(weights[0], moments[0]).spectrum)
    plain = decompose(weights[2])
    torch.testing.assert_close(d.up[2] @ d.down[2], plain.up @ plain.down)


def test_a_stack_of_which_most_saw_nothing_stays_dense(gathered):
    model, statistics = gathered
    layers = stacks(model)
    left = left_blind(layers, CuttlefishConfig(), blinded(statistics, 0, 1, 2, 5))
    assert set(left) == set(layers) and "4 of 6 experts saw too few tokens (0, 1, 2, 5)" in next(iter(left.values()))
    assert not left_blind(layers, CuttlefishConfig(), blinded(statistics, 0, 1, 2))
    assert not left_blind(
        layers, CuttlefishConfig(rank_pattern={"gate_up_proj|down_proj": 4}), blinded(statistics, 0, 1, 2, 5)
    )


def test_few_tokens_are_as_good_as_none():
    """An expert that saw fewer than a quarter of its smaller side has no moments: a handful of tokens would decide alone."""
    model = build("mixtral")
    found = gather_statistics(model, [tokens(rows=1, length=6)], stacks(model))
    counts = gather_statistics(model, [tokens(i, 8, 24) for i in range(4)], stacks(model))
    assert all(m is None for each in found.values() for m in each) or not found
    assert all(m is not None for each in counts.values() for m in each)
