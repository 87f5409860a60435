"""The methods compared: what each one does to a model, and when. Training itself is the same for all (training.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, RankPlan, estimate_ranks, factorize
from hf_cuttlefish.decide.plan import RankDecision, break_even_rank
from hf_cuttlefish.decide.ranks import plan_ranks
from hf_cuttlefish.decide.rules import LayerSpectrum, allowed_rank, random_matrix_scale
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.kinds import dense_weight
from hf_cuttlefish.layers.low_rank import LowRankLinear, low_rank_layers
from hf_cuttlefish.maths import factors
from hf_cuttlefish.maths.factors import GRADIENT_DAMPING, INPUT_DAMPING, Decomposition, LayerMoments, cut, decompose
from hf_cuttlefish.measure.moments import MomentCollector

from .method import Method, Progress

MULTIPLE = 1
"""The other methods do not align their ranks, so that each comes as close to its budget as it can; ours does (to 8)."""
FROBENIUS_DECAY = 1e-4
LORA_RANK = 16
LORA_RATE = 5.0
"""LoRA wants a higher learning rate than full fine-tuning; at the same one it would be compared at its worst."""
FORMER_RATIO, FORMER_DAMPING = 0.4, 0.03
"""Size, and damping of the gradients' moments, before both were measured anew."""
ATTENTION = r".*(query|key|value|attention\.output\.dense|q_proj|k_proj|v_proj|o_proj)"


@dataclass
class Product(Method):
    """`Cuttlefish` as a user runs it, with a config."""

    config: Callable[[Progress], CuttlefishConfig] = lambda training: CuttlefishConfig()

    def start(self, training: Progress) -> None:
        """Attach to the model and its optimizer."""
        config = self.config(training)
        self.cuttlefish = Cuttlefish(
            training.model,
            training.optimizer,
            config,
            total_steps=training.total_steps,
            scheduler=training.scheduler,
        )

    def due(self, training: Progress) -> bool:
        """True at the step of the switch, and where stable ranks alone decide, at every step that may be it."""
        controller = self.cuttlefish
        state = controller.state_dict()
        if state["finished"]:
            return False
        step, at = controller.global_step + 1, state["switch_at"]
        if at is not None:
            return step >= at
        checked = step % controller.schedule.check_steps == 0 or step >= controller.schedule.latest_step
        return controller.schedule.statistics_steps == 0 and step >= controller.schedule.earliest_step and checked

    def after_step(self, training: Progress) -> bool:
        """Let the controller step, and note what it decided."""
        controller = self.cuttlefish
        collector = controller.watch.moments if self.due(training) else None
        if collector is not None:
            collector.steps += 1  # the step being taken, which the controller counts next
            self.notes["curvature"] = curvature(controller.layers, collector.moments())
            self.notes["window_loss"] = collector.mean_loss()
            collector.steps -= 1
        rate, heading = training.scheduler.base_lrs[0], controller.watch.heading
        switched = controller.step()
        if switched and controller.plan is not None and controller.report is not None:
            note_plan(self.notes, controller.plan)
            self.notes |= {
                "reason": controller.reason,
                "switch_seconds": controller.report.seconds,
                "statistics_steps": controller.schedule.statistics_steps,
                "alignment": None if heading is None else heading.alignment(training.step),
                "learning_rate_scale": training.scheduler.base_lrs[0] / rate,
            }
        elif controller.reason is not None and controller.switch_step is None:
            self.notes["reason"] = controller.reason
        return switched


@dataclass
class Former(Product):
    """The defaults of before the run was measured: 0.4 kept, the rate left alone or times 1.5, 4% of the run for the statistics."""

    def __post_init__(self) -> None:
        """Say so in a config."""
        size = self.budget or FORMER_RATIO
        self.config = lambda training: CuttlefishConfig(
            target_ratio=size,
            learning_rate_scale=1.5 if size < 1 / 4 else 1.0,
            statistics_steps=former_window(training.total_steps),
        )

    def after_step(self, training: Progress) -> bool:
        """As the product, with the gradients' moments less damped."""
        now, factors.GRADIENT_DAMPING = factors.GRADIENT_DAMPING, FORMER_DAMPING
        try:
            return super().after_step(training)
        finally:
            factors.GRADIENT_DAMPING = now


