"""The one place that changes a model: what stays, what errors say, and all or nothing."""

import copy
import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import prune
from transformers.optimization import Adafactor

from hf_cuttlefish import LowRankLinear, RankPlan, factorize, merge
from hf_cuttlefish.decide.plan import RankDecision
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.maths.factors import Factors, LayerMoments
from hf_cuttlefish.patch import exchange as exchange_file
from hf_cuttlefish.patch import modules as modules_file
from hf_cuttlefish.patch import structure as structure_file
from hf_cuttlefish.patch.edits import Edit
from hf_cuttlefish.patch.modules import carry_out, make_change
from hf_cuttlefish.patch.optimizer import CheckParameters, SwapParameters
from hf_cuttlefish.processes import Processes
from hf_cuttlefish.saving import standalone_layers
from tiny_models import BY_NAME, assert_same, outputs, text
from untouched import assert_untouched, snapshot

QUERY = "bert.encoder.layer.0.attention.self.query"
OUTPUT = "bert.encoder.layer.1.output.dense"
PLAN = {QUERY: 4, "bert.encoder.layer.0.intermediate.dense": 8, OUTPUT: 4}


@pytest.fixture
def bert():
    return BY_NAME["bert"].build().train()


# --- factorize: what stays ---


def test_everything_else_stays_as_it_is(bert):
    config, biases = bert.config, {name: bert.get_submodule(name).bias for name in PLAN}
    others = {
        n: (id(p), p.detach().clone()) for n, p in bert.named_parameters() if n.removesuffix(".weight") not in PLAN
    }
    random_state = torch.get_rng_state()
    report = factorize(bert, PLAN)
    assert torch.equal(torch.get_rng_state(), random_state)  # a run goes on with the same dropout and data order
    assert bert.config is config and dict(report.plan) == PLAN
    for name, rank in PLAN.items():
        layer = bert.get_submodule(name)
        assert layer.rank == rank and layer.bias is biases[name] and layer.training
    after = dict(bert.named_parameters())
    for name, (identity, value) in others.items():
        name = name.replace(".bias", ".up.bias") if name.removesuffix(".bias") in PLAN else name
        assert id(after[name]) == identity and torch.equal(after[name], value)
    assert config.quantization_config == {"quant_method": "cuttlefish", "version": 1, "ranks": PLAN}
    assert json.loads(config.to_json_string())["quantization_config"]["ranks"] == PLAN


@pytest.mark.parametrize(
    "kind", ["forward", "forward_pre", "forward kwargs", "forward always", "full_backward", "full_backward_pre"]
)
def test_hooks_stay_in_force_and_their_handles_remove_them(bert, kind):
    """Also after merge."""
    calls = []
    layer = bert.get_submodule(QUERY)

    def hook(module: nn.Module, *args: Any) -> None:
        calls.append(type(module))

    register = {
        "forward": layer.register_forward_hook,
        "forward_pre": layer.register_forward_pre_hook,
        "forward kwargs": lambda h: layer.register_forward_hook(h, with_kwargs=True),
        "forward always": lambda h: layer.register_forward_hook(h, always_call=True),
        "full_backward": layer.register_full_backward_hook,
        "full_backward_pre": layer.register_full_backward_pre_hook,
    }
    handle = register[kind](hook)
    for change in (lambda: None, lambda: factorize(bert, PLAN), lambda: merge(bert), lambda: factorize(bert, PLAN)):
        change()
        bert(**text()).loss.backward()
    assert calls == [nn.Linear, LowRankLinear, nn.Linear, LowRankLinear]
    handle.remove()
    bert(**text()).loss.backward()
    assert len(calls) == 4


def test_frozen_layers_stay_frozen_and_out_of_the_optimizer(bert):
    for parameter in bert.bert.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    trainable = [p for p in bert.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    factorize(bert, PLAN, optimizer)
    frozen = bert.get_submodule(QUERY)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in bert.get_submodule(OUTPUT).parameters())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in bert.parameters() if p.requires_grad]


