"""Start: find the engine and the target layers, refuse what would go wrong, and see that all processes are alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import CuttlefishConfig
from ..decide.targets import find_targets, is_part
from ..layers.dense import is_meta
from ..layers.kinds import kind_of
from ..layers.low_rank import low_rank_layers
from ..patch.structure import check_free
from ..processes import Processes
from .base import Engine
from .find import find_engine

logger = logging.getLogger(__name__)


def start(
    model: nn.Module,
    optimizer: Any,
    config: CuttlefishConfig,
    total_steps: int,
    scheduler: Any = None,
    can_restart: bool = False,
) -> tuple[Engine, dict[str, nn.Module]]:
    """The engine that trains a model, and its target layers by name; none where it is factorized already.

        engine, layers = start(model, optimizer, CuttlefishConfig(), total_steps=300)

    Raises:
        TypeError, ValueError, RuntimeError: what would make the switch fail, found on one process and raised on all.
    """
    engine, layers, error = None, {}, None
    processes = Processes()
    try:
        engine = find_engine(model, optimizer, can_restart)
        processes = engine.processes
        if not low_rank_layers(engine.model):  # else nothing will be changed, so anything is fine
            layers = _targets(engine, config)
            engine.check(layers, config, can_restart)
            if config.learning_rate_scale != 1:
                _check_rate(engine, scheduler, config.learning_rate_scale)
    except Exception as caught:
        error = caught
    processes.agree(error)
    processes.check_alike(_facts(engine, layers, config, total_steps) if engine is not None else {})
    if engine is not None and layers:
        engine.check_replicas("at the start")
    return engine or Engine(model, optimizer), layers


def _check_rate(engine: Engine, scheduler: Any, scale: float | None) -> None:
    """Raises TypeError, ValueError for a scale that could not be carried out; of a suggested one a restart says so."""
    try:
        engine.check_rate(scheduler)
    except (TypeError, ValueError) as error:
        if scale is not None:
            raise
        if engine.fixed and engine.processes.is_main:
            logger.info("Cuttlefish: the switch will leave the learning rate as it is: %s.", error)


def _targets(engine: Engine, config: CuttlefishConfig) -> dict[str, nn.Module]:
    check_free(engine.model)
    layers: dict[str, nn.Module] = dict(find_targets(engine.model, config))
    if not engine.takes_parts:
        layers = _without_parts(engine, config, layers)
    for name, layer in layers.items():
        if kind_of(layer).is_vocabulary and not engine.takes_vocabulary:
            raise ValueError(
                f"embeddings=True, which takes {name}, is not supported under {type(engine).__name__}: use DDP or one process, or "
                "leave embeddings out"
            )
        if is_meta(layer):
            raise ValueError(f"{name} is on the meta device: load the weights before training")
    return layers


def _without_parts(engine: Engine, config: CuttlefishConfig, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that are modules of their own; raises ValueError where the user has named others, or none are left."""
    parts = [name for name, layer in layers.items() if is_part(layer)]
    if parts and (config.names_targets or len(parts) == len(layers)):
        raise ValueError(
            f"{parts[0]} is a stack of experts, and their switch is not supported under {type(engine).__name__}: use FSDP2 or DDP, or "
            "leave the experts out of target_modules"
        )
    return {name: layer for name, layer in layers.items() if name not in parts}


def _facts(engine: Engine, layers: Mapping[str, nn.Module], config: CuttlefishConfig, total: int) -> dict[str, Any]:
    """What all processes must have alike."""
    return {
        "model": [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in engine.model.named_parameters()],
        "target layers": list(layers),
        "config": config.to_dict(),
        "total_steps": total,
        "the engine around the model": type(engine).__name__,
    }
