"""Long and large: memory and time that stay flat, plans without weights, and how much a switch holds at its peak."""

import gc
import json
import os
import statistics
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers as hf
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, estimate_ranks, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.history import MOST_CHECKS
from hf_cuttlefish.switch import plan_and_factors as choose

LONG = os.environ.get("CUTTLEFISH_LONG") == "1"
LAYERS, CHECKS, WIDTH = (1000, 1000, 4) if LONG else (100, 600, 4)
"""More checks than the history keeps; with CUTTLEFISH_LONG=1 a thousand of a thousand layers, about two minutes."""
SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
"""Llama-2-7B."""


class Deep(nn.Module):
    """Many square layers one after the other; the residuals keep gradients alive."""

    def __init__(self, layers, width, bias=True):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width, bias=bias)) for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = x + 0.01 * block(x)
        return x


def hooks(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def test_many_checks_of_many_layers():
    """History bounded, memory and time a check flat, no hook before the statistics and none after the end."""
    model = Deep(LAYERS, WIDTH)
    config = CuttlefishConfig(check_steps=1, switch_step=10 * CHECKS, rank_multiple=1)
    cuttlefish = Cuttlefish(model, torch.optim.SGD(model.parameters(), lr=0.1), config, total_steps=10 * CHECKS)
    assert len(cuttlefish.layers) == LAYERS
    cuttlefish.schedule.switch_at = None  # a fixed step needs no checks; this run is to make them all the same
    process, seconds, held = psutil.Process(), [], []
    gc.collect()
    for check in range(CHECKS):
        started = time.process_time()
        cuttlefish.watch.measure(cuttlefish.global_step)
        seconds.append(time.process_time() - started)
        if check % 50 == 49:
            cuttlefish.note_save()  # as a run that saves does
            held.append(process.memory_info().rss)
    assert len(cuttlefish.watch.history.steps) <= MOST_CHECKS and cuttlefish.watch.history.steps[0] == 0
    assert hooks(model) == 2  # no step has been taken: the terms of the first one are to be counted
    assert len(json.dumps(cuttlefish.state_dict())) < 25 * MOST_CHECKS * LAYERS
    early, late = seconds[100:200], seconds[-100:]
    assert statistics.median(late) < 2 * statistics.median(early)
    # From when the history is full on: what is measured takes the place of what is dropped.
    assert max(held[-4:]) - held[len(held) * 6 // 10] < 16e6
    cuttlefish.close()


def test_hooks_are_there_while_statistics_are_gathered_and_gone_afterwards():
    model = Deep(50, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = CuttlefishConfig(switch_step=4, statistics_steps=2, rank_multiple=1, target_ratio=0.6, on_error="raise")
    cuttlefish, counts = Cuttlefish(model, optimizer, config, total_steps=8), []
    for _ in range(8):
        counts.append(hooks(model))
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
    cuttlefish.end()
    assert cuttlefish.switch_step == 4
    assert counts[:2] == [2, 0] and min(counts[2:4]) > 50 and counts[4:] == [0] * 4 and hooks(model) == 0


# --- without weights ---


@pytest.fixture(scope="module")
def seven():
    with torch.device("meta"):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SEVEN))


@pytest.mark.parametrize(
    "config", [{"rank_rule": "ratio"}, {"rank_rule": "ratio", "rank_ratio": 0.1}, {"target_ratio": 0.4}], ids=str
)
def test_a_plan_for_seven_billion_parameters_needs_no_weights(seven, config):
    """Rules that look at shapes alone: seconds, and no memory to speak of."""
    process = psutil.Process()
    before, started = process.memory_info().rss, time.process_time()
    plan = estimate_ranks(seven, CuttlefishConfig(**config))
    assert time.process_time() - started < 10
    assert process.memory_info().rss - before < 100e6
    assert all(p.is_meta for p in seven.parameters())
    assert len(plan.decisions) == 32 * 7
    dense, kept = plan.parameters()
    assert dense == 32 * (4 * 4096**2 + 3 * 4096 * 11008) == 6_476_005_376
    assert kept == sum(d.rank * (d.in_features + d.out_features) for d in plan.decisions.values())
    if config.get("target_ratio"):
        assert 0.39 < kept / dense <= 0.4
        page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")
        assert f"{dense / 1e9:.2f} -> {kept / 1e9:.2f} billion target parameters" in page


@pytest.mark.parametrize("rule", ["stable_rank", "scaled_stable_rank", "accumulative", "paper", "energy"])
def test_rules_that_look_at_values_say_that_they_need_them(seven, rule):
    config = CuttlefishConfig(rank_rule=rule, stable_rank_scale="random_matrix")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is on the meta device"):
        estimate_ranks(seven, config)


def test_nothing_is_factorized_or_trained_without_weights(seven):
    plan = estimate_ranks(seven, CuttlefishConfig(rank_rule="ratio"))
    with pytest.raises(ValueError, match="is on the meta device: load its weights"):
        factorize(seven, plan)
    with pytest.raises(ValueError, match="is on the meta device: load the weights"):
        Cuttlefish(seven, torch.optim.SGD(seven.parameters(), lr=0.1), total_steps=10)


# --- the peak of a switch ---


def peak_of(action):
    """The most bytes that torch held at once on top of what there was before (its own allocation events)."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = action()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert kept is not None and peak > 0
    return peak


@pytest.mark.parametrize("layers", [2, 8])
def test_a_switch_decomposes_one_layer_at_a_time(layers):
    """docs/scaling.md: at most 9 matrices of n^2 in fp64 while a layer is decomposed, whatever the number of layers.

    On top come, of every layer, its factors (2 r n in fp32 or, where the plan needs the spectra first, a cut at break-even,
    which is as large as the weight).
    """
    n, r = 192, 24
    exact, weight, pair = 8 * n * n, 4 * n * n, 4 * 2 * r * n
    model = Deep(layers, n, bias=False)
    ranks = dict.fromkeys(find_targets(model), r)
    peak = peak_of(lambda: factorize(model, ranks))
    assert 5 * exact < peak < 7 * exact + (layers + 2) * pair
    model = Deep(layers, n, bias=False)
    config = CuttlefishConfig(rank_rule="energy", rank_pattern={".*": r})
    peak = peak_of(lambda: choose(find_targets(model), config, None, {}, None))
    assert 5 * exact < peak < 9 * exact + layers * weight
