"""The switch by restart, for an engine that cannot be edited: a checkpoint of the factorized model that it can resume.

`LowRankCheckpoint` is what such engines have in common; what is FSDP1's is in `flattened`, and DeepSpeed's is here.

DeepSpeed divides flat copies of weights and optimizer state among the processes when it is built, and resumes only from such
partitions; those of the full-rank phase do not fit the factors. So a second engine is built around a factorized copy of the
model, gets weights and projected state one parameter at a time, and saves. What it saves takes the place of what the first
engine has saved of the same step. Tried with deepspeed 0.19.8; nothing here is imported unless it is in use.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from . import optimizer as optimizers
from .checkpoints import is_weights_file
from .factorization import Factors
from .layers import DenseLayer, LowRankLinear, dense_origin, is_divided
from .partitions import FlatPartitions, ParameterPartitions, Partitions, gathered
from .patching import factorize
from .plan import RankPlan
from .report import FactorizationReport
from .sharding import PartedModel
from .switch import all_know
from .wrapper import check_synchronized

logger = logging.getLogger(__name__)

STAGING = ".cuttlefish_low_rank"
"""Folder inside a checkpoint in which the low-rank form is written before anything is exchanged."""
FULL_RANK_STATE = f"{TRAINER_STATE_NAME}.full_rank"
"""Where trainer_state.json is during the exchange: a folder without it is no checkpoint."""
_NOT_COPIED = ("optimizer", "scheduler", "flops_profiler", "tensorboard", "wandb", "comet", "csv_monitor")
"""Parts of DeepSpeed's config that the second engine, which never steps, does without."""


class DeepSpeedModel(PartedModel):
    """A model under DeepSpeed ZeRO-1, 2 or 3: all that the switch asks of it. Weights are the fp32 ones that it updates.

    Raises:
        ValueError: another stage, offloading, model or sequence parallelism, experts, an optimizer of another layout, or a
            checkpoint engine that does not write where the others look; what it is is named.
    """

    fixed = "DeepSpeed's partitions"

    def __init__(self, model: nn.Module, engine: Any) -> None:
        super().__init__(model)
        self.engine = engine
        self.optimizer = engine.optimizer
        stage = int(engine.zero_optimization_stage())
        kind = type(self.optimizer).__name__
        settings = engine._config
        unsupported = {
            f"ZeRO stage {stage}": stage not in (1, 2, 3),
            "offloading of the optimizer": bool(
                getattr(self.optimizer, "cpu_offload", False) or getattr(self.optimizer, "offload_optimizer", False)
            ),
            "offloading of the parameters": engine.zero_offload_param() is not None
            and engine.zero_offload_param().device != "none",
            "zero_hpz_partition_size": engine.zero_hpz_partition_size() > 1,
            f"{kind}": kind not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"),
            "model parallelism": engine.mp_world_size > 1 or engine.autotp_size() > 1,
            "sequence parallelism": engine.sequence_parallel_size > 1,
            "experts": engine.has_moe_layers,
            "use_node_local_storage": settings.use_node_local_storage,
            "load_universal": settings.load_universal_checkpoint,
            "a checkpoint engine that writes later": engine.checkpoint_engine.is_decoupled(),
        }
        for what, is_on in unsupported.items():
            if is_on:
                raise ValueError(
                    f"DeepSpeed with {what} is not supported: use ZeRO-1, 2 or 3 without it, FSDP2 (fsdp_version: 2) or DDP"
                )
        self.partitions = partitions_of(engine)

    @property
    def loss_scale(self) -> float:
        """By how much the engine multiplies the loss at backward: fp16's scale, else 1. (Trainer divides the loss by the
        accumulation steps itself, and tells the engine not to.)"""
        return float(self.optimizer.loss_scale)

    def check(self, layers: Mapping[str, nn.Module]) -> None:
        """Raises ValueError, naming the layer, for a trainable weight that the engine does not train."""
        held = {id(p) for group in self.partitions.groups for p in group}
        for name, layer in layers.items():
            weight = cast(nn.Parameter, layer.weight)
            if weight.requires_grad and id(weight) not in held:
                raise ValueError(
                    f"the optimizer does not hold {name}.weight, which DeepSpeed trains not: freeze it with "
                    "requires_grad_(False), or give it to the optimizer before the engine is built"
                )

    def check_replicas(self, when: str) -> None:
        """Raises RuntimeError unless all processes hold the same weights; of ZeRO-3 each has others, of the same shapes."""
        if isinstance(self.partitions, FlatPartitions):
            check_synchronized(None, self.model, self.processes, when)
            return
        shapes = self.processes.gather([(n, tuple(p.ds_shape)) for n, p in self.model.named_parameters()])  # type: ignore[attr-defined]
        if any(theirs != shapes[0] for theirs in shapes):
            raise RuntimeError(f"the processes hold different parameters {when}; resume from the last checkpoint")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole weight in fp32; a frozen one as it is."""
        return self.partitions.weight(tensor)

    def whole_copy(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight as the model computes with it, a copy; under ZeRO-3 in the memory of the host."""
        return gathered(parameter).cpu() if is_divided(parameter) else parameter.detach().clone()


