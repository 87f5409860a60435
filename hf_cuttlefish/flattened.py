"""FSDP1 (FullyShardedDataParallel): whole weights out of flat parameters, and the switch in a checkpoint.

FSDP1 lays the parameters of a unit end to end in one flat parameter when it is built, which cannot be edited. What it saves
with FULL_STATE_DICT is keyed by names, so no second engine is needed: the main process rewrites the two files. Run on torch
2.13 and accelerate 1.15.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from . import optimizer as optimizers
from .factorization import Factors
from .layers import DenseLayer, dense_origin
from .patching import factorize
from .report import FactorizationReport
from .restart import LowRankCheckpoint, copy_module, in_full_precision
from .sharding import PartedModel

logger = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
"""Names under which Accelerate saves FSDP1's model and optimizer with FULL_STATE_DICT."""


def is_flattened(model: object) -> bool:
    """Whether a module is FSDP1's wrapper."""
    return type(model).__name__ == "FullyShardedDataParallel"


class FlattenedModel(PartedModel):
    """A model under FSDP1: all that the switch asks of it.

    Args:
        wrapped: the outermost FullyShardedDataParallel. Every process must make one at the same time.

    Attributes:
        model: the modules inside without wrappers, so that names are the model's own. It shares their hooks, buffers and
            config; its parameters are stand-ins of the right shape without values, which `gather` gets.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(wrapped, recurse=False, writeback=False):
            pass  # the outermost has to come first: it makes itself the root
        self.wrapped = wrapped
        self._units: list[Any] = [m for m in wrapped.modules() if is_flattened(m)]
        self._places: dict[int, tuple[nn.Module, nn.Module, str]] = {}
        self._stand_ins: dict[int, dict[str, nn.Parameter]] = {}
        for unit in self._units:
            self._look_into(unit)
        super().__init__(self._bare(wrapped, {}))

    def _look_into(self, unit: Any) -> None:
        """Make the stand-ins of one unit's parameters; those that share a weight share one."""
        if unit._handle is None:
            return
        flat = unit._handle.flat_param
        own = getattr(flat, "_params", None) or [flat] * len(flat._shapes)
        for info, shape, real in zip(flat._param_infos, flat._shapes, own, strict=True):
            data = torch.zeros((), dtype=flat.dtype, device=flat.device).expand(shape)
            made = nn.Parameter(data, requires_grad=real.requires_grad)
            self._stand_ins.setdefault(id(info.module), {})[info.param_name] = made
            self._places[id(made)] = (unit, info.module, info.param_name)
        for shared in flat._shared_param_infos:
            made = self._stand_ins[id(shared.prim_module)][shared.prim_param_name]
            self._stand_ins.setdefault(id(shared.module), {})[shared.param_name] = made

    def _bare(self, module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
        while is_flattened(module):
            module = cast(nn.Module, module._modules["_fsdp_wrapped_module"])
        if id(module) in known:
            return known[id(module)]
        known[id(module)] = twin = copy.copy(module)
        own = self._stand_ins.get(id(module), {})
        for name in own:
            twin.__dict__.pop(name, None)  # with use_orig_params=False a weight is a plain attribute
        kept = {n: p for n, p in module._parameters.items() if n != "_flat_param"}
        twin.__dict__["_parameters"] = {**kept, **own}
        twin.__dict__["_modules"] = {
            n: None if child is None else self._bare(child, known) for n, child in module._modules.items()
        }
        return twin

    def check(self, layers: Mapping[str, nn.Module]) -> None:
        """Raises ValueError for what is not supported: CPU offload, copies of shards or no shards, original parameters and sharded
        state dicts (Trainer was seen not to resume them exactly, without a switch too)."""
        from accelerate.state import AcceleratorState

        kind = str(AcceleratorState().fsdp_plugin.state_dict_type)
        strategies = sorted({u.sharding_strategy.name for u in self._units})
        unsupported = {
            "CPU offload": any(u.cpu_offload.offload_params for u in self._units),
            "SHARDED_STATE_DICT, from which Trainer's own resuming changes the losses,": "SHARDED" in kind,
            "LOCAL_STATE_DICT": "LOCAL" in kind,
            "use_orig_params, under which Trainer's own resuming changes the losses,": any(
                u._use_orig_params for u in self._units
            ),
            f"the sharding strategy {strategies[-1]}": not {"FULL_SHARD", "SHARD_GRAD_OP"}.issuperset(strategies),
        }
        for what, is_on in unsupported.items():
            if is_on:
                raise ValueError(
                    f"FSDP1 with {what} is not supported: use full_shard or shard_grad_op with "
                    "state_dict_type: FULL_STATE_DICT and use_orig_params: false, FSDP2 (fsdp_version: 2) or DDP"
                )
        for name, layer in layers.items():
            if id(layer.weight) not in self._places:
                raise ValueError(f"{name}.weight is not held by FSDP1 (ignored_modules): exclude this layer")

    def check_replicas(self, when: str) -> None:
        """Raises RuntimeError unless all processes have the same parameters; each holds a part of their values."""
        shapes = self.processes.gather([(n, tuple(p.shape)) for n, p in self.model.named_parameters()])
        if any(theirs != shapes[0] for theirs in shapes):
            raise RuntimeError(
                f"the processes hold different parameters {when}. Training on would go wrong in silence; resume from the last "
                "checkpoint"
            )

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole weight that a stand-in is for. Its unit is whole for that moment."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        if id(tensor) not in self._places:
            return tensor.detach()
        unit, module, name = self._places[id(tensor)]
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            return cast(torch.Tensor, getattr(module, name)).detach().clone()


class FlattenedCheckpoint(LowRankCheckpoint):
    """The low-rank form of a checkpoint of FSDP1, written by the main process. `model` is None on the others.

    optimizer_state="reset" resets all parameters: a flat parameter has state for all of its own, or for none.
    """

    parted: FlattenedModel

    def write(self, folder: Path) -> FactorizationReport:
        """As of `LowRankCheckpoint`."""
        report = super().write(folder)
        return self.processes.from_main(lambda: report)

    def _check(self, folder: Path) -> None:
        for name in (TRAINER_STATE_NAME, WEIGHTS, OPTIMIZER):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} holds no checkpoint of FSDP1 ({name} is missing): something else writes or removes checkpoints "
                    "there; let Trainer write them, with state_dict_type: FULL_STATE_DICT"
                )

    def _write_parts(
        self, folder: Path, staging: Path
    ) -> tuple[nn.Module, FactorizationReport, Mapping[str, torch.Tensor]]:
        factors: dict[str, Factors] = {}
        for name in self.plan:
            found = self.factors[name]  # every process asks
            if self.processes.is_main:
                factors[name] = in_full_precision(found)
        if not self.processes.is_main:
            return None, None, {}  # type: ignore[return-value]
        model = copy_module(self.parted.model)
        model.load_state_dict(torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True, mmap=True))
        report = factorize(model, self.plan, factors=factors)
        saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        report.optimizer = f"FSDP1: {self._project(saved, factors)}"
        staging.mkdir()
        torch.save(model.state_dict(), staging / WEIGHTS)
        torch.save(saved, staging / OPTIMIZER)
        return model, report, model.state_dict()

    def _project(self, saved: dict[str, Any], factors: Mapping[str, Factors]) -> str:
        """Exchange names and state of the plan's layers in an optimizer's state dict; returns what the report says of it."""
        state = saved["state"]
        unknown = sorted({kind for own in state.values() for kind in optimizers.unknown_state(own)})
        if unknown and self.optimizer_state == "carry":
            logger.warning(
                "Cuttlefish: the optimizer keeps the state %s, which has no known projection; all of its state starts anew.",
                ", ".join(unknown),
            )
        carry = self.optimizer_state == "carry" and not unknown
        if not carry:
            state.clear()
        new_names: dict[str, list[str]] = {}
        for name, found in factors.items():
            layer = cast(DenseLayer, self.parted.model.get_submodule(name))
            new_names[f"{name}.weight"] = [f"{name}.down.weight", f"{name}.up.weight"]
            new_names[f"{name}.bias"] = [f"{name}.up.bias"]
            if own := state.pop(f"{name}.weight", None):
                down, up = (nn.Parameter(t, requires_grad=False) for t in (found.down, found.up))
                weight = cast(nn.Parameter, layer.weight)
                pair = optimizers.FactorParameters(name, weight, down, up, dense_origin(layer) == "Conv1D")
                state[f"{name}.down.weight"], state[f"{name}.up.weight"] = optimizers.project(own, pair)
            if f"{name}.bias" in state:
                state[f"{name}.up.bias"] = state.pop(f"{name}.bias")
        for group in saved["param_groups"]:
            group["params"] = [new for old in group["params"] for new in new_names.get(old, [old])]
        return f"state carried for {len(factors)} of {len(factors)} layers" if carry else "state starts anew"
