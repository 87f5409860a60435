"""Graphed step: forward and backward of a training step as one CUDA graph for each shape of batch, dense and low rank."""

from __future__ import annotations

import logging
import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..measure.eager import runs_eagerly
from .capture import NotCapturedError, capture, steady_masks

logger = logging.getLogger(__name__)

WARM = 2
"""Steps of each shape that run as they are before one is recorded: memory is found, and something may be compiled."""
MOST = 8
"""Graphs that are kept; each holds the gradients of the model."""
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
"""What a batch may hold beside tensors: a graph is recorded for each value."""

_ALIVE: weakref.WeakSet[GraphedStep] = weakref.WeakSet()


@dataclass
class _Graph:
    """One recorded step.

    Attributes:
        inputs: tensors that it reads, filled before each run. result: what the function returned. parameters, gradients: that it writes.
    """

    graph: Any
    inputs: list[torch.Tensor]
    result: Any
    parameters: list[nn.Parameter]
    gradients: list[torch.Tensor]

    def run(self, tensors: list[torch.Tensor]) -> Any:
        """Replay with other inputs; gradients are added to those that are there, as backward does."""
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        held = [p.grad for p in self.parameters]
        # Those of the last micro-batch may lie where this one writes.
        kept = [h.clone() if h is g else h for h, g in zip(held, self.gradients, strict=True)] if any(
            h is not None for h in held
        ) else None  # fmt: skip
        self.graph.replay()
        if kept is None:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        else:
            for parameter, before, gradient in zip(self.parameters, kept, self.gradients, strict=True):
                parameter.grad = gradient if before is None else before.add_(gradient)
        return tree_map_only(torch.Tensor, torch.clone, self.result)