def partitions_of(engine: Any) -> Partitions:
    """The partitions of a DeepSpeed engine of stage 1, 2 or 3."""
    return (ParameterPartitions if engine.zero_optimization_stage() == 3 else FlatPartitions)(engine.optimizer)


class LowRankCheckpoint(ABC):
    """The low-rank form of a checkpoint; every process must make one and call `write` at the same time.

    Args:
        parted: the model and its engine, which stay as they are.
        factors: of the plan's layers, asked for in their order, each time anew.
        optimizer_state: "carry", or "reset", which resets all parameters.

    Attributes:
        model: the factorized copy after `write`.
    """

    mark: ClassVar[str]
    """File without which nothing can be resumed from the folder: of a loop's checkpoint it goes first and comes last."""

    def __init__(
        self, parted: PartedModel, plan: RankPlan, factors: Mapping[str, Factors], optimizer_state: str
    ) -> None:
        self.parted, self.plan, self.factors, self.optimizer_state = parted, plan, factors, optimizer_state
        self.processes = parted.processes
        self.model: nn.Module | None = None

    def write(self, folder: Path) -> FactorizationReport:
        """Exchange what the folder holds of the full-rank phase. Trainer's trainer_state.json has another name afterwards.

        Until everything is written the folder stays the checkpoint that it was, and an error leaves it so.

        Raises:
            ValueError, RuntimeError: weights that are not finite, a folder that is no checkpoint of the engine, or what
                the engine raises; on all processes.
        """
        self.model = None  # of an earlier call
        staging = folder / STAGING
        self.processes.from_main(lambda: self._make_room(folder, staging))
        try:
            try:
                model, report, state = self._write_parts(folder, staging)
                self.processes.agree()
            except Exception as error:
                if not all_know(error, self.factors):
                    self.processes.agree(error)
                raise
            report.optimizer = self.processes.from_main(lambda: self._save(folder, staging, model, report, state))
        except BaseException:
            if self.processes.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        self.processes.from_main(lambda: _exchange(folder, staging, self.mark))
        self.model = model
        return report

    def _make_room(self, folder: Path, staging: Path) -> None:
        self._check(folder)
        if staging.exists():
            shutil.rmtree(staging)

    @abstractmethod
    def _check(self, folder: Path) -> None:
        """Raises ValueError for a folder that holds no checkpoint of the engine."""

    @abstractmethod
    def _write_parts(
        self, folder: Path, staging: Path
    ) -> tuple[nn.Module, FactorizationReport, Mapping[str, torch.Tensor]]:
        """What all processes do: write into `staging` what the engine resumes from; the model and (for the main one) its weights."""

    def _save(
        self,
        folder: Path,
        staging: Path,
        model: nn.Module,
        report: FactorizationReport,
        state: Mapping[str, torch.Tensor],
    ) -> str:
        """What the main process adds: the model, as `AutoModel` loads it. Returns what became of the optimizer's state."""
        save_model(model, staging, state)
        return report.optimizer

    def _may_carry(self, unknown: Iterable[str]) -> bool:
        """Whether optimizer state is to be projected; warns of kinds that cannot be, for which all of it starts anew."""
        kinds = sorted(set(unknown))
        if kinds and self.optimizer_state == "carry" and self.processes.is_main:
            logger.warning(
                "Cuttlefish: the optimizer keeps the state %s, which has no known projection; all of its state starts anew.",
                ", ".join(kinds),
            )
        return self.optimizer_state == "carry" and not kinds

    def _outcome(self, carried: bool) -> str:
        """What the report says of the optimizer's state."""
        return f"state carried for {len(self.plan)} of {len(self.plan)} layers" if carried else "state starts anew"


