"""The switch itself: choose ranks and factors on the main process, share them, carry them out everywhere or nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import optimizer as optimizers
from .config import CuttlefishConfig
from .distributed import Processes
from .factorization import Decomposition, Factors, cut, decompose
from .layers import dense_weight
from .patching import factorize, low_rank_layers
from .plan import RankPlan, break_even_rank
from .profiling import FlowRecorder, keep_faster, rank_prices
from .ranks import LayerSpectrum, needs_no_weights, plan_ranks, rank_by_hand, spectrum_of
from .report import FactorizationReport
from .statistics import MomentCollector
from .wrapper import RebuiltDDP, forget_compiled


def choose(
    layers: Mapping[str, nn.Module],
    config: CuttlefishConfig,
    collector: MomentCollector | None,
    initial: Mapping[str, float],
    flow: FlowRecorder | None,
    complete: bool = False,
) -> tuple[RankPlan, dict[str, Factors]]:
    """The plan, and the factors of its layers where the rule has worked them out.

    One layer at a time: of each only the spectrum and a decomposition cut off at break-even are kept, no larger than its
    weight.

    Args:
        layers: name -> dense layer. collector: the statistics gathered, if any.
        initial: stable ranks of the weights that the run started from, by name, where known.
        flow: what was seen of the run's shapes, if layers are to be chosen by measured speed.
        complete: work out the factors of every layer of the plan.

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
        most = max(break_even_rank(n_in, n_out), rank_by_hand(name, config) or 1)
        exact = torch.promote_types(dense_weight(layer).dtype, torch.float32)
        parts[name] = d.shortened(min(most, n_in, n_out), exact)
    if flow is not None and config.rank_rule == "loss":
        sizes = {name: s.in_features + s.out_features for name, s in spectra.items()}
        prices = rank_prices(flow.groups(), sizes, bool(flow.compiled))
        spectra = {name: replace(s, price=prices[name]) for name, s in spectra.items()}
    plan = plan_ranks(spectra, config, loss)
    if flow is not None:
        plan = keep_faster(plan, flow, config.min_speedup)
    factors = {name: cut(parts.pop(name), plan[name]) for name in plan if name in parts}
    if complete:
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


def carry_out(
    model: nn.Module,
    optimizer: Any,
    plan: RankPlan,
    factors: Mapping[str, Factors],
    optimizer_state: str,
    ddp: DistributedDataParallel | None,
    processes: Processes,
) -> FactorizationReport:
    """Factorize and repair DDP on all processes, or put everything back on all of them and raise."""
    told = False

    def confirm() -> None:
        nonlocal told
        told = True
        processes.agree()
        if ddp is None:
            return
        rebuilt, error = None, None
        try:
            rebuilt = RebuiltDDP(ddp)
        except Exception as caught:
            error = caught
        try:
            processes.agree(error)
        except BaseException:
            if rebuilt is not None:
                rebuilt.undo()
            raise
        if rebuilt is not None:
            rebuilt.finish()

    try:
        report = factorize(model, plan, optimizer, factors=factors, optimizer_state=optimizer_state, confirm=confirm)
    except Exception as error:
        if not told:
            processes.agree(error)
        raise
    _share_optimizer_state(model, optimizer, processes)
    forget_compiled()
    return report


def _share_optimizer_state(model: nn.Module, optimizer: Any, processes: Processes) -> None:
    """The projected state comes out of matrix products, which need not round the same on every device."""
    if processes.size == 1:
        return
    state = optimizers.inner_optimizer(optimizer).state
    for pair in low_rank_layers(model).values():
        for parameter in (pair.down.weight, pair.up.weight):
            for _, value in sorted(state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor) and value.ndim > 0:
                    processes.broadcast_(value)
