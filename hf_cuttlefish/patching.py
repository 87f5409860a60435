"""Patch: the one place that changes a model. Dense layers become low-rank pairs and pairs become dense layers again."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import optimizer as optimizers
from .factorization import Factors, LayerMoments, cut, decompose
from .layers import (
    DENSE_TYPES,
    DenseLayer,
    LowRankLinear,
    check_layer,
    check_rank,
    dense_origin,
    dense_weight,
    is_quantized,
)
from .plan import RankDecision, RankPlan
from .profiling import slower_layers, time_inference
from .profiling import table as timing_table
from .redundancy import RedundantEdit
from .report import FactorizationReport, block_containers, count_parameters
from .selection import lost_when_saved, skipped_parameters
from .sharding import ShardedModel, part_like, whole
from .tensor_plan import find_root, place
from .wrapper import check_no_ddp, check_not_wrapped, repair_ddp

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
    sharded: ShardedModel | None = None,
    redundant: RedundantEdit | None = None,
    confirm: Callable[[], None] | None = None,
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
        factors: ready-made factors of the layers instead, asked for one layer after the other.
        optimizer_state: "carry" or "reset".
        sharded: the model as fully_shard holds it, if it does; all processes must call then (`Cuttlefish` gives one).
        redundant: the edit of a ZeroRedundancyOptimizer, if it is one; `confirm` then has to exchange its state (`Cuttlefish`
            gives one).
        confirm: called when everything has changed; what it raises puts everything back. It has to repair the wrapper
            and to hear that the other processes are as far, where there are any (`Cuttlefish` gives one).

    Returns:
        A report with parameter counts; `str(report)` is a table.

    Raises:
        TypeError: the plan is no mapping, a rank no whole number, or a named module no nn.Linear or Conv1D.
        ValueError: an unknown, already factorized, tied, quantized or meta layer; a rank out of range; a plan or
            factors made for another shape; weights that are not finite; an optimizer that does not hold the weights; a
            model whose config says that it is quantized; a model inside DDP, without `confirm`.
    """
    started = time.perf_counter()
    _check_model(model, sharded is not None)
    if confirm is None:
        check_no_ddp(model)
    layers = _validate(model, plan)
    _check_free(model)
    if optimizer is not None:
        optimizers.check_holds(optimizer, {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()})
    before = _sizes(model, layers, plan)
    pairs: dict[str, LowRankLinear] = {}
    shifts: dict[str, torch.Tensor | None] = {}
    for name, layer in layers.items():
        if name in (factors or {}):
            ready = cast(Mapping[str, Factors], factors)[name]
        else:
            try:
                ready = cut(decompose(dense_weight(layer), (statistics or {}).get(name)), plan[name])
            except ValueError as error:
                raise ValueError(f"{name} cannot be factorized: {error}") from error
        _check_factors(name, layer, ready, plan[name])
        pairs[name] = LowRankLinear.standing_for(layer, ready.down, ready.up)
        shifts[name] = ready.bias_shift
        if sharded is not None:
            sharded.place(layer, pairs[name])
    rank_plan = plan if isinstance(plan, RankPlan) else _as_plan(plan, layers)
    parameters = [_replacement(name, layer, pairs[name]) for name, layer in layers.items()]
    gather = whole if sharded is None else sharded.whole
    edit: optimizers.OptimizerEdit | RedundantEdit | None = redundant
    if redundant is not None:
        redundant.prepare(parameters, optimizer_state)
    elif optimizer is not None:
        edit = optimizers.prepare(optimizer, parameters, optimizer_state, gather)
    factored = time.perf_counter()
    skipped = skipped_parameters(model)
    reports: list[FactorizationReport] = []

    def settle() -> None:
        """All that may still fail, while everything can be put back."""
        after = _sizes(model, layers, plan)
        reports.append(
            FactorizationReport(
                rank_plan,
                *(before[0], after[0]),
                *(before[1], after[1]),
                *(before[2], after[2]),
                seconds={"factors": factored - started},
                optimizer="no optimizer" if edit is None else edit.summary,
                skipped=skipped,
            )
        )
        if confirm is not None:
            confirm()

    _commit(model, layers, pairs, shifts, edit, parameters, settle)
    reports[0].seconds["patch"] = time.perf_counter() - factored
    return reports[0]


