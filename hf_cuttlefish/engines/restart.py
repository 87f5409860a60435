"""The switch by restart, for an engine that cannot be edited: a checkpoint of the factorized model that it can resume.

What such engines have in common; DeepSpeed, FSDP1 and tensor parallelism write the rest.
"""

from __future__ import annotations

import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from ..config import CuttlefishConfig
from ..decide.plan import RankPlan
from ..maths.factors import Factors
from ..patch.report import FactorizationReport
from .around import check_not_wrapped
from .base import Layers, ShardedEngine
from .files import is_weights_file
from .saved_rate import SavedRate, saved_rate
from .zero_redundancy import refuse_redundant

logger = logging.getLogger(__name__)

STAGING = ".cuttlefish_low_rank"
"""Folder inside a checkpoint in which the low-rank form is written before anything is exchanged."""


FULL_RANK_STATE = f"{TRAINER_STATE_NAME}.full_rank"
"""Where trainer_state.json is during the exchange: a folder without it is no checkpoint."""


class RestartEngine(ShardedEngine):
    """An engine that fixes the structure when it is built, so that the switch goes through a checkpoint."""

    takes_parts = False
    saves_scheduler: bool = False
    """Whether the engine's own files hold the scheduler's state."""

    def check(self, layers: Layers, config: CuttlefishConfig, can_restart: bool = False) -> None:
        check_not_wrapped(self.model, sharded=True)
        refuse_redundant(self.optimizer)
        if config.switch == "in_place":
            raise ValueError(
                f"switch is 'in_place', and {self.fixed} are fixed when it is built: use switch='auto' or 'restart', FSDP2 "
                "(fsdp_version: 2) or DDP"
            )
        if not can_restart:
            raise ValueError(
                f"{self.fixed} are fixed when it is built, so the switch needs a checkpoint and a new engine: use Trainer with "
                "CuttlefishCallback, which knows how; in a loop of your own can_restart=True and switch_in_checkpoint "
                "(docs/distributed.md), FSDP2 or DDP"
            )

    def check_saving(self, args: Any) -> None:
        for option in ("save_only_model", "save_on_each_node"):
            if getattr(args, option):
                raise ValueError(
                    f"{option} is True, and the switch by restart needs one whole checkpoint: set it to False"
                )


class LowRankCheckpoint(ABC):
    """The low-rank form of a checkpoint; every process must make one and call `write` at the same time.

    Args:
        engine: with the model, which stay as they are.
        factors: of the plan's layers, asked for in their order, each time anew.
        config: its optimizer_state "reset" resets all parameters.
        scheduler: as it was given. alignment: of the weights' travel, by which the learning rate is chosen.

    Attributes:
        model: the factorized copy after `write`. rate: what becomes of the learning rate.
    """

    mark: ClassVar[str]
    """File without which nothing can be resumed from the folder: of a loop's checkpoint it goes first and comes last."""

    def __init__(
        self,
        engine: RestartEngine,
        plan: RankPlan,
        factors: Mapping[str, Factors],
        config: CuttlefishConfig,
        scheduler: Any,
        alignment: float | None,
    ) -> None:
        self.engine, self.plan, self.factors, self.config = engine, plan, factors, config
        self.scheduler, self.alignment, self.rate = scheduler, alignment, SavedRate()
        self.processes = engine.processes
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
        self.rate = self.processes.from_main(lambda: self._make_room(folder, staging))
        try:
            with self.processes.together():
                model, report, state = self._write_parts(folder, staging)
            report.optimizer = self.processes.from_main(lambda: self._save(folder, staging, model, report, state))
            self.processes.from_main(lambda: self.rate.write(folder, staging))
        except BaseException:
            if self.processes.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        self.processes.from_main(lambda: _exchange(folder, staging, self.mark))
        self.model = model
        return report

    def _make_room(self, folder: Path, staging: Path) -> SavedRate:
        """Look at the folder before anything is written; what the learning rate will be."""
        self._check(folder)
        before, after = self.plan.parameters()
        driven, saves = self.engine.rated(self.scheduler), self.engine.saves_scheduler
        rate = saved_rate(folder, *driven, self.config, after / before, self.alignment, saves)
        if staging.exists():
            shutil.rmtree(staging)
        return rate

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
        if kinds and self.config.optimizer_state == "carry" and self.processes.is_main:
            logger.warning(
                "Cuttlefish: the optimizer keeps the state %s, which has no known projection; all of its state starts anew.",
                ", ".join(kinds),
            )
        return self.config.optimizer_state == "carry" and not kinds

    def _outcome(self, carried: bool) -> str:
        """What the report says of the optimizer."""
        state = f"state carried for {len(self.plan)} of {len(self.plan)} layers" if carried else "state starts anew"
        return "; ".join(said for said in (self.rate.summary, state) if said)


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
