"""What has to hold for any matrix, plan, config, model and order of operations (hypothesis).

Few examples here; many with HYPOTHESIS_PROFILE=nightly (1,000 nested models, 300 orders of operations).
"""

import copy
import io
import json
import math
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from hf_cuttlefish import (
    CuttlefishConfig,
    LowRankLinear,
    RankPlan,
    estimate_ranks,
    factorize,
    follow_checkpoints,
    merge,
)
from hf_cuttlefish.config import RANK_RULES
from hf_cuttlefish.decide.plan import RankDecision
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.maths.factors import LayerMoments, cut, decompose, factor_weight
from tiny_models import BY_NAME, outputs

MANY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def examples(few, many):
    return settings(
        max_examples=many if MANY else few,
        deadline=None,
        derandomize=not MANY,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


SIZES = st.integers(1, 24)
SEEDS = st.integers(0, 2**31)


@st.composite
def matrices(draw):
    """(m, n), float64: full, of low rank, badly conditioned, huge or tiny."""
    m, n, seed = draw(SIZES), draw(SIZES), draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["full", "low rank", "conditioned"]))
    if kind == "low rank":
        r = draw(st.integers(1, min(m, n)))
        w = w[:, :r] @ torch.randn(r, n, generator=generator, dtype=torch.float64)
    elif kind == "conditioned":
        w = w * torch.logspace(0, -6, n, dtype=torch.float64)
    return w * 10.0 ** draw(st.integers(-6, 6))


# --- one layer ---


@examples(60, 2000)
@given(matrices(), st.floats(0, 1))
def test_the_error_is_the_tail_of_the_spectrum(w, share):
    """Eckart and Young 1936: nothing of that rank is nearer, and its distance is the tail."""
    rank = max(1, round(share * min(w.shape)))
    factors = factor_weight(w, rank)
    tail = torch.linalg.svdvals(w)[rank:].square().sum().sqrt()
    error = torch.linalg.norm(w - factors.up @ factors.down)
    assert abs(float(error - tail)) <= 1e-6 * float(torch.linalg.norm(w))


@examples(60, 2000)
@given(matrices(), st.floats(0, 1), SEEDS)
def test_what_flows_through_is_kept_no_worse_than_by_plain_svd(w, share, seed):
    """On the statistics that it was given, the loss-aware cut loses no more than the plain one of the same rank."""
    m, n = w.shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    g = torch.randn(3 * m, m, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, m, dtype=torch.float64)
    c, k = x.mT @ x / len(x), g.mT @ g / len(g)
    # The damping of `decompose`, put in here, so that both are judged in the metric that the cut is made for.
    damped_c = c + 1e-3 * c.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    damped_k = k + 0.03 * k.diagonal().mean() * torch.eye(m, dtype=torch.float64)
    rank = max(1, round(share * min(m, n)))

    def lost(factors):
        rest = w - factors.up @ factors.down
        return float(torch.trace(damped_k @ rest @ damped_c @ rest.mT))

    aware = cut(decompose(w, LayerMoments.from_full(w, c, k)), rank)
    whole = float(torch.trace(damped_k @ w @ damped_c @ w.mT))
    assert lost(aware) <= lost(factor_weight(w, rank)) * (1 + 1e-6) + 1e-9 * whole


@examples(60, 2000)
@given(SIZES, SIZES, SEEDS, st.booleans(), st.sampled_from([nn.Linear, Conv1D]))
def test_full_rank_and_back_is_the_identity(n, m, seed, bias, kind):
    torch.manual_seed(seed)
    layer = nn.Linear(n, m, bias=bias) if kind is nn.Linear else Conv1D(m, n)
    nn.init.normal_(layer.weight)
    x = torch.randn(3, n)
    pair = LowRankLinear.from_linear(layer, min(m, n))
    back = pair.to_dense()
    assert type(back) is kind and back.bias is layer.bias
    size = float(layer.weight.detach().abs().max())
    assert float((back.weight - layer.weight).abs().max()) <= 1e-6 * max(1.0, size)
    torch.testing.assert_close(pair(x), layer(x), rtol=1e-5, atol=1e-5 * max(1.0, size))


# --- plans and configs ---


@st.composite
def decisions(draw):
    n, m = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    rank = draw(st.none() | st.integers(1, min(m, n)))
    number = st.none() | st.floats(0, 1e9)
    return RankDecision(n, m, rank, draw(st.text(max_size=20)), draw(number), draw(number))


