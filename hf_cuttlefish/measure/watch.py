"""Watch: all that is measured of a run before its switch. Stable ranks, moments, and what flows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..config import CuttlefishConfig
from ..layers.kinds import dense_weight, kind_of
from ..processes import Processes
from .batches import Batches
from .forgotten_scaler import say_forgotten_scaler
from .heading import Heading, sample
from .history import StableRankHistory
from .kept import KeptBatches
from .moments import MomentCollector
from .pace import BEFORE, Pace
from .places import far_layers, lacks_room_beside_graphs
from .shapes import FlowRecorder
from .tracker import StableRankTracker

T = TypeVar("T")
SLOWER = 1.05
"""Steps that take so many times as long are said to be slower."""
Layers = Mapping[str, nn.Module]


class Source(Protocol):
    """What is asked of the engine that trains the model."""

    processes: Processes
    peers: Processes
    replicas: int
    holds_whole_weights: bool

    def taps(self, layers: Layers) -> Layers: ...
    def whole_flow(self, name: str, tensor: torch.Tensor, side: str) -> torch.Tensor: ...
    def loss_scale(self, scaler: Any = None) -> float: ...
    def from_main(self, layers: Layers, function: Callable[[Layers], T]) -> T: ...
    def forget_compiled(self) -> None: ...


class Watch:
    """What is measured of a run's target layers.

        watch = Watch(model, layers, engine, config)
        watch.measure(0); watch.start_gathering(); watch.step(); watch.stop()

    Attributes:
        history: stable ranks by step and layer. moments: the statistics being gathered, or None. flow: what flows, or None.
        kept: batches of the steps that gather. early: of those in which the flow was seen.
    """

    def __init__(self, model: nn.Module, layers: Layers, engine: Source, config: CuttlefishConfig) -> None:
        self.model, self.layers, self.engine, self.config = model, layers, engine, config
        self.history = StableRankHistory()
        self.moments: MomentCollector | None = None
        self.flow: FlowRecorder | None = None
        self.heading: Heading | None = None
        self.kept, self.early = KeptBatches(model), KeptBatches(model)
        self.pace = Pace(self.model)
        self.seconds: tuple[float, float] | None = None
        self._first: tuple[Batches, list[Any]] | None = None
        self._tracker = StableRankTracker()
        self._logged_check = -1
        self._has_asked = False

    # --- stable ranks ---

    def measure(self, step: int) -> None:
        """Measure the stable ranks of all layers; one after the other where weights are sharded."""
        ranks = self.engine.from_main(self.layers, self._measure)
        self.history.append(step, ranks)

    def _measure(self, layers: Layers) -> dict[str, float]:
        if layers is self.layers:
            return self._tracker.measure({name: dense_weight(layer) for name, layer in layers.items()})
        return {n: self._tracker.measure({n: dense_weight(layer)})[n] for n, layer in layers.items()}

    # --- how the run goes ---

    def start(self, stretch: int) -> None:
        """Before the first step: follow the weights' travel, in stretches of so many steps, and count the first step's terms."""
        batches = Batches()
        self._first = batches, batches.hooks(self.model, lambda module: not getattr(module, "_is_replica", False))
        self.heading = Heading(stretch)
        self.note_heading(0)

    def note_heading(self, step: int) -> None:
        """Sample the weights of this step: every process, or the main one where they are sharded, one after the other."""
        if (heading := self.heading) is None:
            return

        def note(layers: Layers) -> None:
            heading.note(step, {name: sample(dense_weight(layer)) for name, layer in layers.items()})

        if self.engine.holds_whole_weights:
            note(self.layers)
        else:
            self.engine.from_main(self.layers, note)

    def alignment(self, step: int) -> float | None:
        """Share of directed travel of the weights, as the main process has it; None where it is not known."""
        return self.engine.processes.from_main(lambda: None if self.heading is None else self.heading.alignment(step))

    def terms_of_first_step(self) -> float | None:
        """Loss terms that all processes together saw in the step that has just ended; None unless it is the first."""
        batches = self.forget_first_step()
        # Summed: labels differ from process to process, and the window that follows from this must not.
        return None if batches is None else sum(self.engine.peers.gather(float(batches.pending)))

    def forget_first_step(self) -> Batches | None:
        """Stop counting the terms of the first step, and ask no other process. Returns what has been counted."""
        if self._first is None:
            return None
        (batches, handles), self._first = self._first, None
        for handle in handles:
            handle.remove()
        return batches

    def keep_pace(self, step: int) -> None:
        """A step has ended."""
        self.pace.step(counts=not self.is_gathering and step > 2)

    def compared(self) -> tuple[float, float, bool] | None:
        """Seconds a step before the switch and after it, and whether that is more than 5% longer; once, when it is known."""
        times = self.pace.compare() if self.pace.is_known else None
        if times is None:
            return None
        is_slower, self.seconds = self.pace.is_slower(SLOWER), times
        self.pace = Pace(self.model)
        return *times, is_slower

    def seconds_before(self) -> dict[str, float]:
        """Of a step before the switch, for the report; nothing where too few were seen."""
        seconds = self.pace.seconds_before
        return {} if seconds is None else {BEFORE: seconds}

    def width(self) -> int:
        """Rows of the widest moment: the largest min(m, n) of the layers."""
        return max((min(kind_of(layer).size) for layer in self.layers.values()), default=0)

    def forget(self) -> None:
        """The next check starts cold, as it will in a run resumed from here."""
        self._tracker.forget()

    def latest(self) -> dict[str, float]:
        """Stable rank of each layer at the last check."""
        return {name: values[-1] for name, values in self.history.ranks.items() if values}

    def logs(self) -> dict[str, float]:
        """Mean stable rank of the target layers, if there was a check since the last call; by layer it is in the history."""
        checks = self.history.steps
        if not checks or checks[-1] == self._logged_check:
            return {}
        self._logged_check = checks[-1]
        ranks = self.latest().values()
        return {"stable_rank": round(sum(ranks) / max(1, len(ranks)), 4)}

    def initial(self) -> dict[str, float]:
        """Stable rank of each layer before the first step; empty where the run was joined later."""
        known = self.history.ranks if self.history.steps[:1] == [0] else {}
        return {name: values[0] for name, values in known.items()}

    # --- moments ---

    @property
    def is_gathering(self) -> bool:
        return self.moments is not None and self.moments.running

    def start_gathering(self) -> None:
        """Gather statistics from the next step on; nothing to do if that has begun."""
        if self.moments is None:
            # These steps run uncompiled; the switch would drop the graphs of the dense model anyway.
            if any(map(lacks_room_beside_graphs, {p.device for p in self.model.parameters()})):
                self.engine.forget_compiled()
            taps, flow = self.engine.taps(self.layers), self.engine.whole_flow
            # Layers that are not trained have been named by hand, else they would be left as they are.
            frozen = [n for n, la in self.layers.items() if not la.weight.requires_grad]
            frozen = frozen if self.config.names_targets else []
            # The weights that FSDP1 runs with are plain tensors, whose storage it frees in backward.
            in_parts = not self.engine.holds_whole_weights
            self.moments = MomentCollector(
                self.model, self.layers, self.config.statistics_tokens, taps, flow, frozen, in_parts,
                far_layers(self.layers, self.config.statistics_memory),
            )  # fmt: skip
            self.moments.batches.replicas = self.engine.replicas
            self.moments.start()
            if self.engine.holds_whole_weights:
                self.kept.start()

    def look_ahead(self, step: int, due: int, scaler: Any, loss_factor: float) -> None:
        """Before a step: see what flows, where that is asked for, and what the step's loss will be multiplied by."""
        self.watch_flow(step, due)
        if self.moments is not None:
            self.moments.batches.loss_scale = self.engine.loss_scale(scaler)
            self.moments.batches.loss_factor = loss_factor
            batch = self.kept.typical()
            if batch is not None and not self._has_asked:
                self._has_asked = True
                say_forgotten_scaler(self.moments.batches.loss_scale, batch.autocast)

    def sum_moments(self) -> None:
        """Sum the statistics over all processes that saw other batches; the main one gets them all."""
        if self.moments is not None:
            self.moments.reduce(self.engine.peers)

    def drop_moments(self) -> None:
        """Stop gathering, and forget what was gathered."""
        if self.moments is not None:
            self.moments.stop()
            self.moments = None
        self.kept.stop()

    def forget_batches(self) -> None:
        """After the switch: the batches that were kept are not needed any more, nor is what was seen to flow through dense layers."""
        self.kept.forget()
        self.early.forget()
        self.flow = None

    # --- both ---

    def step(self) -> None:
        """An optimizer step has ended."""
        if self.moments is not None and self.moments.running:
            self.moments.step()
        if self.flow is not None and not self.flow.done:
            self.flow.step()
            if len(self.early):
                self.early.stop()

    def watch_flow(self, step: int, due: int) -> None:
        """Before a step: see what has to be timed at the switch; not in the first two steps, in which a compiler is at work.

        due: step of the switch, or the latest one.
        """
        if self.config.objective != "speed" or self.flow is not None or (step < 2 and due > 8):
            return
        self.flow = FlowRecorder(self.model, self.layers)
        self.flow.start()
        if self.engine.holds_whole_weights:
            self.early.start()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that was measured and is still to be used, as tensors for safetensors; moments only while they are gathered."""
        flat = {} if self.heading is None else self.heading.state_dict()
        if self.moments is not None and self.moments.running:
            flat |= {**self.moments.state_dict(), **self.kept.state_dict()}
        return flat

    def load_state_dict(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Reads what `state_dict` gave, but for the moments."""
        if self.heading is not None:
            self.heading.load_state_dict(flat)
        self.kept.load_state_dict(flat)

    def stop(self) -> None:
        """Remove all hooks; what was seen stays."""
        for part in (self.moments, self.flow, self.kept, self.early):
            if part is not None:
                part.stop()
        self.forget_first_step()
