"""FSDP1: what the switch asks of a model whose parameters are flattened, and the checkpoint that it resumes from.

FullyShardedDataParallel lays the parameters of a block end to end when it is built and gives each process a piece of that; the
layers keep views, or nothing. So the model is described beside it: the same modules without the wrappers, the same names, and
parameters that have a shape and no values. A weight is put together from the processes' pieces when it is asked for.

What FSDP1 saves as FULL_STATE_DICT goes by names. So the checkpoint of the switch is rewritten, layer by layer, and no second
engine is needed. Where the pieces lie is torch's own affair (run on torch 2.13).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import distributed as dist
from torch import nn

from ..config import CuttlefishConfig
from ..layers.kinds import is_dense, kind_of
from ..layers.low_rank import LowRankLayer
from ..layers.sizes import WRAPPERS, plain_name
from ..maths.factors import Factors
from ..maths.projection import project, unknown_state
from ..patch.modules import carry_out, make_change
from ..patch.report import FactorizationReport
from ..patch.twins import copy_module, copy_tree
from ..processes import Processes, is_distributed
from .around import Around, is_unit
from .base import Engine, Layers, check_same_shapes, refuse
from .restart import KeptFactors, LowRankCheckpoint, RestartEngine, save_model

WEIGHTS_FILE, OPTIMIZER_FILE = f"{FSDP_MODEL_NAME}.bin", f"{OPTIMIZER_NAME}.bin"


_FLAT = "_flat_param"
"""Under which name a flat parameter is registered with use_orig_params=False."""


Place = tuple[Any, int]
"""A flat parameter, and which of the parameters in it."""


class FSDP1(RestartEngine):
    """A model under FSDP1. Weights are those that the optimizer updates.

    Args:
        described: the model. units: all FSDP1 modules. optimizer: the one that trains them.
    """

    fixed = "FSDP1's flat parameters"

    def __init__(self, described: Description, units: list[nn.Module], optimizer: Any) -> None:
        super().__init__(described.model, optimizer)
        self._places, self._live, self._units = described.places, described.live, cast(list[Any], units)

    @classmethod
    def find(cls, around: Around, optimizer: Any) -> Engine | None:
        units = find_units(around) if is_distributed() else []
        if not units:
            return None
        described = describe(around.model, units)
        # Of a model that is factorized already nothing will be changed, so any engine is fine.
        return Engine(described.model, optimizer) if around.is_factorized else cls(described, units, optimizer)

    def check(self, layers: Layers, config: CuttlefishConfig, can_restart: bool = False) -> None:
        """Raises ValueError, naming it, for what could not be switched.

        That is: a sharding strategy by which each process has not one piece of each parameter, weights offloaded to the CPU, a
        group that is not of all processes, or a trainable weight that FSDP1 or the optimizer does not hold.
        """
        super().check(layers, config, can_restart)
        for unit in self._units:
            strategy = unit.sharding_strategy.name
            unsupported = {
                f"the sharding strategy {strategy}": strategy not in ("FULL_SHARD", "SHARD_GRAD_OP"),
                "weights offloaded to the CPU (cpu_offload)": unit.cpu_offload.offload_params,
                f"a group of {unit.world_size} of {dist.get_world_size()} processes": unit.world_size
                != dist.get_world_size(),
            }
            refuse(
                "FSDP1", unsupported, "FULL_SHARD or SHARD_GRAD_OP over all processes, FSDP2 (fsdp_version: 2) or DDP"
            )
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, layer in layers.items():
            weight = cast(nn.Parameter, layer.weight)
            if id(weight) not in self._places:
                raise ValueError(f"{name}.weight is not held by FSDP1 (ignored_modules): exclude this layer")
            flat, index = self._places[id(weight)]
            if weight.requires_grad and id(flat._params[index] if flat._params else flat) not in held:
                raise ValueError(
                    f"the optimizer does not hold {name}.weight, so FSDP1 does not train it: make the optimizer from the model that "
                    "FSDP1 has wrapped, or exclude this layer"
                )

    def check_saving(self, args: Any) -> None:
        super().check_saving(args)
        check_saved_form(AcceleratorState().fsdp_plugin)

    def check_replicas(self, when: str) -> None:
        """Each process has its own piece: names and shapes alone can be compared."""
        check_same_shapes(self.processes, [(n, tuple(p.shape)) for n, p in self.model.named_parameters()], when)

    def taps(self, layers: Layers) -> Layers:
        """The layers that run, for those that describe them."""
        return {name: self._live[id(layer)] for name, layer in layers.items()}

    def checkpoint(self, *given: Any, **named: Any) -> FSDP1Checkpoint:
        return FSDP1Checkpoint(self, *given, **named)

    @classmethod
    def checkpoint_files(cls, folder: Path, processes: int) -> tuple[list[str], str | None] | None:
        """Of FULL_STATE_DICT."""
        return ([WEIGHTS_FILE, OPTIMIZER_FILE, "scheduler.pt"], None) if (folder / WEIGHTS_FILE).exists() else None

    @classmethod
    def before_loading(cls, model: nn.Module, state: dict[str, torch.Tensor], prefix: str) -> bool:
        """Weights are loaded into the wrappers, whose structure is fixed."""
        if not prefix.endswith(f"{WRAPPERS[0]}."):
            return False
        check_structure(model, [key.removeprefix(prefix) for key in state if key.startswith(prefix)])
        return True

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a parameter of the described model; every process must ask at the same time."""
        if id(tensor) not in self._places:
            return tensor.detach()
        flat, index = self._places[id(tensor)]
        piece = flat._shard_param_infos[index]
        shard = cast(torch.Tensor, getattr(flat, "_local_shard", flat)).detach()  # set when FSDP1 first runs
        whole = torch.zeros(flat._numels[index], dtype=shard.dtype, device=shard.device)
        if piece.in_shard:
            here = slice(piece.intra_param_start_idx, piece.intra_param_end_idx + 1)
            whole[here] = shard[piece.offset_in_shard : piece.offset_in_shard + piece.numel_in_shard]
        self.processes.sum_(whole)
        return whole.as_strided(flat._shapes[index], flat._strides[index])


