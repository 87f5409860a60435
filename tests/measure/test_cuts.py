"""Cuts measured side by side: each as if the model had been factorized, and a model that is afterwards as it was."""

import copy

import pytest
import torch

from hf_cuttlefish import factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.kinds import dense_weight
from hf_cuttlefish.maths.factors import decompose, rough_cut
from hf_cuttlefish.measure.cuts import measure_cuts
from tiny_models import BY_NAME


def cuts_of(layers, *ranks):
    parts = {name: decompose(dense_weight(layer).detach()) for name, layer in layers.items()}
    return [{name: rough_cut(part, rank) for name, part in parts.items()} for rank in ranks]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_each_cut_is_the_factorized_model(name):
    model = BY_NAME[name].build().eval()
    layers, batches = find_targets(model), []
    for seed in range(3):
        torch.manual_seed(seed)
        batches.append(BY_NAME[name].inputs())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense, *found = measure_cuts(model, layers, cuts := cuts_of(layers, 8, 2), batches)
    assert dense.divergence == 0 and dense.agreement == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for cut, measured in zip(cuts, found, strict=True):
        small = copy.deepcopy(model)
        factorize(small, {n: f.down.shape[0] for n, f in cut.items()}, factors=cut)
        first = 1 if name == "gpt2" else 0  # nothing comes before the first token
        counts = [int((b["labels"][..., first:] != -100).sum()) for b in batches]
        with torch.no_grad():
            losses = [float(small.eval()(**b).loss) for b in batches]
        expected = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
        assert measured.loss == pytest.approx(expected, rel=1e-4) and measured.divergence > 0
        if name == "gpt2":
            assert measured.perplexity == pytest.approx(2.718281828**expected, rel=1e-4) and measured.accuracy is None


def test_a_model_that_draws_in_evaluation_draws_the_same_for_each_cut():
    """A dropout without training=: a cut that changes nothing was as far from the model as two draws of it."""
    model = BY_NAME["bert"].build().eval()
    model.dropout.forward = lambda x: torch.nn.functional.dropout(x, 0.5)
    layers, batch = find_targets(model), BY_NAME["bert"].inputs()
    dense, same = measure_cuts(model, layers, cuts_of(layers, 32), [batch])
    assert same.loss == pytest.approx(dense.loss, rel=1e-4) and same.divergence == pytest.approx(0, abs=1e-6)


def test_accuracy_is_the_share_of_right_classes():
    model = BY_NAME["bert"].build().eval()
    batch = BY_NAME["bert"].inputs()
    with torch.no_grad():
        batch["labels"] = model(**batch).logits.argmax(-1)
    (found,) = measure_cuts(model, {}, [], [batch])
    assert found.accuracy == 1
    batch["labels"] = (batch["labels"] + 1) % model.config.num_labels
    assert measure_cuts(model, {}, [], [batch])[0].accuracy == 0


def test_without_labels_the_answers_are_compared():
    model = BY_NAME["bert"].build().eval()
    batch = {k: v for k, v in BY_NAME["bert"].inputs().items() if k != "labels"}
    layers = find_targets(model)
    dense, cut = measure_cuts(model, layers, cuts_of(layers, 1), [batch])
    assert dense.loss is None and dense.accuracy is None and 0 <= cut.agreement <= 1 and cut.divergence > 0