@examples(60, 1000)
@given(
    st.dictionaries(st.text(min_size=1, max_size=30), decisions(), max_size=8),
    st.text(max_size=10),
    st.lists(st.text(max_size=20), max_size=3),
)
def test_plans_round_trip(layers, rule, notes):
    plan = RankPlan(layers, rule, notes)
    again = RankPlan.from_json(plan.to_json())
    assert again == plan and again.to_dict() == plan.to_dict() and again.parameters() == plan.parameters()
    assert plan.parameters()[1] == sum(
        d.in_features * d.out_features if d.rank is None else d.rank * (d.in_features + d.out_features)
        for d in layers.values()
    )
    assert again.summary() == plan.summary()


ENDINGS = st.lists(st.text("abcxyz._", min_size=1, max_size=8), min_size=1, max_size=3)
SHARE = st.floats(0.01, 1)


@examples(80, 1000)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "target_modules": st.just("all-linear") | ENDINGS,
            "exclude_modules": st.none() | ENDINGS,
            "rank_pattern": st.dictionaries(st.text("abc", min_size=1, max_size=5), st.integers(1, 10**6), max_size=3),
            "rank_rule": st.sampled_from(RANK_RULES),
            "rank_ratio": SHARE,
            "accumulative_share": SHARE,
            "energy_share": SHARE,
            "stable_rank_scale": st.sampled_from(["auto", "initial", "random_matrix"]),
            "rank_multiple": st.integers(1, 128),
            "target_ratio": st.none() | SHARE,
            "max_loss_increase": st.none() | st.floats(1e-6, 10),
            "objective": st.sampled_from(["size", "speed"]),
            "min_speedup": st.floats(1, 3),
            "switch_step": st.none() | st.integers(1, 10**6),
            "earliest_switch": st.floats(0, 0.3),
            "latest_switch": st.floats(0.3, 1),
            "check_steps": st.none() | st.integers(1, 1000),
            "statistics_steps": st.none() | st.integers(0, 100),
            "optimizer_state": st.sampled_from(["carry", "reset"]),
            "on_error": st.sampled_from(["continue", "raise"]),
        },
    )
)
def test_configs_round_trip(fields):
    try:
        config = CuttlefishConfig(**fields)
    except ValueError as error:  # two fields that contradict each other
        assert "target_ratio" in str(error) or "max_loss_increase" in str(error)
        return
    assert CuttlefishConfig.from_json(config.to_json()) == config
    assert CuttlefishConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# --- nested models ---


class Block(nn.Module):
    """Layers one after the other, of any classes, with a residual where the sizes allow it."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict({f"part{i}": layer for i, layer in enumerate(layers)})

    def forward(self, x):
        for layer in self.layers.values():
            y = layer(x)
            x = x + y if y.shape == x.shape else y
        return x


@st.composite
def nested_models(draw, depth=0):
    """A module (features -> features), which may hold the same module twice, a frozen layer, norms and more blocks."""
    width = draw(st.sampled_from([4, 6, 9, 16]))

    def make(level):
        kinds = ["linear", "conv1d", "two", "norm"] + (["block", "sequential", "list twice"] if level < 3 else [])
        kind = draw(st.sampled_from(kinds))
        bias = draw(st.booleans())
        if kind == "linear":
            return nn.Linear(width, width, bias=bias).requires_grad_(draw(st.booleans()))
        if kind == "conv1d":
            return Conv1D(width, width)
        if kind == "two":
            middle = draw(st.integers(1, 20))
            return nn.Sequential(nn.Linear(width, middle, bias=bias), nn.Tanh(), nn.Linear(middle, width))
        if kind == "norm":
            return nn.LayerNorm(width)
        if kind == "list twice":
            inner = make(level + 1)
            return Block([inner, nn.Tanh(), inner])
        parts = [make(level + 1) for _ in range(draw(st.integers(1, 3)))]
        return Block(parts) if kind == "block" else nn.Sequential(*parts)

    blocks = nn.ModuleList(
        Block([make(0) for _ in range(draw(st.integers(1, 3)))]) for _ in range(draw(st.integers(1, 3)))
    )
    torch.manual_seed(draw(SEEDS))
    model = nn.Sequential(Block(blocks), nn.Linear(width, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / math.sqrt(width))
    return model, width


@examples(25, 1000)
@given(nested_models(), st.floats(0, 1))
def test_random_models_factorize_and_merge(made, share):
    """All targets of any model: counts as planned, full rank changes nothing, merge gives the classes back, bias objects stay."""
    model, width = made
    x = torch.randn(2, width)
    layers = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    assume(layers)
    with torch.no_grad():
        expected = model(x)
    biases = {n: m.bias for n, m in layers.items()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    before = sum(p.numel() for p in model.parameters())
    shapes = {n: tuple(m.weight.shape) for n, m in layers.items()}
    frozen = {n: m.weight.requires_grad for n, m in layers.items()}

    exact = copy.deepcopy(model)
    factorize(exact, {n: min(s) for n, s in shapes.items()})
    torch.testing.assert_close(exact(x), expected, rtol=1e-3, atol=1e-3 * (1 + float(expected.abs().max())))

    ranks = {n: max(1, round(share * min(s))) for n, s in shapes.items()}
    report = factorize(model, ranks)
    after = sum(p.numel() for p in model.parameters())
    assert after - before == sum(ranks[n] * sum(s) - s[0] * s[1] for n, s in shapes.items())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert {n: m.rank for n, m in low_rank_layers(model).items()} == ranks
    for name, pair in low_rank_layers(model).items():
        assert pair.bias is biases[name]
        assert pair.up.weight.requires_grad == pair.down.weight.requires_grad == frozen[name]
    with torch.no_grad():
        low = model(x)
    merge(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert all(model.get_submodule(n).bias is b for n, b in biases.items())
    torch.testing.assert_close(model(x), low, rtol=1e-3, atol=1e-3 * (1 + float(low.abs().max())))


# --- any order of operations ---


@pytest.fixture(scope="module")
def group():
    """A process group of one, for DDP."""
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}.store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


BERT = BY_NAME["bert"]


def reload(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = {path.suffix for path in Path(folder).iterdir()}
        assert files <= {".json", ".safetensors", ".md", ".py"}
        return hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=next(model.parameters()).dtype)


def raw(model):
    """The weights alone into a fresh dense model, as a Trainer's resume does."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()}, f"{folder}/w.safetensors")
        fresh = BERT.build(seed=9).to(next(model.parameters()).dtype)
        follow_checkpoints(fresh)
        fresh.load_state_dict(load_file(f"{folder}/w.safetensors"))
    return fresh