def find_units(around: Around) -> list[nn.Module]:
    """All FSDP1 modules around or inside the model; none if FSDP1 does not hold it.

    Raises ValueError for one that keeps its parameters elsewhere than is known.
    """
    found = [m for m in (*around.wrappers, *around.model.modules()) if is_unit(m)]
    units = list({id(m): m for m in found}.values())
    for flat in _flats(units):
        missing = [name for name in _OF_FLATS if not hasattr(flat, name)]
        if missing:
            raise ValueError(
                f"the FSDP1 of torch {torch.__version__} keeps its parameters in another way than is known (no {missing[0]}): "
                "use FSDP2 (fsdp_version: 2), DDP, or torch 2.13"
            )
    return units


@dataclass
class Description:
    """A model without FSDP1's wrappers, beside the one that runs.

    Hooks set on its modules fire, since each shares its dictionaries of hooks with the one that it describes.

    Attributes:
        model: modules with the same names, and parameters without values.
        live: id of such a module -> the module that runs, or the wrapper of it alone: weights are whole when that is called.
        places: id of such a parameter -> where its pieces lie.
    """

    model: nn.Module
    live: dict[int, nn.Module]
    places: dict[int, Place]


def describe(model: nn.Module, units: list[nn.Module]) -> Description:
    """Describe a model that FSDP1 holds. units: all FSDP1 modules around or inside it."""
    made: dict[int, dict[str, nn.Parameter]] = defaultdict(dict)
    places: dict[int, Place] = {}
    for flat in _flats(units):
        originals = flat._params or [flat] * flat._num_params
        zero = torch.zeros((), dtype=flat.dtype, device=flat.device)
        for index, (info, shape) in enumerate(zip(flat._param_infos, flat._shapes, strict=True)):
            # A matrix is one number, however large; a bias, to which a shift may be added, has its own.
            values = zero.expand(shape) if len(shape) > 1 else zero.repeat(shape)
            parameter = nn.Parameter(values, requires_grad=originals[index].requires_grad)
            made[id(info.module)][info.param_name] = parameter
            places[id(parameter)] = flat, index
        for info in flat._shared_param_infos:
            made[id(info.module)][info.param_name] = made[id(info.prim_module)][info.prim_param_name]
    live: dict[int, nn.Module] = {}

    def change(outer: nn.Module, twin: nn.Module) -> None:
        module = _inside(outer)
        live[id(twin)] = outer
        flattened = made.get(id(module), {})
        for name in flattened:
            twin.__dict__.pop(name, None)  # the view
        others = {n: p for n, p in module._parameters.items() if n not in flattened and n != _FLAT}
        twin.__dict__["_parameters"] = flattened | others

    return Description(copy_tree(model, change, _inside), live, places)


def _inside(module: nn.Module) -> nn.Module:
    """What FSDP1's wrappers, if any, are around."""
    while inner := next((module._modules[name] for name in WRAPPERS if name in module._modules), None):
        module = inner
    return module


