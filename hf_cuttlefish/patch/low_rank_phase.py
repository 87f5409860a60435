"""The low-rank phase: run in the form that is quickest here, and say what a step takes where it has become slower."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import nn

from ..config import CuttlefishConfig
from ..decide.schedule import Schedule
from ..layers.low_rank import low_rank_layers
from ..measure.eager import has_compiled, has_cuda_graphs
from ..measure.pace import BEFORE
from ..measure.watch import Watch
from .graphed_step import graphs_made, has_graphs, is_graphed
from .left_behind import LeftBehind
from .report import FactorizationReport
from .running import RunMultiplied

WARM, TRIED = 3, 6
"""Steps in each form of running: first ones that do not count, and those that are timed."""
RECORDING = 96
"""Within so many steps after the switch a step counts only once those of the usual shapes are recorded as CUDA graphs."""
SETTLED = 2
"""Steps after which what held the graph of the last dense step has been given another."""
LEAST = 4 * 2 * (WARM + TRIED)
"""With fewer steps to come nothing is tried."""
BACKLOG = 0.3
"""Where the device is behind by more than this share of a step when the host has launched all, it sets the pace."""

CLEARLY = 0.9
"""Where the host sets the pace its times scatter by a third: what launches less runs, unless pairs take less than this share."""


class Run(Protocol):
    """What is asked of a run."""

    config: CuttlefishConfig
    report: FactorizationReport | None
    schedule: Schedule
    global_step: int
    switch_step: int | None

    @property
    def engine(self) -> Any: ...
    @property
    def restarts(self) -> bool: ...


@dataclass(frozen=True)
class Found:
    """What there is to say of the low-rank phase.

    Attributes:
        waits_for_host: whether the host sets the pace; None where it is not known. device: "cuda", "cpu", ...
        tried: form of running -> milliseconds a step, where one was chosen: `form`.
        times: seconds a step before the switch and after it. is_slower: whether that is more than 5% longer.
        objective: of the config. is_compiled: whether anything is compiled. has_graphs: whether it runs as the compiler's CUDA graphs.
        has_step_graphs: whether steps are CUDA graphs as `GraphedStep` records them.
        is_resumed: whether the time before is another run's. is_alone: whether one process trains the model.
    """

    waits_for_host: bool | None
    device: str
    tried: Mapping[str, float] | None = None
    times: tuple[float, float] | None = None
    is_slower: bool = False
    objective: str = "size"
    is_compiled: bool = False
    has_graphs: bool = False
    has_step_graphs: bool = False
    is_resumed: bool = False
    is_alone: bool = True
    form: str | None = None


class LowRankPhase:
    """What happens in the steps after the switch.

        phase = LowRankPhase(watch); ...; found = phase.step(run); ...; phase.stop()

    On a GPU without compilation the host may set the pace, and pairs launch more than dense layers. So the model runs some steps
    in each form, multiplied out (`layers.multiplied`) and as pairs, and stays with the quicker one. Steps that are recorded as CUDA
    graphs launch once in either form, so they run as pairs.

    Attributes:
        tried: form -> milliseconds a step; empty where nothing was tried. multiplied: the form, while it is on or being tried.
        waits_for_host: whether the host sets the pace; None where it is not known.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.tried: dict[str, float] = {}
        self.multiplied: RunMultiplied | None = None
        self.waits_for_host: bool | None = None
        self._section: _Section | None = None
        self._has_begun = self._is_resumed = self._is_dense = False
        self._slower: tuple[float, float] | None = None
        self._left: LeftBehind | None = None
        self._is_graphed = False
        self._made = 0
        self._recorded_by = 0

    def begin(self) -> None:
        """At the switch: there are no target layers any more, and two steps later nobody should hold their weights."""
        self._left = LeftBehind(self.watch.layers, low_rank_layers(self.watch.model))
        self.watch.layers = {}

    def step(self, run: Run) -> Found | None:
        """A step has ended in which no switch was to come any more; what there is to say."""
        if run.switch_step is None:
            return None
        if self._left is not None and run.global_step >= run.switch_step + SETTLED:
            left, self._left = self._left, None
            if run.engine.processes.is_main:
                left.say()
        if not self._has_begun:
            self._has_begun = True
            self.watch.forget_batches()
            self._is_dense = run.restarts and not low_rank_layers(run.engine.model)  # switched in a checkpoint alone
            if not self._is_dense:
                self._begin(run)
        if self._is_dense:
            return None
        if self._is_graphed:
            self._follow_graphs(run)
        device = next(run.engine.model.parameters()).device.type
        if self._section is not None and self._slower is None:
            if not self._try():
                return None
            form = "pairs" if self.multiplied is None else "multiplied"
            return Found(self.waits_for_host, device, self.tried, form=form)
        if self._slower is not None:
            return self._say_slower(run, device, self._slower)
        compared = self.watch.compared()
        if compared is None:
            return None
        *times, is_slower = compared
        if is_slower:
            return self._say_slower(run, device, (times[0], times[1]))
        return self._found(run, device, (times[0], times[1])) if run.config.objective == "speed" else None

    def _say_slower(self, run: Run, device: str, times: tuple[float, float]) -> Found | None:
        """At once where the reason is known; on a GPU after some steps that show whether the host or the device sets the pace."""
        if device == "cuda" and self.waits_for_host is None:
            if self._section is None:
                self._section, self._slower = _Section(), times
                return None
            if not self._section.step(self.watch.pace.latest):
                return None
            self.waits_for_host = self._section.waits_for_host
        self._section = self._slower = None
        return self._found(run, device, times, is_slower=True)

    def _found(self, run: Run, device: str, times: tuple[float, float], is_slower: bool = False) -> Found:
        return Found(
            self.waits_for_host,
            device,
            times=times,
            is_slower=is_slower,
            objective=run.config.objective,
            is_compiled=has_compiled(),
            has_graphs=has_cuda_graphs(),
            has_step_graphs=has_graphs(),
            is_resumed=self._is_resumed,
            is_alone=run.engine.processes.size == 1 and run.engine.replicas == 1,
        )

    def stop(self) -> None:
        """Pairs again: the run has ended."""
        if self.multiplied is not None:
            self.multiplied.stop()
        self._section = self._left = None

    def _begin(self, run: Run) -> None:
        if not self.watch.pace.is_after:  # the run goes on from a checkpoint after the switch
            self._is_resumed = True
            self.watch.pace.mark(None if run.report is None else run.report.seconds.get(BEFORE))
        self._is_graphed, self._recorded_by = is_graphed(run.engine.model), run.global_step + RECORDING
        if not self._is_graphed:
            self._begin_trial(run)

    def _begin_trial(self, run: Run) -> None:
        if run.schedule.total_steps - run.global_step >= LEAST and can_try(run.engine):
            form = RunMultiplied(run.engine.model)
            if form.start():
                self.multiplied, self._section = form, _Section()

    def _follow_graphs(self, run: Run) -> None:
        """Begin to compare anew with each graph that is recorded; where none can be, try the forms after all."""
        self._is_graphed, made = is_graphed(run.engine.model), graphs_made(run.engine.model)
        if self._is_graphed and (made == self._made or run.global_step >= self._recorded_by):
            return
        self._made = made
        self.watch.pace.mark()
        if not self._is_graphed:
            self._begin_trial(run)

    def _try(self) -> bool:
        """Time the form that is on; then try the next one, or choose. Whether that was done."""
        section, form = self._section, self.multiplied
        if section is None or form is None or not section.step(self.watch.pace.latest):
            return False
        self.tried["multiplied" if form.is_on else "pairs"] = 1000 * section.seconds
        if form.is_on:
            form.stop()
            self._section, self.waits_for_host = _Section(), section.waits_for_host
            return False
        both_wait = bool(self.waits_for_host) and section.waits_for_host
        if quicker_form(self.tried, both_wait) == "multiplied":
            form.start()
        else:
            self.multiplied, self.waits_for_host = None, section.waits_for_host
        self._section = None
        self.watch.pace.mark()
        return True


