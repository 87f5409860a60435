"""Where DeepSpeed keeps a parameter's fp32 weight and optimizer state: flat partitions, laid out by the ZeRO stage.

The public helpers of deepspeed.utils read whole parameters, but in deepspeed 0.19.8 those of ZeRO-1 and 2 find no state but
that of the first group, and those of ZeRO-3 cannot write a parameter that the processes do not divide evenly. So the
partitions are read and written here, from what DeepSpeed notes at each parameter.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..processes import Processes

Kept = Callable[[torch.Tensor], torch.Tensor]
"""Gives for a flat fp32 partition itself, or what the basic optimizer keeps beside it."""


class Partitions(ABC):
    """The partitions of a ZeRO optimizer; `basic` is the optimizer inside it, which steps them.

    Attributes:
        groups: the parameters, by the groups of the basic optimizer.
        flats: this process's flat fp32 partitions, by the same groups.
    """

    groups: list[list[torch.Tensor]]
    flats: list[list[torch.Tensor]]

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.basic = optimizer, optimizer.optimizer
        self.processes = Processes()

    @abstractmethod
    def weight(self, parameter: torch.Tensor) -> torch.Tensor:
        """The whole fp32 weight (a frozen one as it is); every process must ask at the same time."""

    @abstractmethod
    def _whole(self, parameter: torch.Tensor, kept: Kept) -> torch.Tensor: ...

    @abstractmethod
    def write(self, parameter: torch.Tensor, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        """One parameter: its weight, and this process's part of its fp32 weight and (whole) state."""

    def kinds(self) -> list[list[str]]:
        """Of each group the kinds of state that every parameter has its own of; nothing before the first step."""

        def mine() -> list[list[str]]:
            found = []
            for flats in self.flats:
                state = self.basic.state.get(flats[0], {}) if flats else {}
                own = (k for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == flats[0].shape)
                found.append(sorted(own))
            return found

        return self.processes.from_main(mine)

    def state(self, parameter: torch.Tensor, kinds: list[str]) -> dict[str, torch.Tensor]:
        """The whole optimizer state of one parameter, in its shape, in fp32."""
        return {kind: self._whole(parameter, self._beside(kind)) for kind in kinds}

    def _beside(self, kind: str) -> Kept:
        return lambda flat: self.basic.state[flat][kind]

    def empty_like(self, first: Partitions, kinds: list[list[str]]) -> None:
        """State of these partitions: zeros to be filled, and what is no parameter's own, as the first ones have it."""
        for olds, news, own in zip(first.flats, self.flats, kinds, strict=True):
            for new in news:
                self.basic.state[new] = {
                    key: torch.zeros_like(new, dtype=value.dtype) if key in own else copy.deepcopy(value)
                    for key, value in first.basic.state[olds[0]].items()
                }


class FlatPartitions(Partitions):
    """ZeRO-1 and 2: one partition a group on each process, into which a parameter's ends may be cut; weights are whole."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.groups = [list(group) for group in optimizer.bit16_groups]
        self.flats = [[flat] for flat in optimizer.single_partition_of_fp32_groups]

    def weight(self, parameter: torch.Tensor) -> torch.Tensor:
        return self._whole(parameter, lambda flat: flat) if hasattr(parameter, "_hp_mapping") else parameter.detach()

    def _whole(self, parameter: torch.Tensor, kept: Kept) -> torch.Tensor:
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if (place := self._place(parameter)) is not None:
            flat, here, there = place
            whole[here] = kept(flat).detach()[there].float()
        self.processes.sum_(whole)
        return whole.view_as(parameter)

    def write(self, parameter: torch.Tensor, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        parameter.copy_(value)
        if (place := self._place(parameter)) is None:
            return
        flat, here, there = place
        own = self.basic.state[flat] if state else {}
        for whole, part in [(value, flat), *((state[key], own[key]) for key in state)]:
            part.detach()[there] = whole.reshape(-1)[here].to(part)

    def _place(self, parameter: torch.Tensor) -> tuple[torch.Tensor, slice, slice] | None:
        """This process's partition of the group, and which part of the parameter lies where in it; None if no part does."""
        found = getattr(parameter, "_hp_mapping", None)
        if found is None:  # frozen, or all of it lies in other processes' partitions
            return None
        here, there = found.lp_fragment_address, found.hp_fragment_address
        return (
            self.flats[found.param_group_index][0],
            slice(here.start, here.start + here.numel),
            slice(there.start, there.start + there.numel),
        )


class ParameterPartitions(Partitions):
    """ZeRO-3: every parameter is divided evenly among the processes (its end padded), the weight itself too."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        count = len(self.basic.param_groups)
        self.groups, self.flats = [[] for _ in range(count)], [[] for _ in range(count)]
        for i, parameters in enumerate(optimizer.fp16_groups):
            group = optimizer.sub_group_to_group_id[i]
            self.groups[group] += list(parameters)
            self.flats[group].append(optimizer.fp32_partitioned_groups_flat[i])

    def weight(self, parameter: torch.Tensor) -> torch.Tensor:
        return self._whole(parameter, lambda flat: flat) if parameter.requires_grad else gathered(parameter)

    def _whole(self, parameter: torch.Tensor, kept: Kept) -> torch.Tensor:
        part = self._part(parameter, kept).float()
        whole = torch.zeros(part.numel() * self.processes.size, dtype=torch.float32, device=part.device)
        whole[self._mine(parameter, part.numel())] = part
        self.processes.sum_(whole)
        return whole[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]

    def write(self, parameter: torch.Tensor, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        self._cut(parameter, value, parameter.ds_tensor)  # type: ignore[attr-defined]
        if parameter.shape == value.shape:  # small ones stay whole
            parameter.data.copy_(value)
        if not parameter.requires_grad:
            return
        self._cut(parameter, value, self._part(parameter, lambda flat: flat))
        for key, whole in state.items():
            self._cut(parameter, whole, self._part(parameter, self._beside(key)))

    def _part(self, parameter: torch.Tensor, kept: Kept) -> torch.Tensor:
        sub_group, start, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return kept(self.optimizer.fp32_partitioned_groups_flat[sub_group]).detach().narrow(0, start, count)

    def _mine(self, parameter: torch.Tensor, count: int) -> slice:
        rank = self.optimizer._get_param_partition_rank(parameter)
        return slice(rank * count, (rank + 1) * count)

    def _cut(self, parameter: torch.Tensor, value: torch.Tensor, part: torch.Tensor) -> None:
        padded = value.new_zeros(part.numel() * self.processes.size)
        padded[: value.numel()] = value.reshape(-1)
        part.data.copy_(padded[self._mine(parameter, part.numel())])


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of the whole of what ZeRO-3 has divided, in its own dtype; every process must ask at the same time."""
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