@dataclass
class OneShot(Method):
    """A switch at a fixed share of the run, with the metric, the ranks and the optimizer state chosen one by one.

    Attributes:
        at: share of the run; 0 factorizes before the first step.
        metric: "weight" (plain SVD), "input" (input-whitened, the mean in the bias) or "loss" (inputs and gradients).
        ranks: "uniform" (the same share of break-even everywhere), "energy" (the same share of the metric's energy in
            each layer), "global" (one threshold for all layers) or "stable" (xi * stable rank of the weights); each is
            scaled until the budget is met.
        state: "carry" or "reset", of the optimizer.
        decay: factor of the Frobenius decay of the low-rank layers' products, which then have no other weight decay.
    """

    at: float = 1 / 3
    metric: str = "weight"
    ranks: str = "uniform"
    state: str = "reset"
    decay: float = 0.0

    def build(self, model: nn.Module) -> nn.Module:
        """Factorize now if the method starts low rank."""
        if self.at == 0:
            self._switch(model, None, {})
        return model

    def start(self, training: Progress) -> None:
        """Fix the step of the switch and the steps that gather statistics (as many as the product's former default)."""
        self.switch_step = 0 if self.at == 0 else max(1, round(self.at * training.total_steps))
        wanted = former_window(training.total_steps) if self.metric != "weight" else 0
        self.window = min(wanted, self.switch_step)
        self.collector: MomentCollector | None = None
        self._gather(training)

    def before_step(self, training: Progress) -> None:
        """Add the gradients of decay / 2 * ||U V||_F^2."""
        if self.decay == 0 or training.step < self.switch_step:
            return
        for layer in low_rank_layers(training.model).values():
            by_up, by_down = product_gradients(layer)
            layer.up.weight.grad.add_(by_up, alpha=self.decay)
            layer.down.weight.grad.add_(by_down, alpha=self.decay)

    def due(self, training: Progress) -> bool:
        """True at the step of the switch."""
        return training.step == self.switch_step

    def after_step(self, training: Progress) -> bool:
        """Gather, and switch when the step has come."""
        if self.collector is not None:
            self.collector.step()
        if training.step != self.switch_step:
            self._gather(training)
            return False
        moments: dict[str, LayerMoments] = {}
        if self.collector is not None:
            self.collector.stop()
            moments = self.collector.moments()
            self.notes["curvature"] = curvature(self.collector.layers, moments)
            self.notes["window_loss"] = self.collector.mean_loss()
            self.notes["statistics_steps"] = self.window
        self._switch(training.model, training.optimizer, moments)
        return True

    def _gather(self, training: Progress) -> None:
        if self.window and training.step == self.switch_step - self.window:
            self.collector = MomentCollector(training.model, find_targets(training.model))
            self.collector.start()

    def _switch(self, model: nn.Module, optimizer: Any, moments: Mapping[str, LayerMoments]) -> None:
        parts: dict[str, Decomposition] = {}
        spectra: dict[str, LayerSpectrum] = {}
        for name, layer in find_targets(model).items():
            weight = dense_weight(layer)
            n_out, n_in = weight.shape
            given = moments.get(name)
            seen = None if given is None or self.metric == "weight" else in_metric(weight, given, self.metric)
            d = decompose(weight, seen)
            singular = torch.linalg.svdvals(weight.double()).cpu() if self.ranks == "stable" else None
            parts[name] = d.shortened(break_even_rank(n_in, n_out), torch.float32)
            tokens = 1.0 if given is None else given.tokens
            spectra[name] = LayerSpectrum(n_in, n_out, singular, d.spectrum.cpu(), tokens)
        plan = plan_at_budget(spectra, self.ranks, self.budget or 1.0)
        known = self.metric == "loss" and bool(moments)
        plan.predicted_loss_increase = (
            sum(d.predicted_loss_increase or 0.0 for d in plan.decisions.values()) if known else None
        )
        pairs = {name: cut(parts.pop(name), plan[name]) for name in plan}
        factorize(model, plan, optimizer, factors=pairs, optimizer_state=self.state)
        note_plan(self.notes, plan)


