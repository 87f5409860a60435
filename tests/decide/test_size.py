"""How small: by bisection over sizes that are tried on kept batches."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_cuttlefish import CuttlefishConfig
from hf_cuttlefish.decide.ranks import plan_ranks
from hf_cuttlefish.decide.rules import DEFAULT_RATIO, LayerSpectrum
from hf_cuttlefish.decide.size import (
    BOUNDED_SIZES,
    DENSE,
    DIVERGENCE,
    LEARNING_SIZES,
    SIZES,
    TOKEN_DIVERGENCE,
    TOKEN_SIZES,
    UNSETTLED,
    measured_size,
)
from hf_cuttlefish.maths.factors import decompose, rough_cut
from hf_cuttlefish.measure.kept import Effect, KeptBatches

WIDTH, CLASSES = 64, 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x, labels):
        logits = self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Told:
    """Stands in for kept batches: the effect follows from the share that is kept, as a test says."""

    def __init__(self, divergence, loss=1.0, of_tokens=False):
        self.divergence, self.loss, self.asked, self.of_tokens = divergence, loss, [], of_tokens

    def __len__(self):
        return 4

    def effect(self, layers, factors, most=None):
        if not factors:
            return Effect(self.loss, 0.0, self.of_tokens)
        kept = sum(f.down.numel() + f.up.numel() for f in factors.values()) / (2 * WIDTH * WIDTH)
        self.asked.append(kept)
        return Effect(self.loss + self.divergence(kept), self.divergence(kept), self.of_tokens)


@pytest.fixture
def parts_of_model():
    """The layers, their spectra and their decompositions, and the model."""
    model = Net()
    layers = {"a": model.a, "b": model.b}
    parts = {name: decompose(layer.weight.detach()) for name, layer in layers.items()}
    spectra = {name: LayerSpectrum(WIDTH, WIDTH, None, d.spectrum, 1.0) for name, d in parts.items()}
    return layers, spectra, parts, model


def choose(parts_of_model, kept, alignment=None, **config):
    layers, spectra, parts, _ = parts_of_model
    config = CuttlefishConfig(rank_multiple=1, **config)
    return measured_size(layers, spectra, parts, config, kept, alignment, None, {})[:2]


@pytest.mark.parametrize("least", [0.0, 0.29, 0.34, 0.39, 0.44, 0.49, 0.59, 0.69, 0.79, 0.9])
def test_the_smallest_size_within_bounds(parts_of_model, least):
    kept = Told(lambda share: 0.0 if share >= least - 0.02 else 1.0)
    size, note = choose(parts_of_model, kept)
    assert size == next((s for s in SIZES if s >= least), SIZES[-1])
    assert len(kept.asked) <= 3
    assert f"size {size:g}" in note


def test_the_divergence_is_a_share_of_the_loss(parts_of_model):
    for loss, expected in ((1.0, SIZES[0]), (0.5, SIZES[-1])):
        assert choose(parts_of_model, Told(lambda share: 0.9 * DIVERGENCE, loss))[0] == expected


def test_a_run_with_much_to_learn_keeps_the_usual_size(parts_of_model):
    harmless = Told(lambda share: 0.0)
    assert choose(parts_of_model, harmless, UNSETTLED + 0.01)[0] == DEFAULT_RATIO
    assert choose(parts_of_model, harmless, UNSETTLED - 0.01)[0] == SIZES[0]


@pytest.mark.parametrize("sizes", [SIZES, LEARNING_SIZES, TOKEN_SIZES, BOUNDED_SIZES])
def test_sizes_rise(sizes):
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize("least", [0.29, 0.49, 0.59, 0.79, 0.89, 0.95])
def test_a_language_model_may_keep_more_or_all(parts_of_model, least):
    kept = Told(lambda share: 0.9 * TOKEN_DIVERGENCE if share >= least - 0.02 else 1.1 * TOKEN_DIVERGENCE, 3.0, True)
    size, note = choose(parts_of_model, kept)
    assert size == next((s for s in TOKEN_SIZES if s >= least), DENSE)
    assert len(kept.asked) <= 4
    assert ("no size is within bounds" in note) == (least > TOKEN_SIZES[-1])


def test_what_will_be_relearnt_is_left_to_the_usual_sizes(parts_of_model):
    """Runs from random weights, and those whose weights still travel straight: their loss falls further than a cut lifts it."""
    layers, spectra, parts, model = parts_of_model
    rise = Told(lambda share: 0.2, 3.0, True)
    assert choose(parts_of_model, Told(lambda share: 0.2, 3.0))[0] == SIZES[-1]
    assert choose(parts_of_model, Told(lambda share: 0.2, 3.0), UNSETTLED + 0.01)[0] == DEFAULT_RATIO
    assert choose(parts_of_model, rise)[0] == DENSE
    assert choose(parts_of_model, rise, UNSETTLED + 0.01)[0] == DEFAULT_RATIO
    random = {n: replace(s, initial_stable_rank=s.full_rank / 4) for n, s in spectra.items()}
    assert choose((layers, random, parts, model), rise)[0] == LEARNING_SIZES[0]
    pretrained = {n: replace(s, initial_stable_rank=3.0) for n, s in spectra.items()}
    assert choose((layers, pretrained, parts, model), rise)[0] == DENSE


def test_a_bound_that_no_size_keeps_keeps_all(parts_of_model):
    size, note = choose(parts_of_model, Told(lambda share: 0.5), max_loss_increase=0.1)
    assert size == DENSE and "allowed: loss 1.1" in note


@pytest.mark.parametrize("least", [0.1, 0.25, 0.45, 0.7])
def test_a_bound_holds_where_the_labels_are_kept_from_the_model(parts_of_model, least):
    """Label smoothing and losses of one's own: no loss on the kept batches, so what the cut does to the outputs counts."""
    layers, spectra, parts, _ = parts_of_model
    kept = Told(lambda share: 0.05 if share >= least - 0.02 else 0.2)
    told = kept.effect
    kept.effect = lambda layers, factors, most=None: replace(told(layers, factors), loss=None)
    config = CuttlefishConfig(rank_multiple=1, max_loss_increase=0.1)
    size, _, _ = measured_size(layers, spectra, parts, config, kept, None, 1.0, {})
    assert size == least and kept.asked


