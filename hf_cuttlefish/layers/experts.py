"""Experts: the 3-D parameters of a mixture, each a stack of matrices, and the stack of pairs that takes the place of one.

The experts' own class goes on to compute: its code reads `self.gate_up_proj`, finds the stack of pairs there, and multiplies by it as
by a tensor (see stack_views.py). So the gates, biases, layouts and implementations (eager, batched_mm, grouped_mm) of every model are
transformers' own.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from .dense import check_rank
from .low_rank import LowRankLayer
from .parts import shape_of
from .stack_views import Stack, StackOfPairs, is_transposed

ORIGIN = "Experts"


class ExpertStack(nn.Module):
    """Shows a 3-D parameter of an experts module as a layer; it is registered nowhere, and holds nothing of its own.

    Args:
        weight: the parameter, (E, out, in), or (E, in, out) where `transposed`.
        owner: the experts module; None for a parameter that is on its way into one. attribute: the parameter's name in it.
    """

    def __init__(
        self, weight: nn.Parameter, transposed: bool = False, owner: nn.Module | None = None, attribute: str = "stack"
    ) -> None:
        super().__init__()
        self.attribute, self.transposed = attribute, transposed
        self._owner = None if owner is None else weakref.ref(owner)
        self._follows = True
        self._parameters["weight"] = weight

    def __copy__(self) -> ExpertStack:
        """The same with a weight of its own, such as one that is whole where the experts hold a part of it."""
        made = ExpertStack.__new__(ExpertStack)
        made.__dict__.update(self.__dict__, _parameters=dict(self._parameters), _follows=False)
        return made

    @property
    def owner(self) -> nn.Module:
        """The experts module."""
        owner = self._owner() if self._owner is not None else None
        if owner is None:
            raise ReferenceError(f"the model that held the experts' {self.attribute} is gone")
        return owner

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the experts hold now, or the last one that they held."""
        now = None if self._owner is None or not self._follows else self.owner._parameters.get(self.attribute)
        if now is not None:
            self._parameters["weight"] = now
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """(E, out), or None."""
        return None if self._owner is None else self.owner._parameters.get(f"{self.attribute}_bias")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.attribute}, transposed={self.transposed}"


def stacks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The 3-D parameters of an experts module, by their names; the same object while one is held. Empty for any other module."""
    found: dict[str, nn.Module] = {}
    for name, parameter in module._parameters.items():
        if parameter is None or not _is_stack(module, name, parameter):
            continue
        known = _SHOWN.setdefault(module, weakref.WeakValueDictionary())
        stack = known.get(name)
        if stack is None:
            known[name] = stack = ExpertStack(parameter, is_transposed(module, name), module, name)
        stack._parameters["weight"] = parameter
        found[name] = stack
    return found


_SHOWN: weakref.WeakKeyDictionary[nn.Module, weakref.WeakValueDictionary[str, ExpertStack]] = (
    weakref.WeakKeyDictionary()
)
"""Experts module -> parameter's name -> what shows it, as long as somebody holds that."""


def _is_stack(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a stack of matrices, one for each expert: 3-D, in a module that says so by its class."""
    shape = shape_of(parameter)
    return len(shape) == 3 and "expert" in type(module).__name__.lower() and min(shape) > 1 and "bias" not in name


class LowRankExperts(StackOfPairs, LowRankLayer):
    """A pair for each expert, at one rank, in the place of a 3-D parameter: down (E, r, in), up (E, out, r).

    It is a module that its owner's code takes for a tensor: indexed, transposed or given to a matrix product it stands for
    `up @ down`, transposed where the parameter was, and two thin products are what is worked out.

        experts.gate_up_proj = LowRankExperts(down, up)
        functional.linear(x, experts.gate_up_proj[3])  # x down[3]^T up[3]^T

    Raises:
        ValueError: factors that do not fit together, or a rank out of range.
    """

    origin = ORIGIN
    child_classes = (Stack, Stack)

    def __init__(self, down: nn.Parameter, up: nn.Parameter, transposed: bool = False) -> None:
        if down.ndim != 3 or up.ndim != 3 or (down.shape[0], down.shape[1]) != (up.shape[0], up.shape[2]):
            raise ValueError(
                f"factors of the shapes {tuple(down.shape)} and {tuple(up.shape)} do not fit: (E, r, in) and (E, out, r) would"
            )
        check_rank(down.shape[1], down.shape[2], up.shape[1], "the experts")
        super().__init__(down, up, transposed)

    @torch.no_grad()
    def product(self) -> torch.Tensor:
        """up @ down of each expert, (E, out, in), computed in fp32 or better and returned in the factors' dtype."""
        down, up = self.factors
        exact = torch.promote_types(up.dtype, torch.float32)
        with torch.autocast(device_type=up.device.type if up.device.type != "meta" else "cpu", enabled=False):
            return (up.to(exact) @ down.to(exact)).to(up.dtype)

    def to_dense(self) -> nn.Module:
        """A layer that shows a 3-D parameter with the products."""
        matrices = self.product()
        data = matrices.mT.contiguous() if self.transposed else matrices
        return ExpertStack(nn.Parameter(data, requires_grad=self.factors[1].requires_grad), self.transposed)

    @property
    def count(self) -> int:  # type: ignore[override]
        """How many experts there are."""
        return self.factors[0].shape[0]

    @property
    def rank(self) -> int:
        """Inner size of each pair."""
        return self.factors[0].shape[1]

    @property
    def in_features(self) -> int:
        """Of each expert's matrix."""
        return self.factors[0].shape[2]

    @property
    def out_features(self) -> int:
        """Of each expert's matrix."""
        return self.factors[1].shape[1]

    @property
    def bias(self) -> None:
        """Belongs to the experts module, and stays there."""
        return None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"experts={self.count}, in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"transposed={self.transposed}"
        )
