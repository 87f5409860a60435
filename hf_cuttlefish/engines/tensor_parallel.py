"""Tensor parallelism (`from_pretrained(..., tp_plan="auto")`): whole weights of one layer at a time, and the switch in a checkpoint.

transformers 5.23 shards the weights when it loads a model, and its Trainer saves no checkpoint of such a model from which a run
could go on: `optimizer.pt` would hold one process's parts, and whole weights do not load into sharded ones. So the checkpoint
of the switch has everything whole, as one process would have saved it, and what is loaded from there is sharded by
`tensor_parallel_plan` (weights when they are loaded, optimizer state when the run begins).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..config import CuttlefishConfig
from ..decide.files import replaced
from ..layers.low_rank import LowRankLayer, LowRankLinear
from ..layers.parts import is_sharded, whole
from ..maths.factors import Factors
from ..maths.projection import project, unknown_state
from ..patch.modules import carry_out, make_change
from ..patch.optimizer import inner_optimizer
from ..patch.report import FactorizationReport
from ..patch.structure import Exchanges
from ..patch.twins import copy_module
from ..processes import Processes, is_distributed
from .around import Around
from .base import DIFFERENT, RESUME, Layers, refuse
from .restart import KeptFactors, LowRankCheckpoint, RestartEngine, save_model
from .tensor_parallel_plan import (
    BY_INPUTS,
    Root,
    check_style,
    cut,
    cut_state,
    extend,
    find_root,
    place,
    placements,
    settle,
)

_OF_PARALLELISM = ("_tp_size", "_fsdp_size", "_device_mesh", "_mesh_manager", "_is_distributed_loading_by_transformers")
"""Attributes that transformers gives a model that it divides; without them it is an ordinary one."""


class TensorParallel(RestartEngine):
    """A model that `from_pretrained` has made tensor parallel."""

    fixed = "tensor parallelism's parts of weights"

    def __init__(self, model: nn.Module, root: Root, optimizer: Any) -> None:
        super().__init__(model, optimizer)
        self.root = root
        self.peers = Processes.alone()  # all processes see the same batches, and each has gathered the whole statistics

    @classmethod
    def find(cls, around: Around, optimizer: Any) -> TensorParallel | None:
        """Also of a model that is factorized already: its checkpoints have to be completed, and sharded when loaded."""
        root = find_root(around.model)
        return None if root is None or not is_distributed() else cls(around.model, root, optimizer)

    def check(self, layers: Layers, config: CuttlefishConfig, can_restart: bool = False) -> None:
        """Raises ValueError, naming it, for what could not be switched.

        That is: parallelism of another kind besides, weights sharded in another way than into rows or columns, a layer whose
        factors could not be sharded, or that is not trained.
        """
        super().check(layers, config, can_restart)
        if config.objective == "speed":
            raise ValueError(
                "objective is 'speed', and layers would be timed whole, of which tensor parallelism gives each process a part: use "
                "objective='size'"
            )
        size, everyone = int(self.root.module._tp_size), dist.get_world_size()
        settings = getattr(self.root.module.config, "distributed_config", None)
        experts, stages = getattr(settings, "ep_size", 1) or 1, getattr(settings, "pp_size", 1) or 1
        unsupported = {
            f"data parallelism besides ({size} of {everyone} processes hold a weight)": size != everyone,
            f"expert parallelism (ep_size={experts})": experts > 1,
            f"pipeline parallelism (pp_size={stages})": stages > 1,
        }
        refuse(
            "tensor parallelism", unsupported, "tensor parallelism over all processes, FSDP2 (fsdp_version: 2) or DDP"
        )
        for name, mesh, placement in placements(self.model):
            if mesh.ndim != 1 or type(placement).__name__ not in ("Shard", "Replicate"):
                raise ValueError(
                    f"{name} is sharded by tensor parallelism as {placement} on a mesh of {tuple(mesh.shape)} processes (a packed "
                    "weight?), which is not supported: use FSDP2 (fsdp_version: 2) or DDP"
                )
        for name, layer in layers.items():
            style = self.root.style(name)
            check_style(name, style)
            if is_sharded(layer.weight) and (style is None or type(layer) is not nn.Linear):
                raise ValueError(
                    f"{name}.weight is sharded, and no rule of tp_plan is for an nn.Linear of this name: exclude this layer"
                )
        self.check_optimizer(layers, config.optimizer_state)

    def check_replicas(self, when: str) -> None:
        """Of parameters that are not sharded all processes must have the same bits."""
        shapes = self.processes.gather([(n, tuple(p.shape)) for n, p in self.model.named_parameters()])
        wrong = [f"other parameters on process {r}" for r, theirs in enumerate(shapes) if theirs != shapes[0]]
        if not wrong:
            wrong = self.processes.differing({n: p for n, p in self.model.named_parameters() if not is_sharded(p)})
        if wrong:
            raise RuntimeError(f"{DIFFERENT} {when}: {wrong[0]}. {RESUME}")

    def checkpoint(self, *given: Any, **named: Any) -> TensorParallelCheckpoint:
        return TensorParallelCheckpoint(self, *given, **named)

    def after_loading_optimizer(self, optimizer: Any) -> None:
        cut_state(self.model, optimizer)

    def after_saving(self, folder: Path, optimizer: Any) -> None:
        save_whole_state(folder, self.model, optimizer)

    @classmethod
    def exchanging(cls, model: nn.Module, changes: Exchanges) -> None:
        """Shard the new layers as the old ones are."""
        root = find_root(model) if changes else None
        if root is None:
            return
        for name, (old, new) in changes.items():
            if not isinstance(new, LowRankLinear) or isinstance(old, LowRankLayer):
                raise ValueError(
                    f"{name} is factorized at another rank than the weights to be loaded, or they are dense, and its factors are "
                    "sharded by tensor parallelism: load these weights with from_pretrained"
                )
        for name, (old, new) in changes.items():
            place(root, name, old, cast(LowRankLinear, new))

    @classmethod
    def shard_loaded(cls, model: nn.Module, state: dict[str, torch.Tensor], prefix: str) -> None:
        cut(model, state, prefix)

    @classmethod
    def extend_parallel_plan(cls, model: nn.Module, plan: dict[str, str]) -> None:
        extend(model, plan)

    @classmethod
    def settle_loaded(cls, model: nn.Module) -> None:
        settle(model)

    def whole_flow(self, name: str, tensor: torch.Tensor, side: str) -> torch.Tensor:
        """All of what flows through a layer, of which a process sees its features alone.

        Args:
            tensor: (..., features here). side: "input", or "output" (its gradient, too).
        """
        style = self.root.style(name)
        divided = (style == "rowwise" and side == "input") or (style == "colwise" and side == "output")
        if not divided:
            return tensor
        layer = cast(nn.Linear, self.model.get_submodule(name))
        features = layer.in_features if style in BY_INPUTS else layer.out_features
        largest = -(-features // self.processes.size)  # the last process may have fewer
        padded = nn.functional.pad(tensor, (0, largest - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.processes.size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts, -1)[..., :features]


class TensorParallelCheckpoint(LowRankCheckpoint):
    """What one process would have saved of the factorized model, written by the main process.

    "reset", and state whose tensors are neither numbers nor of their parameter's shape, start all state anew.
    """

    engine: TensorParallel
    mark = OPTIMIZER_NAME

    def _check(self, folder: Path) -> None:
        for name in (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} holds no whole checkpoint of Trainer ({name} is missing): under tensor parallelism set "
                    "save_strategy to 'no' and save_only_model to False, and let nothing else write or remove checkpoints"
                )

    def _write_parts(
        self, folder: Path, staging: Path
    ) -> tuple[nn.Module, FactorizationReport, Mapping[str, torch.Tensor]]:
        kept = KeptFactors(self.factors)
        of_plan = {id(self.engine.model.get_submodule(name).weight) for name in self.plan}
        model = copy_module(self.engine.model, lambda old: self._data(old, id(old) in of_plan))
        for module in model.modules():
            vars(module).pop("forward", None)  # it runs the original
            for name in _OF_PARALLELISM:
                vars(module).pop(name, None)
            if hasattr(getattr(module, "config", None), "distributed_config"):
                del module.config.distributed_config  # type: ignore[union-attr]
        change = make_change(model, self.plan, factors=kept)
        report = carry_out(change, change.edits(), Processes.alone())
        self._optimizer, done = self._optimizer_state(kept.seen)
        report.optimizer = f"{type(inner_optimizer(self.engine.optimizer)).__name__} (tensor parallel): {done}"
        return model, report, model.state_dict()

    def _data(self, old: nn.Parameter, is_replaced: bool) -> torch.Tensor:
        """What the copy has of a parameter: on the main process its values, but for those that factors replace."""
        if not is_replaced:
            self.processes.agree()  # one that has failed meanwhile would not answer
            values = self.engine.gather(old)
            if self.processes.is_main or old.ndim < 2:  # a bias may get a shift
                return values.cpu().clone()
        return torch.zeros((), dtype=old.dtype).expand(old.shape)

    def _optimizer_state(self, factors: Mapping[str, Factors]) -> tuple[dict[str, Any], str]:
        """The optimizer's state dict for the factorized model, and what became of the state."""
        inner = inner_optimizer(self.engine.optimizer)
        unknown = (kind for p, state in inner.state.items() for kind in _unknown(p, state))
        carry = self._may_carry(unknown) and bool(inner.state)
        layer_of = {id(self.engine.model.get_submodule(name).weight): name for name in self.plan}
        saved = _whole_state(inner, self.processes, carry, layer_of, factors)
        saved["param_groups"] = self.rate.groups(saved["param_groups"])
        return saved, self._outcome(carry)

    def _save(
        self,
        folder: Path,
        staging: Path,
        model: nn.Module,
        report: FactorizationReport,
        state: Mapping[str, torch.Tensor],
    ) -> str:
        save_model(model, staging, state)
        torch.save(self._optimizer, staging / OPTIMIZER_NAME)
        return report.optimizer


