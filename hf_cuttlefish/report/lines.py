"""The lines that a run logs: one at the start, one after a resume, one at the end. Each says what was done and what to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from ..config import CuttlefishConfig
from ..decide.aligning import is_decoder
from ..decide.left import FROZEN, UNBOUNDED, UNRECOVERED, UNSEEN, left_frozen
from ..decide.plan import RankPlan
from ..decide.schedule import Schedule
from ..decide.size import SIZES, TOKEN_SIZES
from ..decide.tables import short_count
from ..layers.low_rank import low_rank_layers
from ..layers.parts import numel
from ..layers.sizes import count_parameters
from ..patch.low_rank_phase import Found


class Run(Protocol):
    """What is asked of a run."""

    config: CuttlefishConfig
    schedule: Schedule
    global_step: int
    finished: bool

    @property
    def model(self) -> nn.Module: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def restarts(self) -> bool: ...
    @property
    def plan(self) -> RankPlan | None: ...
    @property
    def switch_step(self) -> int | None: ...


def start(model: nn.Module, layers: Mapping[str, nn.Module], config: CuttlefishConfig, schedule: Schedule) -> str:
    """What was taken, when the switch is to be expected, and the size aimed at."""
    size = sum(numel(layer.weight) for layer in layers.values())  # type: ignore[arg-type, misc]
    frozen = len(left_frozen(layers, config))
    left = f"; {frozen} of them are frozen and stay dense" if frozen else ""
    return (
        f"Cuttlefish is on: it watches {len(layers)} layers ({short_count(size)} of {short_count(count_parameters(model))} "
        f"parameters{left}) and factorizes them {_when(schedule)}, {_size(config, is_decoder(model))}."
    )


def already_factorized(model: nn.Module) -> str:
    """A second run on a factorized model."""
    return (
        f"Cuttlefish: {len(low_rank_layers(model))} layers of this model are factorized already, so this run trains it as it is "
        "and switches nothing. To choose its ranks anew, call hf_cuttlefish.merge(model) before training."
    )


def resumed(run: Run) -> str:
    """Where a resumed run is."""
    at = f"Cuttlefish: resumed at step {run.global_step} of {run.schedule.total_steps}"
    if run.switch_step is not None:
        return f"{at}, in the low-rank phase: {len(run.plan or ())} layers were factorized at step {run.switch_step}."
    if run.finished:
        return f"{at}; there will be no switch: {run.reason}."
    due = run.schedule.switch_at
    return f"{at}, in the full-rank phase; the switch is due {f'at step {due}' if due else _when(run.schedule)}."


def end(run: Run) -> tuple[int, str]:
    """(level, line): what came of the run, how to load it, and what to try next."""
    pairs = low_rank_layers(run.model)
    if run.switch_step is not None and run.restarts:
        return logging.INFO, "Cuttlefish: the factorized model is in the checkpoint of the switch; resume from there."
    if pairs:
        saved = sum(
            p.count * (p.in_features * p.out_features - p.rank * (p.in_features + p.out_features))
            for p in pairs.values()
        )
        now = count_parameters(run.model)
        loads = (
            "Its folder loads with from_pretrained after `import hf_cuttlefish`; hf_cuttlefish.save_merged(model, folder) writes a "
            "dense one."
            if isinstance(run.model, PreTrainedModel)
            else "Its state_dict loads into the same class after hf_cuttlefish.follow_checkpoints(model); hf_cuttlefish.merge(model) "
            "makes it dense."
        )
        return logging.INFO, (
            f"Cuttlefish: the model is factorized, {short_count(now)} of {short_count(now + saved)} parameters "
            f"({now / (now + saved):.0%}). {loads} If it is accurate enough, try a smaller target_ratio."
        )
    if run.switch_step is not None:
        return logging.WARNING, (
            f"Cuttlefish: the model in hand is dense, although the run switched at step {run.switch_step}: the best checkpoint is "
            "from before the switch (load_best_model_at_end). Load a later checkpoint for the factorized model, or set "
            "load_best_model_at_end=False."
        )
    due = run.schedule.due
    why = run.reason if run.finished else f"the switch was due at step {due} at the latest"
    return logging.WARNING, (
        f"Cuttlefish: the run ended after {run.global_step} of {run.schedule.total_steps} steps without a switch, and the model is "
        f"as large as before: {why}."
    )


def not_converged(config: CuttlefishConfig, step: int) -> str:
    """The switch came because time was up."""
    return (
        f"Cuttlefish: the stable ranks were not seen to converge by step {step}, the latest switch point "
        f"(latest_switch={config.latest_switch:.2f} of the run); switched all the same. If the accuracy falls behind, train longer, "
        "or give the full-rank phase more time with a later latest_switch."
    )


def low_rank_phase(found: Found) -> tuple[int, str]:
    """(level, line): the form of running that was chosen; what a step takes; that it takes longer, why, and what to do."""
    if found.tried is not None:
        return logging.INFO, _form(found.tried, found.form or "pairs", bool(found.waits_for_host))
    before, after = found.times or (0.0, 0.0)
    where = " in the run that this one goes on from" if found.is_resumed else ""
    told = f"Cuttlefish: a step takes {1000 * after:.3g} ms, and took {1000 * before:.3g} ms before the switch{where}. "
    if not found.is_slower:
        return (
            logging.INFO,
            f"{told}objective='speed' chose by forward and backward alone; these are whole steps, with optimizer.",
        )
    instead = "Use larger batches, or objective='speed', which keeps dense what gets slower."
    if found.objective == "speed":
        instead = "Use larger batches, or a larger min_speedup: at the switch forward and backward alone were timed."
    if found.device != "cuda":
        return logging.WARNING, f"{told}At these shapes pairs take longer than dense layers here. {instead}"
    if found.waits_for_host is False:
        return logging.WARNING, f"{told}The device sets the pace: at these shapes pairs take it longer. {instead}"
    if found.has_step_graphs:
        why = "The host sets the pace, although forward and backward are one CUDA graph: pairs have more tensors for the optimizer."
        return logging.WARNING, f"{told}{why} Under Trainer, {UNWAITED}. {instead}"
    if found.has_graphs:
        why = "The host sets the pace: with these CUDA graphs it works for each parameter tensor, and pairs have more of them."
        faster = f"{WHOLE}. " if found.is_alone else ""
        return logging.WARNING, f"{told}{why} {faster}Under Trainer, {UNWAITED}. {instead}"
    why = "The host launches kernels one by one, and the device waits for it."
    faster = FASTER if found.is_alone else FASTER_TOGETHER
    return logging.WARNING, f"{told}{why} {faster}; under Trainer, {UNWAITED}. {instead}"


FASTER = (
    "CuttlefishCallback(cuda_graphs=True), or GraphedStep in a loop of your own, with fixed lengths launches them all at once, dense "
    "steps as well (docs/fast-on-a-gpu.md)"
)
FASTER_TOGETHER = (
    "torch_compile=True with torch_compile_mode='reduce-overhead' and fixed lengths launches them all at once, dense steps as "
    "well (docs/fast-on-a-gpu.md)"
)
"""For several processes or GPUs, whose steps are not recorded whole."""
WHOLE = (
    "torch_compile_mode='default' with CuttlefishCallback(cuda_graphs=True) makes forward, backward and clipping one graph "
    "(docs/fast-on-a-gpu.md)"
)
UNWAITED = "logging_nan_inf_filter=False and accelerator_config={'non_blocking': True} let the host run ahead"


def _form(tried: Mapping[str, float], form: str, waits_for_host: bool) -> str:
    words = {"multiplied": "multiplied out", "pairs": "as pairs"}
    times = " and ".join(f"{ms:.3g} ms {words[name]}" for name, ms in tried.items())
    is_quicker = tried[form] == min(tried.values())
    so = ", so" if is_quicker else ". The host's times scatter by more than that, so what launches less is kept:"
    told = f"Cuttlefish: a step takes {times}{so} the low-rank layers run {words[form]} from here on"
    why = "the host, which launches kernels one by one, sets the pace, not the device"
    return f"{told}: {why}. {FASTER}." if waits_for_host else f"{told}."


def statistics_lost(step: int) -> str:
    """A run resumed among the steps that gather statistics. step: the later one of the switch."""
    return (
        "Cuttlefish: the checkpoint lies among the steps that gather statistics, and its statistics are not at hand: gathering "
        f"starts anew, and the switch comes at step {step}."
    )


def switched_but(step: int, error: Exception) -> str:
    """All has changed, and training goes on low rank."""
    return f"Cuttlefish: switched at step {step}, but what comes after it failed: {error}"


def failed(step: int, error: Exception) -> str:
    """Nothing has changed."""
    return (
        f"Cuttlefish: the switch at step {step} failed and training goes on full rank, the model as before: {error}. To try again, "
        "resume from a checkpoint before this step with another config (exclude_modules, switch_step)."
    )


def why_dense(plan: RankPlan, config: CuttlefishConfig) -> str:
    """Why a plan factorizes nothing."""
    reasons = dict.fromkeys(d.reason for d in plan.decisions.values())
    if config.objective == "speed" and plan.notes:
        return plan.notes[-1]
    if len(reasons) == 1 and next(iter(reasons)) in (FROZEN, UNSEEN, UNRECOVERED, UNBOUNDED):
        return f"of all {len(plan.decisions)} layers it is true: {next(iter(reasons))}"
    return "no layer would get smaller at the ranks that it needs"


def no_switch(step: int, reason: str, plan: RankPlan) -> str:
    """The plan factorizes nothing."""
    return f"Cuttlefish: no switch at step {step}: {reason}.\n{plan.summary()}"


def _when(schedule: Schedule) -> str:
    config = schedule.config
    if config.switch_step is not None:
        return f"at step {config.switch_step} of {schedule.total_steps}"
    first, last = min(schedule.earliest_step, schedule.latest_step), schedule.latest_step
    between = f"at step {last}" if first == last else f"between steps {first} and {last}"
    return f"{between} of {schedule.total_steps}"


def _size(config: CuttlefishConfig, decoder: bool) -> str:
    if config.rank_rule != "loss":
        return f"at the ranks of rule {config.rank_rule!r}"
    if config.max_loss_increase is not None:
        return f"as far as the training loss rises by at most {config.max_loss_increase:.0%}"
    if config.target_ratio is not None:
        return f"to {config.target_ratio:.0%} of their size"
    if decoder:
        return f"to {SIZES[0]:.0%} to {TOKEN_SIZES[-1]:.0%} of their size or not at all, by what is measured then"
    return f"to {SIZES[0]:.0%} to {SIZES[-1]:.0%} of their size, by what is measured then"
