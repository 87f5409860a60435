"""Repair fully_shard (FSDP2): exchange parameters inside its groups, and give whole weights one layer at a time.

fully_shard notes each Parameter of a block in the block's group, which gathers them before the block runs and reduces
their gradients afterwards. The factors take the weight's place in the same group, on the same mesh and under the same
policies, so a step has no collective more than before. The groups are torch's own affair (tried on torch 2.13; what is
looked for and missing in another version is refused by name).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import distributed as dist
from torch import nn

from .distributed import Processes
from .layers import DENSE_TYPES, LowRankLinear

T = TypeVar("T")


class PartedModel(ABC):
    """A model of whose weights no process need hold the whole: each is gathered, used and dropped, one layer at a time."""

    fixed: ClassVar[str] = ""
    """What of the engine cannot be edited, so that the switch is by restart; nothing where it can."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.processes = Processes()
        self.counted = self.processes
        """Over which statistics are summed: those that see other batches."""

    def running(self, layers: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """The layers that run, where those given only describe them."""
        return layers

    def whole_flow(self, name: str, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """All of a layer's "input", or "output" or its gradient, (..., features), where a process sees some features alone."""
        return tensor

    @abstractmethod
    def check(self, layers: Mapping[str, nn.Module]) -> None:
        """Raises ValueError, naming the layer, for target layers that could not be exchanged. layers: name -> dense."""

    @abstractmethod
    def check_replicas(self, when: str) -> None:
        """Raises RuntimeError unless all processes have the same parameters."""

    @abstractmethod
    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a weight, detached; every process must ask at the same time."""

    def from_main(self, layers: Mapping[str, nn.Module], function: Callable[[Mapping[str, nn.Module]], T]) -> T:
        """`Processes.from_main` for a function of the layers, which see whole weights: each is gathered when it is asked for.

        The other processes take part in the gathering until the function has ended. Nobody keeps more than one weight.
        """
        processes = self.processes

        def work() -> T:
            try:
                return function(_WholeLayers(layers, processes, self.gather))
            finally:
                processes.from_main(lambda: None)  # nothing more is asked for

        if not processes.is_main:
            while (name := processes.from_main(lambda: None)) is not None:
                self.gather(cast(torch.Tensor, layers[name].weight))
        return processes.from_main(work)


class ShardedModel(PartedModel):
    """A model under fully_shard: all that the switch asks of it.

    `place` each pair, then `exchange`; `finish` or `undo` must follow.

    Raises:
        ValueError: tensor-parallel weights, weights offloaded to the CPU, a mesh that does not span all processes, or a
            fully_shard that keeps its parameters elsewhere than is known.
    """

    def __init__(self, model: nn.Module, around: list[nn.Module]) -> None:
        super().__init__(model)
        self._roots = [m for m in (*around, *model.modules()) if is_fully_sharded(m)]
        self._places: dict[int, tuple[Any, Any]] = {}
        for module in self._roots:
            for group in _groups(module):
                for entry in group.fsdp_params:
                    self._places[id(entry.sharded_param)] = (group, entry)
        self._made: list[tuple[Any, Any, list[Any], Any, nn.Linear]] = []
        self._before: list[tuple[Any, list[Any]]] = []
        self._moved: list[tuple[Any, Any, Any, Any]] = []
        self._check_groups()

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

    def check(self, layers: Mapping[str, nn.Module]) -> None:
        """Raises ValueError, naming the layer, for target layers whose shards could not be exchanged. layers: name -> dense."""
        self.reshard()
        for name, module in self.model.named_modules():
            in_a_block = any(part.isdigit() for part in name.split("."))
            if in_a_block and is_fully_sharded(module) and isinstance(module, tuple(DENSE_TYPES.values())):
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

    def from_main(self, layers: Mapping[str, nn.Module], function: Callable[[Mapping[str, nn.Module]], T]) -> T:
        """As of `PartedModel`, with every module holding its shards."""
        self.reshard()
        return super().from_main(layers, function)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a tensor, detached; every process must ask at the same time."""
        return whole(tensor)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a tensor. Raises OtherProcessError where another process has failed meanwhile, and would not answer."""
        self.processes.agree()
        return whole(tensor)

    def place(self, layer: nn.Module, pair: LowRankLinear) -> None:
        """Shard the parameters of a pair as those of the layer that it stands for are. The groups are not changed yet."""
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

        group, entry = self._places[id(layer.weight)]
        new: list[Any] = []
        for part in ("down", "up"):
            child: nn.Linear = getattr(pair, part)
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

    def exchange(self) -> None:
        """Put the factors of all pairs that were placed into the groups, where their weights were."""
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
        self._clear()

    def _clear(self) -> None:
        for entries in (self._made, self._before, self._moved):
            entries.clear()

    def check_replicas(self, when: str) -> None:
        """Raises RuntimeError unless all processes have the same parameters, and copies of a shard (HSDP) the same bits."""
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
            raise RuntimeError(
                f"the processes hold different parameters {when}: {said[0]}. Training on would go wrong in silence; resume "
                "from the last checkpoint"
            )


class _WholeLayers(Mapping[str, nn.Module]):
    """The main process's view: name -> a copy of the layer that holds its whole weight. The bias is left as it is."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        processes: Processes,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._layers, self._processes, self._gather = layers, processes, gather

    def __getitem__(self, name: str) -> nn.Module:
        layer = self._layers[name]
        self._processes.from_main(lambda: name)  # asks the others
        weight = self._gather(cast(torch.Tensor, layer.weight))
        view = copy.copy(layer)
        view._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        return view

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def find_sharded(model: nn.Module, live: list[nn.Module]) -> ShardedModel | None:
    """The model as fully_shard holds it; None if it does not. live: modules among which some may hold the model.

    Raises ValueError as `ShardedModel`.
    """
    around = [m for m in live if is_fully_sharded(m) and m is not model and any(i is model for i in m.modules())]
    if not around and not any(map(is_fully_sharded, model.modules())):
        return None
    return ShardedModel(model, around)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was called on this very module."""
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, detached; every process that holds a part must ask at the same time."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all hold whole, cut as `like` is; the tensor itself where that is no DTensor."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    local = tensor
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = local.chunk(mesh.size(dimension), placement.dim)
            at = mesh.get_local_rank(dimension)
            empty = local.narrow(placement.dim, 0, 0)
            local = parts[at] if at < len(parts) else empty
    return DTensor.from_local(
        local.contiguous().clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _groups(module: nn.Module) -> list[Any]:
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [g for g in [getattr(state, "_fsdp_param_group", None)] if g is not None]
    needed = ("fsdp_params", "mesh_info", "mp_policy", "offload_policy", "post_forward_mesh_info", "_init_mp_dtypes")
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


_OF_ENTRIES = ("sharded_param", "_module_info", "_post_load_hook_handle", "fsdp_placement", "is_dtensor", "_param_fqn")


def _reset(entry: Any) -> Callable[..., None]:
    return lambda *_: entry.reset_sharded_param()