def check_structure(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError unless weights of these names, about to be loaded, have the factorized layers that the model has."""
    here = {plain_name(n): m for n, m in model.named_modules()}
    own = {name for name, module in here.items() if isinstance(module, LowRankLayer)}
    could = {name for name, module in here.items() if name in own or is_dense(module)}
    given = set(names)
    loaded = {name for name in could if {f"{name}.down.weight", f"{name}.up.weight"} <= given}
    if own != loaded:
        raise ValueError(
            f"the weights to be loaded have {len(loaded)} factorized layers and the model {len(own)}, and FSDP1 has fixed its "
            "structure: give --resume_from_checkpoint as a training argument, so that the model is factorized before"
        )


def check_saved_form(plugin: Any) -> None:
    """Raises ValueError unless Accelerate saves FSDP1's state in a form from which the run can go on. plugin: its own."""
    form = plugin.state_dict_type.name
    if form != "FULL_STATE_DICT":
        raise ValueError(
            f"FSDP1's state_dict_type is {form}, from which a run cannot go on (Accelerate 1.15 does not load the optimizer's "
            "state from SHARDED_STATE_DICT, without a word): set it to FULL_STATE_DICT, or use FSDP2 (fsdp_version: 2)"
        )


class FSDP1Checkpoint(LowRankCheckpoint):
    """FSDP1's: the main process rewrites the files of weights and of optimizer state, both whole and by name."""

    engine: FSDP1
    mark = OPTIMIZER_FILE
    _exact: dict[str, Factors]

    def _check(self, folder: Path) -> None:
        for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} holds no checkpoint of FSDP1 ({name} is missing): save one there first (Trainer does; "
                    "accelerator.save_state in a loop of your own), and let nothing else write or remove checkpoints"
                )

    def _write_parts(
        self, folder: Path, staging: Path
    ) -> tuple[nn.Module, FactorizationReport, Mapping[str, torch.Tensor]]:
        kept = KeptFactors(self.factors)
        model = copy_module(self.engine.model, lambda old: old.detach() if old.ndim > 1 else old.detach().clone())
        change = make_change(model, self.plan, factors=kept)
        report = carry_out(change, change.edits(), Processes.alone())
        self._exact = kept.seen  # the copy's own factors may have less than fp32
        return model, report, {}

    def _save(
        self,
        folder: Path,
        staging: Path,
        model: nn.Module,
        report: FactorizationReport,
        state: Mapping[str, torch.Tensor],
    ) -> str:
        staging.mkdir()
        exact = self._exact
        dense = torch.load(folder / WEIGHTS_FILE, map_location="cpu", mmap=True, weights_only=True)
        missing = [name for name in self.plan if f"{name}.weight" not in dense]
        if missing:
            raise ValueError(f"{folder / WEIGHTS_FILE} holds no {missing[0]}.weight: is it of another model?")
        weights = _low_rank_weights(dense, exact)
        torch.save(weights, staging / WEIGHTS_FILE)
        save_model(model, staging, weights)
        saved = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", mmap=True, weights_only=True)
        carry = self._may_carry(k for own in saved["state"].values() for k in unknown_state(own))
        states = dict(self._states(saved["state"], exact)) if carry else {}
        saved |= {"state": states, "param_groups": self._groups(self.rate.groups(saved["param_groups"]))}
        torch.save(saved, staging / OPTIMIZER_FILE)
        return f"FSDP1: {self._outcome(bool(states))}"

    def _states(
        self, saved: Mapping[str, dict[str, Any]], exact: Mapping[str, Factors]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """State by the names of the factorized model."""
        for key, state in saved.items():
            name, _, part = key.rpartition(".")
            new = self._names(key)
            if name in exact and part == "weight":
                kind = kind_of(self.engine.model.get_submodule(name))
                yield from zip(new, project(state, *kind.tensors(exact[name]), kind), strict=True)
            else:
                yield new[0], state

    def _groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**group, "params": [new for key in group["params"] for new in self._names(key)]} for group in groups]

    def _names(self, key: str) -> list[str]:
        """What stands for a parameter in the factorized model."""
        name, _, part = key.rpartition(".")
        if name not in self.plan:
            return [key]
        return [f"{name}.down.weight", f"{name}.up.weight"] if part == "weight" else [f"{name}.up.{part}"]


def _low_rank_weights(dense: Mapping[str, torch.Tensor], exact: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in dense.items():
        name, _, part = key.rpartition(".")
        if name not in exact:
            found[key] = value
        elif part == "weight":
            found[f"{name}.down.weight"] = exact[name].down.to(value.dtype)
            found[f"{name}.up.weight"] = exact[name].up.to(value.dtype)
        else:
            shift = exact[name].bias_shift
            found[f"{name}.up.{part}"] = value if shift is None else value + shift.to(value.dtype)
    return found


def _flats(units: list[nn.Module]) -> Iterator[Any]:
    for unit in units:
        handle = cast(Any, unit)._handle
        if handle is not None:
            yield handle.flat_param


_OF_FLATS = (
    "_num_params",
    "_params",
    "_param_infos",
    "_shared_param_infos",
    "_shapes",
    "_strides",
    "_numels",
    "_shard_param_infos",
)