class DeepSpeedCheckpoint(LowRankCheckpoint):
    """As a second engine around the factorized copy saves it. A partition has one count of steps, so "reset" is for all."""

    parted: DeepSpeedModel
    mark = "latest"

    def _check(self, folder: Path) -> None:
        if not (tag := _tag(folder)) or not (folder / tag).is_dir():
            raise ValueError(
                f"{folder} holds no checkpoint of DeepSpeed: save one there first (Trainer does; accelerator.save_state in a "
                "loop of your own), and let nothing else write or remove checkpoints"
            )

    def _write_parts(
        self, folder: Path, staging: Path
    ) -> tuple[nn.Module, FactorizationReport, Mapping[str, torch.Tensor]]:
        engine, tag = None, self.processes.from_main(lambda: _tag(folder))
        try:
            model, report, exact = self._factorized()
            self.processes.agree()
            engine = self._second_engine(model)
            self._fill(engine, model, exact, report)
            engine.save_checkpoint(str(staging), tag=tag, client_state={})
            divided = engine.zero_optimization_stage() == 3
            return model, report, engine._zero3_consolidated_16bit_state_dict() if divided else model.state_dict()
        finally:
            if engine is not None:
                engine.destroy()

    def _factorized(self) -> tuple[nn.Module, FactorizationReport, dict[str, Factors]]:
        """The factorized copy, and its factors in fp32: the copy's own may have less."""
        kept = KeptFactors(self.factors)
        of_plan = {id(self.parted.model.get_submodule(n).weight) for n in self.plan}

        def data(old: nn.Parameter) -> torch.Tensor:
            if id(old) not in of_plan:
                return self.parted.whole_copy(old)
            # The factors take its place: nothing but its shape is asked for.
            return torch.zeros((), dtype=old.dtype).expand(old.ds_shape) if is_divided(old) else old.detach()  # type: ignore[attr-defined]

        model = copy_module(self.parted.model, data)
        return model, factorize(model, self.plan, factors=kept), kept.seen

    def _second_engine(self, model: nn.Module) -> Any:
        import deepspeed  # type: ignore[import-not-found]

        first = self.parted.engine
        basic = self.parted.optimizer.optimizer
        new_of = {id(old): new for old, new, _ in self._pairs(model)}
        groups = [
            {**group, "params": [p for old in params for p in new_of[id(old)]]}
            for group, params in zip(basic.param_groups, self.parted.partitions.groups, strict=True)
        ]
        twin = object.__new__(type(basic))  # the class's own arguments need not be its defaults
        twin.__dict__.update({k: v for k, v in vars(basic).items() if k != "step"})
        twin.param_groups, twin.state = groups, defaultdict(dict)
        config = {k: v for k, v in copy.deepcopy(first.config).items() if k not in _NOT_COPIED}
        config["zero_allow_untested_optimizer"] = True
        engine, *_ = deepspeed.initialize(model=model, optimizer=twin, config=config)
        engine.lr_scheduler = first.lr_scheduler  # only to be saved; DeepSpeed's own, if it has one
        engine.optimizer.loss_scaler = self.parted.optimizer.loss_scaler
        for counter in ("global_steps", "global_samples", "skipped_steps", "micro_steps"):
            setattr(engine, counter, getattr(first, counter))
        return engine

    def _pairs(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, list[nn.Parameter], str | None]]:
        """(parameter, what stands for it in the factorized copy, the layer if it is a weight of the plan)."""
        seen: set[int] = set()
        for name, module in self.parted.model.named_modules():
            twin = model.get_submodule(name)
            for part, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if not isinstance(twin, LowRankLinear):
                    yield parameter, [cast(nn.Parameter, twin._parameters[part])], None
                elif part == "bias":
                    yield parameter, [twin.up.bias], None
                else:
                    yield parameter, [cast(nn.Parameter, twin.down.weight), cast(nn.Parameter, twin.up.weight)], name

    @torch.no_grad()
    def _fill(self, engine: Any, model: nn.Module, exact: dict[str, Factors], report: FactorizationReport) -> None:
        """Weights and optimizer state, one parameter after the other."""
        parted, first, second = self.parted, self.parted.partitions, partitions_of(engine)
        kinds = first.kinds()
        carry = self._may_carry(k for kind in kinds for k in optimizers.unknown_state(kind)) and any(kinds)
        group_of = {id(p): i for i, group in enumerate(first.groups) for p in group}
        if carry:
            second.empty_like(first, kinds)
        shifts = {
            id(layer.bias): exact[name].bias_shift
            for name in self.plan
            if (layer := cast(DenseLayer, parted.model.get_submodule(name))).bias is not None
        }
        for old, new, layer_name in self._pairs(model):
            self.processes.agree()  # one that has failed meanwhile would not answer
            weight = parted.gather(old)
            state = first.state(old, kinds[group_of[id(old)]]) if carry and id(old) in group_of else {}
            if layer_name is None:
                shift = shifts.get(id(old))
                values = [weight if shift is None else weight + shift.to(weight)]
                states = [state]
            else:
                factors = exact[layer_name]
                values = [factors.down.to(weight), factors.up.to(weight)]
                down, up = (nn.Parameter(v, requires_grad=False) for v in values)
                transposed = dense_origin(parted.model.get_submodule(layer_name)) == "Conv1D"
                pair = optimizers.FactorParameters(layer_name, old, down, up, transposed)
                states = list(optimizers.project(state, pair)) if state else [{}, {}]
            for parameter, value, own in zip(new, values, states, strict=True):
                second.write(parameter, value, own)
        report.optimizer = f"{type(parted.optimizer.optimizer).__name__} (DeepSpeed): {self._outcome(carry)}"


