"""Points of time on a device that is behind its host, with events that are told when they were passed."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_cuttlefish.measure import pace as module
from hf_cuttlefish.measure.pace import STEPS, UNCOUNTED, Moment, Pace


class Device:
    """A device that the host does not wait for: it passes an event when it has done all that came before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.busy_until = 100.0, 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.host)
        monkeypatch.setattr(module, "_mark_on_device", lambda model: Event(max(self.host, self.busy_until)))

    def step(self, host: float, device: float) -> None:
        """The host launches for so long; the device works for so long from the launch, or from when it is free."""
        self.busy_until = max(self.host, self.busy_until) + device
        self.host += host


class Event:
    def __init__(self, at: float) -> None:
        self.at, self.is_waited_for = at, False

    def synchronize(self) -> None:
        self.is_waited_for = True

    def elapsed_time(self, later: Event) -> float:
        assert self.is_waited_for and later.is_waited_for
        return 1000 * (later.at - self.at)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle 'Event' object")  # as CUDA's


def run(device: Device, pace: Pace, count: int, host: float, work: float, fetch: float = 0.0) -> None:
    for _ in range(count):
        device.host += fetch
        pace.begin()
        device.step(host, work)
        pace.step()


def test_a_host_that_runs_ahead_does_not_make_steps_look_short(monkeypatch: pytest.MonkeyPatch) -> None:
    device, pace = Device(monkeypatch), Pace()
    run(device, pace, STEPS, host=0.002, work=0.046)
    pace.mark()
    device.host = device.busy_until  # the switch waits for the device
    run(device, pace, UNCOUNTED + STEPS, host=0.002, work=0.034)
    assert pace.compare() == pytest.approx((0.046, 0.034)) and not pace.is_slower(1.05)


def test_a_late_host_is_late_on_the_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device, pace = Device(monkeypatch), Pace()
    run(device, pace, STEPS, host=0.040, work=0.010, fetch=0.5)
    pace.mark()
    run(device, pace, UNCOUNTED + STEPS, host=0.060, work=0.010, fetch=0.5)
    # From a step's first launch to its last the device is done soon after the host: what the loader takes is not in it.
    before, after = pace.compare() or (0.0, 0.0)
    assert before == pytest.approx(0.040) and after == pytest.approx(0.060)


def test_without_a_device_the_hosts_times_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr(module, "_mark_on_device", lambda model=None: None)
    first, second = Moment(), Moment()
    assert first.seconds_to(second) == 2.5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pace: pickle.loads(pickle.dumps(pace))])
def test_a_copy_goes_on_with_the_hosts_times(monkeypatch: pytest.MonkeyPatch, copied: Any) -> None:
    device, pace = Device(monkeypatch), Pace()
    run(device, pace, STEPS, host=0.002, work=0.046)
    again = copied(pace)
    assert again.seconds_before == pytest.approx(0.002) and pace.seconds_before == pytest.approx(0.046)
    device.host = device.busy_until
    run(device, again, STEPS, host=0.05, work=0.046)
    assert again.seconds_before == pytest.approx(0.05)


@pytest.mark.parametrize(("where", "asked"), [("cuda:1", torch.device("cuda", 1)), ("cpu", None), ("meta", None)])
def test_steps_are_timed_where_the_model_is(monkeypatch: pytest.MonkeyPatch, where: str, asked: Any) -> None:
    """The current device may be another one. Offloaded weights are computed with on the current one."""
    recorded: list[Any] = []
    event = SimpleNamespace(record=lambda stream=None: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    model: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(where))]))
    pace = Pace(model)
    pace.begin()
    pace.step()
    assert recorded == [("stream of", asked)] * 2
