"""By itself: low-rank steps become CUDA graphs without being asked for, where nothing but known code runs in a step."""

from __future__ import annotations

import functools
import logging
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks_of_all
from transformers import Trainer, modeling_utils

from ..config import CuttlefishConfig
from ..layers.low_rank import low_rank_layers
from ..measure.eager import has_compiled
from ..patch.graph_stamp import HOOKS
from .graphs import GraphedTrainer

logger = logging.getLogger(__name__)

KNOWN = ("torch", "transformers", "hf_cuttlefish")
"""Packages whose modules do the same in each step."""
OWN = ("training_step", "compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager", "_prepare_inputs",
       "_prepare_input", "_prepare_context_parallel_inputs", "_clip_grad_norm", "floating_point_ops")  # fmt: skip
"""Methods of a Trainer that make up a step."""
OF_ACCELERATOR = ("backward", "clip_grad_norm_", "autocast")


def graphs_by_itself(trainer: Trainer, config: CuttlefishConfig) -> GraphedTrainer | None:
    """For the steps after the switch, if they suit; not started yet.

        graphs = graphs_by_itself(trainer, config)  # None on a CPU

    A graph repeats what kernels did, and nothing that Python did beside them. So only what is known to do nothing beside is taken: an
    uncompiled model of transformers' and torch's own modules without hooks, in a Trainer whose step is transformers' own. That is
    asked again before each recording.
    """
    if config.objective != "size" or has_compiled():
        return None
    try:
        graphs = GraphedTrainer(trainer)
    except ValueError:
        return None
    if not low_rank_layers(graphs.model) or not suits(trainer, graphs.model):
        return None
    graphs.step.careful, graphs.step.level = True, logging.INFO
    graphs.step.suits = lambda: suits(trainer, graphs.model)
    logger.info(
        "Cuttlefish: low-rank steps run as CUDA graphs, one for each shape of batch, so that the host holds up nothing. Batches of one "
        "length gain most. CuttlefishCallback(cuda_graphs=True) does it with dense steps too, cuda_graphs=False with none."
    )
    return graphs


def suits(trainer: Trainer, model: nn.Module) -> bool:
    """Whether nothing but known code makes up a step of this Trainer and model."""
    return not _is_of_a_user(trainer) and trainer.model_wrapped is model and not _has_unknown(model)


def _is_of_a_user(trainer: Any) -> bool:
    """Whether somebody else's code makes up the step, compiles it, or carries something from one step to the next."""
    accelerator = trainer.accelerator
    if not all(_is_trainers(trainer, n) for n in OWN) or not type(accelerator).__module__.startswith("accelerate."):
        return True
    if any(n in vars(accelerator) and not _is_ours(vars(accelerator)[n]) for n in OF_ACCELERATOR):
        return True
    parts = trainer.compute_loss_func, trainer.label_smoother
    given = any(part is not None and not _is_known(type(part)) for part in parts)
    return given or trainer.args.torch_compile or getattr(trainer.args, "past_index", -1) >= 0


def _is_trainers(trainer: Any, name: str) -> bool:
    """Whether a method is the one that transformers has written, or ours; older and newer versions lack some."""
    if name in vars(trainer) and not _is_ours(vars(trainer)[name]):
        return False
    method = getattr(type(trainer), name, None)
    return method is getattr(Trainer, name, None) and (method is None or _is_known(method))


def _is_ours(method: Any) -> bool:
    return isinstance(getattr(method, "__self__", None), GraphedTrainer)


def _has_unknown(model: nn.Module) -> bool:
    """Whether a module, a hook or a replaced forward may do something beside launching kernels."""
    if any(getattr(hooks_of_all, f"_global{name}", None) for name in HOOKS):
        return True
    return any(_is_unknown(module, module is model) for module in model.modules())


def _is_unknown(module: nn.Module, is_root: bool) -> bool:
    state, kind = module.__dict__, type(module)
    if isinstance(module, torch.jit.ScriptModule) or not (_is_known(kind) and _is_known(kind.forward)):
        return True
    if "forward" in state:  # Accelerate wraps that of the whole model in autocast
        wrapped = getattr(state.get("_original_forward"), "__func__", None) if is_root else None
        if wrapped is not kind.forward:
            return True
    others = [value for name, value in state.items() if name != "forward" and callable(value)]
    if not all(_is_known(value) for value in others) or not _attends_as_known(state.get("config")):
        return True
    draws = any(isinstance(value, torch.Generator) for value in state.values())
    parameters = state.get("_parameters", {}).values()
    hooked = any(state.get(name) for name in HOOKS) or any(p is not None and p._backward_hooks for p in parameters)
    return hooked or draws or bool(state.get("gradient_checkpointing"))


def _attends_as_known(config: Any) -> bool:
    """Whether the attention that a config names is not one that a user has registered."""
    name = getattr(config, "_attn_implementation", None)
    registered = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})
    return not isinstance(name, str) or name not in registered or _is_known(registered[name])


def _is_known(what: Any) -> bool:
    """Whether a class, a function or an object is of the known packages."""
    if isinstance(what, functools.partial):
        return _is_known(what.func)
    if isinstance(what, BuiltinFunctionType):  # torch.tanh
        return True
    named = what if isinstance(what, FunctionType | MethodType | type) else type(what)
    return str(named.__module__).partition(".")[0] in KNOWN
