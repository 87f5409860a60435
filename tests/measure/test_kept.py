"""Kept batches: what a cut does to loss and outputs, and a model that is afterwards as it was."""

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

from hf_cuttlefish import factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.kinds import dense_weight
from hf_cuttlefish.maths.factors import Factors
from hf_cuttlefish.measure.kept import BATCHES, KeptBatches, standing_in
from tiny_models import BY_NAME, RANK


@pytest.fixture
def model():
    return BY_NAME["bert"].build().train()


def factors_of(layers):
    """Plain truncated SVDs."""
    found = {}
    for name, layer in layers.items():
        u, s, v = torch.linalg.svd(dense_weight(layer).detach().double(), full_matrices=False)
        root = s[:RANK].sqrt()
        found[name] = Factors((root[:, None] * v[:RANK]).float(), (u[:, :RANK] * root).float())
    return found


def train(model, kept, count=6):
    torch.manual_seed(3)
    kept.start()
    for _ in range(count):
        model(**BY_NAME["bert"].inputs()).loss.backward()
        model.zero_grad()
    kept.stop()


def test_the_last_batches_of_training_are_kept(model):
    kept = KeptBatches(model)
    train(model, kept)
    with torch.no_grad():
        model(**BY_NAME["bert"].inputs())
    assert len(kept) == BATCHES


def test_the_effect_is_that_of_the_factorized_model(model):
    kept, layers = KeptBatches(model), find_targets(model)
    train(model, kept)
    pairs = factors_of(layers)
    before, effect = kept.effect(layers, {}), kept.effect(layers, pairs)
    small = copy.deepcopy(model)
    factorize(small, dict.fromkeys(layers, RANK), factors=pairs)
    small.eval()
    losses, divergences = [], []
    with torch.no_grad():
        for kept_batch in kept._kept:
            new, old = small(**kept_batch.given), model.eval()(**kept_batch.given)
            losses.append(float(new.loss))
            p, q = old.logits.log_softmax(-1), new.logits.log_softmax(-1)
            divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert effect.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert effect.divergence == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert effect.loss != pytest.approx(before.loss, rel=1e-3)
    assert before.divergence == 0


def test_no_more_is_looked_at_than_is_needed(model):
    kept, layers = KeptBatches(model), find_targets(model)
    train(model, kept)
    calls, factors = [], factors_of(layers)
    whole, modes = kept.effect(layers, factors), [m.training for m in model.modules()]
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    part = kept.effect(layers, factors, whole.divergence / 100)
    assert len(calls) == 1 and not part.is_whole and whole.divergence / 100 < part.divergence < whole.divergence
    calls.clear()
    assert kept.effect(layers, factors, whole.divergence) == whole and whole.is_whole
    assert len(calls) == BATCHES
    handle.remove()
    assert [m.training for m in model.modules()] == modes


