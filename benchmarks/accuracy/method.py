"""A method: what it may do to a model, and when; and what it sees of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn


class Progress(Protocol):
    """The run, as a method sees it: `Training` is one.

    Attributes:
        model: what is trained. optimizer: its optimizer. scheduler: of the learning rate.
        step: optimizer steps taken, the current one among them once it has been taken.
        epoch_steps: steps of an epoch. total_steps: steps of the run.
    """

    model: nn.Module
    optimizer: Any
    scheduler: Any
    step: int
    epoch_steps: int
    total_steps: int


@dataclass
class Method:
    """Full rank from the first step to the last; the other methods change the model on the way.

    Attributes:
        budget: share of the target layers' weight parameters to keep, or None.
        notes: numbers about the switch, for the record.
    """

    budget: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    rate = 1.0

    def build(self, model: nn.Module) -> nn.Module:
        """Change the model before there is an optimizer."""
        return model

    def start(self, training: Progress) -> None:
        """Called once, before the first step."""

    def before_step(self, training: Progress) -> None:
        """Called with the gradients of a step, before they are clipped."""

    def due(self, training: Progress) -> bool:
        """Whether the model may switch at the step that has just been taken."""
        return False

    def after_step(self, training: Progress) -> bool:
        """Called after each optimizer step; True if the model switched."""
        return False
