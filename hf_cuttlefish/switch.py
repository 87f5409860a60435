"""The switch itself: choose ranks and factors on the main process, share them, carry them out everywhere or nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import optimizer as optimizers
from .config import CuttlefishConfig
from .distributed import OtherProcessError, Processes
from .factorization import Decomposition, Factors, cut, decompose
from .flow import FlowRecorder
from .layers import dense_weight
from .patching import factorize, low_rank_layers
from .plan import RankPlan, break_even_rank
from .profiling import keep_faster, rank_prices
from .ranks import LayerSpectrum, needs_no_weights, plan_ranks, rank_by_hand, spectrum_of
from .redundancy import RedundantEdit
from .report import FactorizationReport
from .sharding import PartedModel, ShardedModel
from .statistics import MomentCollector
from .wrapper import RebuiltDDP, forget_compiled


def choose(
    layers: Mapping[str, nn.Module],
    config: CuttlefishConfig,
    collector: MomentCollector | None,
    initial: Mapping[str, float],
    flow: FlowRecorder | None,
    keep: str = "found",
) -> tuple[RankPlan, dict[str, Factors]]:
    """The plan, and factors of its layers.

    One layer at a time: of each only the spectrum and a decomposition cut off at break-even are kept, no larger than its
    weight.

    Args:
        layers: name -> dense layer. collector: the statistics gathered, if any.
        initial: stable ranks of the weights that the run started from, by name, where known.
        flow: what was seen of the run's shapes, if layers are to be chosen by measured speed.
        keep: factors to return: "found", those that the rule has worked out; "all", of every layer of the plan; "none".

    Raises:
        ValueError: weights that are not finite, naming the layer.
    """
    statistics = collector.moments() if collector is not None else {}
    loss = collector.mean_loss() if collector is not None else None
    spectra: dict[str, LayerSpectrum] = {}
    parts: dict[str, Decomposition] = {}
    shapes_only = needs_no_weights(config, statistics)
    for name, layer in layers.items():
        n_out, n_in = dense_weight(layer).shape
        if shapes_only:
            spectra[name] = LayerSpectrum(n_in, n_out, initial_stable_rank=initial.get(name))
            continue
        spectra[name], d = spectrum_of(name, layer, config, statistics.pop(name, None), initial.get(name))
        if keep == "none":
            continue
        most = max(break_even_rank(n_in, n_out), rank_by_hand(name, config) or 1)
        exact = torch.promote_types(dense_weight(layer).dtype, torch.float32)
        parts[name] = d.shortened(min(most, n_in, n_out), exact)
        del d  # two matrices in fp64, which would stay while the next layer is worked on
    if flow is not None and config.rank_rule == "loss":
        sizes = {name: s.in_features + s.out_features for name, s in spectra.items()}
        prices = rank_prices(flow.groups(), sizes, bool(flow.compiled))
        spectra = {name: replace(s, price=prices[name]) for name, s in spectra.items()}
    plan = plan_ranks(spectra, config, loss)
    if flow is not None:
        plan = keep_faster(plan, flow, config.min_speedup)
    factors = {name: cut(parts.pop(name), plan[name]) for name in plan if name in parts}
    if keep == "all":
        for name in plan:
            if name not in factors:
                factors[name] = cut(decompose(dense_weight(layers[name])), plan[name])
    return plan, factors


def share(
    layers: Mapping[str, nn.Module],
    plan: RankPlan,
    factors: dict[str, Factors],
    shifted: list[str],
    processes: Processes,
) -> dict[str, Factors]:
    """The main process's factors on all of them, sent layer by layer; `shifted` names the layers with a bias shift."""
    if processes.size == 1:
        return factors
    for name, rank in plan.items():
        weight = dense_weight(layers[name])
        exact = torch.promote_types(weight.dtype, torch.float32)
        m, n = weight.shape
        shapes: dict[str, tuple[int, ...]] = {"down": (rank, n), "up": (m, rank)}
        if name in shifted:
            shapes["bias_shift"] = (m,)
        parts = {}
        for part, shape in shapes.items():
            parts[part] = torch.empty(shape, dtype=exact, device=weight.device)
            if processes.is_main:
                parts[part].copy_(getattr(factors[name], part))
            processes.broadcast_(parts[part])
        factors[name] = Factors(**parts)
    return factors


