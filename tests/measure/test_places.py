"""Statistics that do not fit on the device are kept on the CPU, and are the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.measure import places, samples
from hf_cuttlefish.measure.moments import MomentCollector
from hf_cuttlefish.measure.places import GIB, bytes_of, far_layers, said_of_far
from tiny_trainer import tiny_bert

THERE = "meta"
"""Any device that is not the CPU."""
SIZES = {"a": (8, 8), "b": (64, 64), "c": (8, 32), "d": (64, 64)}
LAYERS = {name: nn.Linear(*size, device=THERE) for name, size in SIZES.items()}


def need(*names: str) -> float:
    return sum(bytes_of(LAYERS[name]) for name in names) / GIB


def test_the_largest_shapes_go_first_and_whole() -> None:
    assert far_layers(LAYERS, need(*LAYERS)) == set()
    assert far_layers(LAYERS, need(*LAYERS) - 1 / GIB) == {"b", "d"}
    assert far_layers(LAYERS, need("a")) == {"b", "c", "d"}
    assert far_layers(LAYERS, 0) == set(LAYERS)


def test_without_a_limit_what_the_largest_step_leaves_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert far_layers(LAYERS, None) == set()  # what is no CUDA device is not asked
    for name, found in (("mem_get_info", (5 * GIB, 80 * GIB)), ("memory_reserved", 10 * GIB)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 8 * GIB)
    assert places.room(torch.device("cuda", 0)) == 7 * GIB - places.SPARE
    monkeypatch.setattr(places, "room", lambda device: bytes_of(LAYERS["a"]) + bytes_of(LAYERS["c"]))
    assert far_layers(LAYERS, None) == {"b", "d"}


def test_graphs_make_room_only_where_a_step_may_not_fit_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    pools: list[dict[str, Any]] = [{"device": 0, "segment_pool_id": (0, 0)}, {"device": 1, "segment_pool_id": (0, 3)}]
    found: dict[str, Any] = {"mem_get_info": (9 * GIB, 80 * GIB), "max_memory_allocated": 30 * GIB}
    found |= {"memory_allocated": 20 * GIB}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: pools)
    assert not places.lacks_room_beside_graphs(torch.device("cpu"))
    assert not places.lacks_room_beside_graphs(device)  # a step takes 10 GiB of 9, but no graph holds any here
    pools.append({"device": 0, "segment_pool_id": (0, 3)})
    assert places.lacks_room_beside_graphs(device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * GIB, 80 * GIB))
    assert not places.lacks_room_beside_graphs(device)


def test_tables_of_tokens_and_what_has_their_shape_stay() -> None:
    sizes = {"of its shape": (64, 8), "other": (8, 8)}
    layers = {name: nn.Linear(*size, device=THERE) for name, size in sizes.items()}
    assert far_layers({"table": nn.Embedding(64, 8, device=THERE)} | layers, 0) == {"other"}


def test_what_is_on_the_cpu_anyway_is_not_named() -> None:
    assert far_layers({name: nn.Linear(*size) for name, size in SIZES.items()} | {"e": LAYERS["a"]}, 0) == {"e"}


@pytest.mark.parametrize("together", [False, True])
def test_sums_on_the_cpu_are_those_of_the_device(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(far: bool) -> MomentCollector:
        plain = samples.add_samples
        monkeypatch.setattr("hf_cuttlefish.measure.moments.add_samples", lambda *given: plain(*given, far=far))
        model = tiny_bert().eval()
        layers = find_targets(model)
        collector = MomentCollector(model, layers, 12, far=layers if far else ())
        collector.together = together
        collector.start()
        for step in range(2):
            ids = torch.randint(3, 50, (8, 10), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
            collector.step()
        collector.stop()
        return collector

    near, far = gather(False).moments(), gather(True).moments()
    assert near.keys() == far.keys() and len(near) == 12
    for name, moments in near.items():
        for part in ("signal", "metric", "mean"):
            wanted = getattr(moments, part)
            assert torch.allclose(getattr(far[name], part), wanted, atol=1e-5 * float(wanted.abs().max())), name


@pytest.mark.parametrize(("m", "n"), [(16, 32), (32, 16)])
@pytest.mark.parametrize("count", [1, 3])
def test_no_operation_mixes_devices(m: int, n: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and devices alone, as torch works them out without a GPU; an operation on tensors of two devices raises."""
    add = torch._foreach_add_

    def checked(to: list[torch.Tensor], new: list[torch.Tensor], **more: Any) -> Any:
        if [t.device for t in to] != [t.device for t in new]:  # not seen by FakeTensorMode
            raise RuntimeError("tensors of two devices are added")
        return add(to, new, **more)

    monkeypatch.setattr(torch, "_foreach_add_", checked)
    with FakeTensorMode():
        k, there = min(m, n), torch.device("cuda", 0)
        shapes = {"signal": (k, k), "metric": (k, k), "x": (n,), "count": (), "other": (), "y": (m,)}
        sums = [{name: torch.zeros(shape) for name, shape in shapes.items()} for _ in range(count)]
        one = samples.Sample(
            torch.zeros(5, n, device=there), None, torch.zeros(5, m, device=there), 1, torch.zeros(m, n, device=there)
        )
        scale = torch.ones((), device=there)
        samples.add_samples(sums, [one] * count, scale)
        assert all(value.device.type == "cpu" for own in sums for value in own.values())
        if count > 1:  # one alone is added by an operation that torch does not know without a GPU
            near = [{name: value.to(there) for name, value in own.items()} for own in sums]
            samples.add_samples(near, [one] * count, scale)
            with pytest.raises(RuntimeError, match="two devices"):
                samples.add_samples(sums, [one] * count, scale, far=False)