@dataclass
class Lora(Method):
    """PEFT's LoRA on the same layers, head and pooler trained in full. Merged, the model is as large as before."""

    rate = LORA_RATE

    def build(self, model: nn.Module) -> nn.Module:
        """Wrap the model."""
        from peft import LoraConfig, get_peft_model

        endings = {name.split(".")[-1] for name, _ in model.named_modules()}
        full = sorted(endings & {"classifier", "pooler"})
        config = LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(find_targets(model)), modules_to_save=full
        )
        return get_peft_model(model, config)


def former_window(total_steps: int) -> int:
    """Steps of statistics, before these followed the layers' width."""
    return min(24, max(4, round(0.04 * total_steps)))


@torch.no_grad()
def product_gradients(layer: LowRankLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ||up down||_F^2 / 2 by `up` and by `down`, without the product (Khodak et al., arXiv 2105.01029)."""
    return factors.frobenius_gradients(layer.up.weight, layer.down.weight)


def in_metric(weight: torch.Tensor, moments: LayerMoments, metric: str) -> LayerMoments:
    """The moments with the gradients' side set to the identity for metric "input"; unchanged for "loss"."""
    if metric == "loss":
        return moments
    if weight.shape[0] <= weight.shape[1]:
        return LayerMoments(moments.signal, None, moments.other_level, moments.mean, moments.tokens)
    w = weight.double()
    return LayerMoments(w.mT @ w, moments.metric, 0.0, moments.mean, moments.tokens)


def plan_at_budget(spectra: Mapping[str, LayerSpectrum], ranks: str, budget: float) -> RankPlan:
    """The largest plan of a kind that keeps at most `budget` of the layers' parameters.

    Raises:
        ValueError: an unknown kind.
    """
    if ranks == "global":
        return plan_ranks(spectra, CuttlefishConfig(target_ratio=budget, rank_multiple=MULTIPLE))
    energy = {}
    if ranks == "energy":
        squares = {name: s.loss_spectrum.square() for name, s in spectra.items()}
        energy = {name: values.cumsum(0) / values.sum() for name, values in squares.items()}

    def wanted(name: str, s: LayerSpectrum, t: float) -> float:
        if ranks == "uniform":
            return t * break_even_rank(s.in_features, s.out_features)
        if ranks == "stable":
            return 4 * t * random_matrix_scale(s.in_features, s.out_features) * (s.stable_rank or 1.0)
        if ranks == "energy":
            return float((energy[name] < t).sum()) + 1
        raise ValueError(f"ranks is {ranks!r}: it must be uniform, energy, global or stable")

    def at(t: float) -> RankPlan:
        decisions = {}
        for name, s in spectra.items():
            rank, reason = allowed_rank(wanted(name, s, t), s.in_features, s.out_features, MULTIPLE)
            dropped = s.tokens / 2 * float(s.loss_spectrum[rank:].square().sum()) if rank is not None else 0.0
            decisions[name] = RankDecision(s.in_features, s.out_features, rank, reason, None, dropped)
        return RankPlan(decisions, ranks)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        before, after = at(middle).parameters()
        low, high = (middle, high) if after <= budget * before else (low, middle)
    return at(low)


def ratio_for(model: nn.Module, budget: float) -> float:
    """The largest share of the full rank at which the target layers keep at most `budget` of their parameters."""
    low, high = 1e-3, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_ratio=middle, rank_multiple=1))
        before, after = plan.parameters()
        low, high = (middle, high) if after <= budget * before else (low, middle)
    return low


