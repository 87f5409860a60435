"""The run itself: watch, decide, gather, switch. Knows no Trainer; `Cuttlefish.step()` is all that a loop calls."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import optimizer as optimizers
from .config import CuttlefishConfig
from .convergence import has_converged
from .distributed import Processes, ProcessLostError, is_distributed
from .factorization import Factors
from .flattened import FlattenedCheckpoint, FlattenedModel, describe, find_flattened
from .flow import FlowRecorder
from .history import StableRankHistory
from .layers import dense_weight
from .learning_rate import check_can_scale, scale_learning_rate, suggested_scale
from .patching import low_rank_layers
from .plan import RankPlan, group_name
from .redundancy import check_redundant
from .report import FactorizationReport, count_parameters
from .restart import DeepSpeedCheckpoint, DeepSpeedModel, LowRankCheckpoint
from .selection import find_targets, is_meta
from .sharding import PartedModel, ShardedModel
from .spectrum import StableRankTracker
from .statistics import MomentCollector, steps_in
from .switch import FactorsInTurn, carry_out, choose, share
from .tensor_parallel import TensorParallelCheckpoint, TensorParallelModel, find_tensor_parallel
from .wrapper import (
    check_can_step,
    check_ddp,
    check_not_wrapped,
    check_synchronized,
    count_replicas,
    find_ddp,
    find_deepspeed,
    find_fully_shard,
    holders,
    unwrap,
)

logger = logging.getLogger(__name__)

STATE_VERSION = 1
CHECKS_PER_RUN = 30
_CHECKPOINTS: dict[type[PartedModel], type[LowRankCheckpoint]] = {
    DeepSpeedModel: DeepSpeedCheckpoint,
    FlattenedModel: FlattenedCheckpoint,
    TensorParallelModel: TensorParallelCheckpoint,
}


class Cuttlefish:
    """Full-rank phase, switch, low-rank phase, for a hand-written training loop.

        cuttlefish = Cuttlefish(model, optimizer, total_steps=len(loader) * epochs)
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
        scheduler: the scheduler that drives the optimizer; needed for a learning_rate_scale alone.
        loss_factor: what the loss is multiplied by before backward where batches say `num_items_in_batch` (the Trainer with
            average_tokens_across_devices: the number of processes, or of GPUs under nn.DataParallel).
        can_restart: whether the caller saves when `restarts` and `step` says so, calls `switch_in_checkpoint`, and trains on
            from there in another run, as CuttlefishCallback does; DeepSpeed, FSDP1 and tensor parallelism ask for it.

    Attributes:
        plan: the RankPlan carried out, or None. switch_step: the step of the switch, or None.
        history: [{"step", "layer", "stable_rank"}, ...]. report: FactorizationReport of the switch, or None.
        reason: why the switch came when it did, or why there is none. model: the bare model.

    Raises:
        TypeError, ValueError: bad arguments, patterns without a match, weights on the meta device, an optimizer that does
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
        config = CuttlefishConfig.coerce(config)
        if isinstance(total_steps, bool) or not isinstance(total_steps, int):
            raise TypeError(f"total_steps must be a whole number of optimizer steps, got {total_steps!r}")
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}: give the optimizer steps of the whole run, at least 1")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.optimizer, self.scaler, self.loss_factor = optimizer, scaler, loss_factor
        self.scheduler = scheduler
        self.config, self._can_restart = config, can_restart
        self.total_steps = total_steps
        self.global_step = 0
        self.plan: RankPlan | None = None
        self.switch_step: int | None = None
        self.report: FactorizationReport | None = None
        self.reason: str | None = None
        self._history = StableRankHistory()
        self._tracker = StableRankTracker()
        self._switch_at: int | None = None
        self._finished = False
        self._logged_check = -1
        self._collector: MomentCollector | None = None
        self._flow: FlowRecorder | None = None
        self.layers: dict[str, nn.Module] = {}
        self._verify_at: int | None = None
        self._looked_again = False
        self.ddp: DistributedDataParallel | None = None
        self.sharded: PartedModel | None = None
        self._checkpoint: LowRankCheckpoint | None = None
        self.processes = Processes()
        error: Exception | None = None
        try:
            self.model = unwrap(model.module if can_restart and type(model).__name__ == "DeepSpeedEngine" else model)
            self._look_around()
            self._find_layers()
        except Exception as caught:
            error = caught
        self._check_same_everywhere(error)
        if self._finished:
            return
        self._measure()
        self._schedule()

    def _look_around(self) -> None:
        """Find the engine. DDP may come later (a loop that prepares the model afterwards): the first step looks again."""
        units = find_flattened(self.model) if is_distributed() else []
        if units:
            described = describe(self.model, units)
            self.model = described.model
        if low_rank_layers(self.model):
            return  # nothing will be changed, so any engine is fine
        engine = find_deepspeed(self.model, self.optimizer) if is_distributed() else None
        if units:
            self.sharded = FlattenedModel(described, units, self.optimizer)
        elif engine is not None:
            self.sharded = DeepSpeedModel(self.model, engine)
        else:
            self.sharded = find_fully_shard(self.model) or find_tensor_parallel(self.model, self.optimizer)
        check_not_wrapped(self.model, sharded=self.sharded is not None)
        if self.restarts:
            check_redundant(self.optimizer, self.sharded, None)
            self._check_restart()
            return
        self.ddp = find_ddp(self.model)
        check_redundant(self.optimizer, self.sharded, self.ddp)
        if self.ddp is not None:
            self.processes = Processes(self.ddp.process_group)

    @property
    def restarts(self) -> bool:
        """Whether the engine cannot be edited, so that the switch has to be carried out in a checkpoint."""
        return self.sharded is not None and bool(self.sharded.fixed)

    def _check_restart(self) -> None:
        fixed = cast(PartedModel, self.sharded).fixed
        if self.config.switch == "in_place":
            raise ValueError(
                f"switch is 'in_place', and {fixed} are fixed when it is built: use switch='auto' or 'restart', FSDP2 "
                "(fsdp_version: 2) or DDP"
            )
        if self.config.objective == "speed" and isinstance(self.sharded, TensorParallelModel):
            raise ValueError(
                "objective is 'speed', and layers would be timed whole, of which tensor parallelism gives each process a part: use "
                "objective='size'"
            )
        if not self._can_restart:
            raise ValueError(
                f"{fixed} are fixed when it is built, so the switch needs a checkpoint and a new engine: use Trainer with "
                "CuttlefishCallback, which knows how; in a loop of your own can_restart=True and switch_in_checkpoint "
                "(docs/distributed.md), FSDP2 or DDP"
            )
        if self.config.learning_rate_scale not in (None, 1):
            raise ValueError(
                f"learning_rate_scale is {self.config.learning_rate_scale}, and a switch by restart cannot change the schedule "
                "that is saved: leave it at 1"
            )

    def _find_layers(self) -> None:
        if low_rank_layers(self.model):
            self._finish("the model is already factorized")
            return
        if self.config.switch_step is not None and self.config.switch_step > self.total_steps:
            raise ValueError(
                f"switch_step is {self.config.switch_step}, but the run has {self.total_steps} steps: choose one below"
            )
        self.layers = dict(find_targets(self.model, self.config))
        for name, layer in self.layers.items():
            if is_meta(layer):
                raise ValueError(f"{name} is on the meta device: load the weights before training")
        if not self.restarts:  # else `check` below
            optimizers.check_holds(
                self.optimizer, {name: cast(nn.Parameter, layer.weight) for name, layer in self.layers.items()}
            )
        if self.config.learning_rate_scale not in (None, 1):
            check_can_scale(self.optimizer, self.scheduler)
        if self.ddp is not None:
            check_ddp(self.ddp, self.model, self.layers)
        if self.sharded is not None:
            self.sharded.check(self.layers)

    def _check_same_everywhere(self, error: Exception | None) -> None:
        """Raises `error` if there is one, and on all processes if one of them has one or has another model or setting."""
        self.processes.agree(error)
        if self.processes.size == 1:
            return
        mine = {
            "model": [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in self.model.named_parameters()],
            "target layers": list(self.layers),
            "config": self.config.to_dict(),
            "total_steps": self.total_steps,
            "DDP around the model": self.ddp is not None,
            "fully_shard": self.sharded is not None,
        }
        for rank, theirs in enumerate(self.processes.gather(mine)):
            for what, value in mine.items():
                if theirs[what] != value:
                    detail = _first_difference(theirs[what], value)
                    # Compared with each other, so that every process raises where only one differs.
                    raise ValueError(
                        f"the processes disagree on {what}: {detail[0]} on process {rank}, {detail[1]} on process "
                        f"{self.processes.rank}; give each process the same model, config and number of steps"
                    )
        self._check_replicas("at the start")

    def _check_replicas(self, when: str) -> None:
        if self.sharded is not None:
            self.sharded.check_replicas(when)
        elif self.ddp is not None:
            check_synchronized(self.ddp, self.model, self.processes, when)

    # --- what the loop calls ---

    def step(self) -> bool:
        """Call after each optimizer step (not after each micro-batch). True on the step that switched.

        Where the model `restarts`, True says that the switch is due: save a checkpoint, then `switch_in_checkpoint`.

        Raises:
            RuntimeError or ValueError: the switch failed and on_error is "raise". The model is as before.
        """
        accumulating = getattr(self.optimizer, "gradient_state", None)
        if accumulating is not None and not accumulating.sync_gradients:
            return False  # Accelerate's optimizer has not stepped: this was a micro-batch
        self.global_step += 1
        if is_distributed():
            self._check_processes()
        if self._finished:
            return False
        if self.config.learning_rate_scale not in (None, 1):
            check_can_scale(self.optimizer, self.scheduler)  # a scheduler may have been made since
        if self._collector is not None and self._collector.running:
            self._collector.step()
        self._watch_flow()
        if self.global_step % self.check_steps == 0 and self.global_step != self._switch_at:
            self._measure()
        if self._switch_at is None:
            self._decide()
        self._schedule()
        if self._switch_at is not None and self.global_step >= self._switch_at:
            return self.restarts or self._try_switch()
        return False

    def switch_in_checkpoint(self, folder: Path) -> bool:
        """Exchange the checkpoint just saved of this step for that of the factorized model; the model here stays as it is.

        All processes must call it. False where there is no switch, for the reason in `reason`: the checkpoint is as it was.
        Trainer's trainer_state.json has been renamed; to write that of the low-rank phase is left to the caller, as the last
        act. Without one (`accelerator.save_state`) the checkpoint is whole; keep `state_dict()` for the run that goes on.
        A checkpoint of the same step that is saved once more can be exchanged once more.

        Raises:
            RuntimeError or ValueError: as `step`.
        """
        if self._checkpoint is not None:
            self._checkpoint.write(folder)
            return True
        return self._try_switch(folder)

    @property
    def switched_model(self) -> nn.Module | None:
        """The factorized model that `switch_in_checkpoint` has saved, for its model card."""
        return None if self._checkpoint is None else self._checkpoint.model

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._history.records()

    @property
    def check_steps(self) -> int:
        """Steps between two checks of the stable ranks."""
        return self.config.check_steps or max(1, self.total_steps // CHECKS_PER_RUN)

    @property
    def statistics_steps(self) -> int:
        """Steps before the switch in which statistics are gathered."""
        if self.config.rank_rule != "loss":
            return 0
        wanted = self.config.statistics_steps
        if wanted is None:
            wanted = min(24, max(4, round(0.04 * self.total_steps)))
        return min(wanted, self.config.switch_step or self.latest_step)

    @property
    def earliest_step(self) -> int:
        return max(1, math.ceil(self.config.earliest_switch * self.total_steps))

    @property
    def latest_step(self) -> int:
        return max(1, int(self.config.latest_switch * self.total_steps))

    @property
    def checks(self) -> list[int]:
        """Steps at which the stable ranks were measured."""
        return self._history.steps

    def latest(self) -> dict[str, float]:
        """Stable rank of each layer at the last check."""
        return {name: values[-1] for name, values in self._history.ranks.items() if values}

    def logs(self) -> dict[str, float]:
        """What a tracker shows of the run, as in `accelerator.log({"loss": ..., **cuttlefish.logs()}, step=...)`.

        Mean stable rank of each kind of projection if there was a check since the last call, the model's parameters, and
        the step of the switch once there was one. The Trainer callback adds the same to each log.
        """
        values: dict[str, float] = {}
        if self.checks and self.checks[-1] != self._logged_check:
            self._logged_check = self.checks[-1]
            kinds: dict[str, list[float]] = {}
            for layer, value in self.latest().items():
                kinds.setdefault(group_name(layer).rpartition("*.")[2], []).append(value)
            values = {f"stable_rank/{kind}": round(sum(v) / len(v), 4) for kind, v in kinds.items()}
        values["parameters"] = count_parameters(self.model)
        if self.switch_step is not None:
            values["switch_step"] = self.switch_step
        return values

    def start_at(self, step: int) -> None:
        """Join a run that has come to `step` without us. Raises ValueError if that is at or past a fixed switch_step."""
        if step == 0 or self._finished:
            return
        if self.config.switch_step is not None and self.config.switch_step <= step:
            raise ValueError(
                f"switch_step is {self.config.switch_step}, but the run resumes at step {step}: choose one after it"
            )
        self.global_step = step
        self._history.steps = [step]
        if self._collector is not None:
            self._collector.stop()
            self._collector = None
        self._switch_at = None
        if step + self.statistics_steps >= self.latest_step:
            self._switch_at, self.reason = min(step + max(1, self.statistics_steps), self.total_steps), "latest_switch"
        self._schedule()

    def close(self) -> None:
        """Remove all hooks. `end` does so too; this is for a run that is given up without a word."""
        if self._collector is not None:
            self._collector.stop()
        if self._flow is not None:
            self._flow.stop()

    def keep_results(self, previous: Cuttlefish) -> None:
        """Keep what an earlier run on this model found out, if the model still has the structure of its plan."""
        if previous.plan is not None and dict(previous.plan) == {
            n: m.rank for n, m in low_rank_layers(self.model).items()
        }:
            self.plan, self.report, self.switch_step = previous.plan, previous.report, previous.switch_step
            self._history = previous._history

    def end(self) -> None:
        """Call when training ends: removes the hooks, and warns with the reason if there was no switch."""
        self.close()
        if self.switch_step is None and not low_rank_layers(self.model):
            self._say(
                logging.WARNING,
                "Cuttlefish: the run ended after %d of %d steps without a switch, and the model is as large as before: %s.",
                self.global_step,
                self.total_steps,
                self.reason
                if self._finished
                else f"the switch was due at step {self._switch_at or self.latest_step} at the latest",
            )

    # --- state, for checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, but for the statistics being gathered (`statistics_state`). JSON-ready."""
        return {
            "version": STATE_VERSION,
            "global_step": self.global_step,
            "switch_at": self._switch_at,
            "switch_step": self.switch_step,
            "reason": self.reason,
            "finished": self._finished,
            "gathering": self._collector is not None and self._collector.running,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "report": None if self.report is None else {k: v for k, v in self.report.to_dict().items() if k != "plan"},
            "history": self._history.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], statistics: Mapping[str, torch.Tensor] | None = None) -> None:
        """Go on where `state_dict` was taken. The model must hold that checkpoint's weights already.

        Args:
            statistics: what `statistics_state` gave then (asked for on the main process only); without it the gathering
                starts anew, and the switch comes later.

        Raises:
            ValueError: a state written by a newer version, one that does not fit the model, or one that is broken.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the saved state of Cuttlefish must be a JSON object, got {state!r:.80}")
        version = state.get("version", STATE_VERSION)
        missing = sorted(set(self.state_dict()) - set(state) - {"version"})
        if missing:
            raise ValueError(f"this is no state of Cuttlefish: it has no {', '.join(missing)}")
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= STATE_VERSION:
            raise ValueError(
                f"this state has version {version}, and this hf_cuttlefish reads up to {STATE_VERSION}: upgrade it"
            )
        for name in ("global_step", "switch_at", "switch_step"):
            if type(state[name]) is not int and (state[name] is not None or name == "global_step"):
                raise ValueError(f"the saved state's {name} must be a whole number of steps, got {state[name]!r:.80}")
        # JSON files are written with sorted keys; the order of layers is the model's.
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        plan = None if state["plan"] is None else RankPlan.from_dict(state["plan"])
        if plan is not None:
            plan.decisions = dict(sorted(plan.decisions.items(), key=lambda item: order.get(item[0], -1)))
        present = {name: layer.rank for name, layer in low_rank_layers(self.model).items()}
        if plan is not None and dict(plan) != present:
            raise ValueError(
                f"the saved run had switched at step {state['switch_step']} and factorized {len(plan)} layers, but the model "
                f"here has {len(present)} factorized layers: load the checkpoint's weights first "
                "(follow_checkpoints(model), then load_state_dict; with model_init, call follow_checkpoints inside it)"
            )
        if plan is None and present:
            raise ValueError("the saved run had not switched, but the model here is factorized already")
        report = None
        if state["report"] is not None and plan is not None:
            report = FactorizationReport.from_dict(plan, state["report"])
        history = StableRankHistory.from_dict(state["history"])
        if self._collector is not None:
            self._collector.stop()
            self._collector = None
        self.plan = plan
        self.global_step = state["global_step"]
        self.switch_step, self.reason = state["switch_step"], state["reason"]
        self._switch_at, self._finished = state["switch_at"], bool(state["finished"])
        self.report, self._history = report, history
        self._history.ranks = dict(sorted(self._history.ranks.items(), key=lambda item: order.get(item[0], -1)))
        self._tracker.forget()
        if state["gathering"] and not self._finished and self._switch_at is not None:
            steps = self.processes.from_main(lambda: None if statistics is None else steps_in(statistics))
            if steps is None:
                self._switch_at = max(self._switch_at, min(self.global_step + self.statistics_steps, self.total_steps))
                self._say(
                    logging.WARNING,
                    "Cuttlefish: the checkpoint lies among the steps that gather statistics, and its statistics are not at "
                    "hand: gathering starts anew, and the switch comes at step %d.",
                    self._switch_at,
                )
            self._schedule()
            if steps is not None and self._collector is not None:
                if statistics is not None and self.processes.is_main:
                    self._collector.load_state_dict(statistics)
                self._collector.steps = steps

    def statistics_state(self) -> dict[str, torch.Tensor] | None:
        """The statistics gathered so far, as tensors for safetensors; None while none are being gathered.

        Call on all processes: they are summed, and the main one gets them all (the others None).
        """
        if self._collector is None or not self._collector.running:
            return None
        self._collector.reduce(self._counted)
        return self._collector.state_dict() if self.processes.is_main else None

    def note_save(self) -> None:
        """Call when a checkpoint has been written: the next check starts cold, as it will in a run resumed from there."""
        self._tracker.forget()

    # --- inside ---

    def _finish(self, reason: str) -> None:
        self._finished, self.reason = True, reason

    @property
    def _counted(self) -> Processes:
        """Those that see other batches, so that their statistics are summed."""
        return self.processes if self.sharded is None else self.sharded.counted

    def _check_processes(self) -> None:
        """Before the first step has passed nobody else is bound to have come to the model; afterwards someone must have."""
        if self._verify_at is not None and self.global_step >= self._verify_at:
            self._verify_at = None
            self._check_replicas(f"after the switch at step {self.switch_step}")
        if self._finished:
            return
        if self.ddp is None and self.sharded is None and not self._looked_again:
            self._looked_again = True
            if self.processes.size != Processes().size:
                raise RuntimeError("torch.distributed was set up after Cuttlefish was made: make it afterwards")
            self._look_around()
            if self.ddp is not None:
                check_ddp(self.ddp, self.model, self.layers)
            if self.sharded is not None:
                self.sharded.check(self.layers)
            self._check_replicas("after the first step")
            if self.ddp is None and self.sharded is None and self.processes.size > 1:
                raise RuntimeError(
                    f"{self.processes.size} processes train this model, but no DistributedDataParallel is around it (around "
                    f"it: {', '.join(holders(self.model)) or 'nothing'}). What exchanges the gradients is not known, and "
                    "replicas could drift apart in silence: wrap the model by DDP (accelerator.prepare(model); without a GPU "
                    "Accelerate does so only with Accelerator(cpu=True) or ACCELERATE_USE_CPU=true)"
                )
        if self.ddp is not None:
            check_can_step(self.ddp)

    def _measure(self) -> None:
        if self.sharded is not None:  # one layer after the other, so that no process holds more than one whole
            ranks = self.sharded.from_main(
                self.layers,
                lambda whole: {n: self._tracker.measure({n: dense_weight(layer)})[n] for n, layer in whole.items()},
            )
        else:
            ranks = self.processes.from_main(
                lambda: self._tracker.measure({name: dense_weight(layer) for name, layer in self.layers.items()})
            )
        self._history.append(self.global_step, ranks)

    def _watch_flow(self) -> None:
        """See in early steps what has to be timed at the switch; not in the first two, in which a compiler is at work."""
        if self.config.objective != "speed" or (self._flow is None and self.global_step < 2 and self.latest_step > 8):
            return
        if self._flow is None:
            self._flow = FlowRecorder(self.model, self.layers)
            self._flow.start()
        elif not self._flow.done:
            self._flow.step()

    def _decide(self) -> None:
        if self.config.switch_step is not None:
            self._switch_at = max(self.config.switch_step, self.global_step)
            self.reason = "switch_step"
            return
        gather = self.statistics_steps
        if self.global_step + gather < min(self.earliest_step, self.latest_step):
            return
        tolerance = self.config.stable_rank_tolerance
        converged = has_converged(self._history.steps, self._history.ranks, self.total_steps, tolerance)
        if self.global_step + gather >= self.latest_step:
            self._switch_at = max(self.latest_step, self.global_step)
            self.reason = "stable ranks have converged" if converged else "latest_switch"
        elif converged:
            self._switch_at, self.reason = self.global_step + gather, "stable ranks have converged"

    def _schedule(self) -> None:
        """Fix the switch where the config does, and start gathering statistics when it is near."""
        if self._finished:
            return
        if self._switch_at is None and (
            self.config.switch_step is not None or self.latest_step <= self.statistics_steps
        ):
            self._decide()
        if self._switch_at is None or self._collector is not None or self.statistics_steps == 0:
            return
        if self._switch_at - self.statistics_steps <= self.global_step < self._switch_at:
            running = None if self.sharded is None else self.sharded.running(self.layers)
            flow = None if self.sharded is None else self.sharded.whole_flow
            self._collector = MomentCollector(self.model, self.layers, self.config.statistics_tokens, running, flow)
            self._collector.replicas = count_replicas(self.model)
            self._collector.start()
        if self._collector is not None:
            scaler = self.scaler or getattr(self.optimizer, "scaler", None)
            self._collector.loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0
            if isinstance(self.sharded, DeepSpeedModel):
                self._collector.loss_scale = self.sharded.loss_scale
            self._collector.loss_factor = self.loss_factor

    def _try_switch(self, folder: Path | None = None) -> bool:
        collector, self._collector = self._collector, None
        try:
            if collector is not None:
                collector.stop()
            if self._flow is not None:
                self._flow.stop()
            switched = self._switch(collector, folder)
        except ProcessLostError:
            raise  # there is no going on, whatever on_error says
        except Exception as error:
            if self.switch_step is not None:  # all has changed, and training goes on low rank
                self._say(
                    logging.WARNING,
                    "Cuttlefish: switched at step %d, but what comes after it failed: %s",
                    self.switch_step,
                    error,
                )
                return True
            self._finish(f"the switch failed: {error}")
            if self.config.on_error == "raise":
                raise
            self._say(
                logging.WARNING,
                "Cuttlefish: the switch at step %d failed and training goes on full rank, the model as before: %s",
                self.global_step,
                error,
            )
            return False
        if self.reason == "latest_switch" and switched:
            self._say(
                logging.WARNING,
                "Cuttlefish: the stable ranks were not seen to converge by step %d, the latest switch point (latest_switch=%.2f of "
                "the run); switched all the same.",
                self.global_step,
                self.config.latest_switch,
            )
        return switched

    def _switch(self, collector: MomentCollector | None, folder: Path | None) -> bool:
        """The main process decides; all of them carry the same plan out, with the same factors, or none does."""
        clock = time.perf_counter()
        if self.ddp is None and self.sharded is None:
            check_synchronized(None, self.model, self.processes, "before the switch")
        else:
            self._check_replicas("before the switch")
        if collector is not None:
            collector.reduce(self._counted)
        gathered = time.perf_counter()
        factors: Mapping[str, Factors]
        mine: dict[str, Factors] = {}

        def decide(layers: Mapping[str, nn.Module]) -> tuple[RankPlan, list[str]]:
            first = self._history.ranks if self._history.steps[:1] == [0] else {}
            initial = {name: values[0] for name, values in first.items()}
            keep = "none" if self.sharded is not None else "found" if self.processes.size == 1 else "all"
            plan, found = choose(layers, self.config, collector, initial, self._flow, keep)
            mine.update(found)
            return plan, [name for name, f in found.items() if f.bias_shift is not None]

        if self.sharded is not None:
            plan, shifted = self.sharded.from_main(self.layers, decide)
        else:
            plan, shifted = self.processes.from_main(lambda: decide(self.layers))
        planned = time.perf_counter()
        if not plan:
            smaller = "no layer would get smaller at the ranks that it needs"
            self._finish(plan.notes[-1] if self.config.objective == "speed" and plan.notes else smaller)
            self._say(
                logging.WARNING,
                "Cuttlefish: no switch at step %d: %s.\n%s",
                self.global_step,
                self.reason,
                plan.summary(),
            )
            return False
        if self.sharded is not None:
            factors = FactorsInTurn(self.layers, plan, self.config, collector, self.sharded)
        else:
            factors = share(self.layers, plan, mine, shifted, self.processes)
        state = self.config.optimizer_state
        if self.sharded is not None and self.restarts:
            kind = next(kind for parted, kind in _CHECKPOINTS.items() if isinstance(self.sharded, parted))
            checkpoint = kind(self.sharded, plan, factors, state)
            report = checkpoint.write(cast(Path, folder))
            self._checkpoint = checkpoint
        else:
            wrapper = cast(ShardedModel | None, self.sharded) or self.ddp
            report = carry_out(self.model, self.optimizer, plan, factors, state, wrapper, self.processes)
        report.step = self.switch_step = self.global_step
        self.plan, self.report = plan, report
        self._finished = True
        self._verify_at = None if self.restarts else self.global_step + 1
        self.layers = {}
        report.optimizer += self._scale_learning_rate(plan)
        finished = time.perf_counter()
        report.seconds = {"statistics": gathered - clock, "ranks": planned - gathered, "total": finished - clock}
        self._say(logging.INFO, "%s (%s)\n%s", report.headline(), self.reason, "\n".join(str(report).splitlines()[1:]))
        return True

    def _scale_learning_rate(self, plan: RankPlan) -> str:
        """As the config says, or as the plan's size suggests; returns what the report is to say of it."""
        scale = self.config.learning_rate_scale
        if scale is None:
            before, after = plan.parameters()
            scale = 1.0 if self.restarts else suggested_scale(after / before)
            if scale == 1:
                return ""
            try:
                check_can_scale(self.optimizer, self.scheduler)
            except (TypeError, ValueError) as error:
                return f"; learning rate unchanged ({error})"
        return "" if scale == 1 else f"; {scale_learning_rate(self.optimizer, self.scheduler, scale)}"

    def _say(self, level: int, message: str, *values: Any) -> None:
        """One log line of the run, not one of each process."""
        if self.processes.is_main:
            logger.log(level, message, *values)


def _first_difference(a: Any, b: Any) -> tuple[str, str]:
    """Where two values begin to differ, as short text."""
    if isinstance(a, list) and isinstance(b, list):
        for x, y in zip(a, b, strict=False):
            if x != y:
                return str(x), str(y)
        return f"{len(a)} entries", f"{len(b)} entries"
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(k for k in {**a, **b} if a.get(k) != b.get(k))
        return f"{key}={a.get(key)!r}", f"{key}={b.get(key)!r}"
    return str(a), str(b)
