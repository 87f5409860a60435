"""DeepSpeed: whole weights one at a time, and a second engine that saves the low-rank checkpoint.

DeepSpeed shards flat copies of weights and optimizer state among the processes when it is built, and resumes only from such
partitions; those of the full-rank phase do not fit the factors. So a second engine is built around a factorized copy of the
model, gets weights and projected state one parameter at a time, and saves. What it saves takes the place of what the first
engine has saved of the same step. Tried with deepspeed 0.19.8; nothing here is imported unless it is in use.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..config import CuttlefishConfig
from ..layers.kinds import kind_of
from ..layers.low_rank import LowRankLayer
from ..layers.parts import is_empty_between_uses, shape_of
from ..maths.factors import Factors
from ..maths.projection import project, unknown_state
from ..patch.modules import carry_out, make_change
from ..patch.report import FactorizationReport
from ..patch.twins import copy_module
from ..processes import Processes, is_distributed
from .around import Around
from .base import Engine, Layers, check_same_bits, check_same_shapes, refuse
from .deepspeed_partitions import FlatPartitions, ParameterPartitions, Partitions, gathered
from .files import weights_files
from .restart import KeptFactors, LowRankCheckpoint, RestartEngine

_NOT_COPIED = ("optimizer", "scheduler", "flops_profiler", "tensorboard", "wandb", "comet", "csv_monitor")
"""Parts of DeepSpeed's config that the second engine, which never steps, does without."""


class DeepSpeed(RestartEngine):
    """A model under DeepSpeed ZeRO-1, 2 or 3. Weights are the fp32 ones that it updates.

    Attributes:
        deepspeed: its engine. zero: its optimizer.
    """

    fixed = "DeepSpeed's partitions"

    def __init__(self, model: nn.Module, engine: Any, optimizer: Any = None) -> None:
        super().__init__(model, optimizer)
        self.deepspeed, self.zero = engine, engine.optimizer
        self.saves_scheduler = engine.lr_scheduler is not None

    @classmethod
    def find(cls, around: Around, optimizer: Any) -> Engine | None:
        """Raises ValueError where a DeepSpeed engine is around the model that steps another optimizer."""
        if not is_distributed():
            return None
        engines: list[Any] = [w for w in around.wrappers if type(w).__name__ == "DeepSpeedEngine"]
        # Of a model that is factorized already nothing will be changed, so any engine is fine.
        if around.is_factorized:
            return Engine(around.model, optimizer) if engines else None
        inner = getattr(optimizer, "optimizer", optimizer)
        mine = [engine for engine in engines if engine.optimizer is inner]
        if engines and not mine:
            raise ValueError(
                f"a DeepSpeed engine is around this {type(around.model).__name__}, and it steps another optimizer than the one "
                "given: pass the optimizer that deepspeed.initialize or accelerator.prepare returned"
            )
        return cls(around.model, mine[0], optimizer) if mine else None

    def check(self, layers: Layers, config: CuttlefishConfig, can_restart: bool = False) -> None:
        """Raises ValueError, naming it, for what could not be switched.

        That is: another stage, offloading, model or sequence parallelism, experts, an optimizer of another layout, a checkpoint
        engine that does not write where the others look, or a trainable weight that the engine does not train.
        """
        super().check(layers, config, can_restart)
        refuse("DeepSpeed", self._unsupported(), "ZeRO-1, 2 or 3 without it, FSDP2 (fsdp_version: 2) or DDP")
        self.partitions = partitions_of(self.deepspeed)
        held = {id(p) for group in self.partitions.groups for p in group}
        for name, layer in layers.items():
            weight = cast(nn.Parameter, layer.weight)
            if weight.requires_grad and id(weight) not in held:
                raise ValueError(
                    f"the optimizer does not hold {name}.weight, so DeepSpeed does not train it: give it to the optimizer before "
                    "the engine is built, or exclude this layer"
                )

    def _unsupported(self) -> dict[str, bool]:
        engine, zero = self.deepspeed, self.zero
        stage, kind = int(engine.zero_optimization_stage()), type(zero).__name__
        return {
            f"ZeRO stage {stage}": stage not in (1, 2, 3),
            "offloading of the optimizer": bool(
                getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)
            ),
            "offloading of the parameters": engine.zero_offload_param() is not None
            and engine.zero_offload_param().device != "none",
            "zero_hpz_partition_size": engine.zero_hpz_partition_size() > 1,
            f"{kind}": kind not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"),
            "model parallelism": engine.mp_world_size > 1 or engine.autotp_size() > 1,
            "sequence parallelism": engine.sequence_parallel_size > 1,
            "experts": engine.has_moe_layers,
            "use_node_local_storage": engine._config.use_node_local_storage,
            "load_universal": engine._config.load_universal_checkpoint,
            "a checkpoint engine that writes later": engine.checkpoint_engine.is_decoupled(),
        }

    def rated(self, scheduler: Any) -> tuple[Any, Any]:
        """The optimizer inside ZeRO's. A scheduler that DeepSpeed steps drives it, whichever was given."""
        return self.zero.optimizer, self.deepspeed.lr_scheduler or scheduler

    def loss_scale(self, scaler: Any = None) -> float:
        """fp16's scale, else 1. (Trainer divides the loss by the accumulation steps itself, and tells the engine not to.)"""
        return float(self.zero.loss_scale)

    def check_replicas(self, when: str) -> None:
        """Of ZeRO-3 each process has other parts of the weights, of the same shapes."""
        if isinstance(self.partitions, FlatPartitions):
            check_same_bits(self.processes, dict(self.model.named_parameters()), when)
        else:
            check_same_shapes(self.processes, [(n, tuple(shape_of(p))) for n, p in self.model.named_parameters()], when)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole weight in fp32; a frozen one as it is."""
        return self.partitions.weight(tensor)

    def whole_copy(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight as the model computes with it, a copy; under ZeRO-3 in the memory of the host."""
        return gathered(parameter).cpu() if is_empty_between_uses(parameter) else parameter.detach().clone()

    def checkpoint(self, *given: Any, **named: Any) -> DeepSpeedCheckpoint:
        return DeepSpeedCheckpoint(self, *given, **named)

    @classmethod
    def checkpoint_files(cls, folder: Path, processes: int) -> tuple[list[str], str | None] | None:
        return _files(folder, processes) if any(folder.glob("global_step*")) else None

    @classmethod
    def check_loaded(cls, name: str, layer: nn.Module, part: str) -> bool:
        """What ZeRO-3 loads tells no shapes, and the structure is fixed."""
        if not is_empty_between_uses(next(layer.parameters())):
            return False
        if isinstance(layer, LowRankLayer) is (part == "dense"):
            kinds = ("dense", "factorized") if part == "dense" else ("factorized", "dense")
            raise ValueError(
                f"{name} is {kinds[0]} in the checkpoint and {kinds[1]} in the model, whose parameters DeepSpeed ZeRO-3 has sharded: "
                "resume with --resume_from_checkpoint as a training argument, so that CuttlefishCallback can change the model before"
            )
        return True


