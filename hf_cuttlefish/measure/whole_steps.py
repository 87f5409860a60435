"""Measure: what a whole training step takes with other layers in the model, in the mode that runs; all is as before afterwards.

A step is forward and backward of one micro-batch of the run, gradients thrown away. The optimizer's share is not timed: its time
falls with the parameters, so that low rank is a little quicker than measured here.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .as_before import as_before
from .kept import Batch
from .random_states import random_states_kept

ROUNDS = 3
"""Rounds in which every candidate has its turn; the quickest of each counts: other work slows a few of one round."""
SLOW_MS = 1000.0
"""Where a step takes longer two rounds have to do."""
MOST_STEPS, ENOUGH_SECONDS = 6, 0.5
"""Steps timed in a turn, from one synchronization to the next: no more than so many, and none is begun after so many seconds."""
GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """One way to run the model.

    Attributes:
        words: for the log: "a step takes 37.3 ms as planned". layers: names of those that run as pairs.
        multiplied: whether these run multiplied out.
    """

    words: str
    layers: frozenset[str] = frozenset()
    multiplied: bool = False


class UnableError(Exception):
    """Whole steps cannot be measured, for the reason that the message says."""


class Places(Protocol):
    """Who lets a candidate take its place in the model."""

    def put(self, candidate: Candidate) -> None: ...
    def take_back(self) -> None: ...


class Step:
    """Forward and backward of one micro-batch.

        step = Step(model, model, kept.typical()); step.begin(); step()

    Args:
        model: bare. run: what runs it as training does: the model, or what torch.compile has made of it.
        batch: as the model got it. is_compiled: whether anything in it is compiled.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any], batch: Batch, is_compiled: bool = False) -> None:
        self.model, self.run, self.batch, self.is_compiled = model, run, batch, is_compiled
        self.devices = sorted({p.device for p in model.parameters()}, key=str)
        self._parameters: list[nn.Parameter] = []

    def begin(self) -> None:
        """Another candidate has taken its place in the model."""
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self) -> None:
        """Raises UnableError where the model gives nothing to differentiate."""
        if self.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()
        enabled, dtype = self.batch.autocast
        with torch.autocast(self.devices[0].type, dtype=dtype, enabled=enabled):
            loss = _loss_in(self.run(**self.batch.given, **self.batch.more))
        # `grad` runs no hooks that wait for gradients: neither an engine's nor those of an optimizer that steps in backward.
        torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def warm_up(self, is_first: bool) -> int:
        """How many steps are not timed in a turn: in the first one something is compiled, recorded, or memory is found."""
        on_gpu = self.devices[0].type == "cuda"
        if is_first:
            return 3 if self.is_compiled else 2 if on_gpu else 1
        return int(self.is_compiled or on_gpu)

    def synchronize(self) -> None:
        """Wait until all devices have done what was begun."""
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


Timer = Callable[[Candidate, Step, int], float]
"""(candidate, step, how many are not timed) -> milliseconds a step. Tests give one of their own."""


def time_steps(candidate: Candidate, step: Step, warm_up: int) -> float:
    """Milliseconds a step, as the loop sees it: host and device work side by side, as in training."""
    for _ in range(warm_up):
        step()
    step.synchronize()
    began, count = time.perf_counter(), 0
    while count == 0 or (count < MOST_STEPS and time.perf_counter() - began < ENOUGH_SECONDS):
        step()
        count += 1
    step.synchronize()
    return 1000 * (time.perf_counter() - began) / count


def measure_steps(
    candidates: Sequence[Candidate], step: Step, places: Places, timer: Timer | None = None
) -> dict[Candidate, float]:
    """Milliseconds of a step of each candidate, which have their turns in rounds.

    Weights, gradients, buffers, plain attributes of modules, modes and random states stay as they were; hooks of parameters sleep.

    Args:
        places: lets a candidate take its place; asked to take it back even where that failed half-way.

    Raises:
        UnableError, naming the candidate, where its step raises an error.
    """
    timer, found = timer or time_steps, dict[Candidate, float]()
    if step.is_compiled:
        _make_room_for_graphs(step.model, len(candidates))
    with random_states_kept(), as_before(step.model), torch.enable_grad():
        if not step.model.training:
            step.model.train()
        for turn in range(ROUNDS):
            if turn == 2 and max(found.values()) > SLOW_MS:
                break
            for candidate in candidates:
                ms = _take_turn(candidate, step, places, timer, step.warm_up(turn == 0))
                found[candidate] = min(ms, found.get(candidate, ms))
    return found


def _take_turn(candidate: Candidate, step: Step, places: Places, timer: Timer, warm_up: int) -> float:
    told = ""
    try:
        places.put(candidate)
        step.begin()
        return timer(candidate, step, warm_up)
    except UnableError:
        raise
    except Exception as error:
        told = f"a step {candidate.words} failed ({type(error).__name__}: {str(error).strip()[:200]})"
    finally:
        places.take_back()
    # The error is gone by now, and with it what its frames held on the device.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    raise UnableError(told)


def check_room(step: Step, more: int) -> None:
    """Raises UnableError where a GPU would not hold a step and so many more bytes.

    What a step needs beside what stays is taken from the most that was ever in use.
    """
    for device in step.devices:
        if device.type != "cuda":
            continue
        in_use = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - in_use
        needed = torch.cuda.max_memory_allocated(device) - in_use + more
        if free < needed:
            raise UnableError(
                f"{device} has {free / GIB:.2f} GiB free, and a step with other layers may need {needed / GIB:.2f}"
            )


def _make_room_for_graphs(model: nn.Module, candidates: int) -> None:
    """Let torch keep a version of a block's code for each block and candidate: it gives up after 8, and runs uncompiled."""
    if "torch._dynamo" not in sys.modules:
        return
    settings = torch._dynamo.config
    versions = candidates * max(Counter(map(type, model.modules())).values())
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        if hasattr(settings, limit):
            setattr(settings, limit, max(getattr(settings, limit), 8 + versions))


def _loss_in(output: Any) -> torch.Tensor:
    """The loss that a model gives, or a sum of what it gives where the loss is worked out outside."""
    loss = output.get("loss") if hasattr(output, "get") else None
    if isinstance(loss, torch.Tensor) and loss.ndim == 0 and loss.requires_grad:
        return loss
    scores = output.get("logits") if hasattr(output, "get") else None
    found = [t for t in _tensors_in(output if scores is None else scores) if t.requires_grad]
    if not found:
        raise UnableError("the model gives nothing that could be differentiated")
    return torch.stack([t.float().mean().to(found[0].device) for t in found]).sum()


def _tensors_in(output: Any, depth: int = 0) -> Iterable[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, list | tuple) else []
    return [tensor for part in parts for tensor in _tensors_in(part, depth + 1)] if depth < 4 else []
