"""The plan of tensor parallelism, carried over from a weight to its two factors.

transformers' plan gives each layer a style. Of a column-wise weight each process has some outputs: `up` is divided so, and every
process has all of `down`. Of a row-wise one each has some inputs: `down` is divided so, what it gives is summed over r numbers
a token (the weight's was over m), and every process has all of `up`. What is whole everywhere is a DTensor too, so that the
optimizer's groups, which Trainer parts by kind, are those of the dense model.

Run on transformers 5.23 and 5.24, whose styles these are; no other version's are touched.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from ..layers.low_rank import LowRankLinear
from ..layers.parts import is_sharded, part_like

BY_OUTPUTS = ("colwise", "colwise_rep", "colwise_gather_output")
"""Styles that divide a weight's outputs."""


BY_INPUTS = ("rowwise", "rowwise_rep", "rowwise_split_input")
"""Styles that divide a weight's inputs."""


WHOLE = "cuttlefish_whole"
"""Our style: every process has all of the weight, and computes with it alone."""


class Root(NamedTuple):
    """The module that `from_pretrained` has made tensor parallel.

    Attributes:
        prefix: its name in the model, with a dot behind; empty for the model itself.
        module: it. plan: rules, layer numbers replaced by "*".
    """

    prefix: str
    module: Any
    plan: Mapping[str, str]

    def style(self, name: str) -> str | None:
        """The style of one of the model's modules; None without a rule, as outside the root."""
        inside = name.removeprefix(self.prefix)
        return self.plan.get(_starred(inside)) if name.startswith(self.prefix) else None


def find_root(model: nn.Module) -> Root | None:
    """The module of a model that is tensor parallel by transformers' doing; None if there is none.

    Raises ValueError where another transformers has done it.
    """
    for name, module in model.named_modules():
        if (getattr(module, "_tp_size", None) or 1) > 1 and getattr(module, "_device_mesh", None) is not None:
            if importlib.util.find_spec("transformers.distributed.parallel_utils") is None:
                raise ValueError(
                    f"the tensor parallelism of transformers {transformers.__version__} is of another kind than is known: use "
                    "transformers 5.23 or 5.24, FSDP2 (fsdp_version: 2) or DDP"
                )
            return Root(f"{name}." if name else "", module, module._tp_plan or {})
    return None


def extend(model: nn.Module, plan: dict[str, str]) -> None:
    """Add rules for the factors of the model's low-rank layers, in place. Before the model is made parallel."""
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            for part, style in _styles(plan.get(_starred(name))).items():
                _known()
                plan.setdefault(_starred(f"{name}.{part}"), style)


def settle(model: nn.Module) -> None:
    """After the model was made parallel, with the plan extended: its low-rank layers work by their factors' rules alone.

    Raises ValueError, naming the layer, where rules that were given besides do not fit each other.
    """
    root = find_root(model)
    if root is None:
        return
    for name, layer in root.module.named_modules():
        if isinstance(layer, LowRankLinear):
            style = root.plan.get(_starred(name))
            check_style(name, style)
            for part, wanted in _styles(style).items():
                found = root.plan.get(_starred(f"{name}.{part}"))
                if found != wanted:
                    raise ValueError(
                        f"tp_plan gives {name} the style {style!r} and its factor {name}.{part} {found!r}, where {wanted!r} is "
                        f"needed: leave the factorized layers out of tp_plan"
                    )
            vars(layer).pop("forward", None)  # the dense layer's rule, which stays for the layers that are dense


def place(root: Root, name: str, old: nn.Module, pair: LowRankLinear) -> None:
    """Divide the factors of a pair that takes a dense layer's place, and let them run as their rules say.

    Raises ValueError for a style that is not known.
    """
    style = root.style(name)
    check_style(name, style)
    mesh = getattr(old.weight, "device_mesh", None)
    for part, own in _styles(style).items():
        rule, child = _known()[own], getattr(pair, part)
        rule.shard_param(child, "weight", mesh)  # a bias is divided as it has to be: it was the dense layer's
        rule.install_forward(child, mesh)


def check_style(name: str, style: str | None) -> None:
    """Raises ValueError, naming the layer, unless its factors can be divided where its weight is by this style."""
    if style is not None and style not in BY_OUTPUTS + BY_INPUTS:
        raise ValueError(
            f"{name} is tensor parallel in the style {style!r}, and only {', '.join(BY_OUTPUTS + BY_INPUTS)} go over to its "
            "factors: exclude this layer"
        )


def cut(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """Of whole tensors about to be loaded into a tensor-parallel model, keep this process's parts; in place."""
    if find_root(model) is None:
        return
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = state_dict.get(prefix + name)
        if value is not None and is_sharded(parameter) and not is_sharded(value) and value.shape == parameter.shape:
            state_dict[prefix + name] = part_like(value.detach().to(parameter.device), parameter)


@torch.no_grad()
def cut_state(model: nn.Module, optimizer: Any) -> None:
    """Of an optimizer's state that was loaded whole, keep this process's parts.

    Raises ValueError for state of which one process's parts were saved, and loaded by all.
    """
    if find_root(model) is None:
        return
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if is_sharded(value):
                raise ValueError(
                    "optimizer.pt holds one process's parts of the optimizer's state, as Trainer saves it under tensor "
                    "parallelism, and a run cannot go on from it: resume from the checkpoint of the switch "
                    "(callback.restart_from), or start from these weights with from_pretrained"
                )
            if is_sharded(parameter) and getattr(value, "shape", None) == parameter.shape:
                state[key] = part_like(value.to(parameter.device), parameter)


def placements(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(name, mesh, placement) of each parameter that the processes hold parts of, and each dimension of its mesh."""
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            for placement in parameter.placements:  # type: ignore[attr-defined]
                yield name, parameter.device_mesh, placement  # type: ignore[attr-defined]


def _styles(style: str | None) -> dict[str, str]:
    """The rules of the factors of a layer that has this one; none where it has none, or one that does not go over."""
    if style in BY_OUTPUTS:
        return {"down": WHOLE, "up": style}
    return {"down": style, "up": WHOLE} if style in BY_INPUTS else {}


@functools.cache
def _known() -> Any:
    """transformers' styles, with ours among them."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    class Whole(TensorParallelLayer):
        def should_use_local_tensors(self, module: nn.Module) -> bool:
            return True

        def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
            whole = module._parameters.get(param)
            if whole is not None:
                parted = distribute_tensor(whole, mesh, [Replicate()], src_data_rank=None)
                module._parameters[param] = nn.Parameter(parted, requires_grad=whole.requires_grad)

    ALL_PARALLEL_STYLES.register(WHOLE, Whole())  # type: ignore[arg-type]
    return ALL_PARALLEL_STYLES


def _starred(name: str) -> str:
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    return replace_layer_number_by_wildcard(name)