class GraphedStep:
    """Run a training step as one CUDA graph for each shape of batch: the host launches once, not a thousand times.

        step = GraphedStep(model, lambda batch: backward(model(**batch).loss))
        loss = step(batch); optimizer.step(); optimizer.zero_grad(); cuttlefish.step()

    The first two steps of a shape run as they are, the third is recorded, and then replayed: the numbers are the same. What the function does
    beside launching kernels (counting, printing) happens while it is recorded, and no more. The graphs are dropped, and recorded anew, where
    parameters, buffers, modules, hooks or training flags have changed, so at the switch. Steps that gather statistics run as they are.
    With torch.compile take a mode without CUDA graphs ("default").

    Args:
        model: bare, on one CUDA device. function: takes the batch, runs forward and backward, and returns tensors that have no graph
            (`loss.detach()`). It must not wait for the device (`.item()`).

    Attributes:
        refused: why steps are not recorded; None while they are. state: how many states of the model have been seen.

    Raises ValueError: the model is not on one CUDA device.
    """

    def __init__(self, model: nn.Module, function: Callable[[Any], Any]) -> None:
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            where = ", ".join(sorted(map(str, devices))) or "no device"
            raise ValueError(
                f"CUDA graphs need a model that is on one CUDA device, and this one is on {where}: run without them"
            )
        self.model, self.function = model, function
        self.refused: str | None = None
        self.state = 0
        self._device = next(iter(devices))
        self._stream = torch.cuda.Stream(self._device)
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: Any = None
        self._seen: Counter[Hashable] = Counter()
        self._modules: list[nn.Module] = []
        self._stamped: Hashable = None
        self._has_said = self._has_told = self._makes_masks = False
        _ALIVE.add(self)

    def __call__(self, batch: Any) -> Any:
        """What the function returns for this batch; gradients are in the parameters."""
        if self.refused is not None or runs_eagerly() or not torch.is_grad_enabled():
            return self.function(batch)
        self._look_at_model()
        leaves, structure = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        key = _key(leaves, structure)
        if key is None:
            return self.function(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if (found := self._graphs.get(key)) is None:
            self._seen[key] += 1
            if not self._has_room():
                return self.function(batch)
            if self._seen[key] <= WARM:
                return self._warm_up(batch, structure, looks=self._seen[key] == WARM)
            try:
                found = self._graphs[key] = self._record(leaves, structure)
            except NotCapturedError as error:
                if not self._makes_masks:  # it may have read whether a mask of its own masks anything
                    self._makes_masks = True
                    self._seen[key] = 0
                    return self.function(batch)
                self._refuse(f"what it does can't be recorded ({error})")
                return self.function(batch)
        return found.run(tensors)

    def drop(self) -> None:
        """Free all graphs; steps are recorded anew."""
        if self._graphs:
            torch.cuda.synchronize(self._device)  # one may be running
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs.clear()
        self._seen.clear()

    # --- inside ---

    def _look_at_model(self) -> None:
        """Drop what was recorded of another state of the model than it has now."""
        stamp = _stamp(self._modules)
        if stamp != self._stamped or not self._modules:
            self.drop()
            self.state += 1
            self._modules = list(self.model.modules())
            self._stamped = _stamp(self._modules)

    def _has_room(self) -> bool:
        if len(self._graphs) < MOST:
            return True
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "Cuttlefish: batches have had more than %d shapes, and the others run without a CUDA graph: pad to one length, or "
                "to a few (pad_to_multiple_of=64 of the collator), and set dataloader_drop_last=True",
                MOST,
            )
        return False

    def _warm_up(self, batch: Any, structure: Any, looks: bool) -> Any:
        """A step as it is, on the stream that will be recorded. looks: whether to see if it draws random numbers on the host."""
        before = _host_random_state() if looks else None
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self._masks(structure):
            result = self.function(batch)
        current.wait_stream(self._stream)
        if looks and _host_random_state() != before:
            self._refuse("it draws random numbers on the host (layerdrop?), which a graph would repeat")
        return result

    def _masks(self, structure: Any) -> Any:
        """How masks are made of a batch: always where it may have some, or where recording without has failed."""
        names = repr(structure)
        packs = "position_ids" in names
        return steady_masks(self._makes_masks or packs or "mask" in names, packs)

    def _record(self, leaves: list[Any], structure: Any) -> _Graph:
        """Raises NotCapturedError. Gradients and parameters stay as they are."""
        inputs = [leaf.to(self._device, copy=True) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        waiting = iter(inputs)
        batch = tree_unflatten(
            [next(waiting) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if any(p._post_accumulate_grad_hooks for p in trained):
            raise NotCapturedError("parameters have hooks that run after backward")
        before = [p.grad for p in trained]
        for parameter in trained:
            parameter.grad = None
        if not self._graphs:  # a pool without graphs is gone
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with self._masks(structure):
                graph, result = capture(lambda: self.function(batch), self._stream, self._pool)
            written = [(p, p.grad) for p in trained if p.grad is not None]
        finally:
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient
        if any(gradient.layout != torch.strided for _, gradient in written):
            raise NotCapturedError("gradients are sparse")
        if not self._has_told:
            self._has_told = True
            logger.info("Cuttlefish: forward and backward run as one CUDA graph from this step on.")
        return _Graph(graph, inputs, result, [p for p, _ in written], [g for _, g in written])

    def _refuse(self, why: str) -> None:
        self.refused = why
        self.drop()
        logger.warning("Cuttlefish: steps run without CUDA graphs: %s.", why)


def drop_graphs(model: nn.Module) -> None:
    """Free the graphs of all graphed steps of this model."""
    for step in list(_ALIVE):
        if step.model is model:
            step.drop()


def has_graphs() -> bool:
    """Whether anything is recorded in this process."""
    return any(step._graphs for step in _ALIVE)


def _key(leaves: list[Any], structure: Any) -> Hashable:
    """What has to be alike for one graph to serve; None for a batch that holds what can't be compared."""
    parts: list[Hashable] = [repr(structure)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if leaf.layout != torch.strided or leaf.requires_grad:
                return None
            parts.append((leaf.shape, leaf.dtype))
        elif isinstance(leaf, PLAIN):
            parts.append((type(leaf), leaf))
        else:
            return None
    return tuple(parts)


def _stamp(modules: list[nn.Module]) -> Hashable:
    """What a graph has fixed of a model: where its parameters lie, its buffers, modules, hooks, and which of them train."""
    found: list[Any] = []
    for module in modules:
        found.append(module.training)
        for parameter in module._parameters.values():
            if parameter is not None:
                found += (parameter.data_ptr(), parameter.requires_grad)
        found += map(id, module._buffers.values())
        found += map(id, module._modules.values())
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            found += hooks
    return tuple(found)


def _host_random_state() -> Any:
    """Of Python, NumPy and torch on the CPU, to be compared."""
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else repr(numpy.random.get_state()[1:3])
    return random.getstate(), drawn, torch.get_rng_state().tolist()
