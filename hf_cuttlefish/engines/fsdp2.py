"""FSDP2 (fully_shard): parameters are exchanged inside its groups, and whole weights are given one layer at a time.

fully_shard notes each Parameter of a block in the block's group, which gathers them before the block runs and reduces
their gradients afterwards. The factors take the weight's place in the same group, on the same mesh and under the same
policies, so a step has no extra collective. The groups are torch's own affair (tried on torch 2.13; what is
looked for and missing in another version is refused by name).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn

from ..config import CuttlefishConfig
from ..layers.kinds import KINDS
from ..layers.low_rank import LowRankLayer
from ..layers.parts import is_sharded, whole
from ..maths.factors import Factors
from ..patch.edits import Edit
from ..patch.modules import Change, make_change
from ..processes import Processes, is_distributed
from .around import Around, check_not_wrapped
from .base import DIFFERENT, RESUME, Layers, ShardedEngine, T
from .zero_redundancy import refuse_redundant


class FSDP2(ShardedEngine):
    """A model under fully_shard."""

    def __init__(self, model: nn.Module, optimizer: Any, around: list[nn.Module]) -> None:
        super().__init__(model, optimizer)
        self._roots = [m for m in (*around, *model.modules()) if is_fully_sharded(m)]
        self._places: dict[int, tuple[Any, Any]] = {}

    @classmethod
    def find(cls, around: Around, optimizer: Any) -> FSDP2 | None:
        if not is_distributed() or around.is_factorized:
            return None
        outside = [m for m in around.holders if is_fully_sharded(m)]
        if not outside and not any(map(is_fully_sharded, around.model.modules())):
            return None
        return cls(around.model, optimizer, outside)

    def check(self, layers: Layers, config: CuttlefishConfig, can_restart: bool = False) -> None:
        """Raises ValueError, naming it, for what could not be exchanged.

        That is: tensor-parallel weights, weights offloaded to the CPU, a mesh that does not span all processes, a target that is
        not held as it must be, or a fully_shard that keeps its parameters elsewhere than is known.
        """
        check_not_wrapped(self.model, sharded=True)
        self._places = {
            id(entry.sharded_param): (group, entry)
            for module in self._roots
            for group in _groups(module)
            for entry in group.fsdp_params
        }
        self._check_groups()
        refuse_redundant(self.optimizer)
        self.check_optimizer(layers, config.optimizer_state)
        self._check_layers(layers)

    def _check_groups(self) -> None:
        self.reshard()
        for name, parameter in self.model.named_parameters():
            if is_sharded(parameter) and id(parameter) not in self._places:
                raise ValueError(
                    f"{name} is a DTensor that fully_shard does not hold (tensor parallel), which is not supported"
                )
        for group in {id(g): g for g, _ in self._places.values()}.values():
            size, everyone = group.mesh_info.mesh.size(), dist.get_world_size()
            if size != everyone:
                raise ValueError(
                    f"fully_shard was given a mesh of {size} processes, and the run has {everyone}: give it a mesh of all"
                )
            if type(group.offload_policy).__name__ == "CPUOffloadPolicy":
                raise ValueError("fully_shard offloads weights to the CPU (CPUOffloadPolicy), which is not supported")

    def _check_layers(self, layers: Layers) -> None:
        dense = tuple(kind.dense for kind in KINDS.values())
        for name, module in self.model.named_modules():
            in_a_block = any(part.isdigit() for part in name.split("."))
            if in_a_block and is_fully_sharded(module) and isinstance(module, dense):
                raise ValueError(
                    f"fully_shard was called on {name} itself, where it can't be exchanged: call it on the blocks that hold "
                    "the layers"
                )
        for name, layer in layers.items():
            if id(layer.weight) not in self._places:
                raise ValueError(f"{name}.weight is not held by fully_shard (ignored_params): exclude this layer")
            _, entry = self._places[id(layer.weight)]
            if entry.is_dtensor:
                raise ValueError(f"{name}.weight is tensor parallel besides fully_shard, which is not supported")
            if entry.fsdp_placement.dim != 0:
                raise ValueError(
                    f"{name}.weight is sharded along dimension {entry.fsdp_placement.dim} (shard_placement_fn), and only 0 is "
                    "supported: exclude this layer"
                )
            if hasattr(entry._sharded_local_tensor, "fsdp_pre_all_gather"):
                raise ValueError(f"{name}.weight brings its own all-gather (a float8 weight?): exclude this layer")

    def reshard(self) -> None:
        """Let every module hold its shards: an evaluation leaves the outermost block's weights whole."""
        for module in self._roots:
            module.reshard()  # type: ignore[operator]

    def from_main(self, layers: Layers, function: Callable[[Layers], T]) -> T:
        """As of `ShardedEngine`, with every module holding its shards."""
        self.reshard()
        return super().from_main(layers, function)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a tensor. Raises OtherProcessError where another process has failed meanwhile, and would not answer."""
        self.processes.agree()
        return whole(tensor)

    def change(self, plan: Mapping[str, int], factors: Mapping[str, Factors], mode: str) -> tuple[Change, list[Edit]]:
        placing = PlaceShards(self._places)
        change = make_change(
            self.model,
            plan,
            self.optimizer,
            factors=factors,
            optimizer_state=mode,
            place=placing.place,
            gather=self.whole,
        )
        return change, [*self.edits(change), placing]

    @classmethod
    def checkpoint_files(cls, folder: Path, processes: int) -> tuple[list[str], str | None] | None:
        """Of folders of shards."""
        parts = [d for d in folder.iterdir() if d.is_dir() and d.name.startswith(("pytorch_model_fsdp", "optimizer_"))]
        # torch.distributed.checkpoint writes .metadata last
        lack = next((f"{part.name} holds no .metadata" for part in parts if not (part / ".metadata").is_file()), None)
        return (["scheduler.pt"], lack) if parts else None

    def check_replicas(self, when: str) -> None:
        """Copies of a shard (HSDP) must have the same bits, too."""
        self.reshard()
        shapes = self.processes.gather([(n, tuple(p.shape)) for n, p in self.model.named_parameters()])
        wrong = [f"other parameters on process {r}" for r, theirs in enumerate(shapes) if theirs != shapes[0]]
        if not wrong:
            copies: dict[int, tuple[Any, dict[str, torch.Tensor]]] = {}
            for name, parameter in self.model.named_parameters():
                mesh = getattr(parameter, "device_mesh", None)
                if mesh is not None and mesh.ndim == 2:  # (copies, shards)
                    copies.setdefault(id(mesh), (mesh, {}))[1][name] = parameter.to_local()  # type: ignore[attr-defined]
            for mesh, locals_ in copies.values():
                wrong += Processes(mesh.get_group(0)).differing(locals_)
        said = [name for names in self.processes.gather(wrong) for name in names]
        if said:
            raise RuntimeError(f"{DIFFERENT} {when}: {said[0]}. {RESUME}")


class PlaceShards(Edit):
    """The factors' shards take their weights' places in fully_shard's groups; `place` each pair before.

    Args:
        places: id of a sharded parameter -> (group, entry in it); kept up to date.
    """

    def __init__(self, places: dict[int, tuple[Any, Any]]) -> None:
        self._places = places
        self._made: list[tuple[Any, Any, list[Any], Any, nn.Module]] = []
        self._before: list[tuple[Any, list[Any]]] = []
        self._moved: list[tuple[Any, Any, Any, Any]] = []

    def place(self, layer: nn.Module, pair: LowRankLayer) -> None:
        """Shard the parameters of a pair as those of the layer that it stands for are. The groups are not changed yet."""
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

        group, entry = self._places[id(layer.weight)]
        new: list[Any] = []
        for part in ("down", "up"):
            child: nn.Module = getattr(pair, part)
            made = FSDPParam(
                cast(nn.Parameter, child.weight),
                ParamModuleInfo(child, "weight"),
                entry.mesh_info if hasattr(entry, "mesh_info") else group.mesh_info,
                group.post_forward_mesh_info,
                group.device,
                None,
                group.mp_policy,
                group.offload_policy,
            )
            if entry._param_fqn is not None:
                made._param_fqn = f"{entry._param_fqn.removesuffix('weight')}{part}.weight"
            new.append(made)
        bias = None if pair.bias is None else self._places[id(pair.bias)][1]
        self._made.append((group, entry, new, bias, pair.up))

    def apply(self) -> None:
        from torch.distributed.fsdp._fully_shard._fsdp_param import ParamModuleInfo

        new_of = {id(entry): new for _, entry, new, _, _ in self._made}
        for group in {id(g): g for g, *_ in self._made}.values():
            self._before.append((group, group.fsdp_params))
            group.fsdp_params = [q for p in group.fsdp_params for q in new_of.get(id(p), [p])]
            group._init_mp_dtypes()
        for _, _, _, bias, up in self._made:
            if bias is not None:
                handle = up.register_load_state_dict_post_hook(_reset(bias))
                self._moved.append((bias, bias._module_info, bias._post_load_hook_handle, handle))
                bias._module_info, bias._post_load_hook_handle = ParamModuleInfo(up, "bias"), handle

    def undo(self) -> None:
        """Put the groups back as they were."""
        for group, entries in self._before:
            group.fsdp_params = entries
        for bias, info, hook, handle in self._moved:
            handle.remove()
            bias._module_info, bias._post_load_hook_handle = info, hook
        self._clear()

    def finish(self) -> None:
        """Let go of what belonged to the old parameters."""
        for _, _, hook, _ in self._moved:
            hook.remove()
        for group, entry, new, _, _ in self._made:
            del self._places[id(entry.sharded_param)]
            self._places.update({id(made.sharded_param): (group, made) for made in new})
        for group in {id(g): g for g, *_ in self._made}.values():
            _register_anew(group)
        self._clear()

    def _clear(self) -> None:
        for entries in (self._made, self._before, self._moved):
            entries.clear()


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was called on this very module."""
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def _groups(module: nn.Module) -> list[Any]:
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [g for g in [getattr(state, "_fsdp_param_group", None)] if g is not None]
    needed = ("fsdp_params", "mesh_info", "mp_policy", "offload_policy", "post_forward_mesh_info", *_CALLED)
    for group in groups:
        missing = [name for name in needed if not hasattr(group, name)]
        for entry in getattr(group, "fsdp_params", [])[:1]:
            missing += [name for name in _OF_ENTRIES if not hasattr(entry, name)]
        if missing:
            raise ValueError(
                f"the fully_shard of torch {torch.__version__} keeps its parameters in another way than is known (no "
                f"{missing[0]}): use DDP, or torch 2.13"
            )
    return list(groups)


def _register_anew(group: Any) -> None:
    """A group's hooks for state dicts stand on the modules of its parameters, by module: on the old layers, and not on the pairs."""
    tables = [getattr(group, f"_module_to_pre_{what}_state_dict_hook_handle", {}) for what in ("save", "load")]
    if not any(tables):
        return  # they come with the first forward
    for table in tables:
        for handle in table.values():
            handle.remove()
        table.clear()
    group._register_state_dict_hooks()


_CALLED = ("_init_mp_dtypes", "_register_state_dict_hooks")
_OF_ENTRIES = ("sharded_param", "_module_info", "_post_load_hook_handle", "fsdp_placement", "is_dtensor", "_param_fqn")


def _reset(entry: Any) -> Callable[..., None]:
    return lambda *_: entry.reset_sharded_param()
