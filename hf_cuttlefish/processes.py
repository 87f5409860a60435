"""Agree: what the processes that train one model tell each other, so that one of them decides and none goes its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed as dist

T = TypeVar("T")


class ProcessLostError(RuntimeError):
    """A process did not answer: it died, or its timeout ran out. Nothing can be agreed on any more, so the run must end."""


class OtherProcessError(RuntimeError):
    """Another process failed, and said so. All processes stop at the same point."""


class Processes:
    """The processes that train one model together; alone, every call is a plain function call.

    Each method must be called by all of them, in the same order.

    Args:
        group: their process group; None: all processes of the run, or this one alone if torch.distributed is not set up.

    Attributes:
        size, rank: how many, and which one this is. is_main: whether it is the one that decides (rank 0).
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        running = is_distributed()
        self.size: int = dist.get_world_size(group) if running else 1
        self.rank: int = dist.get_rank(group) if running else 0
        self._root: int = dist.get_global_rank(group, 0) if running and group is not None else 0

    @classmethod
    def alone(cls) -> Processes:
        """This process, asking nobody."""
        processes = cls()
        processes.group, processes.size, processes.rank, processes._root = None, 1, 0, 0
        return processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, function: Callable[[], T]) -> T:
        """What `function` gives (picklable) on the main process, on all of them; only there is it called.

        Raises:
            Whatever `function` raises, on the main process; OtherProcessError with the same message on the others.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        error = None
        if self.is_main:
            try:
                answer[0] = function()
            except Exception as caught:
                error, answer[1] = caught, f"{type(caught).__name__}: {caught}"
        with self._talking():
            dist.broadcast_object_list(answer, src=self._root, group=self.group)
        if error is not None:
            raise _told(error)
        if answer[1] is not None:
            raise OtherProcessError(f"process 0 failed: {answer[1]}")
        return answer[0]

    def agree(self, error: BaseException | None = None) -> None:
        """Go on only if all processes can: raises `error` where there is one, and OtherProcessError on all the others."""
        if self.size > 1:
            said = self.gather(None if error is None else f"{type(error).__name__}: {error}")
            if error is None and any(said):
                rank = next(i for i, message in enumerate(said) if message)
                raise OtherProcessError(f"process {rank} failed: {said[rank]}")
        if error is not None:
            raise _told(error) if self.size > 1 else error  # alone nobody else has heard of it

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside succeeds on all processes or raises on all: an error is told, unless they know of it."""
        try:
            yield
        except Exception as error:
            if not knows_everyone(error):
                self.agree(error)
            raise
        self.agree()

    def check_alike(self, mine: Mapping[str, Any]) -> None:
        """Raises ValueError on all processes, naming what differs, unless all have the same facts. mine: what -> value."""
        if self.size == 1:
            return
        # Compared with each other, so that every process raises where only one differs.
        for rank, theirs in enumerate(self.gather(dict(mine))):
            for what, value in mine.items():
                if theirs[what] != value:
                    detail = _first_difference(theirs[what], value)
                    raise ValueError(
                        f"the processes disagree on {what}: {detail[0]} on process {rank}, {detail[1]} on process "
                        f"{self.rank}; give each process the same model, config and number of steps"
                    )

    def gather(self, value: T) -> list[T]:
        """The value of every process (picklable), by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum_(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            with self._talking():
                dist.all_reduce(tensor, group=self.group)

    def broadcast_(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite a tensor by the one of the process of rank `source`, which is the main one unless told."""
        if self.size > 1:
            root = source if self.group is None else dist.get_global_rank(self.group, source)
            with self._talking():
                dist.broadcast(tensor, src=root, group=self.group)

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of the tensors (same names and shapes everywhere) whose bits are not the same on all processes.

        Sends 8 bytes a tensor. One request of the device.
        """
        if self.size == 1 or not tensors:
            return []
        device = next(iter(tensors.values())).device
        sums = torch.stack([checksum(t).to(device) for t in tensors.values()])
        everywhere = [torch.empty_like(sums) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(everywhere, sums, group=self.group)
        table = torch.stack(everywhere).cpu()
        equal = (table == table[0]).all(0).tolist()
        return [name for name, same in zip(tensors, equal, strict=True) if not same]

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise ProcessLostError(
                f"process {self.rank} of {self.size} got no answer from the others (one has ended, or the timeout of "
                f"torch.distributed has run out); resume from the last checkpoint: {error}"
            ) from error


def knows_everyone(error: BaseException) -> bool:
    """Whether every process has heard of an error: it came from another one, or was told."""
    return isinstance(error, OtherProcessError) or getattr(error, "_cuttlefish_told", False)


def _told(error: BaseException) -> BaseException:
    error._cuttlefish_told = True  # type: ignore[attr-defined]
    return error


def is_distributed() -> bool:
    """Whether torch.distributed has been set up in this process."""
    return dist.is_available() and dist.is_initialized()


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A whole number (int64, on the tensor's device) that depends on every bit and on the order. No copy of the tensor."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(whole)
    odd = torch.arange(_COLUMNS, device=bits.device) * 2654435761 | 1  # int64 wraps around
    full = len(bits) // _COLUMNS * _COLUMNS
    columns = bits[:full].view(-1, _COLUMNS).sum(0, dtype=torch.int64)
    return (columns * odd).sum() + (bits[full:].to(torch.int64) * odd[: len(bits) - full] * 3).sum()


_COLUMNS = 1024


def _first_difference(a: Any, b: Any) -> tuple[str, str]:
    """Where two values begin to differ, as short text."""
    if isinstance(a, list) and isinstance(b, list):
        for x, y in zip(a, b, strict=False):
            if x != y:
                return str(x), str(y)
        return f"{len(a)} entries", f"{len(b)} entries"
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(k for k in {**a, **b} if a.get(k) != b.get(k))
        return f"{key}={a.get(key)!r}", f"{key}={b.get(key)!r}"
    return str(a), str(b)