class KeptFactors(Mapping[str, Factors]):
    """Factors that remember, on the CPU and in fp32, what was asked for."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self._factors = factors
        self.seen: dict[str, Factors] = {}

    def __getitem__(self, name: str) -> Factors:
        found = self._factors[name]
        self.seen[name] = in_full_precision(found)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._factors

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


def in_full_precision(factors: Factors) -> Factors:
    """The factors on the CPU and in fp32."""
    parts = (factors.down, factors.up, factors.bias_shift)
    return Factors(*(None if t is None else t.to("cpu", torch.float32) for t in parts))  # type: ignore[arg-type]


def copy_module(module: nn.Module, data: Callable[[nn.Parameter], torch.Tensor]) -> nn.Module:
    """A module with parameters (of what `data` gives for each), buffers and configs of its own and no hooks."""
    return _copy(module, {}, data)


def _copy(module: nn.Module, known: dict[int, Any], data: Callable[[nn.Parameter], torch.Tensor]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = twin = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, PreTrainedConfig):
            twin.__dict__[key] = copy.deepcopy(value, known)
    bare = vars(nn.Module())
    twin.__dict__.update({key: type(value)() for key, value in bare.items() if isinstance(value, OrderedDict)})
    twin.__dict__["_parameters"] = parameters = {}
    for name, old in module._parameters.items():
        if old is not None and id(old) not in known:
            known[id(old)] = nn.Parameter(data(old), requires_grad=old.requires_grad)
        parameters[name] = None if old is None else known[id(old)]
    twin.__dict__["_buffers"] = {n: None if b is None else b.detach().clone() for n, b in module._buffers.items()}
    twin.__dict__["_modules"] = {
        n: None if child is None else _copy(child, known, data) for n, child in module._modules.items()
    }
    return twin


def _tag(folder: Path) -> str:
    """Name of DeepSpeed's part of a checkpoint; empty where there is none."""
    latest = folder / "latest"
    return latest.read_text("utf-8").strip() if latest.is_file() else ""


def save_model(model: nn.Module, staging: Path, state: Mapping[str, torch.Tensor]) -> None:
    """As `save_pretrained` does, or for what is no transformer as Trainer does."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    if hasattr(model, "save_pretrained"):
        cast(PreTrainedModel, model).save_pretrained(staging, state_dict=state)
    else:
        from safetensors.torch import save_file

        save_file(state, staging / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def _exchange(folder: Path, staging: Path, mark: str) -> None:
    """The folder's weights and partitions go, the new ones come.

    From the first line on it is no checkpoint: without trainer_state.json, which the caller puts back, or else without the
    engine's `mark`, which comes last.
    """
    by_trainer = (folder / TRAINER_STATE_NAME).is_file()
    if by_trainer:
        os.replace(folder / TRAINER_STATE_NAME, folder / FULL_RANK_STATE)
    else:
        (folder / mark).unlink()
    for old in folder.iterdir():
        if is_weights_file(old.name):
            old.unlink()
    for new in sorted(staging.iterdir(), key=lambda path: path.name == mark):
        old = folder / new.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(new, old)
    staging.rmdir()