def merge(model: nn.Module, where: str = "all", example_inputs: Any = None) -> nn.Module:
    """Turn LowRankLinears back into the dense class they came from, in place; returns the model.

    The bias Parameters stay the same objects, and merged layers are removed from the structure noted in `model.config`.

    Args:
        where: "all", or "slower": only the layers that are faster dense in inference. They are timed here, eagerly, on the
            device of `example_inputs` and at their shapes; a few milliseconds for each distinct shape and rank. The others
            stay pairs, and the model saves and loads like any factorized one. Times differ from process to process: where
            several hold replicas, let one merge and save.
        example_inputs: for "slower", what the model is served with: keyword arguments of its forward (as a tokenizer gives
            them), or a tensor or a tuple of positional ones.

    Raises:
        TypeError: example_inputs of another type.
        ValueError: the model has no factorized layer, factors that are quantized or hold an adapter; another `where`;
            "slower" without example_inputs or with inputs with which no factorized layer runs, "all" with some.
    """
    if where not in ("all", "slower"):
        raise ValueError(f"where is {where!r}: it must be 'all' or 'slower'")
    if (example_inputs is None) == (where == "slower"):
        raise ValueError(
            "where='slower' times the layers at the shapes that you serve: give a batch of them as example_inputs"
            if example_inputs is None
            else "example_inputs are used with where='slower' only: give both or neither"
        )
    if example_inputs is not None and not isinstance(example_inputs, (Mapping, tuple, list, torch.Tensor)):
        raise TypeError(
            "example_inputs must be keyword arguments of the model's forward, a tensor or a tuple of positional ones, got "
            f"{type(example_inputs).__name__}"
        )
    _check_model(model)
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no factorized layer to merge")
    if "" in layers:
        raise ValueError("this is a LowRankLinear and not a model that holds some: use layer.to_dense()")
    check_mergeable(layers)
    if where == "slower":
        layers = _slower(model, layers, example_inputs)
    _swap(model, {id(layer): _keep_hooks(layer, layer.to_dense()) for layer in layers.values()})
    write_structure(model)
    return model


def check_mergeable(layers: Mapping[str, LowRankLinear]) -> None:
    """Raises ValueError, naming the layer, for factors that are quantized or hold an adapter."""
    for name, layer in layers.items():
        for child in (layer.down, layer.up):
            if is_quantized(child.weight):
                raise ValueError(f"the factors of {name} are quantized, and have no product: merge before quantizing")
            if not isinstance(child, nn.Linear):
                raise ValueError(
                    f"a factor of {name} is a {type(child).__name__}, and what it adds would be lost: with PEFT call "
                    "merge_and_unload() first"
                )


