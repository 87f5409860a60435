"""The run itself: watch, decide, gather, switch. Knows no Trainer; `Cuttlefish.step()` is all that a loop calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import CuttlefishConfig
from .decide.plan import RankPlan
from .decide.schedule import Schedule
from .engines.find import find_again
from .engines.restart import LowRankCheckpoint
from .engines.start import start
from .layers.low_rank import low_rank_layers
from .layers.sizes import count_parameters
from .measure.batches import steps_in
from .measure.watch import Watch
from .patch.decay import FrobeniusDecay
from .patch.low_rank_phase import LowRankPhase
from .patch.report import FactorizationReport
from .processes import Processes, ProcessLostError
from .report import lines
from .saving.following import note_optimizer
from .saving.run_state import RunState
from .switch import Record, choose, switch_in_place

logger = logging.getLogger(__name__)


class Cuttlefish:
    """Full-rank phase, switch, low-rank phase, for a hand-written training loop.

        cuttlefish = Cuttlefish(model, optimizer, total_steps=len(loader) * epochs, scheduler=scheduler)
        for batch in ...:
            model(**batch).loss.backward()
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
            if cuttlefish.step():
                print(cuttlefish.report)
        cuttlefish.end()

    The optimizer and the scheduler stay the same objects; the model changes in place. Where several processes train it
    under DDP, all of them make a Cuttlefish and call it at the same steps; the main one decides, and DDP is repaired.

    Args:
        model: the model, with weights: bare, or as DDP, nn.DataParallel or torch.compile has wrapped it.
        optimizer: the torch optimizer (or Accelerate's wrapper of it) that trains it.
        config: choices; none are needed.
        total_steps: optimizer steps of the whole run.
        scaler: a GradScaler, if fp16 is used without Accelerate's optimizer wrapper.
        scheduler: the one that drives the optimizer, if any. If it is not given, the learning rate stays as it is at the
            switch, and the report says so; a learning_rate_scale is an error then.
        loss_factor: what the loss is multiplied by before backward where batches say `num_items_in_batch` (the Trainer with
            average_tokens_across_devices: the number of processes, or of GPUs under nn.DataParallel).
        can_restart: whether the caller saves when `restarts` and `step` says so, calls `switch_in_checkpoint`, and trains on
            from there in another run, as CuttlefishCallback does; DeepSpeed, FSDP1 and tensor parallelism ask for it.

    Attributes:
        plan, switch_step, report: the RankPlan carried out, when, and what it did; None without a switch.
        history: [{"step", "layer", "stable_rank"}, ...].
        reason: why the switch came when it did, or why there is none. model: the bare model.

    Raises TypeError or ValueError: bad arguments, patterns without a match, weights on the meta device, an optimizer that does
        not hold the target weights, an engine that is not supported, processes that hold different models or settings.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: CuttlefishConfig | None = None,
        *,
        total_steps: int,
        scaler: Any = None,
        scheduler: Any = None,
        loss_factor: float = 1.0,
        can_restart: bool = False,
    ) -> None:
        self.config = CuttlefishConfig.coerce(config)
        self.schedule = Schedule(self.config, total_steps)
        self.scaler, self.scheduler, self.loss_factor = scaler, scheduler, loss_factor
        self.global_step, self._can_restart = 0, can_restart
        self.plan: RankPlan | None = None
        self.switch_step: int | None = None
        self.report: FactorizationReport | None = None
        self._checkpoint: LowRankCheckpoint | None = None
        self._verify_at: int | None = None
        self.finished = self._looked_again = self._saw_state = False
        self.engine, layers = start(model, optimizer, self.config, total_steps, scheduler, can_restart)
        note_optimizer(self.engine)
        self.watch = Watch(self.engine.model, layers, self.engine, self.config)
        self.phase, self.decay = LowRankPhase(self.watch), FrobeniusDecay(self)
        if not layers:
            self._finish("the model is already factorized")
            self._say(logging.INFO, "%s", lines.already_factorized(self.model))
            return
        self.schedule.check_fits()
        self._say(logging.INFO, "%s", lines.start(self.model, layers, self.config, self.schedule))
        self.watch.measure(0)
        self.watch.start(self.schedule.stretch)
        self._look_ahead()

    # --- what the loop calls ---

    def step(self) -> bool:
        """Call after each optimizer step (not after each micro-batch). True on the step that switched.

            if cuttlefish.step():
                print(cuttlefish.report)

        Where the model `restarts`, True says that the switch is due: save a checkpoint, then `switch_in_checkpoint`.

        Raises RuntimeError or ValueError if the switch failed and on_error is "raise". The model is as before.
        """
        accumulating = getattr(self.engine.optimizer, "gradient_state", None)
        if accumulating is not None and not accumulating.sync_gradients:
            return False  # Accelerate's optimizer has not stepped: this was a micro-batch
        self.global_step += 1
        self._check_engine()
        self.watch.keep_pace(self.global_step)
        if self.finished:
            if (found := self.phase.step(self)) is not None:
                self._say(*lines.low_rank_phase(found))
            return False
        if self.config.learning_rate_scale not in (None, 1):
            self.engine.check_rate(self.scheduler)  # a scheduler may have been made since
        # Measure what this step has shown, then decide from numbers alone.
        self.watch.step()
        if (terms := self.watch.terms_of_first_step()) is not None:
            self.schedule.need(self.watch.width(), terms)
        if self.schedule.is_check(self.global_step):
            self.watch.measure(self.global_step)
        if self.global_step % self.schedule.stretch == 0 or self.global_step == self.schedule.switch_at:
            self.watch.note_heading(self.global_step)
        self.schedule.decide(self.global_step, self.watch.history.steps, self.watch.history.ranks)
        self._look_ahead()
        return self.schedule.is_due(self.global_step) and (self.restarts or self._try_switch())

    def switch_in_checkpoint(self, folder: Path) -> bool:
        """Exchange the checkpoint just saved of this step for that of the factorized model; the model here stays as it is.

            if cuttlefish.step():
                accelerator.save_state(folder); cuttlefish.switch_in_checkpoint(folder)

        All processes must call it. False where there is no switch, for the reason in `reason`: the checkpoint is as it was.
        Trainer's trainer_state.json has been renamed; the caller writes that of the low-rank phase, as the last act. Without
        one (`accelerator.save_state`) the checkpoint is whole; keep `state_dict()`. Saved once more, it can be exchanged once more.
        Raises as `step`.
        """
        if self._checkpoint is not None:
            self._checkpoint.write(folder)
            return True
        return self._try_switch(folder)

    def start_at(self, step: int) -> None:
        """Join a run that has come to `step` without us. Raises ValueError if that is at or past a fixed switch_step."""
        if step == 0 or self.finished:
            return
        self.schedule.start_at(step)
        self.global_step = step
        self.watch.history.steps = [step]
        self.watch.drop_moments()
        self._look_ahead()

    def close(self) -> None:
        """Remove all hooks. `end` does so too; this is for a run that is given up without a word."""
        self.watch.stop()
        self.phase.stop()
        self.decay.stop()

    def end(self) -> None:
        """Call when training ends: removes the hooks, says what came of it, and warns if the model in hand is not factorized."""
        self.close()
        self._say(*lines.end(self))

    def keep_results(self, previous: Cuttlefish) -> None:
        """Keep what an earlier run on this model found out, if the model still has the structure of its plan."""
        here = {n: m.rank for n, m in low_rank_layers(self.model).items()}
        if previous.plan is not None and dict(previous.plan) == here:
            self.plan, self.report, self.switch_step = previous.plan, previous.report, previous.switch_step
            self.watch.history = previous.watch.history

    # --- what can be read ---

    @property
    def model(self) -> nn.Module:
        return self.engine.model

    @property
    def processes(self) -> Processes:
        return self.engine.processes

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Name -> target layer; none once the run has switched."""
        return dict(self.watch.layers)

    @property
    def restarts(self) -> bool:
        """Whether the engine cannot be edited, so that the switch has to be carried out in a checkpoint."""
        return bool(self.engine.fixed)

    @property
    def reason(self) -> str | None:
        return self.schedule.reason

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.watch.history.records()

    @property
    def switched_model(self) -> nn.Module | None:
        """The factorized model that `switch_in_checkpoint` has saved, for its model card."""
        return None if self._checkpoint is None else self._checkpoint.model

    def logs(self) -> dict[str, float]:
        """What a tracker shows of the run, as in `accelerator.log({"loss": ..., **cuttlefish.logs()}, step=...)`.

        The mean stable rank after a check (each layer's is in `history`), the parameters, the step of the switch if there was one.
        """
        switch = {} if self.switch_step is None else {"switch_step": self.switch_step}
        return {**self.watch.logs(), "parameters": count_parameters(self.model), **switch}

    # --- state, for checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, but for the statistics being gathered (`statistics_state`). JSON-ready."""
        schedule, watch = self.schedule, self.watch
        where = (self.global_step, schedule.switch_at, self.switch_step, self.reason, self.finished)
        found = (watch.is_gathering, self.plan, self.report, watch.history)
        measured = not self.finished and watch.heading is not None
        return RunState(*where, *found, self.config.to_dict(), schedule.statistics_needed, measured).to_dict()

    def load_state_dict(self, state: Mapping[str, Any], statistics: Mapping[str, torch.Tensor] | None = None) -> None:
        """Go on where `state_dict` was taken, before the switch under any config. The model must hold that checkpoint's weights.

        Args:
            statistics: of `statistics_state` (asked for on the main process only); without it gathering starts anew, and later.

        Raises ValueError: a state that is newer, broken or does not fit; a config that differs where the switch is decided.
        """
        saved = RunState.from_dict(state, self.model).under(self.config, self.watch.layers)
        self.watch.drop_moments()
        self.watch.forget_first_step()
        self.schedule.statistics_needed = saved.statistics_needed
        if statistics is not None:
            self.watch.load_state_dict(statistics)
        self.global_step, self.finished = saved.global_step, saved.finished
        self.plan, self.report, self.switch_step = saved.plan, saved.report, saved.switch_step
        self.schedule.switch_at, self.schedule.reason = saved.switch_at, saved.reason
        self.watch.history = saved.history
        self.watch.forget()
        if saved.switch_at is None and not self.finished:
            self.schedule.start_at(self.global_step)
        if not self.watch.history.steps and not self.finished:
            self.watch.measure(self.global_step)
        if not self.finished:
            self.watch.watch_flow(self.global_step, self.schedule.due)
            if saved.gathering and saved.switch_at is not None:
                self._go_on_gathering(statistics)
        self._say(logging.INFO, "%s", lines.resumed(self))

    def _go_on_gathering(self, statistics: Mapping[str, torch.Tensor] | None) -> None:
        steps = self.processes.from_main(lambda: None if statistics is None else steps_in(statistics))
        if steps is None:
            self._say(logging.WARNING, "%s", lines.statistics_lost(self.schedule.postpone(self.global_step)))
        self._look_ahead()
        if steps is not None and self.watch.moments is not None:
            if statistics is not None and self.processes.is_main:
                self.watch.moments.load_state_dict(statistics)
            self.watch.moments.steps = steps

    def statistics_state(self) -> dict[str, torch.Tensor] | None:
        """What was measured so far, as tensors for safetensors; None where there is nothing more to come.

        Call on all processes: they are summed, and the main one gets them all (the others None).
        """
        if self.finished:
            return None
        self.watch.sum_moments()
        return self.watch.state_dict() or None if self.processes.is_main else None

    def note_save(self) -> None:
        """Call when a checkpoint has been written: the next check starts cold, as it will in a run resumed from there."""
        self.watch.forget()
        self.watch.pace.pause()

    # --- inside ---

    def _finish(self, reason: str) -> None:
        self.finished, self.schedule.reason = True, reason

    def _check_engine(self) -> None:
        """Before the first step has passed nobody else is bound to have come to the model; afterwards someone must have."""
        if self._verify_at is not None and self.global_step >= self._verify_at:
            self._verify_at = None
            self.engine.check_replicas(f"after the switch at step {self.switch_step}")
        if self.finished:
            return
        if self.engine.is_alone and not self._looked_again:
            self._looked_again = True
            self.engine = find_again(self.engine, self.watch.layers, self.config, self._can_restart)
            self.watch.engine = self.engine
        self.engine.check_step()
        if not self._saw_state:
            self._saw_state = True
            with self.processes.together():
                self.engine.check_state(self.watch.layers, self.config.optimizer_state)

    def _look_ahead(self) -> None:
        """Before a step: fix the switch where the config does, and gather statistics when it is near."""
        if self.finished:
            return
        if self.schedule.is_known_at_once:
            self.schedule.decide(self.global_step, self.watch.history.steps, self.watch.history.ranks)
        if self.schedule.is_gathering(self.global_step):
            self.watch.start_gathering()
        self.watch.look_ahead(self.global_step, self.schedule.due, self.scaler, self.loss_factor)

    def _try_switch(self, folder: Path | None = None) -> bool:
        try:
            self.watch.stop()
            return self._switch(folder)
        except ProcessLostError:
            raise  # there is no going on, whatever on_error says
        except Exception as error:
            if self.switch_step is not None:  # all has changed, and training goes on low rank
                self._say(logging.WARNING, "%s", lines.switched_but(self.switch_step, error))
                return True
            self._finish(f"the switch failed: {error}")
            if self.config.on_error == "raise":
                raise
            self._say(logging.WARNING, "%s", lines.failed(self.global_step, error))
            return False
        finally:
            self.watch.moments = None

    def _switch(self, folder: Path | None) -> bool:
        """The main process decides; all of them carry the same plan out, with the same factors, or none does."""
        started = time.perf_counter()
        self.engine.check_replicas("before the switch")
        self.watch.sum_moments()
        gathered = time.perf_counter()
        # Which layers, and at which ranks.
        alignment = self.watch.alignment(self.global_step)
        steps_left = self.schedule.total_steps - self.global_step
        plan, factors = choose(self.engine, self.watch, self.config, alignment, steps_left)
        if not plan:
            return self._stay_dense(plan)
        planned = time.perf_counter()
        if self.restarts and folder is not None:  # make the change in the checkpoint, or here
            checkpoint = self.engine.checkpoint(plan, factors, self.config, self.scheduler, alignment)
            report = checkpoint.write(folder)
            self._checkpoint = checkpoint
            self._record(plan, report)
        else:
            record = _Record(self, plan)
            report = switch_in_place(self.engine, plan, factors, self.config, self.scheduler, record, alignment)
        report.seconds = {"statistics": gathered - started, "ranks": planned - gathered, **self.watch.seconds_before()}
        report.seconds["total"] = time.perf_counter() - started
        self._say(logging.INFO, "%s (%s)\n%s", report.headline(), self.reason, "\n".join(str(report).splitlines()[1:]))
        if self.reason == "latest_switch":
            self._say(logging.WARNING, "%s", lines.not_converged(self.config, self.global_step))
        return True

    def _stay_dense(self, plan: RankPlan) -> bool:
        self._finish(lines.why_dense(plan, self.config))
        self._say(logging.WARNING, "%s", lines.no_switch(self.global_step, self.reason or "", plan))
        return False

    def _record(self, plan: RankPlan, report: FactorizationReport) -> None:
        self.plan, self.report, self.finished = plan, report, True
        report.step = self.switch_step = self.global_step
        self._verify_at = None if self.restarts else self.global_step + 1
        self.phase.begin()
        self.watch.pace.mark()

    def _say(self, level: int, message: str, *values: Any) -> None:
        """One log line of the run, not one of each process."""
        if self.processes.is_main:
            logger.log(level, message, *values)


class _Record(Record):
    """The run hears of the switch as its last edit, so that it never says otherwise than the model is."""

    def __init__(self, run: Cuttlefish, plan: RankPlan) -> None:
        self.run, self.plan, self._layers = run, plan, run.watch.layers

    def apply(self) -> None:
        self.run._record(self.plan, self.report)

    def undo(self) -> None:
        self.run.plan = self.run.report = self.run.switch_step = self.run._verify_at = None
        self.run.finished, self.run.watch.layers = False, self._layers