def ddp(model):
    """Wrapped, run forward and backward, and taken out again."""
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped(**BERT.inputs()).logits.float().square().mean().backward()
    model.zero_grad()
    return wrapped.module


def compiled(model):
    """torch.compile's wrapper shares the module; taken out as the package itself does (the backend is the eager one)."""
    wrapped = torch.compile(model, backend="eager")
    with torch.no_grad():
        wrapped(**BERT.inputs())
    torch._dynamo.reset()
    return wrapped._orig_mod


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def factorize_more(model):
    """One more dense layer at full rank, which keeps the outputs."""
    for name, layer in find_targets_or_none(model).items():
        factorize(model, {name: min(layer.weight.shape)})
        break
    return model


def find_targets_or_none(model):
    try:
        return find_targets(model)
    except ValueError:
        return {}


def merged(model):
    return merge(model) if low_rank_layers(model) else model


OPERATIONS = {
    "save and load": reload,
    "raw weights": raw,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": pickled,
    "to bf16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "to cpu": lambda model: model.to("cpu"),
    "merge": merged,
    "factorize more": factorize_more,
    "compile": compiled,
    "DDP": ddp,
    "train and eval": lambda model: model.train().eval(),
}


@pytest.mark.usefixtures("group")
@examples(6, 300)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=2, max_size=8), st.integers(0, 11), SEEDS)
def test_any_order_of_operations_keeps_the_outputs(operations, layers, seed):
    """Rounding is allowed for by how coarse the coarsest dtype was, and nothing else."""
    model = BERT.build(seed % 5)
    names = sorted(find_targets(model))[:layers]
    if names:
        factorize(model, dict.fromkeys(names, 6))
    batch = {k: v for k, v in BERT.inputs().items() if k != "labels"}
    expected, coarsest = outputs(model, batch)[0], 1e-4
    for name in operations:
        ranks = {n: m.rank for n, m in low_rank_layers(model).items()}
        model = OPERATIONS[name](model)
        dtype = next(model.parameters()).dtype
        coarsest = max(coarsest, {torch.bfloat16: 0.2, torch.float16: 0.05}.get(dtype, 0))
        after = {n: m.rank for n, m in low_rank_layers(model).items()}
        note = (getattr(model.config, "quantization_config", None) or {}).get("ranks", {})
        assert note == after
        if name == "merge":
            assert not after
        elif name == "factorize more":
            assert ranks.items() <= after.items()
        else:
            assert after == ranks
        actual = outputs(model.eval(), batch)[0].float()
        torch.testing.assert_close(actual, expected, rtol=coarsest, atol=coarsest * (1 + float(expected.abs().max())))


@examples(10, 200)
@given(SEEDS, st.sampled_from([r for r in RANK_RULES if r not in ("stable_rank",)]), st.integers(1, 16))
def test_the_same_seed_gives_the_same_plan(seed, rule, multiple):
    config = CuttlefishConfig(rank_rule=rule, rank_multiple=multiple, stable_rank_scale="random_matrix")
    first, second = (estimate_ranks(BERT.build(seed), config) for _ in range(2))
    assert first.to_json() == second.to_json()
