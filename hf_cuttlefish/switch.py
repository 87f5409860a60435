"""The switch itself: choose ranks and factors on the main process, share them, and make the edits everywhere or nowhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .config import CuttlefishConfig
from .decide.aligning import aligned
from .decide.even import note_of_even
from .decide.left import UNBOUNDED, UNRECOVERED, left_blind, left_frozen, left_unseen
from .decide.plan import RankPlan, break_even_rank
from .decide.ranks import BATCH_BYTES, BATCHED_ON, needs_no_weights, plan_ranks, rank_by_hand, spectra_of, spectrum_of
from .decide.rules import LayerSpectrum
from .decide.size import DENSE, Tried, measured_size
from .decide.speed import PAPER_RULES, keep_faster
from .decide.targets import notes_of_dense
from .engines.around import check_not_wrapped, compiles_blocks
from .engines.base import Engine, Layers
from .engines.find import check_is_free
from .engines.trial import Trial
from .layers.kinds import dense_weight, kind_of
from .maths.factors import Decomposition, Factors, Moments, cut, cut_together, decompose
from .measure.eager import said_of_shapes
from .measure.kept import KeptBatches
from .measure.moments import MomentCollector
from .measure.places import said_of_far
from .measure.shapes import FlowRecorder
from .measure.timing import rank_prices
from .measure.watch import Watch
from .patch.edits import Edit
from .patch.learning_rate import learning_rate_edit
from .patch.merge import merge_layers
from .patch.modules import carry_out, make_change
from .patch.report import FactorizationReport
from .processes import Processes


def factorize(
    model: nn.Module,
    plan: Mapping[str, int],
    optimizer: Any = None,
    *,
    statistics: Mapping[str, Moments] | None = None,
    factors: Mapping[str, Factors] | None = None,
    optimizer_state: str = "carry",
) -> FactorizationReport:
    """Replace each layer of `plan` by a pair of its kind (a LowRankLinear for an nn.Linear), in place, all or nothing.

        report = factorize(model, estimate_ranks(model), optimizer)
        print(report)

    Modules, the optimizer's groups and state, and `model.config` change together; if anything fails before the end,
    nothing has changed. Bias Parameters stay the same objects. Forward and backward hooks of the layers stay in force.

    Args:
        model: the bare model (not wrapped by DDP or the like).
        plan: a RankPlan, or {module name: rank}. An explicit rank is obeyed, also above break-even.
        optimizer: the optimizer that trains the model, if any (Accelerate's wrapper is fine).
        statistics: moments of the layers; the factors are then the best ones in the metric of the loss, and the mean
            input's part goes into the bias. Plain SVD without.
        factors: ready-made factors of the layers instead, asked for one layer after the other.
        optimizer_state: "carry" or "reset".

    Returns:
        A report with parameter counts; `str(report)` is a table.

    Raises:
        TypeError: the plan is no mapping, a rank no whole number, or a named module of no kind that can be factorized.
        ValueError: an unknown, already factorized, tied, quantized or meta layer; a rank out of range; a plan or
            factors made for another shape; weights that are not finite; an optimizer that does not hold the weights; a
            model whose config says that it is quantized; a model inside DDP or another engine.
    """
    if isinstance(model, nn.Module):
        check_is_free(model, optimizer)
    change = make_change(
        model, plan, optimizer, statistics=statistics, factors=factors, optimizer_state=optimizer_state
    )
    return carry_out(change, change.edits(), Processes.alone())


def merge(model: nn.Module, where: str = "all", example_inputs: Any = None) -> nn.Module:
    """Turn factorized layers back into the dense classes they came from, in place; returns the model.

        merge(model)
        merge(model, where="slower", example_inputs=batch)

    The bias Parameters stay the same objects, and merged layers are removed from the structure noted in `model.config`.

    Args:
        where: "all", or "slower": only the layers that are faster dense in inference. They are timed here, eagerly, on the
            device of `example_inputs` and at their shapes; a few milliseconds for each distinct shape and rank. The others
            stay pairs, and the model saves and loads like any factorized one. Times differ from process to process: where
            several hold replicas, let one merge and save.
        example_inputs: for "slower", what the model is served with: keyword arguments of its forward (as a tokenizer gives
            them), or a tensor or a tuple of positional ones.

    Raises:
        TypeError: example_inputs of another type, or a model that is no module.
        ValueError: the model has no factorized layer, factors that are quantized or hold an adapter; another `where`;
            "slower" without example_inputs or with inputs with which no factorized layer runs, "all" with some; a model inside
            DDP or another engine.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return merge_layers(model, where, example_inputs, check_not_wrapped)


def choose(
    engine: Engine, watch: Watch, config: CuttlefishConfig, alignment: float | None = None, steps_left: int = 0
) -> tuple[RankPlan, Mapping[str, Factors]]:
    """The plan, as the main process decides it, and the factors of its layers, on all processes.

    Args:
        alignment: of the weights' travel (`Heading`), or None. steps_left: of the run.

    Raises:
        ValueError: weights that are not finite, naming the layer.
    """
    config = aligned(config, engine.model, watch.layers)
    why_even = why_even_ranks(config, engine.model)
    config = replace(config, even_ranks=bool(why_even))
    mine: dict[str, Factors] = {}
    keep = "none" if not engine.holds_whole_weights else "found" if engine.processes.size == 1 else "all"

    def decide(layers: Layers) -> tuple[RankPlan, list[str]]:
        seen = (watch.moments, watch.initial(), watch.flow)
        trial = None if config.rank_rule in PAPER_RULES else Trial(engine, watch, steps_left)
        plan, found = plan_and_factors(layers, config, *seen, keep, watch.kept, alignment, trial)
        plan.notes[:0] = [*notes_of_dense(watch.model), *([note_of_even(plan, why_even)] if why_even and plan else [])]
        mine.update(found)
        return plan, [name for name, f in found.items() if f.bias_shift is not None]

    plan, shifted = engine.from_main(watch.layers, decide)
    if not plan:
        return plan, {}
    if not engine.holds_whole_weights:
        return plan, FactorsInTurn(engine, watch, plan, config)
    return plan, share(watch.layers, plan, mine, shifted, engine.processes)


def why_even_ranks(config: CuttlefishConfig, model: nn.Module) -> str:
    """Why layers are to share ranks; "" where each has its own. model: bare."""
    if config.even_ranks != "auto":
        return "even_ranks=True" if config.even_ranks else ""
    return "blocks are compiled one by one, and equal ones share a graph" if compiles_blocks(model) else ""


def plan_and_factors(
    layers: Layers,
    config: CuttlefishConfig,
    collector: MomentCollector | None,
    initial: Mapping[str, float],
    flow: FlowRecorder | None,
    keep: str = "found",
    kept: KeptBatches | None = None,
    alignment: float | None = None,
    trial: Trial | None = None,
) -> tuple[RankPlan, dict[str, Factors]]:
    """The plan, and factors of its layers.

    One layer at a time: of each only the spectrum and a decomposition cut off at break-even are kept, no larger than its
    weight.

    Args:
        layers: name -> dense layer. collector: the statistics gathered, if any.
        initial: stable ranks of the weights that the run started from, by name, where known.
        flow: what was seen of the run's shapes, if layers are to be chosen by measured speed.
        kept: batches to try sizes on, if any. alignment: of the weights' travel, or None.
        trial: measures whole steps, if layers are to be chosen by measured speed.
        keep: factors to return: "found", those that the rule has worked out; "all", of every layer of the plan; "none".

    Raises:
        ValueError: weights that are not finite, naming the layer.
    """
    statistics = collector.moments() if collector is not None else {}
    loss = collector.mean_loss() if collector is not None else None
    left = left_frozen(layers, config)
    if collector is not None:
        left = left_unseen(layers, config, statistics) | left_blind(layers, config, statistics) | left
    spectra, parts = _decompose_all(layers, config, statistics, initial, keep, left)
    if flow is not None and config.rank_rule == "loss":
        sizes = {name: s.rank_size for name, s in spectra.items()}
        prices = rank_prices(flow.groups(), sizes, bool(flow.compiled))
        spectra = {name: replace(s, price=prices[name]) for name, s in spectra.items()}
    notes: list[str] = []
    tried: Tried = []
    chosen = [name for name in spectra if name not in left]
    if kept and parts and config.target_ratio is None and all(spectra[n].loss_spectrum is not None for n in chosen):
        ratio, note, tried = measured_size(layers, spectra, parts, config, kept, alignment, loss, left)
        if ratio is not None:
            if ratio == DENSE:
                why = UNRECOVERED if config.max_loss_increase is None else UNBOUNDED
                left = {name: why for name in layers if rank_by_hand(name, config) is None} | left
            config, notes = replace(config, target_ratio=ratio, max_loss_increase=None), [note]
    plan = plan_ranks(spectra, config, loss, left)
    plan.notes += [*notes, *_notes_of_run(layers, collector)]
    if flow is not None:
        plan = keep_faster(plan, flow, config.min_speedup, trial=trial)
    factors = _cut_all(parts, plan)
    if kept and factors and (before := kept.effect(layers, {}).loss):
        known = [effect for ranks, effect in tried if ranks == dict(plan) and effect.is_whole]
        after = (known[0] if known else kept.effect(layers, factors)).loss
        plan.notes.append(f"loss on the last {len(kept)} batches, without dropout: {before:.4g} -> {after or 0:.4g}")
    if keep == "all":
        for name in plan:
            if name not in factors:
                factors[name] = cut(decompose(dense_weight(layers[name])), plan[name])
    return plan, factors


def _notes_of_run(layers: Layers, collector: MomentCollector | None) -> list[str]:
    """What the steps before the switch had to do without."""
    far = "" if collector is None else said_of_far(layers, collector.far)
    return [told for told in (said_of_shapes(), far) if told]


def _decompose_all(
    layers: Layers,
    config: CuttlefishConfig,
    statistics: dict[str, Moments],
    initial: Mapping[str, float],
    keep: str,
    left: Collection[str],
) -> tuple[dict[str, LayerSpectrum], dict[str, Decomposition]]:
    """Spectra of all layers, and their decompositions up to break-even unless `keep` is "none"; `statistics` is used up.

    Of layers that are left dense nothing but the shape is asked for.
    """
    parts: dict[str, Decomposition] = {}
    if needs_no_weights(config, statistics):
        left = layers
    spectra = {name: _shape_alone(layers[name], initial.get(name)) for name in layers if name in left}
    if keep == "none":
        for name in layers:  # whole for one layer at a time
            if name not in left:
                moments = statistics.pop(name, None)
                spectra[name], _ = spectrum_of(name, layers[name], config, moments, initial.get(name))
        return {name: spectra[name] for name in layers}, parts
    wanted = {name: layer for name, layer in layers.items() if name not in left}
    for name, spectrum, d in spectra_of(wanted, config, statistics, initial):
        spectra[name] = spectrum
        most = max(break_even_rank(*kind_of(layers[name]).size[::-1]), rank_by_hand(name, config) or 1)
        weight = dense_weight(layers[name])
        exact = torch.promote_types(weight.dtype, torch.float32)
        parts[name] = d.shortened(min(most, *weight.shape[-2:]), exact)
        statistics.pop(name, None)
    return {name: spectra[name] for name in layers}, {name: parts[name] for name in layers if name in parts}


def _shape_alone(layer: nn.Module, initial: float | None) -> LayerSpectrum:
    kind = kind_of(layer)
    n_out, n_in = kind.size
    return LayerSpectrum(n_in, n_out, initial_stable_rank=initial, count=kind.count)


def _cut_all(parts: dict[str, Decomposition], plan: RankPlan) -> dict[str, Factors]:
    """The factors of all layers of the plan that have a decomposition, which is used up; on a GPU in batches of one shape."""
    batches: dict[object, list[str]] = {}
    for name in [name for name in plan if name in parts]:
        up, down = parts[name].up, parts[name].down
        alone = None if up.device.type == BATCHED_ON and up.ndim == 2 else name
        batches.setdefault((len(up), down.shape[-1], alone), []).append(name)
    found: dict[str, Factors] = {}
    for names in batches.values():
        most = max(1, BATCH_BYTES // (40 * max(parts[name].up.numel() + parts[name].down.numel() for name in names)))
        for i in range(0, len(names), most):
            some = names[i : i + most]
            ranks = [plan[name] for name in some]
            found |= zip(some, cut_together([parts.pop(name) for name in some], ranks), strict=True)
    return {name: found[name] for name in plan if name in found}


def share(
    layers: Layers, plan: RankPlan, factors: dict[str, Factors], shifted: list[str], processes: Processes
) -> dict[str, Factors]:
    """The main process's factors on all of them, sent layer by layer; `shifted` names the layers with a bias shift."""
    if processes.size == 1:
        return factors
    for name, rank in plan.items():
        weight = dense_weight(layers[name])
        exact = torch.promote_types(weight.dtype, torch.float32)
        *stack, m, n = weight.shape
        shapes: dict[str, tuple[int, ...]] = {"down": (*stack, rank, n), "up": (*stack, m, rank)}
        if name in shifted:
            shapes["bias_shift"] = (*stack, m)
        parts = {}
        for part, shape in shapes.items():
            parts[part] = torch.empty(shape, dtype=exact, device=weight.device)
            if processes.is_main:
                parts[part].copy_(getattr(factors[name], part))
            processes.broadcast_(parts[part])
        factors[name] = Factors(**parts)
    return factors


class Record(Edit):
    """The last edit of a switch: whoever asked for it hears of it. report: of the switch, set before it is applied."""

    report: FactorizationReport


def switch_in_place(
    engine: Engine,
    plan: RankPlan,
    factors: Mapping[str, Factors],
    config: CuttlefishConfig,
    scheduler: Any,
    record: Record,
    alignment: float | None = None,
) -> FactorizationReport:
    """Work the switch out, and make it on all processes or on none.

    Args:
        factors: as `choose` gives them. scheduler: that drives the optimizer, if any. record: hears of it.
        alignment: of the weights' travel, by which the learning rate is chosen where the config says none.
    """
    before, after = plan.parameters()
    with engine.processes.together():
        change, edits = engine.change(plan, factors, config.optimizer_state)
        scale = config.learning_rate_scale
        edits.append(learning_rate_edit(engine.optimizer, scheduler, scale, after / before, alignment))
        record.report = change.report
    return carry_out(change, [*edits, record], engine.processes)


class FactorsInTurn(Mapping[str, Factors]):
    """Factors of sharded weights: each layer's are worked out on the main process and sent when they are asked for.

    All processes must ask for the same layers in the same order. None of them ever holds more than one layer whole.
    """

    def __init__(self, engine: Engine, watch: Watch, plan: RankPlan, config: CuttlefishConfig) -> None:
        self._engine, self._layers, self._collector = engine, watch.layers, watch.moments
        self._plan, self._config = plan, config

    def __getitem__(self, name: str) -> Factors:
        """Raises ValueError, naming the layer and on all processes, for weights that are not finite."""
        processes = self._engine.processes
        processes.agree()  # one that has failed meanwhile would not answer
        mine: dict[str, Factors] = {}

        def work(layers: Layers) -> list[str]:
            moments = self._collector.moments_of(name) if self._collector is not None else None
            _, parts = spectrum_of(name, layers[name], self._config, moments, None)
            mine[name] = cut(parts, self._plan[name])
            return [name] if mine[name].bias_shift is not None else []

        shifted = self._engine.from_main(self._layers, work)
        one = RankPlan({name: self._plan.decisions[name]})
        return share(self._layers, one, mine, shifted, processes)[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would work the factors out
        return name in self._plan

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)