def test_what_was_measured_comes_with_its_ranks(parts_of_model):
    layers, spectra, parts, _ = parts_of_model
    kept, config = Told(lambda share: 0.0 if share >= 0.4 else 1.0), CuttlefishConfig(rank_multiple=1)
    size, _, tried = measured_size(layers, spectra, parts, config, kept, None, None, {})
    plan = plan_ranks(spectra, CuttlefishConfig(rank_multiple=1, target_ratio=size))
    assert len(tried) == len(kept.asked) == len({tuple(ranks.values()) for ranks, _ in tried})
    assert [effect.divergence for ranks, effect in tried if ranks == dict(plan)] == [0.0]


def test_a_cut_that_two_sizes_share_is_measured_once(parts_of_model):
    layers, spectra, parts, _ = parts_of_model
    kept, config = Told(lambda share: 1.0), CuttlefishConfig(rank_multiple=WIDTH // 2, rank_pattern={"a": 2, "b": 2})
    measured_size(layers, spectra, parts, config, kept, None, None, {})
    assert len(kept.asked) == 1


def test_no_loss_is_told_of_a_part_of_the_batches(parts_of_model):
    kept = Told(lambda share: 0.0 if share >= 0.4 else 0.5)
    told = kept.effect

    def in_part(layers, factors, most=None):
        effect = told(layers, factors)
        return replace(effect, is_whole=most is None or effect.divergence <= most)

    kept.effect = in_part
    _, note = choose(parts_of_model, kept)
    assert ": outputs >0.5" in note and "loss 1.5" not in note and ": loss 1, outputs 0" in note


def test_nothing_measured_nothing_said(parts_of_model):
    assert choose(parts_of_model, KeptBatches(parts_of_model[3])) == (None, "")
    without_scores = Told(lambda share: 0.0)
    without_scores.effect = lambda layers, factors, most=None: Effect(1.0, None)
    assert choose(parts_of_model, without_scores) == (None, "")


@pytest.mark.parametrize("bound", [0.001, 0.05, 0.3])
def test_a_bound_on_the_loss_holds_on_the_kept_batches(parts_of_model, bound):
    layers, spectra, parts, model = parts_of_model
    g = torch.Generator().manual_seed(1)
    for _ in range(60):  # a loss worth the name
        x = torch.randn(32, WIDTH, generator=g)
        loss = model(x=x, labels=x[:, :CLASSES].argmax(-1))["loss"]
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.3 * p.grad)
    parts = {name: decompose(layer.weight.detach()) for name, layer in layers.items()}
    spectra = {name: LayerSpectrum(WIDTH, WIDTH, None, d.spectrum, 1.0) for name, d in parts.items()}
    kept = KeptBatches(model)
    kept.start()
    for _ in range(4):
        x = torch.randn(32, WIDTH, generator=g)
        model(x=x, labels=x[:, :CLASSES].argmax(-1))
    kept.stop()
    size, _ = choose((layers, spectra, parts, model), kept, max_loss_increase=bound)

    def rise(ratio):
        plan = plan_ranks(spectra, CuttlefishConfig(rank_multiple=1, target_ratio=ratio))
        cut = {name: rough_cut(parts[name], rank) for name, rank in plan.items()}
        before = kept.effect(layers, {}).loss
        return kept.effect(layers, cut).loss / before - 1

    assert rise(size) <= bound or size == BOUNDED_SIZES[-1]
    smaller = [s for s in BOUNDED_SIZES if s < size]
    assert not smaller or rise(smaller[-1]) > bound
