"""What a model says of a batch: next tokens where they are labels, in bounded memory, and one loss whatever the way."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cuttlefish.measure import scores
from hf_cuttlefish.measure.kept import KeptBatches
from hf_cuttlefish.measure.scores import scores_of

CLASSES = 50


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=CLASSES, **sizes)).eval()


def batch(prompt=0, rows=3, tokens=12):
    torch.manual_seed(1)
    ids = torch.randint(CLASSES, (rows, tokens))
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[0, -2:] = -100
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def expected(model, given):
    output = model(**given)
    used = given["labels"][:, 1:] != -100
    return output.logits[:, :-1][used].log_softmax(-1), output.loss


@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 5])
def test_scores_are_of_the_labels_that_follow(model, prompt):
    given = batch(prompt)
    found, (logs, loss) = scores_of(model, given), expected(model, given)
    assert torch.allclose(found.log_probabilities, logs, atol=1e-5)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)


@torch.no_grad()
def test_a_model_that_names_no_output_layer_gives_all_scores(model, monkeypatch):
    given = batch()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    found, (logs, loss) = scores_of(model, given), expected(model, given)
    assert torch.allclose(found.log_probabilities, logs, atol=1e-5)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)


@torch.no_grad()
def test_a_model_that_gives_all_scores_says_the_same(model):
    class Whole(nn.Module):  # without logits_to_keep
        def __init__(self):
            super().__init__()
            self.inner, self.loss_function = model, model.loss_function

        def forward(self, input_ids, labels):
            return self.inner(input_ids=input_ids, labels=labels)

    one, other = scores_of(model, batch(5)), scores_of(Whole(), batch(5))
    assert torch.allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


@torch.no_grad()
def test_a_large_vocabulary_is_seen_at_some_positions(model, monkeypatch):
    monkeypatch.setattr(scores, "ENTRIES", 3 * 4 * CLASSES)
    asked = []
    model.lm_head.register_forward_hook(lambda module, args, output: asked.append(output.shape))
    found = scores_of(model, batch(2))
    assert asked == [(3, 4, CLASSES)]
    assert len(found.log_probabilities) in range(9, 13)  # without those that have no label
    assert 0 < found.loss < 10
    plain = {"input_ids": batch()["input_ids"]}  # somebody else has the labels
    assert scores_of(model, plain).log_probabilities.shape == (12, CLASSES)


@torch.no_grad()
def test_a_batch_without_a_label_says_nothing(model):
    given = batch()
    given["labels"][:] = -100
    found = scores_of(model, given)
    assert found.log_probabilities is None and found.loss is None


def test_what_trl_asks_of_its_fused_head_is_not_kept(model):
    forward = model.forward
    model.forward = lambda fused_lm_head=False, **kwargs: {} if fused_lm_head else forward(**kwargs)
    kept = KeptBatches(model)
    kept.start()
    model(**batch(), fused_lm_head=True)
    kept.stop()
    effect = kept.effect({}, {})
    assert effect.divergence == 0 and effect.loss > 0