def save_whole_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Make a checkpoint that Trainer has just saved of a tensor-parallel model one from which a run can go on.

    Its optimizer.pt has the main process's parts alone; it is written anew with the whole state. All processes must call. Nothing
    is done for another model, without optimizer.pt, or where the state could not be divided again.
    """
    if find_root(model) is None:
        return
    inner, processes = inner_optimizer(optimizer), Processes()
    other = any(_other_shapes(p, state) for p, state in inner.state.items())
    if not processes.from_main((folder / OPTIMIZER_NAME).is_file) or other:
        return
    saved = _whole_state(inner, processes)

    def write() -> None:
        with replaced(folder / OPTIMIZER_NAME) as partial:
            torch.save(saved, partial)

    processes.from_main(write)


def _whole_state(
    inner: torch.optim.Optimizer,
    processes: Processes,
    carry: bool = True,
    layer_of: Mapping[int, str] | None = None,
    factors: Mapping[str, Factors] | None = None,
) -> dict[str, Any]:
    """An optimizer's state dict, its tensors whole on the main process (and None on the others).

    Args:
        carry: whether it has state. layer_of: id of a weight whose place `factors` take -> its layer.
    """
    groups: list[dict[str, Any]] = []
    states: dict[int, dict[str, Any]] = {}
    count = 0
    for group in inner.param_groups:
        positions = []
        for parameter in group["params"]:
            processes.agree()  # one that has failed meanwhile would not answer
            name = (layer_of or {}).get(id(parameter))
            state = inner.state.get(parameter, {}) if carry else {}
            values = {k: whole(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}
            new = [values, values]
            if not processes.is_main:
                new = [dict.fromkeys(values), dict.fromkeys(values)]
            elif values:
                values = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
                new = [values]
                if name is not None:
                    found = cast(Mapping[str, Factors], factors)[name]
                    new = list(project(values, found.down, found.up))
            for own in new[: 1 if name is None else 2]:
                if own:
                    states[count] = own
                positions.append(count)
                count += 1
        groups.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": positions})
    return {"state": states, "param_groups": groups}


def _unknown(parameter: torch.Tensor, state: Mapping[str, Any]) -> list[str]:
    """Kinds of state that cannot be projected, or not be divided again."""
    return [*unknown_state(state), *_other_shapes(parameter, state)]


def _other_shapes(parameter: torch.Tensor, state: Mapping[str, Any]) -> list[str]:
    shapes = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim > 0}
    return [k for k, shape in shapes.items() if shape != tuple(parameter.shape)]