def partitions_of(engine: Any) -> Partitions:
    """The partitions of a DeepSpeed engine of stage 1, 2 or 3."""
    return (ParameterPartitions if engine.zero_optimization_stage() == 3 else FlatPartitions)(engine.optimizer)


class DeepSpeedCheckpoint(LowRankCheckpoint):
    """As a second engine around the factorized copy saves it. A partition has one count of steps, so "reset" is for all."""

    engine: DeepSpeed
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
            sharded = engine.zero_optimization_stage() == 3
            return model, report, engine._zero3_consolidated_16bit_state_dict() if sharded else model.state_dict()
        finally:
            if engine is not None:
                engine.destroy()

    def _factorized(self) -> tuple[nn.Module, FactorizationReport, dict[str, Factors]]:
        """The factorized copy, and its factors in fp32: the copy's own may have less."""
        kept = KeptFactors(self.factors)
        of_plan = {id(self.engine.model.get_submodule(n).weight) for n in self.plan}

        def data(old: nn.Parameter) -> torch.Tensor:
            if id(old) not in of_plan:
                return self.engine.whole_copy(old)
            # The factors take its place: nothing but its shape is asked for.
            return (
                torch.zeros((), dtype=old.dtype).expand(shape_of(old)) if is_empty_between_uses(old) else old.detach()
            )

        model = copy_module(self.engine.model, data)
        change = make_change(model, self.plan, factors=kept)
        return model, carry_out(change, change.edits(), Processes.alone()), kept.seen

    def _second_engine(self, model: nn.Module) -> Any:
        import deepspeed  # type: ignore[import-not-found]

        first = self.engine.deepspeed
        basic = self.engine.zero.optimizer
        new_of = {id(old): new for old, new, _ in self._pairs(model)}
        groups = [
            {**group, "params": [p for old in params for p in new_of[id(old)]]}
            for group, params in zip(self.rate.groups(basic.param_groups), self.engine.partitions.groups, strict=True)
        ]
        twin = object.__new__(type(basic))  # the class's own arguments need not be its defaults
        twin.__dict__.update({k: v for k, v in vars(basic).items() if k != "step"})
        twin.param_groups, twin.state = groups, defaultdict(dict)
        config = {k: v for k, v in copy.deepcopy(first.config).items() if k not in _NOT_COPIED}
        config["zero_allow_untested_optimizer"] = True
        engine, *_ = deepspeed.initialize(model=model, optimizer=twin, config=config)
        if first.lr_scheduler is not None:  # DeepSpeed's own, or one that was given to it: only to be saved
            engine.lr_scheduler = self.rate.scheduler(first.lr_scheduler)
        engine.optimizer.loss_scaler = self.engine.zero.loss_scaler
        for counter in ("global_steps", "global_samples", "skipped_steps", "micro_steps"):
            setattr(engine, counter, getattr(first, counter))
        return engine

    def _pairs(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, list[nn.Parameter], str | None]]:
        """(parameter, what stands for it in the factorized copy, the layer if it is a weight of the plan)."""
        seen: set[int] = set()
        for name, module in self.engine.model.named_modules():
            twin = model.get_submodule(name)
            for part, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if not isinstance(twin, LowRankLayer):
                    yield parameter, [cast(nn.Parameter, twin._parameters[part])], None
                elif part == "bias":
                    yield parameter, [cast(nn.Parameter, twin.bias)], None
                else:
                    yield parameter, list(twin.factors), name

    @torch.no_grad()
    def _fill(self, engine: Any, model: nn.Module, exact: dict[str, Factors], report: FactorizationReport) -> None:
        """Weights and optimizer state, one parameter after the other."""
        first, second = self.engine.partitions, partitions_of(engine)
        kinds = first.kinds()
        carry = self._may_carry(k for kind in kinds for k in unknown_state(kind)) and any(kinds)
        group_of = {id(p): i for i, group in enumerate(first.groups) for p in group}
        if carry:
            second.empty_like(first, kinds)
        shifts = {
            id(layer.bias): exact[name].bias_shift
            for name in self.plan
            if (layer := self.engine.model.get_submodule(name)).bias is not None
        }
        for old, new, layer_name in self._pairs(model):
            self.processes.agree()  # one that has failed meanwhile would not answer
            weight = self.engine.gather(old)
            state = first.state(old, kinds[group_of[id(old)]]) if carry and id(old) in group_of else {}
            if layer_name is None:
                shift = shifts.get(id(old))
                values = [weight if shift is None else weight + shift.to(weight)]
                states = [state]
            else:
                factors, kind = exact[layer_name], kind_of(self.engine.model.get_submodule(layer_name))
                values = [t.to(weight) for t in kind.tensors(factors)]
                states = list(project(state, values[0], values[1], kind)) if state else [{}, {}]
            for parameter, value, own in zip(new, values, states, strict=True):
                second.write(parameter, value, own)
        report.optimizer = f"{type(self.engine.zero.optimizer).__name__} (DeepSpeed): {self._outcome(carry)}"


def _tag(folder: Path) -> str:
    """Name of DeepSpeed's part of a checkpoint; empty where there is none."""
    latest = folder / "latest"
    return latest.read_text("utf-8").strip() if latest.is_file() else ""


def _files(folder: Path, processes: int) -> tuple[list[str], str | None]:
    """Names of DeepSpeed's files in the folder that `latest` names, or what it lacks."""
    try:
        tag = (folder / "latest").read_text("utf-8").strip()
    except OSError:
        return [], "latest, which names DeepSpeed's folder, is missing"
    files = [f"{tag}/{file.name}" for file in sorted((folder / tag).glob("*.pt"))]
    if not any(name.endswith("model_states.pt") for name in files):
        return [], f"{tag} holds no model_states.pt"
    parts = sum(name.endswith("optim_states.pt") for name in files)
    if parts not in (0, processes):  # none: ZeRO is off, and the state is with the weights
        return [], f"{tag} holds optimizer state of {parts} processes, and {processes} resume"
    weights = [name for name in weights_files(folder) if (folder / name).exists()]  # ZeRO-3 may save none of them
    return [*files, *weights, *(["scheduler.pt"] if (folder / "scheduler.pt").exists() else [])], None
