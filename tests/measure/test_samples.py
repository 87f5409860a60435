"""Samples of several layers added in one batch: the same sums as one by one, in bounded memory, before the weights move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.steps.operations import Count
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure import moments, samples
from hf_cuttlefish.measure.moments import MomentCollector
from hf_cuttlefish.measure.samples import Sample, add_samples


def make_bert() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 60,
    }
    return BertForSequenceClassification(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))


def gather(together: bool, checkpointing: bool | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model = make_bert().train().to(dtype)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    # A weight that has moved would show; a bias that has is in the outputs, and not in what is worked out from the inputs.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.5)
    collector = MomentCollector(model, find_targets(model), max_tokens=12)
    collector.together = together
    collector.start()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(5, 60, (4, 8), generator=generator)
        model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        assert not collector._waiting
        optimizer.step()
        optimizer.zero_grad()
        collector.step()
    collector.stop()
    return collector


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("most", [2**27, 3000, 0])
def test_together_is_one_by_one(monkeypatch: pytest.MonkeyPatch, checkpointing: bool | None, most: int) -> None:
    monkeypatch.setattr(moments, "MOST_BYTES", most)
    one, together = gather(False, checkpointing).moments(), gather(True, checkpointing).moments()
    assert set(one) == set(together) and len(one) == 18
    for name, moments_of_one in one.items():
        for key in ("signal", "metric", "other_level", "mean", "tokens"):
            found, wanted = (torch.as_tensor(getattr(m, key)) for m in (together[name], moments_of_one))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7 if key == "signal" else 1e-9)


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_an_overflow_in_one_layer_leaves_out_that_layer_alone(wrong: float) -> None:
    def sample(size: float) -> Sample:
        return Sample(torch.ones(3, 4), None, torch.full((3, 5), size), 2, torch.ones(5, 4))

    shapes = {"signal": (4, 4), "metric": (4, 4), "x": (4,), "count": (), "other": (), "y": (5,)}
    sums = [{key: torch.zeros(shape) for key, shape in shapes.items()} for _ in range(2)]
    add_samples(sums, [sample(1.0), sample(wrong)], 0.5)
    assert float(sums[0]["count"]) == 6 and float(sums[0]["signal"][0, 0]) == 2 * 3 * 2.5**2
    assert all(float(value.abs().sum()) == 0 for value in sums[1].values())


def test_waiting_samples_count_what_they_keep_alive() -> None:
    """The whole gradient that a few tokens are picked from, unless it is large; an input that layers share once."""
    waiting, x = samples.Waiting(), torch.zeros(10, 4)

    def add(tokens: int) -> Sample:
        waiting.add({}, Sample(x, None, torch.zeros(tokens, 5)[:: tokens // 10], tokens // 10, torch.ones(5, 4)))
        return waiting[-1][1]

    kept = add(40)
    assert waiting.nbytes == x.nbytes + 40 * 5 * 4 and kept.g.untyped_storage().nbytes() == 40 * 5 * 4
    many = samples.LONE_BYTES // 20 // 10 * 10 + 10
    copied = add(many)
    assert waiting.nbytes == x.nbytes + 40 * 5 * 4 + 10 * 5 * 4 and copied.g.untyped_storage().nbytes() == 10 * 5 * 4
    assert [len(same) for same in waiting.take()] == [1, 1]
    assert not waiting and waiting.nbytes == 0


def test_a_gathering_step_launches_little_more_than_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host's launches set the pace. Added in three parts, as a BERT-base, 32 x 128, does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=12, **sizes)).train()
    collector, optimizer = MomentCollector(model, find_targets(model), 8), torch.optim.AdamW(model.parameters())
    collector.together, adds = True, []

    def step() -> int:
        with Count() as launches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=torch.ones(4, 8, dtype=torch.long), labels=torch.zeros(4, dtype=torch.long)).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        collector.step()
        return launches.count

    step()
    ordinary = step()
    monkeypatch.setattr(moments, "MOST_BYTES", 40_000)
    monkeypatch.setattr(moments, "add_samples", lambda *args: adds.append(len(args[0])) or add_samples(*args))
    collector.start()
    step()
    adds.clear()
    gathering = step()
    collector.stop()
    assert sum(adds) == 72 and len(adds) == 12  # four kinds, three times
    assert gathering - ordinary <= ordinary / 3, (ordinary, gathering)


@pytest.mark.parametrize("whole", [True, False])
def test_a_backward_that_raises_leaves_no_samples(whole: bool) -> None:
    """They would wait across optimizer steps, and no later backward would ask for its own to be added."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(5, 6)
    collector = MomentCollector(net, {"0": net[0], "1": net[1]})
    collector.together = True
    collector.start()

    def out_of_memory(gradient: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    between = net[0](x)
    between.register_hook(out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        net[1](between).square().sum().backward()
    assert collector._waiting
    if whole:  # caught, and the next batch tried
        net(x).square().sum().backward()
    collector.step()
    assert not collector._waiting
    if whole:
        assert {float(collector.sums[name]["count"]) for name in ("0", "1")} == {5.0}
    collector.stop()