class FactorsInTurn(Mapping[str, Factors]):
    """Factors of a model in parts: each layer's are worked out on the main process and sent when they are asked for.

    All processes must ask for the same layers in the same order. None of them ever holds more than one layer whole.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        plan: RankPlan,
        config: CuttlefishConfig,
        collector: MomentCollector | None,
        parted: PartedModel,
    ) -> None:
        self._layers, self._plan, self._config, self._collector = layers, plan, config, collector
        self._parted, self._processes = parted, parted.processes
        self.all_know = False
        """Whether every process has heard of the error that was raised."""

    def __getitem__(self, name: str) -> Factors:
        """Raises ValueError, naming the layer and on all processes, for weights that are not finite."""
        self._processes.agree()  # one that has failed meanwhile would not answer
        mine: dict[str, Factors] = {}

        def work(layers: Mapping[str, nn.Module]) -> list[str]:
            moments = self._collector.moments_of(name) if self._collector is not None else None
            _, parts = spectrum_of(name, layers[name], self._config, moments, None)
            mine[name] = cut(parts, self._plan[name])
            return [name] if mine[name].bias_shift is not None else []

        try:
            shifted = self._parted.from_main(self._layers, work)
        except Exception:
            self.all_know = True
            raise
        one = RankPlan({name: self._plan.decisions[name]})
        return share(self._layers, one, mine, shifted, self._processes)[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would work the factors out
        return name in self._plan

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)


def all_know(error: Exception, factors: Mapping[str, Factors]) -> bool:
    """Whether every process has heard of an error: it came from another one, or from factors that are worked out in turn."""
    return isinstance(error, OtherProcessError) or (isinstance(factors, FactorsInTurn) and factors.all_know)


def carry_out(
    model: nn.Module,
    optimizer: Any,
    plan: RankPlan,
    factors: Mapping[str, Factors],
    optimizer_state: str,
    wrapper: DistributedDataParallel | ShardedModel | None,
    processes: Processes,
) -> FactorizationReport:
    """Factorize and repair the wrapper on all processes, or put everything back on all of them and raise."""
    told = False
    sharded = wrapper if isinstance(wrapper, ShardedModel) else None
    redundant = RedundantEdit(optimizer) if optimizers.is_redundant(optimizer) else None

    def repair() -> ShardedModel | RebuiltDDP | None:
        if sharded is not None:
            sharded.exchange()
            return sharded
        if redundant is not None:
            redundant.exchange()
        return None if wrapper is None else RebuiltDDP(cast(DistributedDataParallel, wrapper))

    def confirm() -> None:
        nonlocal told
        forget_compiled()
        told = True
        processes.agree()
        repaired, error = None, None
        try:
            repaired = repair()
        except Exception as caught:
            error = caught
        try:
            processes.agree(error)
        except BaseException:
            if repaired is not None:
                repaired.undo()
            raise
        if repaired is not None:
            repaired.finish()

    try:
        report = factorize(
            model,
            plan,
            optimizer,
            factors=factors,
            optimizer_state=optimizer_state,
            sharded=sharded,
            redundant=redundant,
            confirm=confirm,
        )
    except BaseException as error:
        if sharded is not None:
            sharded.undo()
        if isinstance(error, Exception) and not (told or all_know(error, factors)):
            processes.agree(error)
        raise
    if redundant is not None:
        report.optimizer = redundant.summary  # of all processes, which was not known before
    elif sharded is None and processes.size > 1:
        _share_optimizer_state(model, optimizer, processes)
    return report


def _share_optimizer_state(model: nn.Module, optimizer: Any, processes: Processes) -> None:
    """The projected state comes out of matrix products, which need not round the same on every device."""
    state = optimizers.inner_optimizer(optimizer).state
    for pair in low_rank_layers(model).values():
        for parameter in (pair.down.weight, pair.up.weight):
            for _, value in sorted(state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor) and value.ndim > 0:
                    processes.broadcast_(value)
