"""The learning rate of a switch by restart: scaled in the files of a checkpoint, as a switch in place scales it in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import CuttlefishConfig
from ..patch.learning_rate import bare_scheduler, said_of, scaled_groups, scaled_scheduler, wanted_scale

_MAY_HOLD = r"scheduler(_\d+)?\.(pt|bin)|custom_checkpoint_\d+\.pkl"
"""Files in which Trainer, Accelerate and `register_for_checkpointing` save schedulers."""


@dataclass(frozen=True)
class SavedRate:
    """What becomes of the learning rate in a checkpoint.

    Attributes:
        scale: what every rate is multiplied by. files: names of those that hold the scheduler's state.
        summary: what the report says of it; nothing where the rate is left alone.
    """

    scale: float = 1.0
    files: tuple[str, ...] = ()
    summary: str = ""

    def groups(self, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies of an optimizer's groups, scaled."""
        return scaled_groups(groups, self.scale)

    def scheduler(self, scheduler: Any) -> Any:
        """Something whose state_dict is that of a scheduler, scaled."""
        return _Saved(scaled_scheduler(scheduler.state_dict(), self.scale))

    def write(self, folder: Path, staging: Path) -> None:
        """Into `staging` the scaled form of the scheduler's files in `folder`."""
        for name in self.files:
            torch.save(scaled_scheduler(_state_in(folder / name), self.scale), staging / name)


class _Saved:
    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


def saved_rate(
    folder: Path,
    optimizer: Any,
    scheduler: Any,
    config: CuttlefishConfig,
    kept: float,
    alignment: float | None,
    by_engine: bool = False,
) -> SavedRate:
    """What the switch does to the learning rate in a checkpoint, before anything is written.

        rate = saved_rate(folder, optimizer, scheduler, config, kept=0.4, alignment=None)

    Args:
        folder: the checkpoint, just saved of this step. optimizer, scheduler: that drives it, as they are in memory.
        kept, alignment: see `suggested_scale`. by_engine: whether the engine itself saves the scheduler.

    Raises:
        TypeError, ValueError: as `check_can_scale`, or a scheduler whose state is in no file, for a scale that was asked for.
    """
    scale, why_not = wanted_scale(optimizer, scheduler, config.learning_rate_scale, kept, alignment)
    if scale == 1:
        return SavedRate(summary=why_not)
    try:
        files = () if scheduler is None else files_of(folder, scheduler, by_engine)
    except ValueError as error:
        if config.learning_rate_scale is not None:
            raise
        return SavedRate(summary=f"learning rate unchanged ({error})")
    return SavedRate(scale, files, said_of(scale, float(optimizer.param_groups[0]["lr"])))


def files_of(folder: Path, scheduler: Any, by_engine: bool = False) -> tuple[str, ...]:
    """Names of the files in a folder that hold just the state that a scheduler has.

    Raises ValueError where there are none, unless the engine itself saves it.
    """
    state = bare_scheduler(scheduler).state_dict()
    names = sorted(path.name for path in folder.iterdir() if re.fullmatch(_MAY_HOLD, path.name))
    found = tuple(name for name in names if _same(_state_in(folder / name), state))
    if not found and not by_engine:
        raise ValueError(
            f"learning_rate_scale: no file in {folder} holds the state that the scheduler has now, so that the run would go on at "
            "another rate: save it with the checkpoint of the switch (accelerator.prepare or register_for_checkpointing, then save_state)"
        )
    return found


def _state_in(path: Path) -> Any:
    """What torch has saved there; None for what Trainer and Accelerate would not load as a scheduler's state."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # another object that was registered, whatever it raises
        return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return both and torch.equal(a, b.cpu())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
