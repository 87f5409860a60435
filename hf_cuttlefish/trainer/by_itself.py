"""By itself: low-rank steps become CUDA graphs without being asked for, where nothing but known code runs in a step."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks_of_all
from transformers import Trainer, modeling_utils

from ..config import CuttlefishConfig
from ..layers.low_rank import low_rank_layers
from ..measure.eager import has_compiled
from ..patch.graph_stamp import HOOKS
from .graphs import OF_ACCELERATOR, OWN, GraphedTrainer
from .whose import are_as_written, is_of, package_of

logger = logging.getLogger(__name__)


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
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    if _is_of_a_user(trainer) or trainer.model_wrapped is not model or _get_current_dispatch_mode() is not None:
        return False
    return _tables_are_as_written() and not _has_unknown(model)


def _is_of_a_user(trainer: Any) -> bool:
    """Whether somebody else's code makes up the step, compiles it, or carries something from one step to the next."""
    accelerator = trainer.accelerator
    if not all(_is_trainers(trainer, n) for n in OWN) or not type(accelerator).__module__.startswith("accelerate."):
        return True
    if any(n in vars(accelerator) and not _is_ours(vars(accelerator)[n]) for n in OF_ACCELERATOR):
        return True
    if not all(is_of(getattr(type(accelerator), n), ("accelerate",)) for n in OF_ACCELERATOR):
        return True
    parts = trainer.compute_loss_func, trainer.label_smoother
    given = any(part is not None and not is_of(type(part)) for part in parts)
    return given or trainer.args.torch_compile or getattr(trainer.args, "past_index", -1) >= 0


def _is_trainers(trainer: Any, name: str) -> bool:
    """Whether a method is the one that transformers has written, or ours; older and newer versions lack some."""
    if name in vars(trainer) and not _is_ours(vars(trainer)[name]):
        return False
    method = getattr(type(trainer), name, None)
    return method is getattr(Trainer, name, None) and (method is None or is_of(method))


def _is_ours(method: Any) -> bool:
    return isinstance(getattr(method, "__self__", None), GraphedTrainer)


def _has_unknown(model: nn.Module) -> bool:
    """Whether a module, a hook or a replaced forward may do something beside launching kernels."""
    if any(getattr(hooks_of_all, f"_global{name}", None) for name in HOOKS):
        return True
    if any(_is_unknown(module, module is model) for module in model.modules()):
        return True
    return not are_as_written({type(module) for module in model.modules()})


def _is_unknown(module: nn.Module, is_root: bool) -> bool:
    state, kind = module.__dict__, type(module)
    if isinstance(module, torch.jit.ScriptModule) or not (is_of(kind) and is_of(kind.forward)):
        return True
    if "forward" in state and not (is_root and _is_accelerates(state["forward"], kind)):
        return True
    others = [value for name, value in state.items() if name != "forward" and callable(value)]
    if not all(is_of(value) for value in others) or not _looks_up_known(state.get("config")):
        return True
    draws = any(isinstance(value, torch.Generator) for value in state.values())
    parameters = state.get("_parameters", {}).values()
    hooked = any(state.get(name) for name in HOOKS) or any(p is not None and p._backward_hooks for p in parameters)
    return hooked or draws or bool(state.get("gradient_checkpointing"))


def _is_accelerates(forward: Any, kind: type[nn.Module]) -> bool:
    """Whether a forward is what Accelerate makes of the class's own in mixed precision: in autocast, with outputs in fp32."""
    inner = getattr(forward, "__func__", None)
    while inner is not None and inner is not kind.forward:
        if package_of(inner) not in ("accelerate", "torch"):
            return False
        inner = getattr(inner, "__wrapped__", None)
    return inner is not None


def _looks_up_known(config: Any) -> bool:
    """Whether the attention, its mask and the experts that a config names are not ones that a user has registered."""
    from transformers import masking_utils
    from transformers.integrations import moe

    for attribute, registered in (  # versions differ in what they have
        ("_attn_implementation", getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})),
        ("_attn_implementation", getattr(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", {})),
        ("_experts_implementation", getattr(moe, "ALL_EXPERTS_FUNCTIONS", {})),
    ):
        name = getattr(config, attribute, None)
        if isinstance(name, str) and name in registered and not is_of(registered[name]):
            return False
    return True


def _tables_are_as_written() -> bool:
    """Of losses and of rotary embeddings: which of them a model takes is worked out in several ways, so all are asked."""
    from transformers import modeling_rope_utils
    from transformers.loss import loss_utils

    tables = getattr(loss_utils, "LOSS_MAPPING", {}), getattr(modeling_rope_utils, "ROPE_INIT_FUNCTIONS", {})
    return all(is_of(value) for table in tables for value in table.values())
