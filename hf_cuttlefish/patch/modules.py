"""Patch: dense layers become low-rank pairs, in place, all or nothing. A change is worked out first, and then made."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..decide.plan import RankDecision, RankPlan
from ..decide.stored import lost_when_saved
from ..decide.targets import skipped_parameters
from ..layers.dense import bias_of, check_rank
from ..layers.kinds import check_layer, dense_weight, find_layers, kind_of, layer_at
from ..layers.low_rank import LowRankLayer, low_rank_layers
from ..layers.parts import numel, part_like, shape_of, whole
from ..layers.sizes import block_containers, count_parameters
from ..maths.factors import Factors, Moments, cut, decompose
from ..processes import Processes
from .edits import Edit, commit
from .exchange import Exchange
from .factor_state import FactorParameters
from .optimizer import CheckParameters, SwapParameters, check_holds
from .report import FactorizationReport
from .structure import NoteStructure, check_free
from .weight_hooks import say_lost


@dataclass
class Change:
    """A switch that is worked out and not made: the pairs that take the layers' places, and what it will come to.

    Attributes:
        model: bare. optimizer: that trains it, or None. optimizer_state: "carry" or "reset".
        plan: with the numbers behind each rank. layers: name -> dense layer, each once. pairs: name -> what stands for it.
        shifts: name -> what is added to the bias, or None. report: sizes before and after.
        gather: gives the whole of a tensor of which the processes hold parts.
    """

    model: nn.Module
    optimizer: Any
    optimizer_state: str
    plan: RankPlan
    layers: dict[str, nn.Module]
    pairs: dict[str, LowRankLayer]
    shifts: dict[str, torch.Tensor | None]
    report: FactorizationReport
    gather: Callable[[torch.Tensor], torch.Tensor] = whole

    @property
    def parameters(self) -> list[FactorParameters]:
        """Each weight with the two that take its place, in the order of the plan."""
        return [
            FactorParameters(
                name,
                cast(nn.Parameter, layer.weight),
                *self.pairs[name].factors,
                layout=kind_of(layer),
                behind=self._beside(name, layer),
            )
            for name, layer in self.layers.items()
        ]

    def _beside(self, name: str, layer: nn.Module) -> tuple[nn.Parameter, ...]:
        """Where the weight is a parameter of a larger module: the parameters that this one keeps."""
        if isinstance(kind_of(layer).seat, nn.Module):
            return ()
        owner, gone = self.model.get_submodule(name.rpartition(".")[0]), {id(la.weight) for la in self.layers.values()}
        return tuple(p for p in owner._parameters.values() if p is not None and id(p) not in gone)

    def edits(self, swap: Edit | None = None) -> list[Edit]:
        """What makes the change of model, optimizer and config. swap: the edit of the optimizer, where it is of its own kind."""
        edits: list[Edit] = [SwapModules(self)]
        if self.optimizer is not None:
            pairs = self.parameters
            edits.append(swap or SwapParameters(self.optimizer, pairs, self.optimizer_state, self.gather))
            edits.append(CheckParameters(self.model, self.optimizer, pairs))
        return [*edits, NoteStructure(self.model)]


def make_change(
    model: nn.Module,
    plan: Mapping[str, int],
    optimizer: Any = None,
    *,
    statistics: Mapping[str, Moments] | None = None,
    factors: Mapping[str, Factors] | None = None,
    optimizer_state: str = "carry",
    place: Callable[[nn.Module, LowRankLayer], None] | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] = whole,
) -> Change:
    """Work a switch out; nothing is changed.

    Args:
        model: bare. plan: a RankPlan, or {module name: rank}. optimizer: that trains the model, if any.
        statistics: moments of the layers; plain SVD without.
        factors: ready-made ones instead, asked for one layer after the other.
        place: called with each layer and its pair as soon as that is made, so that it can be sharded before the next one.
        gather: see `Change`.

    Raises: as `factorize`.
    """
    started = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = _validate(model, plan)
    check_free(model)
    if optimizer is not None:
        check_holds(optimizer, {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()})
    pairs: dict[str, LowRankLayer] = {}
    shifts: dict[str, torch.Tensor | None] = {}
    # One layer at a time, so that no more than one need be whole.
    for name, layer in layers.items():
        if name in (factors or {}):
            ready = cast(Mapping[str, Factors], factors)[name]
        else:
            try:
                ready = cut(decompose(dense_weight(layer), (statistics or {}).get(name)), plan[name])
            except ValueError as error:
                raise ValueError(f"{name} cannot be factorized: {error}") from error
        _check_factors(name, layer, ready, plan[name])
        pairs[name] = kind_of(layer).stand_in(ready.down, ready.up)
        shifts[name] = ready.bias_shift
        if place is not None:
            place(layer, pairs[name])
    rank_plan = plan if isinstance(plan, RankPlan) else _as_plan(plan, layers)
    report = _report(model, rank_plan, layers)
    report.seconds["factors"] = time.perf_counter() - started
    return Change(model, optimizer, optimizer_state, rank_plan, layers, pairs, shifts, report, gather)


def carry_out(change: Change, edits: list[Edit], processes: Processes) -> FactorizationReport:
    """Make the edits of a change on all processes, or none on any; returns its report, completed.

    Raises: as `commit`.
    """
    started = time.perf_counter()
    commit(edits, processes)
    change.report.optimizer = "; ".join(edit.summary for edit in edits if edit.summary) or "no optimizer"
    change.report.seconds["patch"] = time.perf_counter() - started
    return change.report


class SwapModules(Edit):
    """The pairs take the layers' places, with their hooks; what the mean input did goes into the biases, or the norms behind.

    Bias Parameters stay the same objects.
    """

    def __init__(self, change: Change) -> None:
        self.change = change
        self._biases = {
            n: bias.detach().clone() for n, la in change.layers.items() if (bias := bias_of(la)) is not None
        }
        self._means = [
            (mean, mean.clone())
            for layer in change.layers.values()
            if bias_of(layer) is None and (mean := _running_mean(layer)) is not None
        ]
        self._grads = [(layer, layer.weight.grad) for layer in change.layers.values()]
        self._exchange = Exchange(change.model, change.layers, change.pairs)

    @torch.no_grad()
    def apply(self) -> None:
        change = self.change
        self._exchange.put()
        for name, layer in change.layers.items():
            shift = change.shifts[name]
            bias = bias_of(layer)
            mean = _running_mean(layer)
            if shift is not None and bias is None and mean is not None:
                mean.sub_(shift.reshape(-1).to(mean))
            if shift is not None and bias is not None:
                bias.add_(part_like(shift.reshape(shape_of(bias)).to(bias.device, bias.dtype), bias))
            layer.weight.grad = None

    @torch.no_grad()
    def undo(self) -> None:
        change = self.change
        self._exchange.take_back()
        for name, bias in self._biases.items():
            cast(nn.Parameter, bias_of(change.layers[name])).copy_(bias)
        for mean, value in self._means:
            mean.copy_(value)
        for layer, grad in self._grads:
            layer.weight.grad = grad

    def finish(self) -> None:
        say_lost(self.change.layers, self.change.optimizer)


def _running_mean(layer: nn.Module) -> torch.Tensor | None:
    """Of the batch norm behind a layer: taking a constant away there is what adding it to a bias would do."""
    return cast("torch.Tensor | None", getattr(kind_of(layer).norm, "running_mean", None))


def _check_factors(name: str, layer: nn.Module, factors: Factors, rank: int) -> None:
    *stack, m, n = dense_weight(layer).shape
    up, down = (*stack, m, rank), (*stack, rank, n)
    if factors.down.shape != down or factors.up.shape != up:
        raise ValueError(
            f"the factors of {name} have the shapes {tuple(factors.up.shape)} and {tuple(factors.down.shape)}: "
            f"rank {rank} of a layer of shape {(*stack, m, n)} needs {up} and {down}"
        )
    parts = [t for t in (factors.down, factors.up, factors.bias_shift) if t is not None]
    if not all(bool(torch.isfinite(t.to(dense_weight(layer).dtype)).all()) for t in parts):
        raise ValueError(f"the factors of {name} hold NaN or Inf; the model is unchanged")


def _validate(model: nn.Module, plan: Mapping[str, int]) -> dict[str, nn.Module]:
    """The layers of the plan by name, each once. Raises before anything is touched (see `make_change`)."""
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must be a RankPlan or a dict {{module name: rank}}, got {type(plan).__name__}")
    if not plan:
        raise ValueError("the plan factorizes no layer: every target stays dense, so there is nothing to do")
    modules = dict(model.named_modules(remove_duplicate=False)) | dict(find_layers(model, remove_duplicate=False))
    decisions = plan.decisions if isinstance(plan, RankPlan) else {}
    for name in [*plan, *decisions]:
        if name not in modules:
            close = difflib.get_close_matches(str(name), list(modules), n=3)
            hint = f"close names: {', '.join(close)}" if close else "look at model.named_modules() for its names"
            raise ValueError(f"the plan names {name!r}, which is no module of {type(model).__name__}; {hint}")
    owners, inner = _owners(model)
    chosen: dict[str, nn.Module] = {}
    seen: dict[int, str] = {}
    for name, rank in plan.items():
        module = modules[name]
        if id(module) in inner:
            rank = low_rank_layers(model)[inner[id(module)]].rank
            raise ValueError(
                f"{inner[id(module)]} is already factorized (rank {rank}); merge(model) first to change its rank"
            )
        if module is model:
            raise ValueError(
                "the model is itself a layer, and cannot be replaced in place: use LowRankLinear.from_linear(layer)"
            )
        _check_target(model, name, module, rank, decisions.get(name), owners)
        if (at := id(kind_of(module).seat)) in seen:
            if plan[seen[at]] != rank:
                raise ValueError(f"{seen[at]} and {name} are one module, but the plan gives them different ranks")
            continue
        seen[at] = name
        chosen[name] = module
    if lost := lost_when_saved(model, chosen):
        raise ValueError(
            f"transformers stores {lost[0]} in another layout or under another name than it has in {type(model).__name__}, and "
            "its factors would be lost by save_pretrained: leave it out of the plan"
        )
    return chosen


def _owners(model: nn.Module) -> tuple[dict[int, set[int]], dict[int, str]]:
    """Which modules hold each parameter (by ids), and the factorized layer that a module is, or is a factor of."""
    owners: dict[int, set[int]] = {}
    inner: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
        if isinstance(module, LowRankLayer):
            inner |= {id(module): name, id(module.down): name, id(module.up): name}
    return owners, inner


def _check_target(
    model: nn.Module,
    name: str,
    module: nn.Module,
    rank: int,
    decision: RankDecision | None,
    owners: Mapping[int, set[int]],
) -> None:
    """Raises unless this layer can be factorized at this rank, by itself."""
    check_layer(module, name)
    kind = kind_of(module)
    out_features, in_features = kind.size
    check_rank(rank, in_features, out_features, name)
    here = (in_features, out_features, kind.count)
    if decision is not None and (decision.in_features, decision.out_features, decision.count) != here:
        there = (decision.out_features, decision.in_features)
        stacks = f" ({decision.count} and {kind.count} of them)" if decision.count != kind.count else ""
        raise ValueError(
            f"the plan was written for another model: {name} is {there} there and {(out_features, in_features)} here{stacks}"
        )
    follows = {id(m) for m in kind.tied(model)}
    for part in ("weight", "bias"):
        if len(owners.get(id(getattr(module, part, None)), set()) - follows) > 1:
            raise ValueError(f"{name}.{part} is tied to another module, which would change with it: exclude it")


def _report(model: nn.Module, plan: RankPlan, layers: Mapping[str, nn.Module]) -> FactorizationReport:
    """Sizes before, and after: each weight of the plan gives way to its two factors."""
    found = {name: layer_at(model, name) or model.get_submodule(name) for name in plan.decisions}
    decided = {id(kind_of(m).seat): m for m in found.values()}.values()
    # The vocabulary lies outside the blocks.
    tables = {kind_of(m).size for m in decided if kind_of(m).is_vocabulary}
    inside = [n for n, m in found.items() if not {kind_of(m).size, kind_of(m).size[::-1]} & tables] or list(found)
    saved = saved_inside = saved_bytes = looked_up = still_looked_up = 0
    for name, layer in layers.items():
        kind, weight = kind_of(layer), cast(torch.Tensor, layer.weight)
        fewer = numel(weight) - plan[name] * sum(kind.size) * kind.count
        saved, saved_bytes = saved + fewer, saved_bytes + fewer * weight.element_size()
        saved_inside += fewer if name in inside else 0
        if kind.is_vocabulary and all(kind_of(other).is_vocabulary for other in kind.tied(model)):
            looked_up, still_looked_up = looked_up + numel(weight), still_looked_up + plan[name] * kind.size[1]
    total, size = count_parameters(model), sum(numel(p) * p.element_size() for p in model.parameters())
    targets = sum(
        sum(f.numel() for f in m.factors) if isinstance(m, LowRankLayer) else dense_weight(m).numel() for m in decided
    )
    blocks = count_parameters(model, block_containers(model, dict.fromkeys(inside)))
    skipped = {name: size for name, size in skipped_parameters(model).items() if name not in layers}
    return FactorizationReport(
        plan,
        *(total, total - saved, targets, targets - saved, blocks, blocks - saved_inside),
        *(size, size - saved_bytes, looked_up, still_looked_up),
        on_maps=any(kind_of(layer).has_maps for layer in layers.values()),
        skipped=skipped,
    )


def _as_plan(plan: Mapping[str, int], layers: Mapping[str, nn.Module]) -> RankPlan:
    decisions = {}
    for name, layer in layers.items():
        kind = kind_of(layer)
        out_features, in_features = kind.size
        decisions[name] = RankDecision(in_features, out_features, plan[name], "by hand", count=kind.count)
    return RankPlan(decisions)
