"""Time: each group of layers on the device, dense and low rank, at the shapes and in the precision of the run.

On a GPU without compilation a step takes the longer of two times, the device's and the host's, and pairs save one and cost
the other: so both are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ..layers.low_rank import LowRankLinear, low_rank_layers
from .eager import eagerly
from .shapes import FlowRecorder, Group
from .side_stream import side_stream

ROUNDS = 3
"""Rounds in which all that is to be compared has its turn; the quickest of each counts: other work slows a few of one round."""


REPEATS = 3
"""Timed batches of calls in a round; the quickest counts, too."""


BATCH_MS = 4.0
"""About how long one timed batch of calls takes."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one forward and backward: on the device, and of the host until all is launched (0: never waited for)."""

    device_ms: float
    host_ms: float = 0.0


@dataclass(frozen=True)
class GroupTiming:
    """One row of the table: a group, dense and at its planned ranks (None: that layer stays dense in both)."""

    group: Group
    ranks: tuple[int | None, ...]
    dense: Timing
    low_rank: Timing

    @property
    def speedup(self) -> float:
        """Dense over low rank, on the device."""
        return self.dense.device_ms / max(self.low_rank.device_ms, 1e-9)


Timer = Callable[[Group, Sequence["int | None"], bool], Timing]
"""(group, rank of each layer or None for dense, compiled) -> Timing. Tests give one of their own."""


_CACHE: dict[tuple[Any, ...], Timing] = {}


def time_group(group: Group, ranks: Sequence[int | None], compiled: bool = False) -> Timing:
    """Forward and backward of a group with random weights and inputs; the random state stays as it was."""
    gpus = [group.device] if group.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.enable_grad():
        return _time(_training_call(group, ranks, compiled), group.device, compiled)


def time_in_turn(
    wanted: Sequence[tuple[Group, tuple[int | None, ...]]], compiled: bool = False, timer: Timer = time_group
) -> list[Timing]:
    """The best of `ROUNDS` timings of each; measured once for each (device, dtypes, shape, ranks) and remembered."""
    keys = [(timer, *group.key, ranks, compiled) for group, ranks in wanted]
    new = {key: job for key, job in zip(keys, wanted, strict=True) if key not in _CACHE}
    for _ in range(ROUNDS):
        for key, (group, ranks) in new.items():
            found = timer(group, ranks, compiled)
            best = _CACHE.get(key, found)
            _CACHE[key] = Timing(min(found.device_ms, best.device_ms), min(found.host_ms, best.host_ms))
    return [_CACHE[key] for key in keys]


def measure_groups(
    groups: Iterable[Group], ranks: Mapping[str, int], compiled: bool = False, timer: Timer = time_group
) -> list[GroupTiming]:
    """Time every group of which a layer is planned to be factorized.

    Args:
        groups: what flows (`FlowRecorder.groups`). ranks: layer -> planned rank; layers without one are dense in both.
        compiled: whether the model runs compiled: then only the device's time counts.
        timer: what measures; `time_group`.
    """
    planned = [(group, tuple(ranks.get(name) for name in group.layers)) for group in groups]
    planned = [(group, some) for group, some in planned if any(rank is not None for rank in some)]
    jobs: list[tuple[Group, tuple[int | None, ...]]] = []
    for group, some in planned:
        jobs.append((group, (None,) * len(some)))
        jobs.append(
            (
                group,
                tuple(
                    None if r is None else _rounded(r, min(group.in_features, out))
                    for r, (out, _) in zip(some, group.outs, strict=True)
                ),
            )
        )
    times = time_in_turn(jobs, compiled, timer)
    return [GroupTiming(*row, dense, low) for row, dense, low in zip(planned, times[::2], times[1::2], strict=True)]


