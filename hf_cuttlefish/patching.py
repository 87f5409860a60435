"""Patch: the one place that changes a model. Dense layers become low-rank pairs and pairs become dense layers again."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import optimizer as optimizers
from .factorization import Factors, LayerMoments, cut, decompose
from .layers import DENSE_TYPES, LowRankLinear, check_rank, dense_origin, dense_weight
from .ranks import RankDecision, RankPlan
from .report import FactorizationReport, block_containers, count_parameters
from .selection import skipped_parameters
from .wrapper import check_not_wrapped

logger = logging.getLogger(__name__)

QUANT_METHOD = "cuttlefish"
STRUCTURE_VERSION = 1


def factorize(
    model: nn.Module,
    plan: Mapping[str, int],
    optimizer: Any = None,
    *,
    statistics: Mapping[str, LayerMoments] | None = None,
    factors: Mapping[str, Factors] | None = None,
    optimizer_state: str = "carry",
) -> FactorizationReport:
    """Replace each layer of `plan` by a LowRankLinear, in place, all or nothing.

    Modules, the optimizer's groups and state, and `model.config` change together; if anything fails before the end,
    nothing has changed. Bias Parameters stay the same objects. Forward and backward hooks of the layers stay in force.

    Args:
        model: the bare model (not wrapped by DDP or the like).
        plan: a RankPlan, or {module name: rank}. An explicit rank is obeyed, also above break-even.
        optimizer: the optimizer that trains the model, if any (Accelerate's wrapper is fine).
        statistics: moments of the layers; the factors are then the best ones in the metric of the loss, and the mean
            input's part goes into the bias. Plain SVD without.
        factors: ready-made factors of the layers instead.
        optimizer_state: "carry" or "reset".

    Returns:
        A report with parameter counts; `str(report)` is a table.

    Raises:
        TypeError: the plan is no mapping, or a named module is no nn.Linear or Conv1D.
        ValueError: an unknown, already factorized, tied, quantized or meta layer; a rank out of range; a plan written for
            another shape; weights that are not finite; an optimizer that does not hold the weights.
    """
    started = time.perf_counter()
    check_not_wrapped(model)
    layers = _validate(model, plan)
    if optimizer is not None:
        optimizers.check_holds(optimizer, {name: layer.weight for name, layer in layers.items()})
    before = _sizes(model, layers, plan)
    ready = dict(factors or {})
    for name, layer in layers.items():
        if name not in ready:
            try:
                ready[name] = cut(decompose(dense_weight(layer), (statistics or {}).get(name)), plan[name])
            except ValueError as error:
                raise ValueError(f"{name} cannot be factorized: {error}") from error
    for name, f in ready.items():
        if not all(bool(torch.isfinite(t).all()) for t in (f.down, f.up, f.bias_shift) if t is not None):
            raise ValueError(f"the factors of {name} hold NaN or Inf; the model is unchanged")
    pairs = {name: LowRankLinear.standing_for(layer, ready[name].down, ready[name].up) for name, layer in layers.items()}
    parameters = [
        optimizers.FactorParameters(
            name, layer.weight, pairs[name].down.weight, pairs[name].up.weight, dense_origin(layer) == "Conv1D"
        )
        for name, layer in layers.items()
    ]
    edit = None if optimizer is None else optimizers.prepare(optimizer, parameters, optimizer_state)
    factored = time.perf_counter()
    _commit(model, layers, pairs, ready, edit, parameters)
    rank_plan = plan if isinstance(plan, RankPlan) else _as_plan(plan, layers)
    after = _sizes(model, layers, plan)
    return FactorizationReport(
        rank_plan,
        *(size for b, a in zip(before, after, strict=True) for size in (b, a)),
        seconds={"factors": factored - started, "patch": time.perf_counter() - factored},
        optimizer="no optimizer" if edit is None else edit.summary,
        skipped=skipped_parameters(model),
    )


def merge(model: nn.Module) -> nn.Module:
    """Turn every LowRankLinear back into the dense class it came from, in place; returns the model.

    The bias Parameters stay the same objects, and the low-rank structure is removed from `model.config`.

    Raises:
        ValueError: the model has no factorized layer.
    """
    check_not_wrapped(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no factorized layer to merge")
    _swap(model, {id(layer): _keep_hooks(layer, layer.to_dense()) for layer in layers.values()})
    write_structure(model)
    return model


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The factorized layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def restructure(model: nn.Module, ranks: Mapping[str, int | None]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Give layers the structure that weights about to be loaded have: a rank, or None for dense. Their values are empty.

    Returns name -> (old module, new module), for an optimizer that has to follow.

    Raises:
        ValueError: a name that is no such layer, or a rank out of range; nothing is changed then.
    """
    modules = dict(model.named_modules())
    changes: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, rank in ranks.items():
        module = modules.get(name)
        if isinstance(module, LowRankLinear):
            if rank == module.rank:
                continue
            dense = module.to_dense()
            new = dense if rank is None else LowRankLinear.standing_for(dense, None, None, _checked(rank, dense, name))
            if rank is not None:
                new.up.bias = module.bias
        elif module is not None and type(module) in DENSE_TYPES.values():
            if rank is None:
                continue
            new = LowRankLinear.standing_for(module, None, None, _checked(rank, module, name))
        else:
            kind = "there is no such module" if module is None else f"it is a {type(module).__name__}"
            raise ValueError(f"the weights hold factors of {name!r}, but in this {type(model).__name__} {kind}")
        changes[name] = (module, _keep_hooks(module, new))
    _swap(model, {id(old): new for old, new in changes.values()})
    write_structure(model)
    return changes


def write_structure(model: nn.Module) -> None:
    """Note the ranks in `model.config`, where `from_pretrained` finds them; remove the note if no layer is factorized."""
    config = getattr(model, "config", None)
    if config is None or isinstance(config, dict):
        return
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    current = getattr(config, "quantization_config", None)
    if ranks:
        config.quantization_config = {"quant_method": QUANT_METHOD, "version": STRUCTURE_VERSION, "ranks": ranks}
    elif current is not None and _method_of(current) == QUANT_METHOD:
        del config.quantization_config


def _validate(model: nn.Module, plan: Mapping[str, int]) -> dict[str, nn.Module]:
    """The layers of the plan by name, each once. Raises before anything is touched (see `factorize`)."""
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must be a RankPlan or a dict {{module name: rank}}, got {type(plan).__name__}")
    if not plan:
        raise ValueError("the plan factorizes no layer: every target stays dense, so there is nothing to do")
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    chosen: dict[str, nn.Module] = {}
    seen: dict[int, str] = {}
    for name, rank in plan.items():
        module = modules.get(name)
        if module is None:
            close = difflib.get_close_matches(str(name), list(modules), n=3)
            raise ValueError(f"the plan names {name!r}, which is no module of {type(model).__name__}; close names: {close}")
        if isinstance(module, LowRankLinear):
            raise ValueError(f"{name} is already factorized (rank {module.rank}); merge(model) first to change its rank")
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and not weight.is_floating_point():
            raise ValueError(f"{name} is quantized ({weight.dtype}): only floating-point weights can be factorized")
        if type(module) not in DENSE_TYPES.values():
            raise TypeError(f"{name} is a {type(module).__name__}: only nn.Linear and Conv1D can be factorized")
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device: load its weights before factorizing it")
        out_features, in_features = dense_weight(module).shape
        check_rank(rank, in_features, out_features, name)
        decision = plan.decisions.get(name) if isinstance(plan, RankPlan) else None
        if decision is not None and (decision.in_features, decision.out_features) != (in_features, out_features):
            raise ValueError(
                f"the plan was written for another model: {name} is ({decision.out_features}, {decision.in_features}) there "
                f"and ({out_features}, {in_features}) here"
            )
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight holds NaN or Inf: the model is unchanged; look at the loss and the learning rate")
        if len(owners[id(weight)]) > 1:
            raise ValueError(f"{name}.weight is tied to another module: factorizing it would untie them; exclude it")
        if id(module) in seen:
            if plan[seen[id(module)]] != rank:
                raise ValueError(f"{seen[id(module)]} and {name} are one module, but the plan gives them different ranks")
            continue
        seen[id(module)] = name
        chosen[name] = module
    return chosen


def _commit(
    model: nn.Module,
    layers: dict[str, nn.Module],
    pairs: dict[str, LowRankLinear],
    factors: Mapping[str, Factors],
    edit: optimizers.OptimizerEdit | None,
    parameters: list[optimizers.FactorParameters],
) -> None:
    """Swap modules, optimizer and config; on any error put everything back and raise it."""
    held = set() if edit is None else {id(p) for g in edit.optimizer.param_groups for p in g["params"]}
    biases = {name: layer.bias.detach().clone() for name, layer in layers.items() if layer.bias is not None}
    config = getattr(model, "config", None)
    had = getattr(config, "quantization_config", None)
    grads = [(layer, layer.weight.grad) for layer in layers.values()]
    swapped = {id(layer): pairs[name] for name, layer in layers.items()}
    done: list[str] = []
    try:
        done.append("modules")
        _swap(model, swapped)
        with torch.no_grad():
            for name, layer in layers.items():
                _keep_hooks(layer, pairs[name])
                shift = factors[name].bias_shift
                if shift is not None and layer.bias is not None:
                    layer.bias.add_(shift.to(layer.bias))
                layer.weight.grad = None
        if edit is not None:
            done.append("optimizer")
            edit.apply()
            optimizers.check_in_step(model, edit.optimizer, held, parameters)
        done.append("config")
        write_structure(model)
    except BaseException:
        if "config" in done and config is not None:
            if had is not None:
                config.quantization_config = had
            elif hasattr(config, "quantization_config"):
                del config.quantization_config
        if "optimizer" in done and edit is not None:
            edit.undo()
        _swap(model, {id(pairs[name]): layer for name, layer in layers.items()})
        with torch.no_grad():
            for name, bias in biases.items():
                layers[name].bias.copy_(bias)
        for layer, grad in grads:
            layer.weight.grad = grad
        raise


def _swap(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Replace child modules by id, in every place where a module is registered."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                parent._modules[child_name] = new[id(child)]


def _keep_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    """Let `new` share the hook tables of `old`, so that hooks fire on and their handles still remove them."""
    for table in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        setattr(new, table, getattr(old, table))
    return new


def _sizes(model: nn.Module, layers: Mapping[str, Any], plan: Mapping[str, int]) -> tuple[int, int, int]:
    """Parameters of the whole model, of the decided layers' weights, of the containers of blocks."""
    names = plan.decisions if isinstance(plan, RankPlan) else layers
    targets = 0
    for module in {id(m): m for m in map(model.get_submodule, names)}.values():
        if isinstance(module, LowRankLinear):
            targets += module.down.weight.numel() + module.up.weight.numel()
        else:
            targets += module.weight.numel()
    return count_parameters(model), targets, count_parameters(model, block_containers(model, names))


def _as_plan(plan: Mapping[str, int], layers: Mapping[str, nn.Module]) -> RankPlan:
    decisions = {}
    for name, layer in layers.items():
        out_features, in_features = dense_weight(layer).shape
        decisions[name] = RankDecision(in_features, out_features, plan[name], "by hand")
    return RankPlan(decisions)


def _checked(rank: int, dense: nn.Module, name: str) -> int:
    out_features, in_features = dense_weight(dense).shape
    check_rank(rank, in_features, out_features, name)
    return rank


def _method_of(config: Any) -> Any:
    return config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)


def dense_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that could be factorized by class alone."""
    return ((n, m) for n, m in model.named_modules() if type(m) in DENSE_TYPES.values())
