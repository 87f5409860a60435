"""The run itself: watch, decide, gather, switch. Knows no Trainer; `Cuttlefish.step()` is all that a loop calls."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import optimizer as optimizers
from .config import CuttlefishConfig
from .convergence import has_converged
from .factorization import Decomposition, cut
from .history import StableRankHistory
from .layers import dense_weight
from .patching import factorize, low_rank_layers
from .ranks import LayerSpectrum, RankPlan, break_even_rank, needs_no_weights, plan_ranks, spectrum_of
from .report import FactorizationReport
from .selection import find_targets, is_meta
from .spectrum import StableRankTracker
from .statistics import MomentCollector
from .wrapper import check_engine

logger = logging.getLogger(__name__)

STATE_VERSION = 1
CHECKS_PER_RUN = 30


class Cuttlefish:
    """Full-rank phase, switch, low-rank phase, for a hand-written training loop.

        cuttlefish = Cuttlefish(model, optimizer, total_steps=len(loader) * epochs)
        for batch in ...:
            model(**batch).loss.backward()
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
            if cuttlefish.step():
                print(cuttlefish.report)

    The optimizer and the scheduler stay the same objects; the model changes in place.

    Args:
        model: the bare model, with weights.
        optimizer: the torch optimizer (or Accelerate's wrapper of it) that trains it.
        config: choices; none are needed.
        total_steps: optimizer steps of the whole run.
        scaler: a GradScaler, if fp16 is used without Accelerate's optimizer wrapper.

    Attributes:
        plan: the RankPlan carried out, or None. switch_step: the step of the switch, or None.
        history: [{"step", "layer", "stable_rank"}, ...]. report: FactorizationReport of the switch, or None.
        reason: why the switch came when it did, or why there is none.

    Raises:
        TypeError, ValueError: bad arguments, patterns without a match, weights on the meta device, an optimizer that does
            not hold the target weights, an engine that is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: CuttlefishConfig | None = None,
        *,
        total_steps: int,
        scaler: Any = None,
    ) -> None:
        if isinstance(config, dict):
            config = CuttlefishConfig.from_dict(config)
        if config is not None and not isinstance(config, CuttlefishConfig):
            raise TypeError(f"config must be a CuttlefishConfig, got {type(config).__name__}")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int):
            raise TypeError(f"total_steps must be a whole number of optimizer steps, got {total_steps!r}")
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}: give the optimizer steps of the whole run, at least 1")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.config = config or CuttlefishConfig()
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
        self._collector: MomentCollector | None = None
        self.layers: dict[str, nn.Module] = {}
        check_engine(model, optimizer)
        if low_rank_layers(model):
            self._finish("the model is already factorized")
            return
        if self.config.switch_step is not None and self.config.switch_step > total_steps:
            raise ValueError(
                f"switch_step is {self.config.switch_step}, but the run has {total_steps} steps: choose one below"
            )
        self.layers = find_targets(model, self.config)
        for name, layer in self.layers.items():
            if is_meta(layer):
                raise ValueError(f"{name} is on the meta device: load the weights before training")
        optimizers.check_holds(optimizer, {name: layer.weight for name, layer in self.layers.items()})
        self._measure()
        self._schedule()

    # --- what the loop calls ---

    def step(self) -> bool:
        """Call after each optimizer step (not after each micro-batch). True on the step that switched.

        Raises:
            RuntimeError or ValueError: the switch failed and on_error is "raise". The model is as before.
        """
        self.global_step += 1
        if self._finished:
            return False
        if self._collector is not None and self._collector.running:
            self._collector.step()
        if self._switch_at is None:
            if self.global_step % self.check_steps == 0:
                self._measure()
            self._decide()
        self._schedule()
        if self._switch_at is not None and self.global_step >= self._switch_at:
            return self._try_switch()
        return False

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

    def start_at(self, step: int) -> None:
        """Join a run that has come to `step` without us. Raises ValueError if that is at or past a fixed switch_step."""
        if step == 0 or self._finished:
            return
        if self.config.switch_step is not None and self.config.switch_step <= step:
            raise ValueError(f"switch_step is {self.config.switch_step}, but the run resumes at step {step}: choose one after it")
        self.global_step = step
        self._history.steps = [step]
        if self._collector is not None:
            self._collector.stop()
            self._collector = None
        self._switch_at = None
        if step + self.statistics_steps >= self.latest_step:
            self._switch_at, self.reason = min(step + max(1, self.statistics_steps), self.total_steps), "latest_switch"
        self._schedule()

    def end(self) -> None:
        """Call when training ends: removes the hooks, and warns with the reason if there was no switch."""
        if self._collector is not None:
            self._collector.stop()
        if self.switch_step is None and not low_rank_layers(self.model):
            logger.warning(
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
            statistics: what `statistics_state` gave then; without it the gathering starts anew, and the switch comes later.

        Raises:
            ValueError: a state written by a newer version, or one that does not fit the model.
        """
        version = state.get("version", STATE_VERSION)
        if not isinstance(version, int) or version > STATE_VERSION:
            raise ValueError(f"this state has version {version}, and this hf_cuttlefish reads up to {STATE_VERSION}: upgrade it")
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
                "(follow_checkpoints(model), then load_state_dict; with model_init, load with from_pretrained(checkpoint))"
            )
        if plan is None and present:
            raise ValueError("the saved run had not switched, but the model here is factorized already")
        if self._collector is not None:
            self._collector.stop()
            self._collector = None
        self.plan = plan
        self.global_step = int(state["global_step"])
        self.switch_step, self.reason = state["switch_step"], state["reason"]
        self._switch_at, self._finished = state["switch_at"], bool(state["finished"])
        if state["report"] is not None and plan is not None:
            self.report = FactorizationReport(plan=plan, **state["report"])
        self._history = StableRankHistory.from_dict(state["history"])
        self._history.ranks = dict(sorted(self._history.ranks.items(), key=lambda item: order.get(item[0], -1)))
        self._tracker.forget()
        if state["gathering"] and not self._finished and self._switch_at is not None:
            if statistics is None:
                self._switch_at = max(self._switch_at, min(self.global_step + self.statistics_steps, self.total_steps))
                logger.warning(
                    "Cuttlefish: the checkpoint lies among the steps that gather statistics, and its statistics are not at "
                    "hand: gathering starts anew, and the switch comes at step %d.",
                    self._switch_at,
                )
            self._schedule()
            if statistics is not None and self._collector is not None:
                self._collector.load_state_dict(statistics)

    def statistics_state(self) -> dict[str, torch.Tensor] | None:
        """The statistics gathered so far, as tensors for safetensors; None while none are being gathered."""
        if self._collector is None or not self._collector.running:
            return None
        return self._collector.state_dict()

    def note_save(self) -> None:
        """Call when a checkpoint has been written: the next check starts cold, as it will in a run resumed from there."""
        self._tracker.forget()

    # --- inside ---

    def _finish(self, reason: str) -> None:
        self._finished, self.reason = True, reason

    def _measure(self) -> None:
        ranks = self._tracker.measure({name: dense_weight(layer) for name, layer in self.layers.items()})
        self._history.append(self.global_step, ranks)

    def _decide(self) -> None:
        if self.config.switch_step is not None:
            self._switch_at = max(self.config.switch_step, self.global_step)
            self.reason = "switch_step"
            return
        gather = self.statistics_steps
        if self.global_step + gather >= self.latest_step:
            self._switch_at, self.reason = max(self.latest_step, self.global_step), "latest_switch"
        elif self.global_step + gather >= self.earliest_step and has_converged(
            self._history.steps, self._history.ranks, self.total_steps, self.config.stable_rank_tolerance
        ):
            self._switch_at, self.reason = self.global_step + gather, "stable ranks have converged"

    def _schedule(self) -> None:
        """Fix the switch where the config does, and start gathering statistics when it is near."""
        if self._finished:
            return
        if self._switch_at is None and (self.config.switch_step is not None or self.latest_step <= self.statistics_steps):
            self._decide()
        if self._switch_at is None or self._collector is not None or self.statistics_steps == 0:
            return
        if self._switch_at - self.statistics_steps <= self.global_step < self._switch_at:
            self._collector = MomentCollector(self.model, self.layers, self.config.statistics_tokens)
            self._collector.start()
        if self._collector is not None:
            scaler = self.scaler or getattr(self.optimizer, "scaler", None)
            self._collector.loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0

    def _try_switch(self) -> bool:
        collector, self._collector = self._collector, None
        if collector is not None:
            collector.stop()
        try:
            switched = self._switch(collector)
        except Exception as error:
            self._finish(f"the switch failed: {error}")
            if self.config.on_error == "raise":
                raise
            logger.warning(
                "Cuttlefish: the switch at step %d failed and training goes on full rank, the model as before: %s",
                self.global_step,
                error,
            )
            return False
        if self.reason == "latest_switch" and switched:
            logger.warning(
                "Cuttlefish: the stable ranks had not converged by step %d, the latest switch point (latest_switch=%.2f of "
                "the run); switched all the same.",
                self.global_step,
                self.config.latest_switch,
            )
        return switched

    def _switch(self, collector: MomentCollector | None) -> bool:
        clock = time.perf_counter()
        statistics = collector.moments() if collector is not None else {}
        loss = collector.mean_loss() if collector is not None else None
        gathered = time.perf_counter()
        initial = {name: values[0] for name, values in self._history.ranks.items()} if self._history.steps[:1] == [0] else {}
        spectra: dict[str, LayerSpectrum] = {}
        parts: dict[str, Decomposition] = {}
        for name, layer in self.layers.items():
            n_out, n_in = dense_weight(layer).shape
            if needs_no_weights(self.config, statistics):
                spectra[name] = LayerSpectrum(n_in, n_out, initial_stable_rank=initial.get(name))
                continue
            spectra[name], d = spectrum_of(name, layer, self.config, statistics.pop(name, None), initial.get(name))
            most = max(break_even_rank(n_in, n_out), max(self.config.rank_pattern.values(), default=1))
            parts[name] = d.shortened(min(most, n_in, n_out), torch.promote_types(layer.weight.dtype, torch.float32))
        plan = plan_ranks(spectra, self.config, loss)
        planned = time.perf_counter()
        if not plan:
            self._finish("no layer would get smaller at the ranks that it needs")
            logger.warning("Cuttlefish: no switch at step %d: %s.\n%s", self.global_step, self.reason, plan.summary())
            return False
        factors = {name: cut(parts.pop(name), plan[name]) for name in plan if name in parts}
        report = factorize(self.model, plan, self.optimizer, factors=factors, optimizer_state=self.config.optimizer_state)
        report.seconds = {"statistics": gathered - clock, "ranks": planned - gathered, "total": time.perf_counter() - clock}
        report.step = self.switch_step = self.global_step
        self.plan, self.report = plan, report
        self._finished = True
        self.layers = {}
        logger.info("%s (%s)\n%s", report.headline(), self.reason, "\n".join(str(report).splitlines()[1:]))
        return True
