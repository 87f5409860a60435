"""Capture: record what a function launches on a CUDA device as a graph, and leave nothing broken where that fails."""

from __future__ import annotations

import contextlib
import gc
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class NotCapturedError(RuntimeError):
    """What a function did could not be recorded. Nothing has run, and the device is as it was.

    Attributes:
        no_room: whether the device had no memory for it.
    """

    def __init__(self, why: str, no_room: bool = False) -> None:
        super().__init__(why)
        self.no_room = no_room


def capture(function: Callable[[], Any], stream: Any, pool: Any) -> tuple[Any, Any]:
    """(graph, what the function returned); its launches are recorded and not run, so returned tensors have no values yet.

        graph, loss = capture(lambda: step(batch), torch.cuda.Stream(), torch.cuda.graph_pool_handle())
        graph.replay(); loss.item()

    Args:
        stream: that the function has run on before, at least once.
        pool: handle of the memory, shared with graphs that never run at the same time; one whose graphs are all gone can't be used.

    Raises NotCapturedError: the function waits for the device (`.item()`, printing), or does something else that no graph can hold.
    """
    graph = torch.cuda.CUDAGraph()
    recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    current = torch.cuda.current_stream(stream.device)
    failed: BaseException | None = None
    broken = False
    torch.clear_autocast_cache()  # casts made before would be taken for constants
    with _no_garbage_collected():
        try:
            with recording:
                try:
                    result = function()
                except BaseException as error:
                    failed = error  # the reason; the end of the recording has another, of little use
        except Exception as error:
            failed, broken = failed or error, "captur" in str(error)
    torch.clear_autocast_cache()  # and those made in the recording have no values outside of it
    if failed is None:
        return graph, result
    torch.cuda.set_stream(current)  # torch stays on the other one where a recording breaks off
    if broken and not _has_ended(graph):
        _clean_up(stream, pool)
    traceback.clear_frames(failed.__traceback__)  # they hold the memory of the step
    if not isinstance(failed, Exception):
        raise failed
    lines = str(failed).splitlines()
    no_room = isinstance(failed, torch.OutOfMemoryError)
    raise NotCapturedError(f"{type(failed).__name__}: {lines[0] if lines else ''}", no_room)


@contextlib.contextmanager
def steady_masks(with_mask: bool, with_positions: bool) -> Iterator[None]:
    """Let transformers make attention masks inside without a look at the device, so that a step runs, and compiles, the same code
    before it is recorded and while it is.

    Out of a recording it reads whether a mask masks anything, and drops it if not. In one, older versions (5.17) make a mask even
    where none is given, which makes attention twice as slow.

    Args:
        with_mask: whether a batch may need a mask. with_positions: whether it has position_ids; without them no sequences are packed.
    """
    from transformers import masking_utils
    from transformers.utils import import_utils

    # The same functions each time: compiled code asks for them.
    is_recording = _is_recording if with_mask else _is_not_recording
    changed: list[tuple[Any, str, Callable[..., Any]]] = [(import_utils, "is_cuda_stream_capturing", is_recording)]
    if not with_positions:
        changed.append((masking_utils, "find_packed_sequence_indices", _not_packed))
    changed = [(place, name, stand_in) for place, name, stand_in in changed if hasattr(place, name)]
    before = [(place, name, getattr(place, name)) for place, name, _ in changed]
    try:
        for place, name, stand_in in changed:
            setattr(place, name, stand_in)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


@contextlib.contextmanager
def waiting_seen(looks: bool = True) -> Iterator[list[str]]:
    """Collect what waits for the device inside (`.item()`, a copy from the host's memory): no graph can hold it.

        with waiting_seen() as waits: step(batch)
        print(waits)

    The list is filled at the end. A step as it is can be asked so, and no recording has to break off.
    """
    found: list[str] = []
    if not looks or not torch.cuda.is_initialized():
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        told = str(warning.message)
        if "called a synchronizing CUDA operation" in told:
            found.append(f"{Path(warning.filename).name}, line {warning.lineno}")
        elif "Synchronization debug mode" not in told:  # of torch, about itself
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _is_recording() -> bool:
    return True


def _is_not_recording() -> bool:
    return False


def _not_packed(position_ids: Any) -> None:
    return None


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """What is collected during a recording may free CUDA objects, which ends it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _has_ended(graph: Any) -> bool:
    """Whether the recording came to its end, so that the graph frees its memory itself."""
    try:
        graph.pool()
    except Exception:
        return False
    return True


def _clean_up(stream: Any, pool: Any) -> None:
    """A recording that broke off leaves the allocator and the random generator in it: end the one, and get the other out by one of nothing."""
    for end in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with contextlib.suppress(Exception):
            getattr(torch._C, end)(stream.device_index, pool)
    torch.cuda.synchronize(stream.device)
    empty = torch.cuda.CUDAGraph()
    with torch.cuda.graph(empty, stream=stream):
        torch.zeros((), device=stream.device)
    empty.reset()