def rank_prices(
    groups: Iterable[Group], sizes: Mapping[str, int], compiled: bool = False, timer: Timer = time_group
) -> dict[str, float]:
    """Milliseconds that one more unit of rank costs each layer: the slope between two ranks below break-even.

    For rules that spread ranks over a model by their price. A slope lost in noise becomes the smallest plausible one, a
    quarter of the median by size.

    Args:
        sizes: m + n of every layer that needs a price; one that was not seen to run gets the typical one of its size.
    """
    slopes: dict[str, tuple[float, int]] = {}
    jobs: list[tuple[Group, tuple[int | None, ...]]] = []
    for group in groups:
        for name, (out, bias) in zip(group.layers, group.outs, strict=True):
            single = replace(group, layers=(name,), outs=((out, bias),))
            most = group.in_features * out // (group.in_features + out)
            jobs += [(single, (max(1, most // 4),)), (single, (max(2, most),))]
    times = time_in_turn(jobs, compiled, timer)
    for (single, (low,)), (_, (high,)), cheap, dear in zip(jobs[::2], jobs[1::2], times[::2], times[1::2], strict=True):
        slope = (dear.device_ms - cheap.device_ms) / (cast(int, high) - cast(int, low)) * single.calls
        slopes[single.layers[0]] = slope, single.in_features + single.outs[0][0]
    typical = sorted(slope / size for slope, size in slopes.values())
    middle = max(typical[len(typical) // 2], 1e-12) if typical else 1.0
    prices = {name: max(slope, middle * size / 4) for name, (slope, size) in slopes.items()}
    return {name: prices.get(name, middle * size) for name, size in sizes.items()}


def _rounded(rank: int, limit: int) -> int:
    """A rank not below this one, so that few distinct ones are measured: all ranks of a plan differ under rule "loss"."""
    step = 8 if rank <= 64 else 32 if rank <= 512 else 128
    return max(rank, min(-(-rank // step) * step, limit))


def _training_call(group: Group, ranks: Sequence[int | None], compiled: bool) -> Callable[[], Any]:
    made: dict[str, Any] = {"device": group.device, "dtype": group.weight_dtype}
    layers: list[nn.Module] = []
    layer: nn.Module
    forms = group.forms or (None,) * len(group.outs)
    for form, (out, bias), rank in zip(forms, group.outs, ranks, strict=True):
        n = group.in_features
        if form is not None:
            layer = form.build(rank, group.device, group.weight_dtype)
        else:
            layer = nn.Linear(n, out, bias, **made) if rank is None else LowRankLinear(n, out, rank, bias, **made)
        layers.append(layer.requires_grad_(group.weight_grad))
    # A compiler lets the producer write what the product reads; eagerly the cast is the layer's own.
    dtype = group.autocast if compiled and group.autocast is not None else group.input_dtype
    generator = torch.Generator(group.device).manual_seed(0)
    if forms[0] is not None:
        x = forms[0].input(group.input_shape, group.device).to(dtype)
    else:
        x = torch.randn(group.tokens, group.in_features, generator=generator, device=group.device).to(dtype)
    x.requires_grad_(group.input_grad)
    wanted = [t for t in (x, *(p for layer in layers for p in layer.parameters())) if t.requires_grad]
    kind = group.device.type
    gradients: list[torch.Tensor] = []

    def call() -> None:
        with torch.autocast(kind, dtype=group.autocast, enabled=group.autocast is not None):
            outputs = [layer(x) for layer in layers]
        if not gradients:
            gradients.extend(torch.randn_like(y) for y in outputs)
        if wanted:
            torch.autograd.grad(outputs, wanted, gradients)

    return call


def _time(call: Callable[[], Any], device: torch.device, compiled: bool) -> Timing:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _time_on_gpu(call, compiled)
    call()
    began = time.perf_counter()
    call()
    one = 1000 * (time.perf_counter() - began)
    found = [one]
    repeats = max(1, min(50, int(BATCH_MS / max(one, 1e-3))))
    for _ in range(REPEATS if one < 5 * BATCH_MS else 0):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        found.append(1000 * (time.perf_counter() - began) / repeats)
    return Timing(min(found))


def _time_on_gpu(call: Callable[[], Any], compiled: bool) -> Timing:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    host = []
    if not compiled:
        for _ in range(REPEATS):
            began = time.perf_counter()
            for _ in range(8):  # few enough that the launch queue never fills
                call()
            host.append(1000 * (time.perf_counter() - began) / 8)
            torch.cuda.synchronize()
    run = _captured(call) or call
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    found, repeats = [], 4
    for attempt in range(REPEATS + 1):
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        ms = start.elapsed_time(end) / repeats
        if attempt == 0:
            repeats = max(4, min(200, int(BATCH_MS / max(ms, 1e-3))))
        else:
            found.append(ms)
    return Timing(min(found), min(host, default=0.0))


def _captured(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call as a CUDA graph: the device's time without the host's. None where capture fails."""
    try:
        side = side_stream(torch.device("cuda", torch.cuda.current_device()))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, stream=side, capture_error_mode="thread_local"
        ):  # other threads may ask the device meanwhile
            call()
        return graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def table(rows: Sequence[GroupTiming]) -> list[str]:
    """One line for each distinct kind of group: shape, range of ranks, times and speed-up."""
    kinds: dict[tuple[Any, ...], list[GroupTiming]] = {}
    for row in rows:
        kinds.setdefault((*row.group.key, row.group.calls), []).append(row)
    lines = []
    for same in kinds.values():
        group = same[0].group
        outs = " + ".join(str(out) for out, _ in group.outs)
        ranks = sorted(rank for row in same for rank in row.ranks if rank is not None)
        span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}-{ranks[-1]}"
        dense, low = _mean(r.dense.device_ms for r in same), _mean(r.low_rank.device_ms for r in same)
        host = ""
        if same[0].dense.host_ms:
            before, after = _mean(r.dense.host_ms for r in same), _mean(r.low_rank.host_ms for r in same)
            host = f", host {before:.3f} -> {after:.3f} ms"
        lines.append(
            f"{len(same)} x {_short(group.layers)} ({group.in_features} -> {outs}, {group.tokens} tokens) at rank {span}: "
            f"{dense:.3f} -> {low:.3f} ms, {dense / max(low, 1e-9):.2f}x{host}"
        )
    return lines


def time_inference(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor, timer: Timer = time_group
) -> list[GroupTiming]:
    """Forward times of the factorized layers, one row each, dense and as pairs, at the shapes of `inputs`.

    The model runs once, eagerly and without gradients; layers that it does not call have no row.

    Args:
        inputs: keyword arguments of the model's forward, or positional ones, on its device.
    """
    layers = low_rank_layers(model)
    flow = FlowRecorder(model, layers, inference=True)
    training = [module for module in model.modules() if module.training]
    flow.start()
    try:
        model.eval()
        with torch.no_grad(), eagerly():
            if isinstance(inputs, torch.Tensor):
                model(inputs)
            elif isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*inputs)
    finally:
        for module in training:
            module.training = True
        flow.stop()
    jobs: list[tuple[Group, tuple[int | None, ...]]] = []
    for group in flow.groups():
        for name, out in zip(group.layers, group.outs, strict=True):
            single = replace(group, layers=(name,), outs=(out,), input_grad=False, weight_grad=False)
            jobs += [(single, (None,)), (single, (layers[name].rank,))]
    times = time_in_turn(jobs, False, timer)
    return [GroupTiming(*jobs[i], *times[i - 1 : i + 1]) for i in range(1, len(jobs), 2)]


def slower_layers(rows: Iterable[GroupTiming]) -> list[str]:
    """Names of the layers that are slower as pairs, by `time_inference`; what a call takes is the longer of device and host."""
    return [row.group.layers[0] for row in rows if _longer(row.dense) < _longer(row.low_rank)]


def _longer(timing: Timing) -> float:
    return max(timing.device_ms, timing.host_ms)


def _short(layers: tuple[str, ...]) -> str:
    return "+".join(".".join(name.split(".")[-2:]) if len(layers) == 1 else name.split(".")[-1] for name in layers)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
