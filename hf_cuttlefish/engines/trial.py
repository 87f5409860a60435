"""The trial before a switch: whole steps of a few candidates, by the engine's own model, in the mode that it trains in."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from torch import nn

from ..decide.plan import RankPlan
from ..measure.watch import Watch
from ..measure.whole_steps import Candidate, Step, UnableError, check_room, measure_steps
from ..patch.low_rank_phase import LEAST, can_try
from ..patch.trying import TriedPairs
from .around import compiled_runner
from .base import Engine, Layers


class Trial:
    """Measures whole steps for `decide.speed.keep_faster`; alone or under DDP, where the main process runs its bare model.

    trial = Trial(engine, watch, steps_left=200); trial(plan, candidates)
    """

    def __init__(self, engine: Engine, watch: Watch, steps_left: int) -> None:
        self.engine, self.watch, self.steps_left = engine, watch, steps_left

    @property
    def multiplies(self) -> bool:
        """Whether the run will try its pairs multiplied out after the switch."""
        return self.steps_left >= LEAST and can_try(self.engine)

    def __call__(self, plan: RankPlan, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        """Milliseconds of a step of each candidate.

        Raises:
            UnableError, saying why, where whole steps cannot be measured; all is as before then, too.
        """
        step = self._step()
        layers: Layers = self.watch.layers
        size = max(layers[name].weight.element_size() for name in plan)  # type: ignore[operator]
        check_room(step, size * sum(plan.decisions[name].parameters_after for name in plan))
        try:
            return measure_steps(candidates, step, TriedPairs(self.engine.model, layers, plan))
        except UnableError:
            raise
        except Exception as error:
            raise UnableError(f"{type(error).__name__}: {str(error).strip()[:200]}") from None
        finally:
            gc.collect()  # forms of running and their layers know each other: the pairs must not lie beside those of the switch

    def _step(self) -> Step:
        """One of the run's micro-batches, and what runs it."""
        engine, watch, model = self.engine, self.watch, self.engine.model
        if not engine.holds_whole_weights or engine.fixed or engine.replicas > 1:
            raise UnableError(f"under {type(engine).__name__} no other layers can take a place for a while")
        if engine.processes.size > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise UnableError("SyncBatchNorm waits for the other processes in each forward")
        batch = watch.kept.typical() or watch.early.typical()
        if batch is None:
            raise UnableError("no batch of the run is kept")
        kinds = {p.device.type for p in model.parameters()}
        if not kinds <= {"cpu", "cuda"}:
            raise UnableError(f"on {', '.join(sorted(kinds))} steps are not timed")
        known = None if watch.flow is None else watch.flow.compiled
        is_compiled = compiled_runner(model) is not None if known is None else bool(known)
        run = compiled_runner(model) if is_compiled else model
        if run is None:
            raise UnableError("the training step is compiled as a whole, and not the model")
        if is_compiled and "cuda" in kinds and any(p.grad is not None for p in model.parameters()):
            raise UnableError("gradients of the last step may lie in CUDA graphs: call zero_grad() before step()")
        return Step(model, run, batch, is_compiled)