def test_a_module_registered_twice_is_replaced_in_both_places():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Sequential(self.a, nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model, x = Twice(), torch.randn(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model(x)
    with pytest.raises(ValueError, match=r"a and b\.0 are one module, but the plan gives them different ranks"):
        factorize(model, {"a": 8, "b.0": 4})
    factorize(model, {"a": 8, "b.0": 8}, optimizer)
    assert model.a is model.b[0] and isinstance(model.a, LowRankLinear)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    merge(model)
    assert model.a is model.b[0] and type(model.a) is nn.Linear


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda g: torch.optim.AdamW(g, lr=1e-3),
    "SGD momentum": lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9),
    "Adafactor": lambda g: Adafactor(g, lr=1e-3, relative_step=False, beta1=0.9),
    "RMSprop": lambda g: torch.optim.RMSprop(g, lr=1e-3, momentum=0.9),
    "Adagrad": lambda g: torch.optim.Adagrad(g, lr=1e-2),
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Layerwise learning rates times weight decay or none, as fine-tuning scripts make them."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        block = next((f"block {i}" for i in range(2) if f"layer.{i}." in name), "rest")
        groups.setdefault((block, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": params, "lr": 1e-3 * (1 + i), "weight_decay": 0.01 * decay, "tag": key}
        for i, ((key, decay), params) in enumerate(groups.items())
    ]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_comes_along(name, family):
    """Groups and their settings, the order in them, the size of every state; it steps; old weights are gone."""
    model, batch = BY_NAME[family].build(), BY_NAME[family].inputs()
    optimizer = OPTIMIZERS[name](groups_of(model))
    groups = optimizer.param_groups
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        model.zero_grad()

    step()
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    targets = find_targets(model)
    old = [weakref.ref(layer.weight) for layer in targets.values()]
    old_state = [
        weakref.ref(v)
        for layer in targets.values()
        for v in optimizer.state[layer.weight].values()
        if isinstance(v, torch.Tensor) and v.ndim
    ]
    plan = dict.fromkeys(targets, 4)
    del targets
    factorize(model, plan, optimizer)
    gc.collect()
    assert not any(ref() is not None for ref in old + old_state) and old and old_state

    assert optimizer.param_groups is groups
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == settings
    expected = [[id(p) for p in group["params"]] for group in groups_of(model)]
    assert [[id(p) for p in group["params"]] for group in groups] == expected
    parameters = {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= parameters
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or not value.ndim:
                continue
            row, column = parameter.shape[:-1], parameter.shape[:-2] + parameter.shape[-1:]
            assert value.shape == {"exp_avg_sq_row": row, "exp_avg_sq_col": column}.get(key, parameter.shape), key
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step()
    step()
    factors = [n for n in before if n.endswith((".down.weight", ".up.weight"))]
    assert len(factors) == 2 * len(plan)
    for n, p in model.named_parameters():
        assert p.isfinite().all() and (n not in factors or not torch.equal(p, before[n])), n
    assert [group["lr"] for group in groups] == [group["initial_lr"] / 4 for group in groups]


class Listed(nn.Module):
    """As MaskFormer's pyramid: layers run from plain containers, and are registered under their numbers besides."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.ReLU()]
        self.last = {"map": nn.Linear(8, 8)}
        self.pair = (nn.Linear(8, 8), "linear")
        for i, layer in enumerate([*self.layers, *self.last.values(), self.pair[0]]):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.pair[0](self.last["map"](x))


def test_layers_that_run_from_plain_containers_are_replaced_there_too():
    """Else the dense layer would run on unseen, and a loaded model would run one that was never filled."""
    torch.manual_seed(0)
    model, x = nn.ModuleList([Listed()]), torch.randn(3, 8)
    kept = list(model[0].layers), dict(model[0].last), model[0].pair
    change = make_change(model, dict.fromkeys(("0.0", "0.2", "0.3"), 2))
    edit = modules_file.SwapModules(change)
    edit.apply()
    block = model[0]
    assert [block.layers[0], block.last["map"], block.pair[0]] == [block.get_submodule(n) for n in "023"]
    block(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # those of the factors, and no others
    edit.undo()
    assert (block.layers, block.last, block.pair) == kept
    dense = copy.deepcopy(model)
    factorize(model, dict.fromkeys(("0.0", "0.2", "0.3"), 8))
    assert isinstance(model[0].layers[0], LowRankLinear)
    torch.testing.assert_close(model[0](x), dense[0](x), rtol=1e-4, atol=1e-5)
    merge(model)
    assert model[0].layers[0] is model[0].get_submodule("0") and type(model[0].layers[0]) is nn.Linear
    standalone_layers.exchange(dense, {"0.0": 2, "0.3": 2})
    assert dense[0].layers[0] is dense[0].get_submodule("0") and dense[0].pair[0] is dense[0].get_submodule("3")
    assert isinstance(dense[0].layers[0], standalone_layers.LowRankLinear)


def test_pending_gradients_go_with_the_old_weights(bert):
    bert(**text()).loss.backward()
    factorize(bert, PLAN)
    assert bert.get_submodule(QUERY).down.weight.grad is None and bert.get_submodule(QUERY).bias.grad is not None


# --- bad input: an error that names the field, and nothing touched ---


def plan_for(shape: tuple[int, int], rank: int | None = 2, name: str = QUERY) -> RankPlan:
    return RankPlan({name: RankDecision(shape[1], shape[0], rank, "test")})


def set_weight(value: Any) -> Callable[[hf.PreTrainedModel], None]:
    def change(model: hf.PreTrainedModel) -> None:
        layer = model.get_submodule(QUERY)
        layer.weight = nn.Parameter(value(layer.weight.detach().clone()), requires_grad=False)

    return change


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = value
        return weight

    return change


def tie(model: hf.PreTrainedModel) -> None:
    model.bert.encoder.layer[1].attention.self.query.weight = model.bert.encoder.layer[0].attention.self.query.weight


def quantized_config(model: hf.PreTrainedModel) -> None:
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.classifier.register_buffer(
        "qweight", torch.zeros(4, 4, dtype=torch.int32)
    )  # packed, as GPTQ's layers hold them


BAD: dict[str, tuple[Callable[[Any], Any] | None, Any, type[Exception], str]] = {
    "no mapping": (None, [QUERY], TypeError, r"plan must be a RankPlan or a dict \{module name: rank\}, got list"),
    "no layer": (None, {}, ValueError, "factorizes no layer"),
    "nothing but dense": (None, plan_for((32, 32), None), ValueError, "factorizes no layer"),
    "unknown name": (
        None,
        {QUERY: 4, "bert.encoder.layer.0.attention.self.qery": 4},
        ValueError,
        "self.qery', which is no module of BertFor.*close names.*self.query",
    ),
    "a name that is no str": (None, {3: 4}, ValueError, "the plan names 3, which is no module"),
    "dense decision of another model": (
        None,
        RankPlan({QUERY: RankDecision(32, 32, 4, ""), "h.0.c_attn": RankDecision(8, 8, None, "")}),
        ValueError,
        "the plan names 'h.0.c_attn', which is no module",
    ),
    "dense decision about a block": (
        None,
        RankPlan({QUERY: RankDecision(32, 32, 4, ""), "bert.encoder": RankDecision(8, 8, None, "")}),
        TypeError,
        "can be factorized, got BertEncoder",
    ),
    "rank 0": (None, {QUERY: 0}, ValueError, f"the rank of {QUERY} is 0: it must lie between 1"),
    "negative rank": (None, {OUTPUT: 4, QUERY: -1}, ValueError, f"the rank of {QUERY} is -1"),
    "rank above": (None, {QUERY: 33}, ValueError, r"is 33: .*min\(32, 32\)"),
    "huge rank": (None, {QUERY: 10**12}, ValueError, "is 1000000000000: it must lie"),
    "float rank": (None, {QUERY: 4.0}, TypeError, f"the rank of {QUERY} must be a whole number, got 4.0"),
    "bool rank": (None, {QUERY: True}, TypeError, "must be a whole number, got True"),
    "no rank": (None, {QUERY: None}, TypeError, "must be a whole number, got None"),
    "another shape": (
        None,
        plan_for((64, 32)),
        ValueError,
        r"written for another model: .*query is \(64, 32\) there and \(32, 32\) here",
    ),
    "norm": (None, {"bert.embeddings.LayerNorm": 4}, TypeError, "LayerNorm is a LayerNorm"),
    "block": (None, {"bert.encoder.layer.0": 4}, TypeError, "layer.0 is a BertLayer"),
    "the model": (None, {"": 4}, ValueError, "cannot be replaced in place"),
    "NaN": (set_weight(poisoned(torch.nan)), PLAN, ValueError, f"{QUERY}.weight holds NaN or Inf"),
    "Inf": (set_weight(poisoned(torch.inf)), PLAN, ValueError, f"{QUERY}.weight holds NaN or Inf"),
    "int8": (set_weight(lambda w: w.to(torch.int8)), PLAN, ValueError, rf"{QUERY} is quantized \(torch.int8\)"),
    "float8": (
        set_weight(lambda w: w.to(torch.float8_e4m3fn)),
        PLAN,
        ValueError,
        rf"{QUERY} is quantized \(torch.float8_e4m3fn\)",
    ),
    "meta": (set_weight(lambda w: w.to("meta")), PLAN, ValueError, f"{QUERY} is on the meta device: load its weights"),
    "tied": (tie, PLAN, ValueError, f"{QUERY}.weight is tied to another module"),
    "pruned": (
        lambda m: prune.identity(m.get_submodule(QUERY), "weight"),
        PLAN,
        ValueError,
        f"{QUERY}.weight is computed from other",
    ),
    "quantized config": (quantized_config, PLAN, ValueError, r"the model is quantized \(gptq: classifier.qweight\)"),
    "already factorized": (
        lambda m: factorize(m, {QUERY: 2}),
        PLAN,
        ValueError,
        rf"{QUERY} is already factorized \(rank 2\); merge",
    ),
    "a factor": (
        lambda m: factorize(m, {QUERY: 2}),
        {QUERY + ".down": 1},
        ValueError,
        rf"{QUERY} is already factorized \(rank 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore:.*non-writable.*")
def test_bad_input_is_named_and_nothing_is_touched(bert, case):
    change, plan, error, message = BAD[case]
    if change is not None:
        change(bert)
    optimizer = torch.optim.AdamW([p for p in bert.parameters() if p.requires_grad])
    before = snapshot(bert, optimizer)
    with pytest.raises(error, match=message):
        factorize(bert, plan, optimizer)
    assert_untouched(before, bert, optimizer)


@pytest.mark.parametrize("model", [None, "bert", {}], ids=str)
def test_no_model_is_a_type_error(model):
    for action in (lambda: factorize(model, PLAN), lambda: merge(model)):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
            action()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: torch.optim.SGD(copy.deepcopy(m).parameters(), lr=1), ValueError, f"does not hold {QUERY}.weight"),
        (lambda m: torch.optim.SGD(m.classifier.parameters(), lr=1), ValueError, "3 of 3 target weights are missing"),
        (
            lambda m: torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(m.parameters(), lr=1)),
            TypeError,
            "is no torch.optim",
        ),
        (lambda m: "adamw", TypeError, "is no torch.optim.Optimizer"),
    ],
    ids=["of a copy", "of the head", "a schedule", "a name"],
)
def test_an_optimizer_of_something_else_is_refused(bert, make, error, message):
    optimizer, before = make(bert), snapshot(bert)
    with pytest.raises(error, match=message):
        factorize(bert, PLAN, optimizer)
    assert_untouched(before, bert)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (
            Factors(torch.zeros(3, 32), torch.zeros(32, 3)),
            r"\(32, 3\) and \(3, 32\): rank 4 .* needs \(32, 4\) and \(4, 32\)",
        ),
        (Factors(torch.zeros(4, 1), torch.zeros(32, 4)), r"needs \(32, 4\) and \(4, 32\)"),
        (Factors(torch.full((4, 32), torch.nan), torch.zeros(32, 4)), "the factors of .*query hold NaN or Inf"),
        (Factors(torch.zeros(4, 32), torch.zeros(32, 4), torch.full((32,), torch.inf)), "hold NaN or Inf"),
    ],
    ids=["another rank", "broadcast", "NaN", "Inf in the bias"],
)
def test_ready_factors_must_fit(bert, factors, message):
    before = snapshot(bert)
    with pytest.raises(ValueError, match=message):
        factorize(bert, PLAN, factors={QUERY: factors})
    assert_untouched(before, bert)


def test_factors_that_overflow_in_half_precision_are_refused(bert):
    bert.half()
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        factorize(bert, PLAN, factors={QUERY: Factors(torch.full((4, 32), 1e6), torch.zeros(32, 4))})


# --- all or nothing ---


class Injected(Exception):
    pass


def fail_at(call: int, function: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
    """The function, but for its `call`-th call, which raises before or after its work."""
    count = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call and not after:
            raise Injected
        result = function(*args, **kwargs)
        if count[0] == call:
            raise Injected
        return result

    return wrapped


def fail_half_way(swap: Callable[..., Any]) -> Callable[..., Any]:
    """The first call replaces one module and fails; those that put it back work."""
    calls = []

    def wrapped(model: nn.Module, new: dict[int, nn.Module]) -> None:
        calls.append(1)
        swap(model, dict(list(new.items())[:1]) if len(calls) == 1 else new)
        if len(calls) == 1:
            raise Injected

    return wrapped


FAILURES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "first decomposition": (modules_file, "decompose", lambda f: fail_at(1, f)),
    "third decomposition": (modules_file, "decompose", lambda f: fail_at(3, f)),
    "second cut": (modules_file, "cut", lambda f: fail_at(2, f)),
    "building the second pair": (LowRankLinear, "standing_for", lambda f: fail_at(2, f)),
    "preparing the optimizer": (modules_file, "SwapParameters", lambda f: fail_at(1, f)),
    "swapping the modules": (exchange_file, "swap", fail_half_way),
    "after swapping them": (exchange_file, "swap", lambda f: fail_at(1, f, after=True)),
    "hooks of the second layer": (exchange_file, "keep_hooks", lambda f: fail_at(2, f)),
    "after the optimizer's change": (SwapParameters, "apply", lambda f: fail_at(1, f, after=True)),
    "checking the optimizer": (CheckParameters, "apply", lambda f: fail_at(1, f)),
    "before the config": (structure_file, "write_structure", lambda f: fail_at(1, f)),
    "after the config": (structure_file, "write_structure", lambda f: fail_at(1, f, after=True)),
}


@pytest.fixture
def ready(bert):
    """A model and an optimizer in the middle of a step, with statistics that move biases."""
    optimizer = torch.optim.AdamW(groups_of(bert))
    for _ in range(2):
        optimizer.zero_grad()
        bert(**text()).loss.backward()
        optimizer.step()
    bert.get_submodule(QUERY).register_forward_hook(lambda *a: None)
    statistics = {}
    for name in PLAN:
        weight = bert.get_submodule(name).weight.detach()
        statistics[name] = LayerMoments.from_full(
            weight, torch.eye(weight.shape[1]), torch.eye(weight.shape[0]), mean=torch.ones(weight.shape[1])
        )
    return bert, optimizer, statistics


def check_all_or_nothing(
    ready: Any, monkeypatch: pytest.MonkeyPatch, patch: Callable[[], None], error: Any = Injected
) -> None:
    model, optimizer, statistics = ready
    bias = model.get_submodule(QUERY).bias.detach().clone()
    before = snapshot(model, optimizer)
    expected = outputs(model.eval(), text())
    model.train()
    patch()
    with pytest.raises(error):
        factorize(model, PLAN, optimizer, statistics=statistics)
    assert_untouched(before, model, optimizer)
    monkeypatch.undo()
    assert_same(outputs(model.eval(), text()), expected)
    # And with nothing in its way it works, on the same objects.
    factorize(model, PLAN, optimizer, statistics=statistics)
    assert not torch.equal(model.get_submodule(QUERY).bias, bias)  # the failures did happen around a change of biases
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("step", FAILURES)
def test_all_or_nothing(ready, monkeypatch, step):
    holder, name, make = FAILURES[step]
    if step == "building the second pair":
        failing = make(LowRankLinear.standing_for)
        patched: Any = classmethod(lambda cls, *a, **k: failing(*a, **k))
    else:
        patched = make(getattr(holder, name))
    check_all_or_nothing(ready, monkeypatch, lambda: monkeypatch.setattr(holder, name, patched))


def test_all_or_nothing_in_the_middle_of_the_optimizer(ready, monkeypatch):
    """Its groups have changed already, its state has not."""
    _, optimizer, _ = ready

    class Failing(dict):
        failed = False

        def update(self, *args: Any, **kwargs: Any) -> None:
            if not self.failed:
                self.failed = True
                raise Injected
            super().update(*args, **kwargs)

    optimizer.state = Failing(optimizer.state)
    check_all_or_nothing(ready, monkeypatch, lambda: None)


def test_what_a_later_edit_refuses_is_put_back(ready):
    model, optimizer, statistics = ready
    before = snapshot(model, optimizer)

    class Refuse(Edit):
        def apply(self) -> None:
            assert isinstance(model.get_submodule(QUERY), LowRankLinear)
            assert QUERY in model.config.quantization_config["ranks"]
            raise Injected

    change = make_change(model, PLAN, optimizer, statistics=statistics)
    with pytest.raises(Injected):
        carry_out(change, [*change.edits(), Refuse()], Processes.alone())
    assert_untouched(before, model, optimizer)


def test_an_interrupt_puts_everything_back_too(ready, monkeypatch):
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    check_all_or_nothing(
        ready, monkeypatch, lambda: monkeypatch.setattr(structure_file, "write_structure", interrupt), KeyboardInterrupt
    )


def test_statistics_that_are_not_finite_name_the_layer(ready):
    model, optimizer, statistics = ready
    statistics[OUTPUT] = LayerMoments(torch.full((32, 32), torch.nan), None)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=f"{OUTPUT} cannot be factorized: signal holds NaN or Inf"):
        factorize(model, PLAN, optimizer, statistics=statistics)
    assert_untouched(before, model, optimizer)


def test_a_model_that_was_dequantized_while_it_was_loaded_is_welcome(bert):
    """transformers keeps the note of a GGUF file in the config; the weights are what counts."""
    model = bert
    model.config.quantization_config = {"quant_method": "gguf"}
    factorize(model, {QUERY: 4})
    assert model.config.quantization_config["quant_method"] == "cuttlefish"