def curvature(layers: Mapping[str, nn.Module], moments: Mapping[str, LayerMoments]) -> float:
    """Predicted loss if all layers vanished: the sum over layers of tokens / 2 * ||K^T W L||_F^2, damping included."""
    total = torch.zeros((), dtype=torch.float64)
    for name, given in moments.items():
        weight = dense_weight(layers[name]).double()
        on_left = weight.shape[0] <= weight.shape[1]
        side = weight if on_left else weight.mT
        inner, outer = (INPUT_DAMPING, GRADIENT_DAMPING) if on_left else (GRADIENT_DAMPING, INPUT_DAMPING)
        signal = given.signal.double() + inner * given.other_level * (side @ side.mT)
        if given.metric is None:
            trace = signal.trace()
        else:
            metric = given.metric.double()
            trace = (signal * metric).sum() + outer * metric.diagonal().mean() * signal.trace()
        total += given.tokens / 2 * trace.cpu()
    return float(total)


def note_plan(notes: dict[str, Any], plan: RankPlan) -> None:
    """Put the plan's numbers into a record."""
    notes["predicted_loss_increase"] = plan.predicted_loss_increase
    notes["plan_notes"] = list(plan.notes)
    notes["ranks"] = {name: d.rank for name, d in plan.decisions.items()}


def _pufferfish(budget: float) -> Callable[[Progress], CuttlefishConfig]:
    return lambda t: CuttlefishConfig(
        rank_rule="ratio",
        rank_ratio=ratio_for(t.model, budget),
        rank_multiple=1,
        switch_step=t.epoch_steps,
        statistics_steps=0,
        optimizer_state="reset",
        learning_rate_scale=1.0,
    )


def _reference(training: Progress) -> CuttlefishConfig:
    return CuttlefishConfig(
        rank_rule="ratio",
        rank_ratio=0.45,
        target_modules=ATTENTION,
        switch_step=training.epoch_steps,
        statistics_steps=0,
        optimizer_state="reset",
        learning_rate_scale=1.0,
    )


def _cuttlefish(budget: float | None, options: Mapping[str, Any]) -> Callable[[Progress], CuttlefishConfig]:
    options = dict(options)
    share = options.pop("switch", None)

    def config(training: Progress) -> CuttlefishConfig:
        at = {} if share is None else {"switch_step": max(1, round(share * training.total_steps))}
        return CuttlefishConfig(target_ratio=budget, **at, **options)

    return config


def create(name: str, budget: float | None, epochs: int, options: Mapping[str, Any]) -> Method:
    """The method of that name.

    Raises:
        ValueError: an unknown name, or a method that needs a budget without one.
    """
    if name in BUDGETED and budget is None:
        raise ValueError(f"the method {name!r} needs a budget")
    share = 0.0 if budget is None else budget
    if name == "dense":
        return Method()
    if name == "lora":
        return Lora()
    if name == "cuttlefish":
        return Product(budget, config=_cuttlefish(budget, options))
    if name == "former":
        return Former(budget)
    if name == "paper":
        return Product(None, config=lambda t: CuttlefishConfig.paper())
    if name == "reference_bert":
        return Product(None, config=_reference)
    if name == "pufferfish":
        return Product(budget, config=_pufferfish(share))
    if name == "paper_at_budget":
        return OneShot(budget, at=1 / epochs, ranks="stable")
    if name == "sifd":
        return OneShot(budget, at=0.0, **{"decay": FROBENIUS_DECAY, **options})
    if name == "svd_after":
        return OneShot(budget, at=math.ceil(2 / 3 * epochs) / epochs)
    if name == "whitened_after":
        return OneShot(budget, at=math.ceil(2 / 3 * epochs) / epochs, metric="input")
    if name == "ablation":
        return OneShot(budget, **options)
    raise ValueError(f"unknown method {name!r}: choose one of {', '.join(SIZED + BUDGETED)}")


SIZED = ("dense", "lora", "paper", "reference_bert")
"""Methods that have one size; so has cuttlefish with no budget."""
BUDGETED = ("pufferfish", "paper_at_budget", "sifd", "svd_after", "whitened_after", "ablation")
