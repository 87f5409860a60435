"""On a CUDA device: precisions, overflow, fused optimizers, compilation, CUDA graphs, resume, memory, DDP and FSDP2."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import socket
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig, LowRankLinear, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.engines import find
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.maths.factors import LayerMoments, cut, cut_together, decompose, decompose_together, factor_weight
from hf_cuttlefish.maths.stable_ranks import stable_rank
from hf_cuttlefish.measure.pace import STEPS, Moment, Pace
from hf_cuttlefish.measure.shapes import Group
from hf_cuttlefish.measure.timing import time_group
from hf_cuttlefish.measure.tracker import StableRankTracker
from hf_cuttlefish.patch.running import RunMultiplied
from launch import PLAIN, by_hand

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: run on a GPU with `pytest -m gpu`"),
]


def build(hidden: int = 128, layers: int = 2, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
        problem_type="single_label_classification",
    )
    return BertForSequenceClassification(config).to(DEVICE, dtype).train()


def make_batch(rows: int = 16, length: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 200, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.to(DEVICE), "labels": (ids[:, 1] > 100).long().to(DEVICE)}


class Loop:
    """A hand-written loop over one batch, with a switch after 6 steps."""

    def __init__(self, model: Any, precision: str = "fp32", compile_mode: str | None = None, **config: Any) -> None:
        self.model, self.precision, self.batch = model, precision, make_batch()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**14) if precision == "fp16" else None
        options = {"switch_step": 6, "statistics_steps": 3, "target_ratio": 0.5, "on_error": "raise"} | config
        self.call = model if compile_mode is None else torch.compile(model, dynamic=False, mode=compile_mode)
        self.cuttlefish = Cuttlefish(
            model, self.optimizer, CuttlefishConfig(**options), total_steps=20, scaler=self.scaler
        )
        self.losses: list[float] = []

    def autocast(self) -> Any:
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
        if self.precision in dtypes:
            return torch.autocast(DEVICE, dtype=dtypes[self.precision])
        return contextlib.nullcontext()

    def step(self, times: float = 1.0) -> bool:
        torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():
            loss = self.call(**self.batch).loss
        self.losses.append(float(loss.detach()))
        loss = loss * times
        if self.scaler is not None:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.cuttlefish.step()

    def run(self, steps: int) -> Loop:
        for _ in range(steps):
            self.step()
        return self


def check_in_step(loop: Loop) -> None:
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loop.model.parameters()}
    assert {id(p) for p in loop.optimizer.state} <= held


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "pure bf16"])
def test_the_loss_falls_through_the_switch(precision: str) -> None:
    loop = Loop(build(dtype=torch.bfloat16 if precision == "pure bf16" else torch.float32), precision).run(14)
    assert loop.cuttlefish.switch_step == 6
    layers = low_rank_layers(loop.model)
    assert layers
    assert all(p.dtype == loop.model.dtype for layer in layers.values() for p in layer.parameters())
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())
    assert loop.losses[-1] < 0.7 * loop.losses[0]
    check_in_step(loop)


@pytest.mark.parametrize("overflow_at", [4, 9])
def test_an_overflow_step_changes_nothing_but_the_scale(overflow_at: int) -> None:
    """Step 4 lies among those that gather statistics, step 9 after the switch at step 6."""
    loop = Loop(build(), "fp16").run(overflow_at - 1)
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    assert loop.scaler is not None
    scale = loop.scaler.get_scale()
    loop.step(times=1e9)
    assert loop.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, before[name]) for name, p in loop.model.named_parameters())
    loop.run(14 - overflow_at)
    assert loop.cuttlefish.switch_step == 6
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())
    assert loop.losses[-1] < loop.losses[0]


def test_a_fused_optimizer_stays_fused_and_keeps_its_moments() -> None:
    loop = Loop(build()).run(6)
    assert loop.optimizer.param_groups[0]["fused"]
    for layer in low_rank_layers(loop.model).values():
        for parameter in (layer.down.weight, layer.up.weight):
            state = loop.optimizer.state[parameter]
            assert state["step"].device.type == DEVICE
            assert float(state["step"]) == 6
            assert state["exp_avg"].shape == parameter.shape
            assert float(state["exp_avg"].abs().sum()) > 0
    loop.step()
    assert float(loop.optimizer.state[layer.up.weight]["step"]) == 7


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_goes_on_compiled(mode: str, precision: str) -> None:
    torch._dynamo.reset()
    loop, eager = Loop(build(), precision, mode).run(14), Loop(build(), precision).run(14)
    assert loop.cuttlefish.switch_step == 6
    assert loop.losses[-1] < 0.7 * loop.losses[0]
    assert loop.losses == pytest.approx(eager.losses, rel=0.2, abs=0.05)
    loop.model.eval()
    with torch.no_grad(), loop.autocast():
        torch.compiler.cudagraph_mark_step_begin()
        compiled = loop.call(**loop.batch).logits.clone()
        plain = loop.model(**loop.batch).logits
    assert torch.allclose(compiled.float(), plain.float(), rtol=0.05, atol=0.05)
    check_in_step(loop)


def test_graphs_that_leave_no_room_are_gone_while_statistics_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_graphs() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        pools = [s for s in torch.cuda.memory_snapshot() if s.get("segment_pool_id", (0, 0)) != (0, 0)]
        return sum(s["total_size"] for s in pools)

    torch._dynamo.reset()
    assert of_graphs() == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
    loop, eager = Loop(build(), compile_mode="reduce-overhead"), Loop(build())
    loop.run(2)
    assert of_graphs() > 0
    loop.run(1)  # the next step gathers
    assert loop.cuttlefish.watch.is_gathering and of_graphs() == 0
    loop.run(11)
    assert loop.cuttlefish.switch_step == 6 and of_graphs() > 0
    assert loop.losses == pytest.approx(eager.run(14).losses, rel=0.2, abs=0.05)


def test_a_whole_low_rank_step_can_be_captured_as_a_graph() -> None:
    model, batch = build(), make_batch()
    factorize(model, dict.fromkeys(find_targets(model), 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, cache_enabled=False):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = float(step())
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(12):
        graph.replay()
    assert float(loss) < 0.7 * first


def test_resume_after_the_switch_gives_the_same_loss(tmp_path: Any) -> None:
    loop = Loop(build()).run(8)
    loop.model.save_pretrained(tmp_path)
    optimizer, state = copy.deepcopy(loop.optimizer.state_dict()), loop.cuttlefish.state_dict()
    loop.run(4)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).to(DEVICE).train()
    again = Loop(model)
    again.optimizer.load_state_dict(optimizer)
    again.cuttlefish.load_state_dict(state)
    again.run(4)
    assert again.cuttlefish.switch_step == 6
    assert again.losses[0] == loop.losses[8]
    assert again.losses == pytest.approx(loop.losses[8:], rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_against_float64_on_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(96, 160, 24).to(DEVICE, dtype)
    x = torch.randn(64, 96).to(DEVICE, dtype).requires_grad_()
    g = torch.randn(64, 160).to(DEVICE, dtype)
    y = layer(x)
    y.backward(g)

    down, up, bias = (p.detach().cpu().double() for p in (layer.down.weight, layer.up.weight, layer.bias))
    exact_x, exact_g = x.detach().cpu().double(), g.cpu().double()
    exact = {
        "y": (y, exact_x @ down.T @ up.T + bias),
        "x": (x.grad, exact_g @ up @ down),
        "down": (layer.down.weight.grad, (exact_g @ up).T @ exact_x),
        "up": (layer.up.weight.grad, exact_g.T @ (exact_x @ down.T)),
        "bias": (layer.bias.grad, exact_g.sum(0)),
    }
    for name, (found, wanted) in exact.items():
        error = float((found.detach().cpu().double() - wanted).norm() / wanted.norm())
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64)])
def test_factors_from_the_gpu_are_the_best_ones(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    factors = factor_weight(weight, 16)
    error = (weight.double() - factors.up.double() @ factors.down.double()).norm()
    values = torch.linalg.svdvals(weight.cpu().double())
    assert float(error) == pytest.approx(float(values[16:].square().sum().sqrt()), rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64)])
def test_a_batch_on_the_gpu_is_each_alone_in_float64_on_the_cpu(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, *shape, generator=generator)
    moments, k = [], min(shape)
    for weight in weights.double():
        x, g = torch.randn(400, shape[1], generator=generator), torch.randn(400, shape[0], generator=generator)
        covariance, gradient = x.mT @ x / 400, g.mT @ g / 400
        moments.append(LayerMoments.from_full(weight, covariance.double(), gradient.double(), torch.zeros(shape[1])))
    together = decompose_together(weights.to(DEVICE), moments)
    ranks = [k // 4, k // 3, k // 4, k // 2, 8]
    for i, factors in enumerate(cut_together(together, ranks)):
        alone = decompose(weights[i], moments[i])
        torch.testing.assert_close(together[i].spectrum.cpu(), alone.spectrum, rtol=1e-7, atol=1e-9)
        wanted = cut(alone, ranks[i])
        torch.testing.assert_close((factors.up @ factors.down).cpu(), wanted.up @ wanted.down, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_multiplied_out_gives_the_gradients_of_pairs(precision: str) -> None:
    model, batch = build(), make_batch()
    factorize(model, {name: 8 + 8 * (i % 3) for i, name in enumerate(find_targets(model))})

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    pairs = gradients()
    form = RunMultiplied(model)
    form.start()
    gradients()
    found = gradients()
    assert form.batches and set(found) == set(pairs)
    size = max(float(g.norm()) for g in pairs.values())
    for name, g in pairs.items():
        assert float((found[name] - g).norm()) < (1e-4 if precision == "fp32" else 0.05) * max(
            float(g.norm()), 0.01 * size
        ), name


def test_the_quicker_form_is_found_and_said(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.utils.counters.clear()
    loop = Loop(build(), "bf16", switch_step=6)
    loop.cuttlefish.schedule.total_steps = 200
    with caplog.at_level("INFO", logger="hf_cuttlefish"):
        loop.run(40)
    assert set(loop.cuttlefish.phase.tried) == {"multiplied", "pairs"}
    assert "multiplied out" in caplog.text and "as pairs" in caplog.text
    assert all(math.isfinite(loss) for loss in loop.losses)


def test_stable_ranks_on_the_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {str(i): torch.randn(96, 64 + 32 * (i % 2), generator=generator).to(DEVICE) for i in range(6)}
    found = StableRankTracker().measure(weights)
    for name, value in found.items():
        assert value == pytest.approx(float(stable_rank(weights[name].cpu().double())), rel=1e-3)


def test_the_old_tensors_are_gone_and_the_peak_falls_by_what_they_took() -> None:
    model = build(hidden=512, layers=4)
    loop = Loop(model, switch_step=5, target_ratio=0.3)
    loop.batch = make_batch(2, 8)
    loop.run(1)
    old = [weakref.ref(layer.weight) for layer in find_targets(model).values()]
    torch.cuda.reset_peak_memory_stats()
    loop.run(1)
    before = torch.cuda.max_memory_allocated()
    size = sum(p.numel() for p in model.parameters())
    loop.run(4)
    assert loop.cuttlefish.switch_step == 5
    factorized = len(low_rank_layers(model))
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    loop.run(1)
    after = torch.cuda.max_memory_allocated()
    saved = 16 * (size - sum(p.numel() for p in model.parameters()))  # weight, gradient and two moments in fp32
    assert saved > 2**20
    assert before - after >= 0.99 * saved
    assert sum(ref() is None for ref in old) == factorized


def test_measured_selection_knows_how_the_model_runs() -> None:
    torch._dynamo.reset()
    for mode in (None, "default"):
        loop = Loop(build(hidden=256), "bf16", mode, objective="speed", switch_step=12, min_speedup=1.05)
        loop.run(13)
        flow = loop.cuttlefish.watch.flow
        assert flow is not None
        assert flow.compiled is (mode is not None)
        assert (flow.step_time is None) is (mode is not None)
        assert {len(group.layers) for group in flow.groups()} == {1, 3}
        assert all(group.autocast == torch.bfloat16 and group.tokens == 16 * 24 for group in flow.groups())
        switched = loop.cuttlefish.switch_step is not None
        assert switched or "times faster" in str(loop.cuttlefish.reason) or "launches" in str(loop.cuttlefish.reason)


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_whole_steps_are_measured_in_the_mode_that_runs_and_leave_nothing(mode: str | None) -> None:
    losses, reserved = [], []
    for options in ({"objective": "speed", "min_speedup": 100.0, "switch_step": 12}, {"switch_step": 20}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        loop = Loop(build(hidden=256), "bf16", mode, **options).run(11)
        reserved.append(torch.cuda.memory_allocated())
        loop.run(1)
        gc.collect()
        reserved.append(torch.cuda.memory_allocated())
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        loop.run(4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made  # the dense graphs serve on
        losses.append(loop.losses)
        if len(losses) == 1:
            told = str(loop.cuttlefish.reason)
            assert loop.cuttlefish.switch_step is None and told.startswith("a step takes "), told
            assert "ms dense" in told and "ms as planned" in told
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.02)
    # Of products in the stream that is recorded a workspace stays, for each of two threads: 32 MiB on an H100.
    assert reserved[1] - reserved[0] < 2**27


def test_statistics_without_room_on_the_device_are_on_the_cpu_and_the_same() -> None:
    near, far = Loop(build(), statistics_memory=1.0), Loop(build(), statistics_memory=0)
    for loop in (near, far):
        loop.run(5)
    mine, other = far.cuttlefish.watch.moments, near.cuttlefish.watch.moments
    assert {v.device.type for s in mine.sums.values() for v in s.values()} == {"cpu"}
    assert {v.device.type for s in other.sums.values() for v in s.values()} == {"cuda"}
    for name, moments in other.moments().items():
        expected = moments.metric
        assert torch.allclose(
            mine.moments()[name].metric.to(DEVICE), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        ), name
    for loop in (near, far):
        loop.run(5)
    assert dict(near.cuttlefish.plan) == dict(far.cuttlefish.plan)
    assert any("kept on the CPU" in note for note in far.cuttlefish.plan.notes)


def test_steps_of_a_host_that_runs_ahead_take_what_the_device_takes() -> None:
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    began = Moment()
    torch.cuda._sleep(20_000_000)
    expected = began.seconds_to(Moment())
    pace = Pace()
    for _ in range(STEPS):
        pace.begin()
        torch.cuda._sleep(20_000_000)
        pace.step()
        assert pace.latest is not None and pace.latest < expected / 2  # the host waits for nothing
    assert pace.seconds_before == pytest.approx(expected, rel=0.2)


def test_timings_on_the_device_are_finite_and_tell_host_from_device() -> None:
    group = Group(("a",), 256, ((256, True),), 512, torch.device(DEVICE, 0), torch.float32, torch.float32)
    for compiled in (False, True):
        timing = time_group(group, (64,), compiled)
        assert 0 < timing.device_ms < 100
        assert (timing.host_ms > 0) is not compiled


class OnTwoDevices(torch.nn.DataParallel):
    """nn.DataParallel over the GPU and the CPU, for a machine with one GPU: torch's replicas (torch/nn/parallel/replicate.py)
    and a thread for each, and copies of the parameters that backward goes through."""

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        losses: dict[str, torch.Tensor] = {}
        halves = {key: value.chunk(2) for key, value in batch.items()}

        def run(i: int, device: str) -> None:
            rows = {key: parts[i].to(device) for key, parts in halves.items()}
            losses[device] = replica(self.module, device)(**rows).loss

        threads = [threading.Thread(target=run, args=given) for given in enumerate((DEVICE, "cpu"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.stack([losses[DEVICE], losses["cpu"].to(DEVICE)])


def replica(model: torch.nn.Module, device: str) -> torch.nn.Module:
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, parameter.to(device).view_as(parameter))
        twin._buffers = {n: None if b is None else b.to(device) for n, b in module._buffers.items()}
    return twins[model]


@pytest.mark.parametrize("kind", [OnTwoDevices, torch.nn.DataParallel])
def test_replicas_on_several_devices(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are those of the replica where the model is, and the switch needs nothing more."""
    monkeypatch.setattr(find, "_devices", lambda: 2)  # with one GPU nobody would be looked for
    if kind is torch.nn.DataParallel and torch.cuda.device_count() < 2:
        pytest.skip("one GPU here: torch's own nn.DataParallel makes no replicas")
    loop, half = Loop(build()), Loop(build())
    parallel = kind(loop.model)
    parallel.device_ids = [0, 1]

    def call(**batch: torch.Tensor) -> SimpleNamespace:
        output = parallel(**batch)
        return SimpleNamespace(loss=(output if kind is OnTwoDevices else output.loss).mean())

    loop.call = call
    loop.batch = make_batch(16)
    half.batch = {key: value.chunk(2)[0] for key, value in loop.batch.items()}
    for each in (loop, half):
        each.run(3)
    half.model.load_state_dict(loop.model.state_dict())
    for each in (loop, half):
        each.step()
        assert each.cuttlefish.watch.moments is not None
    ours, plain = (each.cuttlefish.watch.moments.moments() for each in (loop, half))
    assert ours.keys() == plain.keys() and len(ours) == 12
    for name, moments in ours.items():
        assert moments.tokens == plain[name].tokens
        for key in ("signal", "metric"):
            expected = getattr(plain[name], key)
            assert torch.allclose(
                getattr(moments, key), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            ), name
    loop.run(10)
    assert loop.cuttlefish.switch_step == 6 and low_rank_layers(loop.model)
    assert loop.losses[-1] < loop.losses[0]
    check_in_step(loop)


