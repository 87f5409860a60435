"""Measured selection: what is seen, what is decided, with timers of the test's own; real times are only checked for sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, estimate_ranks, factorize, merge
from hf_cuttlefish.decide.ranks import plan_ranks
from hf_cuttlefish.decide.rules import LayerSpectrum
from hf_cuttlefish.decide.speed import MIN_SPEEDUP, choose, keep_faster
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.measure import timing as timing_file
from hf_cuttlefish.measure import whole_steps as whole_steps_file
from hf_cuttlefish.measure.shapes import FlowRecorder, Group, StepTime
from hf_cuttlefish.measure.timing import GroupTiming, Timing
from hf_cuttlefish.measure.whole_steps import Candidate, Step


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=50, problem_type="single_label_classification", **sizes))


def batch(rows: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 50, (rows, length)), "labels": torch.zeros(rows, dtype=torch.long)}


def watched(model: nn.Module, inputs: dict[str, torch.Tensor], micro_batches: int = 1) -> FlowRecorder:
    flow = FlowRecorder(model, find_targets(model))
    flow.start()
    for _ in range(micro_batches):
        model(**inputs).loss.backward()
    flow.step()
    return flow


def group(*layers: str, n: int = 64, out: int = 64, calls: int = 1) -> Group:
    outs = ((out, True),) * len(layers)
    return Group(layers, n, outs, 128, torch.device("cpu"), torch.float32, torch.float32, calls=calls)


def row(
    name: str, dense: float, low: float, dense_host: float = 0.0, low_host: float = 0.0, calls: int = 1
) -> GroupTiming:
    return GroupTiming(group(name, calls=calls), (8,), Timing(dense, dense_host), Timing(low, low_host))


def by_size(found: Group, ranks: Sequence[int | None], compiled: bool) -> Timing:
    """A fake device: one microsecond a multiplication, and 50 for each product begun."""
    total = 0
    for (out, _), rank in zip(found.outs, ranks, strict=True):
        n = found.in_features
        total += n * out + 50 if rank is None else rank * (n + out) + 100
    return Timing(total / 1000)


# --- what is seen ---


def test_groups_are_the_layers_that_read_one_tensor() -> None:
    model = bert()
    flow = watched(model, batch())
    assert flow.done and flow.compiled is False
    names = [tuple(name.removeprefix("bert.encoder.layer.") for name in g.layers) for g in flow.groups()]
    one = [("{}.attention.self.query", "{}.attention.self.key", "{}.attention.self.value")]
    one += [("{}.attention.output.dense",), ("{}.intermediate.dense",), ("{}.output.dense",)]
    assert names == [tuple(name.format(i) for name in each) for i in (0, 1) for each in one]


def test_gate_and_up_are_one_group_and_grouped_queries_keep_their_sizes() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, intermediate_size=48, **sizes))
    ids = torch.randint(1, 50, (2, 5))
    groups = watched(model, {"input_ids": ids, "labels": ids}).groups()
    assert [[name.split(".")[-1] for name in g.layers] for g in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert groups[0].outs == ((32, False), (16, False), (16, False))


def test_shapes_precision_and_calls_of_a_step_with_micro_batches() -> None:
    model = bert()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flow = watched(model, batch(3, 7), micro_batches=4)
    first = flow.groups()[0]
    assert (first.tokens, first.in_features, first.calls) == (21, 32, 4)
    assert first.autocast == torch.bfloat16
    assert first.weight_dtype == torch.float32
    assert first.input_grad and first.weight_grad


def test_the_hooks_are_gone_afterwards_and_inference_is_not_recorded() -> None:
    model = bert()
    flow = FlowRecorder(model, find_targets(model))
    flow.start()
    with torch.no_grad():
        model(**batch())
    assert flow.groups() == []
    model(**batch()).loss.backward()
    flow.step()
    assert all(not layer._forward_pre_hooks for layer in find_targets(model).values())


def test_a_compiled_model_is_known_as_one_and_runs_compiled_again() -> None:
    torch._dynamo.reset()
    model = bert()
    compiled = torch.compile(model, backend="eager")
    inputs = batch()
    compiled(**inputs)
    flow = FlowRecorder(model, find_targets(model))
    flow.start()
    steps = 0
    while not flow.done:
        compiled(**inputs).loss.backward()
        flow.step()
        steps += 1
    assert flow.compiled is True
    assert steps == 2
    assert len(flow.groups()) == 8
    calls = []
    model.bert.embeddings.register_forward_pre_hook(lambda *_: calls.append(1))
    compiled(**inputs)
    assert not calls  # run by the compiled code again, which knows no new hooks


# --- what is decided ---


def test_only_groups_that_are_faster_by_min_speedup() -> None:
    rows = [row("fast", 2.0, 1.0), row("even", 1.0, 1.0), row("slow", 1.0, 1.5), row("hardly", 1.04, 1.0)]
    assert choose(rows, None, 1.05).faster == {"fast"}
    assert choose(rows, None, 1.0).faster == {"fast", "even", "hardly"}


def test_nothing_faster_says_why() -> None:
    found = choose([row("a", 1.0, 1.0)], None, 1.5)
    assert not found.faster
    assert "1.5 times faster" in found.reason
    assert "seen to run" in choose([], None).reason


def test_where_the_host_is_the_bottleneck_launching_more_is_refused() -> None:
    rows = [row("a", 2.0, 1.0, dense_host=0.1, low_host=0.2)]
    found = choose(rows, StepTime(total_ms=30.0, host_ms=29.9))
    assert not found.faster
    assert "launch" in found.reason


def test_where_the_device_is_the_bottleneck_its_savings_count() -> None:
    rows = [row("a", 20.0, 10.0, dense_host=0.1, low_host=0.2)]
    found = choose(rows, StepTime(total_ms=100.0, host_ms=30.0))
    assert found.faster == {"a"}
    assert found.predicted == pytest.approx(0.9)


def test_between_the_two_the_best_mix_is_taken() -> None:
    """Three groups save 20, 20 and 1 ms of the device's 100 at 10 ms each of the host's 50: the third costs more than it saves."""
    rows = [row("a", 30.0, 10.0, 0, 10.0), row("b", 30.0, 10.0, 0, 10.0), row("c", 11.0, 10.0, 0, 30.0)]
    found = choose(rows, StepTime(total_ms=100.0, host_ms=50.0))
    assert found.faster == {"a", "b"}
    assert found.predicted == pytest.approx(0.7)


def test_a_group_called_often_weighs_more() -> None:
    rows = [row("a", 2.0, 1.0, 0.0, 0.5, calls=12)]
    found = choose(rows, StepTime(total_ms=100.0, host_ms=50.0))
    assert found.predicted == pytest.approx(0.88)


# --- plans ---


def test_a_plan_keeps_what_is_faster_and_says_so_of_each_layer() -> None:
    model = bert()
    plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_ratio=0.25))
    kept = keep_faster(plan, watched(model, batch()), 2.0, by_size)
    # 32 x 32 at rank 8: (1024 + 50) / (512 + 100) = 1.75. 32 x 64: (2048 + 50) / (768 + 100) = 2.4.
    assert {name.split("layer.")[1][2:] for name in kept} == {"intermediate.dense", "output.dense"}
    decision = kept.decisions["bert.encoder.layer.0.attention.self.query"]
    assert decision.rank is None
    assert "1.75 times" in decision.reason
    assert len(kept.decisions) == len(plan.decisions)
    assert any("query+key+value" in note and "1.75x" in note for note in kept.notes)


def test_layers_that_never_ran_stay_dense() -> None:
    model = bert()
    plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio"))
    kept = keep_faster(plan, FlowRecorder(model, find_targets(model)), 1.0, by_size)
    assert not kept
    assert all("never seen" in d.reason for d in kept.decisions.values())


def test_prices_are_the_time_of_one_unit_of_rank() -> None:
    model = bert()
    groups = watched(model, batch()).groups()
    sizes = {name: sum(layer.weight.shape) for name, layer in find_targets(model).items()} | {"unseen": 100}
    prices = timing_file.rank_prices(groups, sizes, False, by_size)
    assert prices["bert.encoder.layer.0.attention.self.query"] == pytest.approx(0.064)
    assert prices["bert.encoder.layer.0.output.dense"] == pytest.approx(0.096)
    assert prices["unseen"] == pytest.approx(0.1)
    flat = timing_file.rank_prices(groups, sizes, False, lambda *_: Timing(1.0))
    assert all(price > 0 for price in flat.values())


def test_a_dearer_layer_gets_less_rank() -> None:
    values = torch.linspace(1, 0.01, 32, dtype=torch.float64)
    spectra = {name: LayerSpectrum(32, 32, None, values) for name in ("a", "b")}
    config = CuttlefishConfig(target_ratio=0.5, rank_multiple=1)
    even = plan_ranks(spectra, config)
    assert even["a"] == even["b"]
    priced = {"a": replace(spectra["a"], price=1.0), "b": replace(spectra["b"], price=4.0)}
    plan = plan_ranks(priced, config)
    assert plan["a"] > plan["b"]


# --- the run ---


def steps_of(dense: float, planned: float = 1.0, mix: float = 0.5) -> Any:
    """A timer of whole steps that runs each and gives these milliseconds."""

    def timer(candidate: Candidate, step: Step, warm_up: int) -> float:
        step()
        return dense if not candidate.layers else planned if candidate.words.startswith("as planned") else mix

    return timer


def fine_tune(
    monkeypatch: pytest.MonkeyPatch, timer: Any, steps: Any = None, resumed_at: int = 0, **options: Any
) -> Cuttlefish:
    monkeypatch.setattr(timing_file, "time_group", timer)
    monkeypatch.setattr(whole_steps_file, "time_steps", steps or steps_of(3.0, 2.0, 1.0))
    monkeypatch.setattr(keep_faster, "__defaults__", (MIN_SPEEDUP, timer, None))
    monkeypatch.setattr(timing_file.rank_prices, "__defaults__", (False, timer))
    model, inputs = bert(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CuttlefishConfig(**{"switch_step": 6, "statistics_steps": 2, "on_error": "raise", **options})
    cuttlefish = Cuttlefish(model, optimizer, config, total_steps=40)
    for step in range(8):
        if resumed_at and step == resumed_at:
            state, statistics = cuttlefish.state_dict(), cuttlefish.statistics_state()
            cuttlefish.close() if hasattr(cuttlefish, "close") else cuttlefish.watch.stop()
            cuttlefish = Cuttlefish(model, optimizer, config, total_steps=40)
            cuttlefish.load_state_dict(state, statistics)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
    return cuttlefish


@pytest.mark.parametrize("rule", ["loss", "ratio"])
def test_speed_switches_what_is_faster(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    cuttlefish = fine_tune(monkeypatch, by_size, objective="speed", rank_rule=rule, min_speedup=2.0)
    assert cuttlefish.switch_step == 6
    assert cuttlefish.plan is not None
    assert set(low_rank_layers(cuttlefish.model)) == set(cuttlefish.plan)
    assert any(note.startswith("measured") for note in cuttlefish.plan.notes)


@pytest.mark.parametrize("rule", ["loss", "ratio"])
@pytest.mark.parametrize("switch_step, resumed_at", [(6, 5), (1, 0), (2, 0)])
def test_speed_measures_right_after_a_resume_and_in_early_steps(
    monkeypatch: pytest.MonkeyPatch, rule: str, switch_step: int, resumed_at: int
) -> None:
    options = {"objective": "speed", "rank_rule": rule, "min_speedup": 1.2, "statistics_steps": min(2, switch_step)}
    cuttlefish = fine_tune(monkeypatch, by_size, None, resumed_at, switch_step=switch_step, **options)
    assert cuttlefish.switch_step == switch_step and cuttlefish.plan is not None
    assert any(note.startswith("a step takes") for note in cuttlefish.plan.notes)


def test_speed_switches_nothing_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    cuttlefish = fine_tune(monkeypatch, lambda *_: Timing(1.0), steps_of(1.0), objective="speed")
    assert cuttlefish.switch_step is None
    assert not low_rank_layers(cuttlefish.model)
    assert "times faster" in str(cuttlefish.reason)


def test_whole_steps_overrule_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = fine_tune(
        monkeypatch, by_size, steps_of(3.0, 1.0, 2.0), objective="speed", rank_rule="ratio", min_speedup=2.0
    )
    assert planned.plan is not None and len(low_rank_layers(planned.model)) == len(planned.plan) == 12
    told = "a step takes 3 ms dense, 1 ms as planned, 2 ms with 8 of 12 layers dense"
    assert told in planned.plan.notes
    options = {"objective": "speed", "rank_rule": "ratio", "min_speedup": 2.0}
    dense = fine_tune(monkeypatch, by_size, steps_of(3.0, 2.0, 1.6), **options)
    assert dense.switch_step is None and not low_rank_layers(dense.model)
    assert dense.reason == (
        "a step takes 3 ms dense, 2 ms as planned, 1.6 ms with 8 of 12 layers dense; nothing is 2 times faster than dense"
    )


@pytest.mark.parametrize("rule", ["loss", "ratio"])
def test_speed_that_factorizes_everything_ends_on_the_bits_of_size(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """Shapes that all cost the same by rank, so that prices do not move the ranks of rule "loss"."""
    even = {"rank_rule": rule, "target_ratio": 0.4 if rule == "loss" else None, "rank_multiple": 1}
    size = fine_tune(monkeypatch, by_parameters, objective="size", **even)
    speed = fine_tune(monkeypatch, by_parameters, steps_of(3.0), objective="speed", **even)
    assert speed.plan is not None and dict(speed.plan) == dict(size.plan or {}) != {}
    left, right = speed.model.state_dict(), size.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)


def by_parameters(found: Group, ranks: Sequence[int | None], compiled: bool) -> Timing:
    """A fake device on which a unit of rank costs what it has of parameters."""
    sizes = [(rank or 1000) * (found.in_features + out) for (out, _), rank in zip(found.outs, ranks, strict=True)]
    return Timing(sum(sizes) / 1000)


def test_a_step_that_fails_leaves_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(candidate: Candidate, step: Step, warm_up: int) -> float:
        step()
        if candidate.layers:
            raise torch.OutOfMemoryError("no room for it")
        return 1.0

    options = {"objective": "speed", "rank_rule": "ratio", "min_speedup": 2.0}
    found = fine_tune(monkeypatch, by_size, timer, **options)
    predicted = fine_tune(monkeypatch, by_size, steps_of(3.0), **options)
    assert found.plan is not None and dict(found.plan) == dict(predicted.plan or {}) and len(found.plan) == 4
    why = "groups of layers decide: a step as planned failed (OutOfMemoryError: no room for it)"
    assert any(note.endswith(why) for note in found.plan.notes)
    left, right = found.model.state_dict(), predicted.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_size_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("objective='size' must not time anything")

    assert fine_tune(monkeypatch, never, never, rank_rule="ratio").switch_step == 6


def test_a_wrong_objective_or_speedup_is_named() -> None:
    with pytest.raises(ValueError, match="objective 'fast'"):
        CuttlefishConfig(objective="fast")
    with pytest.raises(ValueError, match=r"min_speedup is 0\.5"):
        CuttlefishConfig(min_speedup=0.5)


# --- real times ---


def test_real_times_are_finite_measured_once_and_leave_the_random_state_alone() -> None:
    timing_file._CACHE.clear()
    state = torch.get_rng_state()
    found = group("a", "b", n=32, out=48)
    timing = timing_file.time_in_turn([(found, (8, None))])[0]
    assert math.isfinite(timing.device_ms) and timing.device_ms > 0
    assert timing.host_ms == 0.0
    assert timing_file.time_in_turn([(replace(found, layers=("c", "d")), (8, None))])[0] is timing
    assert len(timing_file._CACHE) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_layers_and_inputs_without_gradients_can_be_timed() -> None:
    frozen = replace(group("a"), input_grad=False, weight_grad=False)
    assert timing_file.time_group(frozen, (8,)).device_ms > 0


# --- inference, and merge where it pays ---


def small_products_are_slow(found: Group, ranks: Sequence[int | None], compiled: bool) -> Timing:
    """A fake device on which 32 x 32 at rank 8 is faster dense, and 32 x 64 as a pair."""
    (out, _), (rank,), n = *found.outs, ranks, found.in_features
    return Timing((n * out if rank is None else 600 + rank * (n + out)) / 1000)


def served(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, torch.Tensor]]:
    """A factorized model, and what it is served with."""
    monkeypatch.setattr(timing_file.time_inference, "__defaults__", (small_products_are_slow,))
    model = bert().eval()
    factorize(model, dict.fromkeys(find_targets(model), 8))
    return model, {"input_ids": torch.randint(1, 50, (1, 5))}


@pytest.mark.parametrize("form", ["mapping", "tensor", "tuple"])
def test_merge_where_slower_merges_just_those_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any, form: str
) -> None:
    model, inputs = served(monkeypatch)
    expected = model(**inputs).logits
    given = {"mapping": inputs, "tensor": inputs["input_ids"], "tuple": (inputs["input_ids"],)}[form]
    with caplog.at_level("INFO", "hf_cuttlefish"):
        assert merge(model, "slower", given) is model
    left = {name.split("layer.")[1][2:] for name in low_rank_layers(model)}
    assert left == {"intermediate.dense", "output.dense"}
    assert "merged 8 of 12 factorized layers" in caplog.text and "(0 never ran" in caplog.text
    assert "at rank 8: 1.024 -> " in caplog.text and "2.048 -> " in caplog.text
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert set(model.config.quantization_config["ranks"]) == set(low_rank_layers(model))
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert list(low_rank_layers(loaded)) == list(low_rank_layers(model))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    merge(loaded)
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(loaded(**inputs).logits, expected)


def test_inference_is_timed_without_gradients_whatever_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = served(monkeypatch)
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    seen: list[Group] = []

    def timer(found: Group, ranks: Sequence[int | None], compiled: bool) -> Timing:
        seen.append(found)
        return Timing(1.0)

    with torch.inference_mode():
        rows = timing_file.time_inference(model, inputs, timer)
    assert len(rows) == 12 and len(seen) == 6 * timing_file.ROUNDS  # three shapes, dense and as pairs
    assert not any(found.input_grad or found.weight_grad for found in seen)
    assert timing_file.slower_layers(rows) == []  # as fast is no reason to give up the smaller form
    assert [module.training for module in model.modules()] == modes


def test_host_time_counts_in_inference() -> None:
    launches = row("a", dense=1.0, low=0.5, dense_host=2.0, low_host=3.0)
    assert timing_file.slower_layers([launches]) == ["a"]


def test_merge_where_slower_in_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full rank a pair does twice the work of the dense layer: the clock must see it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(256, 256)])})
    model.forward = lambda x: model["layers"][0](x)  # type: ignore[method-assign]
    factorize(model, {"layers.0": 256})
    merge(model, "slower", torch.randn(512, 256))
    assert not low_rank_layers(model)


def test_what_merge_is_not_told_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = served(monkeypatch)
    with pytest.raises(ValueError, match="where is 'faster': it must be 'all' or 'slower'"):
        merge(model, "faster")
    with pytest.raises(ValueError, match="give a batch of them as example_inputs"):
        merge(model, where="slower")
    with pytest.raises(ValueError, match="with where='slower' only"):
        merge(model, example_inputs=inputs)
    with pytest.raises(TypeError, match="got str"):
        merge(model, "slower", "text")
    unused = nn.ModuleDict({"used": nn.Identity(), "model": model})
    unused.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no factorized layer of ModuleDict runs"):
        merge(unused, "slower", torch.ones(1))
    assert len(low_rank_layers(model)) == 12


def test_merge_refuses_to_drop_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = bert()
    factorize(model, dict.fromkeys(find_targets(model), 8))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query.down"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"query is a Linear, and what it adds would be lost.*merge_and_unload"):
        merge(model)
    whole, inputs = adapted.merge_and_unload().eval(), batch()
    expected = whole(**inputs).logits
    torch.testing.assert_close(merge(whole)(**inputs).logits, expected)
