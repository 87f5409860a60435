"""The methods: what each one does to the network, and when. Training itself is the same for all.

dense            full rank from the first step to the last
ours             `Cuttlefish` with its default config
ours_budget      the same with target_ratio = the budget (1/5.6)
paper            the paper's recipe for CNNs, `CuttlefishConfig.paper_cnn()`: scaled stable ranks, at its own size; all
                 layers, since times measured beside other runs would choose at random
paper_budget     the same ranks, scaled to the budget
pufferfish       one rank ratio for all layers, after one epoch, at the budget (arXiv 2103.03936)
sifd             low rank from the first step, spectral initialization and Frobenius decay (arXiv 2105.01029)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.methods import plan_at_budget, ratio_for
from hf_cuttlefish import Cuttlefish, CuttlefishConfig, factorize
from hf_cuttlefish.decide.plan import RankPlan
from hf_cuttlefish.decide.rules import LayerSpectrum
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.kinds import kind_of
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.patch.decay import add_decay

METHODS = ("dense", "ours", "ours_budget", "paper", "paper_budget", "pufferfish", "sifd")
AT_BUDGET = ("ours_budget", "paper_budget", "pufferfish", "sifd")


def start(method: str, model: nn.Module, budget: float, total_steps: int, epoch_steps: int) -> CuttlefishConfig | None:
    """The config of a method that `Cuttlefish` carries out; None for dense, for sifd, which changes the model here, and for `PaperAtBudget`."""
    if method in ("dense", "paper_budget"):
        return None
    if method == "sifd":
        factorize(model, _plan(model, budget, "uniform"))
        return None
    if method == "ours":
        return CuttlefishConfig()
    if method == "ours_budget":
        return CuttlefishConfig(target_ratio=budget)
    if method == "paper":
        return CuttlefishConfig.paper_cnn(objective="size")
    if method == "pufferfish":
        ratio = ratio_for(model, budget)
        ratios: dict[str, Any] = {"rank_rule": "ratio", "rank_ratio": ratio, "rank_multiple": 1, "objective": "size"}
        return CuttlefishConfig.paper_cnn(**ratios, switch_step=epoch_steps)
    raise ValueError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")


class PaperAtBudget:
    """The paper's ranks, scaled to the budget: factorized at the earliest step at which ours may be."""

    def __init__(self, model: nn.Module, optimizer: Any, budget: float, total_steps: int) -> None:
        self.model, self.optimizer, self.budget = model, optimizer, budget
        self.switch_at, self.count = max(1, round(0.3 * total_steps)), 0
        self.plan: RankPlan | None = None
        self.switch_step: int | None = None

    def step(self) -> bool:
        """An optimizer step has ended."""
        self.count += 1
        if self.count != self.switch_at:
            return False
        self.plan = _plan(self.model, self.budget, "stable")
        factorize(self.model, self.plan, self.optimizer, optimizer_state="reset")
        self.switch_step = self.count
        return True

    def end(self) -> None:
        """Nothing to do."""


def controller(
    method: str,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    config: CuttlefishConfig | None,
    budget: float,
    total: int,
) -> Any:
    """What is told of each step; None where nobody is."""
    if method == "paper_budget":
        return PaperAtBudget(model, optimizer, budget, total)
    return None if config is None else Cuttlefish(model, optimizer, config, total_steps=total, scheduler=scheduler)


@torch.no_grad()
def frobenius_decay(model: nn.Module, decay: float) -> None:
    """Add the gradients of decay / 2 * ||up down||_F^2."""
    add_decay(low_rank_layers(model).values(), decay)


def _plan(model: nn.Module, budget: float, ranks: str) -> RankPlan:
    spectra = {}
    for name, layer in find_targets(model).items():
        weight = kind_of(layer).weight.double()
        values = torch.linalg.svdvals(weight).cpu()
        spectra[name] = LayerSpectrum(weight.shape[1], weight.shape[0], values, values)
    return plan_at_budget(spectra, ranks, budget)