def train(memory: float | None) -> Cuttlefish:
    model = tiny_bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CuttlefishConfig(
        switch_step=8, statistics_steps=4, rank_multiple=4, target_ratio=0.4, statistics_memory=memory, on_error="raise"
    )
    run = Cuttlefish(model, optimizer, config, total_steps=20)
    for step in range(10):
        torch.manual_seed(step)
        ids = torch.randint(3, 50, (8, 10))
        model(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
    return run


def test_a_run_without_room_decides_the_same_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(0)  # on a CPU nothing is far
    budgets: list[float | None] = []

    def all_layers(layers: Any, budget: float | None) -> frozenset[str]:
        budgets.append(budget)
        return frozenset(layers)

    monkeypatch.setattr("hf_cuttlefish.measure.watch.far_layers", all_layers)
    poor = train(0.5)
    assert budgets == [0.5]
    assert dict(plain.plan) == dict(poor.plan) and low_rank_layers(poor.model)
    (note,) = [note for note in poor.plan.notes if "kept on the CPU" in note]
    assert note == said_of_far(find_targets(tiny_bert()), frozenset(find_targets(tiny_bert())))
    assert "statistics_memory" in note and not any("kept on the CPU" in note for note in plain.plan.notes)


def test_processes_sum_what_is_on_the_cpu() -> None:
    """Sums that were copied for the exchange come back; here one other process has the same ones."""

    two: Any = SimpleNamespace(size=2, is_main=True, sum_=lambda value: value.mul_(2))
    model = tiny_bert()
    layers = find_targets(model)
    found = []
    for far in ((), layers):
        collector = MomentCollector(model, layers, far=far)
        for name in layers:
            for value in collector.sums_of(name).values():
                value.fill_(3.0)
        collector.reduce(two)
        found.append({float(v.max()) for name in layers for v in collector.sums_of(name).values()})
    assert found == [{6.0}, {6.0}]


@pytest.mark.parametrize("value", [-1, "2"])
def test_a_wrong_limit_is_named(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="statistics_memory"):
        CuttlefishConfig(statistics_memory=value)