def test_the_model_is_as_it_was(model):
    kept, layers = KeptBatches(model), find_targets(model)
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    train(model, kept)
    next(iter(layers.values())).eval()  # a mode of its own, as of a frozen part
    modes, weights = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    kept.effect(layers, factors_of(layers))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Drawing(nn.Module):
    """Draws in evaluation too, as models that mask patches do, and counts its forwards."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2))
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x, labels, cache=None):
        self.seen += 1
        self.calls += 1
        for layer in self.layers:
            x = x + nn.functional.dropout(layer(x), 0.5)
        return {"loss": nn.functional.cross_entropy(x, labels), "logits": x}


def test_a_model_that_draws_in_evaluation_draws_the_same_for_each_cut():
    """The divergence of a cut that changes nothing was that of two draws, and decided the size; training drew on from there."""
    model, generator = Drawing(), torch.Generator().manual_seed(1)
    layers = {"layers.0.0": model.layers[0][0], "layers.1.0": model.layers[1][0]}
    kept = KeptBatches(model)
    kept.start()
    for _ in range(BATCHES):
        model(torch.randn(8, 32, generator=generator), torch.randint(0, 32, (8,), generator=generator))
    kept.stop()
    whole = {name: Factors(layer.weight.detach().clone(), torch.eye(32)) for name, layer in layers.items()}
    state = torch.get_rng_state()
    before, effect = kept.effect(layers, {}), kept.effect(layers, whole)
    assert effect.loss == pytest.approx(before.loss, rel=1e-6) and abs(effect.divergence) < 1e-6
    assert torch.equal(torch.get_rng_state(), state)
    assert model.seen.item() == model.calls == BATCHES


def test_a_batch_that_comes_with_a_cache_is_left_out():
    """The forwards of the trial would make it longer one after the other, and see other texts each."""
    model = Drawing()
    kept = KeptBatches(model)
    kept.start()
    for cache in (None, DynamicCache(), None):
        model(torch.randn(8, 32), torch.zeros(8, dtype=torch.long), cache=cache)
    kept.stop()
    assert len(kept) == 2


def test_hooks_go_even_when_a_forward_fails(model):
    kept, layers = KeptBatches(model), find_targets(model)
    train(model, kept)
    wrong = {name: Factors(f.down[:, :-1], f.up) for name, f in factors_of(layers).items()}
    kept.effect(layers, {})
    with pytest.raises(RuntimeError):
        kept.effect(layers, wrong)
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


def test_the_state_goes_round(model):
    kept, layers = KeptBatches(model), find_targets(model)
    train(model, kept)
    again = KeptBatches(model)
    again.load_state_dict(kept.state_dict())
    assert len(again) == len(kept)
    assert again.effect(layers, {}) == kept.effect(layers, {})


def test_batches_are_kept_as_they_were_and_can_be_stored(tmp_path):
    """A loop that fills one buffer in place, and gives it as inputs and as labels."""
    model, ids = BY_NAME["gpt2"].build().train(), torch.zeros(2, 5, dtype=torch.long)
    kept = KeptBatches(model)
    kept.start()
    for step in range(2):
        model(input_ids=ids.fill_(step + 3), labels=ids).loss.backward()
    kept.stop()
    save_file(kept.state_dict(), tmp_path / "kept.safetensors")
    stored = load_file(tmp_path / "kept.safetensors")
    assert [int(stored[f"kept/{i}/{name}"][0, 0]) for i in range(2) for name in ("input_ids", "labels")] == [3, 3, 4, 4]


def test_a_state_that_is_not_whole_is_said(model):
    kept = KeptBatches(model)
    train(model, kept)
    flat = kept.state_dict()
    for broken, message in (
        ({k: v for k, v in flat.items() if k != "kept/1/"}, "do not say in what precision"),
        ({**flat, "kept/": flat["kept/1/"]}, "is no batch's"),
        ({**flat, "kept/x/input_ids": flat["kept/1/"]}, "is no batch's"),
    ):
        with pytest.raises(ValueError, match=message):
            kept.load_state_dict(broken)
    assert len(kept) == BATCHES


def test_a_model_without_scores_has_no_divergence():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return {"loss": self.a(x).square().mean()}

    model = Plain()
    kept = KeptBatches(model)
    kept.start()
    model(x=torch.ones(2, 8))
    kept.stop()
    effect = kept.effect({"a": model.a}, factors_of({"a": model.a}))
    assert effect.divergence is None
    assert effect.loss > 0


def test_a_batch_given_by_position_counts_as_by_name(model):
    """`model(input_ids, attention_mask, labels=labels)` measured nothing, and the size was the one for runs without a measure."""
    batch = BY_NAME["bert"].inputs()
    found = []
    for positional in (False, True):
        kept, layers = KeptBatches(model), find_targets(model)
        kept.start()
        model(batch["input_ids"], **{k: v for k, v in batch.items() if k != "input_ids"}) if positional else model(
            **batch
        )
        kept.stop()
        assert len(kept) == 1
        again = KeptBatches(model)
        again.load_state_dict(kept.state_dict())
        found += [kept.effect(layers, factors_of(layers)), again.effect(layers, factors_of(layers))]
    assert found[0].divergence > 0 and found[0].loss > 0 and found == [found[0]] * 4


def test_a_batch_that_has_no_names_is_left_out():
    class Anything(nn.Linear):
        def forward(self, *inputs):
            return {"loss": super().forward(inputs[0]).square().mean()}

    model = Anything(4, 4)
    kept = KeptBatches(model)
    kept.start()
    model(torch.ones(2, 4)), model.eval()
    assert len(kept) == 0


def with_norm(norm):
    """A classifier of 6 numbers in 3 classes, with a norm between two layers."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 8), norm(8), nn.Linear(8, 3)

        def forward(self, x, labels):
            logits = self.last(self.norm(self.first(x)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    return Net().train()


def test_norms_that_processes_share_wait_for_nobody(monkeypatch):
    """The main process measures alone: in training a SyncBatchNorm would wait for the others (and on a CPU it raises)."""
    found = []
    for norm in (nn.BatchNorm1d, nn.SyncBatchNorm):
        model = with_norm(norm)
        kept = KeptBatches(model)
        kept.start()
        torch.manual_seed(1)
        for _ in range(3):
            model(x=torch.randn(5, 6), labels=torch.tensor([0, 1, 2, 0, 1]))
        kept.stop()
        before = {n: v.clone() for n, v in model.state_dict().items()}
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        found.append(kept.effect({}, {}).loss)
        monkeypatch.undo()
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()) and model.norm.training
    assert found[0] == found[1]


def test_an_interruption_at_any_line_leaves_no_layer_that_answers_for_a_cut(model):
    layers = find_targets(model)
    factors = factors_of(layers)
    code = standing_in.__wrapped__.__code__
    for nth in range(1, 1000):
        seen = 0

        def come_by(frame, event, _, nth=nth):
            nonlocal seen
            if frame.f_code is not code:
                return None
            seen += event == "line"
            if event == "line" and seen == nth:
                raise KeyboardInterrupt
            return come_by

        outer, interrupted = sys.gettrace(), False
        sys.settrace(come_by)
        try:
            with standing_in(model, layers, factors):
                pass
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(outer)
        assert interrupted == (seen >= nth)
        left = [n for n, m in model.named_modules() if "forward" in vars(m) or m._forward_hooks]
        assert not left, (nth, left)
        if seen < nth:
            break
    assert nth > 2 * len(layers)