def quicker_form(tried: Mapping[str, float], waits_for_host: bool) -> str:
    """The form to run in. tried: form -> milliseconds a step. waits_for_host: whether the host sets the pace in both."""
    least = CLEARLY if waits_for_host else 1.0
    return "pairs" if tried["pairs"] <= least * tried["multiplied"] else "multiplied"


def can_try(engine: Any) -> bool:
    """Whether the host may set the pace, and one process holds the whole model."""
    parameter = next(engine.model.parameters())
    alone = engine.processes.size == 1 and engine.holds_whole_weights and not engine.fixed
    return parameter.device.type == "cuda" and alone and not has_compiled() and not _is_checkpointed(engine.model)


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class _Section:
    """Some steps in one form: the first ones warm up, the others are timed from a synchronization to the next one."""

    def __init__(self) -> None:
        self._gaps: list[float] = []
        self._count = 0
        self._last = 0.0
        self._wait = 0.0

    def step(self, seconds: float | None) -> bool:
        """A step has ended; whether it was the last one. seconds: that it took, where it is known when it began."""
        self._count += 1
        if self._count == WARM:
            _synchronize()
        elif self._count > WARM:
            self._gaps.append(time.perf_counter() - self._last if seconds is None else seconds)
        if len(self._gaps) == TRIED:
            began = time.perf_counter()
            _synchronize()
            self._wait = time.perf_counter() - began
            return True
        self._last = time.perf_counter()
        return False

    @property
    def seconds(self) -> float:
        """A step: the median of the host's, so that an evaluation among them does not count, and what the device was behind."""
        return median(self._gaps) + self._wait / TRIED

    @property
    def waits_for_host(self) -> bool:
        return self._wait < BACKLOG * self.seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
