"""By itself: low-rank steps become CUDA graphs without being asked for, where nothing but known code runs in a step."""

from __future__ import annotations

import functools
import logging
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks_of_all
from transformers import Trainer

from ..config import CuttlefishConfig
from ..layers.low_rank import low_rank_layers
from ..measure.eager import has_compiled
from .graphs import GraphedTrainer

logger = logging.getLogger(__name__)

KNOWN = ("torch", "transformers", "hf_cuttlefish")
"""Packages whose modules do the same in each step."""
OWN = ("training_step", "compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager", "_prepare_inputs",
       "_prepare_input", "_clip_grad_norm", "floating_point_ops")  # fmt: skip
"""Methods of a Trainer that make up a step."""
FUNCTIONS = (FunctionType, MethodType, functools.partial)
"""What may stand among the attributes of a module as a part of its forward: a loss, an activation."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def graphs_by_itself(trainer: Trainer, config: CuttlefishConfig) -> GraphedTrainer | None:
    """For the steps after the switch, if they suit; not started yet.

        graphs = graphs_by_itself(trainer, config)  # None on a CPU

    A graph repeats what kernels did, and nothing that Python did beside them. So only what is known to do nothing beside is taken: an
    uncompiled model of transformers' and torch's own modules without hooks, in a Trainer whose step is transformers' own.
    """
    if config.objective != "size" or has_compiled() or _is_of_a_user(trainer):
        return None
    try:
        graphs = GraphedTrainer(trainer)
    except ValueError:
        return None
    if not low_rank_layers(graphs.model) or _has_unknown(graphs.model):
        return None
    graphs.step.careful, graphs.step.level = True, logging.INFO
    logger.info(
        "Cuttlefish: low-rank steps run as CUDA graphs, one for each shape of batch, so that the host holds up nothing. Batches of one "
        "length gain most. CuttlefishCallback(cuda_graphs=True) does it with dense steps too, cuda_graphs=False with none."
    )
    return graphs


def _is_of_a_user(trainer: Any) -> bool:
    """Whether somebody else's code makes up the step, compiles it, or carries something from one step to the next."""
    if any(n in vars(trainer) or not _is_trainers(trainer, n) for n in OWN):
        return True
    parts = trainer.compute_loss_func, trainer.label_smoother
    given = any(part is not None and not _is_known(type(part).__module__) for part in parts)
    return given or trainer.args.torch_compile or getattr(trainer.args, "past_index", -1) >= 0


def _is_trainers(trainer: Any, name: str) -> bool:
    """Whether a method is the one that transformers has written; older and newer versions lack some."""
    method = getattr(type(trainer), name, None)
    return method is getattr(Trainer, name, None) and (method is None or _is_known(method.__module__))


def _has_unknown(model: nn.Module) -> bool:
    """Whether a module, a hook or a replaced forward may do something beside launching kernels."""
    if any(getattr(hooks_of_all, f"_global{name}", None) for name in HOOKS):
        return True
    return any(_is_unknown(module, module is model) for module in model.modules())


def _is_unknown(module: nn.Module, is_root: bool) -> bool:
    state, kind = module.__dict__, type(module)
    if not (_is_known(kind.__module__) and _is_known(kind.forward.__module__)) or state.get("gradient_checkpointing"):
        return True
    if "forward" in state:  # Accelerate wraps that of the whole model in autocast
        wrapped = getattr(state.get("_original_forward"), "__func__", None) if is_root else None
        if wrapped is not kind.forward:
            return True
    functions = [value for name, value in state.items() if name != "forward" and isinstance(value, FUNCTIONS)]
    if not all(_is_known(getattr(function, "func", function).__module__) for function in functions):
        return True
    parameters = state["_parameters"].values()
    return any(state.get(name) for name in HOOKS) or any(p is not None and p._backward_hooks for p in parameters)


def _is_known(package: Any) -> bool:
    return str(package).partition(".")[0] in KNOWN