def _slower(model: nn.Module, layers: Mapping[str, LowRankLinear], inputs: Any) -> dict[str, LowRankLinear]:
    """The layers that are faster dense, with a log line that says so."""
    rows = time_inference(model, inputs)
    if not rows:
        raise ValueError(
            f"no factorized layer of {type(model).__name__} runs with these example_inputs: they say nothing of its speed"
        )
    slower = set(slower_layers(rows))
    logger.info(
        "Cuttlefish: merged %d of %d factorized layers, the ones that are faster dense at these shapes (%d never ran and stay "
        "pairs). Forward times, dense -> pair:\n%s",
        len(slower),
        len(layers),
        len(layers) - len(rows),
        "\n".join(timing_table(rows)),
    )
    return {name: layer for name, layer in layers.items() if name in slower}


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The factorized layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def restructure(model: nn.Module, ranks: Mapping[str, int | None]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Give layers the structure that weights about to be loaded have: a rank, or None for dense. Values are to come.

    Returns name -> (old module, new module), for an optimizer that has to follow.

    Raises:
        ValueError: a name that is no such layer, or a rank out of range; nothing is changed then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    changes: dict[str, tuple[nn.Module, nn.Module]] = {}
    new_of: dict[int, nn.Module] = {}
    for name, rank in ranks.items():
        module = modules.get(name)
        new: nn.Module
        if isinstance(module, LowRankLinear):
            if rank == module.rank or id(module) in new_of:
                continue
            dense = module.to_dense()
            new = dense if rank is None else LowRankLinear.standing_for(dense, None, None, _checked(rank, dense, name))
        elif isinstance(module, DenseLayer) and type(module) in DENSE_TYPES.values():
            if rank is None or id(module) in new_of:
                continue
            new = LowRankLinear.standing_for(module, None, None, _checked(rank, module, name))
        else:
            kind = "there is no such module" if module is None else f"it is a {type(module).__name__}"
            raise ValueError(f"the weights hold factors of {name!r}, but in this {type(model).__name__} {kind}")
        new_of[id(module)] = new
        changes[name] = (module, new)
    for old, changed in changes.values():
        _keep_hooks(old, changed)
    _place(model, changes)
    _swap(model, new_of)
    write_structure(model)
    if changes:
        repair_ddp(model)
    return changes


def _place(model: nn.Module, changes: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
    """Divide the new layers of a tensor-parallel model as the old ones are."""
    root = find_root(model) if changes else None
    if root is None:
        return
    for name, (old, new) in changes.items():
        if not isinstance(new, LowRankLinear) or isinstance(old, LowRankLinear):
            raise ValueError(
                f"{name} is factorized at another rank than the weights to be loaded, or they are dense, and its factors are "
                "divided by tensor parallelism: load these weights with from_pretrained"
            )
    for name, (old, new) in changes.items():
        place(root, name, old, cast(LowRankLinear, new))


def write_structure(model: nn.Module) -> None:
    """Note the ranks in `model.config`, where `from_pretrained` finds them; remove the note if no layer is factorized.

    Models inside the model that have a config of their own (CLIP's text model) get theirs, so that they load alone too.
    """
    for prefix, config in _configs(model):
        layers = low_rank_layers(model.get_submodule(prefix))
        if layers:
            ranks = {name: layer.rank for name, layer in layers.items()}
            config.quantization_config = {"quant_method": QUANT_METHOD, "version": STRUCTURE_VERSION, "ranks": ranks}
        elif _method_of(getattr(config, "quantization_config", None)) == QUANT_METHOD:
            del config.quantization_config


def _configs(model: nn.Module) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The config of the model and of each model inside it, with the name of the module that it describes, each once.

    PEFT's and sentence-transformers' models hand out the config of the model inside them, whose names it has to hold.
    """
    seen: set[int] = set()
    inside = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    for name, module in [*inside, ("", model)]:
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield name, config


def _check_model(model: nn.Module, sharded: bool = False) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_not_wrapped(model, sharded)


def _check_free(model: nn.Module) -> None:
    for _, config in _configs(model):
        note = getattr(config, "quantization_config", None)
        if note is not None and _method_of(note) != QUANT_METHOD:
            raise ValueError(
                f"the model is quantized ({_method_of(note)!s}), and its config has room for one structure: "
                "factorize it before it is quantized"
            )


def _check_factors(name: str, layer: DenseLayer, factors: Factors, rank: int) -> None:
    m, n = dense_weight(layer).shape
    if factors.down.shape != (rank, n) or factors.up.shape != (m, rank):
        raise ValueError(
            f"the factors of {name} have the shapes {tuple(factors.up.shape)} and {tuple(factors.down.shape)}: "
            f"rank {rank} of a layer of shape {(m, n)} needs {(m, rank)} and {(rank, n)}"
        )
    parts = [t for t in (factors.down, factors.up, factors.bias_shift) if t is not None]
    if not all(bool(torch.isfinite(t.to(layer.weight.dtype)).all()) for t in parts):
        raise ValueError(f"the factors of {name} hold NaN or Inf; the model is unchanged")


def _validate(model: nn.Module, plan: Mapping[str, int]) -> dict[str, DenseLayer]:
    """The layers of the plan by name, each once. Raises before anything is touched (see `factorize`)."""
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must be a RankPlan or a dict {{module name: rank}}, got {type(plan).__name__}")
    if not plan:
        raise ValueError("the plan factorizes no layer: every target stays dense, so there is nothing to do")
    modules = dict(model.named_modules(remove_duplicate=False))
    decisions = plan.decisions if isinstance(plan, RankPlan) else {}
    for name in [*plan, *decisions]:
        if name not in modules:
            close = difflib.get_close_matches(str(name), list(modules), n=3)
            raise ValueError(
                f"the plan names {name!r}, which is no module of {type(model).__name__}; close names: {close}"
            )
    owners: dict[int, set[int]] = {}
    inner: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
        if isinstance(module, LowRankLinear):
            inner |= {id(module): name, id(module.down): name, id(module.up): name}
    chosen: dict[str, DenseLayer] = {}
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
        check_layer(module, name)
        out_features, in_features = dense_weight(module).shape
        check_rank(rank, in_features, out_features, name)
        decision = decisions.get(name)
        if decision is not None and (decision.in_features, decision.out_features) != (in_features, out_features):
            raise ValueError(
                f"the plan was written for another model: {name} is ({decision.out_features}, {decision.in_features}) "
                f"there and ({out_features}, {in_features}) here"
            )
        for part in ("weight", "bias"):
            if len(owners.get(id(getattr(module, part)), ())) > 1:
                raise ValueError(f"{name}.{part} is tied to another module, which would change with it: exclude it")
        if id(module) in seen:
            if plan[seen[id(module)]] != rank:
                raise ValueError(
                    f"{seen[id(module)]} and {name} are one module, but the plan gives them different ranks"
                )
            continue
        seen[id(module)] = name
        chosen[name] = cast(DenseLayer, module)
    if lost := lost_when_saved(model, chosen):
        raise ValueError(
            f"transformers stores {lost[0]} in another layout or under another name than it has in {type(model).__name__}, and "
            "its factors would be lost by save_pretrained: leave it out of the plan"
        )
    return chosen


def _commit(
    model: nn.Module,
    layers: Mapping[str, DenseLayer],
    pairs: dict[str, LowRankLinear],
    shifts: Mapping[str, torch.Tensor | None],
    edit: optimizers.OptimizerEdit | RedundantEdit | None,
    parameters: list[optimizers.FactorParameters],
    confirm: Callable[[], None] | None,
) -> None:
    """Swap modules, optimizer and config; on any error put everything back and raise it."""
    held = set() if edit is None else {id(p) for g in edit.optimizer.param_groups for p in g["params"]}
    biases = {name: layer.bias.detach().clone() for name, layer in layers.items() if layer.bias is not None}
    grads = [(layer, layer.weight.grad) for layer in layers.values()]
    notes = [(config, getattr(config, "quantization_config", None)) for _, config in _configs(model)]
    swapped = {id(layer): pairs[name] for name, layer in layers.items()}
    optimizer_touched = False
    try:
        _swap(model, swapped)
        with torch.no_grad():
            for name, layer in layers.items():
                _keep_hooks(layer, pairs[name])
                shift = shifts[name]
                if shift is not None and layer.bias is not None:
                    layer.bias.add_(part_like(shift.to(layer.bias.device, layer.bias.dtype), layer.bias))
                layer.weight.grad = None
        if edit is not None:
            optimizer_touched = True
            edit.apply()
            optimizers.check_in_step(model, edit.optimizer, held, parameters)
        write_structure(model)
        if confirm is not None:
            confirm()
    except BaseException:
        _swap(model, {id(pairs[name]): layer for name, layer in layers.items()})
        with torch.no_grad():
            for name, bias in biases.items():
                layers[name].bias.copy_(bias)
        for layer, grad in grads:
            layer.weight.grad = grad
        for config, note in notes:
            if note is not None:
                config.quantization_config = note
            elif hasattr(config, "quantization_config"):
                del config.quantization_config
        if edit is not None and optimizer_touched:
            edit.undo()
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
        "_is_full_backward_hook",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        setattr(new, table, getattr(old, table))
    return new


def _replacement(name: str, layer: DenseLayer, pair: Any) -> optimizers.FactorParameters:
    weight: Any = layer.weight
    return optimizers.FactorParameters(
        name, weight, pair.down.weight, pair.up.weight, transposed=dense_origin(layer) == "Conv1D"
    )


def _sizes(model: nn.Module, layers: Mapping[str, Any], plan: Mapping[str, int]) -> tuple[int, int, int]:
    """Parameters of the whole model, of the decided layers' weights, of the containers of blocks."""
    names = plan.decisions if isinstance(plan, RankPlan) else layers
    targets = 0
    for module in {id(m): m for m in map(model.get_submodule, names)}.values():
        if isinstance(module, LowRankLinear):
            targets += module.down.weight.numel() + module.up.weight.numel()
        else:
            targets += dense_weight(module).numel()
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