def test_trainer_uses_data_parallel_by_itself(tmp_path: Path) -> None:
    """One process and several GPUs: Trainer wraps the model, and the switch is in place."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    from loops import tiny_bert
    from trainers import Rows

    for options in ({}, {"fp16": True}, {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}):
        callback = CuttlefishCallback(
            CuttlefishConfig(switch_step=6, statistics_steps=3, rank_multiple=2, target_ratio=0.5, on_error="raise")
        )
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, save_strategy="no", report_to=[],
            logging_steps=1, **options,
        )  # fmt: skip
        trainer = Trainer(model=tiny_bert(), args=arguments, train_dataset=Rows(), callbacks=[callback])
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.DataParallel) and trainer.args.n_gpu > 1
        assert callback.switch_step == 6 and low_rank_layers(trainer.model)
        assert callback.plan.predicted_loss_increase is not None
        losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
        assert len(losses) == 12 and all(math.isfinite(loss) for loss in losses)


ENGINES = [
    ("nccl", 1, ["ddp fp32", "ddp fp16", "ddp fp16 accumulation", "ddp bf16"]),
    ("nccl", 1, ["ddp bf16 compiled"]),
    ("nccl", 1, ["fsdp2 fp32", "fsdp2 bf16"]),
    ("nccl", 1, ["fsdp2 bf16 compiled"]),
    ("gloo", 2, ["ddp fp32", "ddp fp16", "ddp fp16 accumulation", "ddp bf16"]),
    ("nccl", 2, ["ddp fp32", "ddp fp16", "ddp fp16 accumulation", "ddp bf16"]),
    ("nccl", 2, ["ddp bf16 compiled"]),
    ("nccl", 2, ["fsdp2 fp32", "fsdp2 bf16"]),
    ("nccl", 2, ["fsdp2 bf16 compiled"]),
]
RESTARTS = [
    ("nccl", 2, ["fsdp1 fp32", "fsdp1 fp16", "fsdp1 bf16"]),
    ("gloo", 2, ["fsdp1 fp32", "fsdp1 bf16"]),
    ("nccl", 1, ["zero1 fp16", "zero2 fp16", "zero3 fp16", "zero2 bf16", "zero3 bf16"]),
    ("nccl", 2, ["zero1 fp16", "zero2 fp16", "zero3 fp16", "zero2 bf16", "zero3 bf16"]),
]
"""Backend, processes, scenarios of gpu_trainer.py. NCCL takes one process a GPU; through gloo two can share one."""


@pytest.mark.parametrize(("backend", "size", "scenarios"), ENGINES)
def test_trainer_switches_under_an_engine(tmp_path: Path, backend: str, size: int, scenarios: list[str]) -> None:
    everywhere = start(tmp_path, backend, size, scenarios)
    for name in scenarios:
        result, precision = everywhere[0][name], check_engine(everywhere, name, backend, size)
        assert result["on"] is (size > 1 or "fsdp2" in name)  # Accelerate puts no DDP around one process
        assert result["unequal"] == 0 and result["loaded"] == result["size"]
        for step in (4, 8):
            again = result[f"resumed at {step}"]
            assert again["plan"] == result["plan"]
            assert again["losses"][-4:] == pytest.approx(result["losses"][-4:], rel=2e-2 if precision != "no" else 1e-4)


@pytest.mark.parametrize(("backend", "size", "scenarios"), RESTARTS)
def test_trainer_switches_by_restart(tmp_path: Path, backend: str, size: int, scenarios: list[str]) -> None:
    if scenarios[0].startswith("zero"):
        pytest.importorskip("deepspeed")
    everywhere = start(tmp_path, backend, size, scenarios)
    for name in scenarios:
        result, _ = everywhere[0][name], check_engine(everywhere, name, backend, size)
        assert result["on"] and result["on again"] and result["stopped"] == 6 and result["steps"] == 12
        assert "carried for 12 of 12" in result["optimizer"] and result["loaded"] < result["dense"]


def check_engine(everywhere: list[dict[str, Any]], name: str, backend: str, size: int) -> str:
    """What holds under each of them; returns the precision."""
    result = everywhere[0][name]
    assert "error" not in result, f"{name}: {result['error']}"
    assert (result["backend"], result["processes"], result["device"]) == (backend, size, DEVICE)
    precision = next((p for p in ("fp16", "bf16") if p in name), "no")
    assert result["mixed_precision"] == precision
    assert (result["scale"] is not None) is (precision == "fp16")
    assert result["switched"] == 6 and result["plan"] and len(result["losses"]) == 12
    assert all(math.isfinite(loss) for loss in result["losses"]), result["losses"]
    assert all(other[name]["plan"] == result["plan"] for other in everywhere)
    return precision


def start(tmp_path: Path, backend: str, size: int, scenarios: list[str]) -> list[dict[str, Any]]:
    """Results of gpu_trainer.py, by process and scenario."""
    if backend == "nccl" and size > torch.cuda.device_count():
        pytest.skip(f"NCCL takes a GPU for each of {size} processes, and there is {torch.cuda.device_count()} here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = range(size) if backend == "nccl" else [0] * size
    ends = by_hand("gpu_trainer.py", tmp_path, backend, *scenarios, local_ranks=ranks, port=port, environment=PLAIN)
    assert all(code == 0 for code, _ in ends), ends[0][1][-3000:]
    everywhere = json.loads((tmp_path / "results.json").read_text())
    print(json.dumps(everywhere[0]))
    return everywhere
