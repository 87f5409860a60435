"""Graphed step: forward and backward of a training step as one CUDA graph for each shape of batch, dense and low rank."""

from __future__ import annotations

import gc
import logging
import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..measure.eager import runs_eagerly
from ..measure.side_stream import side_stream
from .capture import NotCapturedError, capture, steady_masks, waiting_seen
from .graph_room import MOST, fits_beside, has_room_for
from .graph_stamp import stamp
from .recorded_step import GivenGradients, RecordedStep

logger = logging.getLogger(__name__)

WARM = 2
"""Steps of the first shape that run as they are before one is recorded: memory is found, and something may be compiled. Of later
shapes one has to do."""
UNSTEADY, STEADY = 8, 8
"""After so many changes of the model no step is recorded any more, if there were never so many steps in a row without one."""
MANY = 100
"""After batches of so many kinds without a graph the log says why there is none."""
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
"""What a batch may hold beside tensors: a graph is recorded for each value."""

_ALIVE: weakref.WeakSet[GraphedStep] = weakref.WeakSet()


class GraphedStep:
    """Run a training step as one CUDA graph for each shape of batch: the host launches once, not a thousand times.

        step = GraphedStep(model, forward_and_backward)
        loss = step(batch); optimizer.step(); optimizer.zero_grad(); cuttlefish.step()

    Two steps of the first shape, and one of each later, run as they are; the next is recorded, and replayed: the numbers are the
    same. What the function does beside launching kernels (counting, printing) happens while it is recorded, and no more; numbers that
    it takes from Python (a weight that a schedule changes) stay as they were then: put them into the batch, or make them plain
    attributes of a module. Graphs are dropped, and recorded anew, where parameters, buffers, modules, hooks, or plain attributes of
    modules and of their config (rates, flags) have changed, so at the switch.
    Steps that gather statistics run as they are. A gradient that somebody keeps moves to memory of its own; clone what is a view of
    one. With torch.compile take a mode without CUDA graphs ("default").

    Args:
        model: bare, on one CUDA device. function: takes the batch (a mapping, best), runs forward and backward, and returns tensors
            that have no graph (`loss.detach()`). It must not wait for the device (`.item()`). position_ids of packed sequences must be
            in the batch by this name, or `packs` be set.
        also: gives parameters outside of the model that get gradients, such as those of a loss.

    Attributes:
        refused: why steps are not recorded; None while they are. state: how many states of the model have been seen.
        packs: whether the function may pack sequences with position_ids of its own.
        level: of logging, at which is said what is not recorded. careful: whether a graph is recorded only where the device has room for
            a step as it is beside it. suits: asked before each recording whether it may be made; None: it may.
        made: how many graphs have been recorded.

    Raises ValueError: the model is not on one CUDA device. When called: the function returns a tensor that has a graph.
    """

    def __init__(
        self, model: nn.Module, function: Callable[[Any], Any], also: Callable[[], Iterable[nn.Parameter]] = tuple
    ) -> None:
        self._device = only_device(model)
        self.model, self.function, self.also = model, function, also
        self.refused: str | None = None
        self.state, self.packs = 0, False
        self.level, self.careful, self.made = logging.WARNING, False, 0
        self.suits: Callable[[], bool] | None = None
        self._stream = side_stream(self._device)
        self._graphs: dict[Hashable, RecordedStep] = {}
        self._given = GivenGradients()
        self._pool: Any = None
        self._seen: Counter[Hashable] = Counter()
        self._modules: list[nn.Module] = []
        self._stamped: Hashable = None
        self._told: set[str] = set()
        self._makes_masks = self._is_full = False
        self._changes = self._unchanged = 0
        _ALIVE.add(self)

    def __call__(self, batch: Any) -> Any:
        """What the function returns for this batch; gradients are in the parameters."""
        if self.refused is not None or runs_eagerly() or not torch.is_grad_enabled():
            return self.function(batch)
        self._look_at_model()
        if self.refused is not None:
            return self.function(batch)
        leaves, structure = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        key = self._key(leaves, structure)
        if key is None:
            return self.function(batch)
        if (graph := self._graphs.get(key)) is None:
            self._seen[key] += 1
            if not self._has_room():
                return self.function(batch)
            if self._seen[key] <= (warm := WARM if not self._graphs else 1):
                return self._warm_up(key, batch, structure, looks=self._seen[key] == warm)
            graph = self._try_to_record(key, leaves, structure)
        if graph is None:
            return self.function(batch)
        return graph.run([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], self._given)

    @property
    def trains(self) -> bool:
        """Whether all modules are known to be in training mode."""
        return bool(self._modules) and all(module.training for module in self._modules)

    def drop(self) -> None:
        """Free all graphs; steps are recorded anew."""
        if self._graphs:
            torch.cuda.synchronize(self._device)  # one may be running
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs.clear()
        self._given.clear()
        self._seen.clear()
        self._modules, self._stamped = [], None
        self._is_full = False

    def end(self) -> None:
        """Free all graphs for good: steps run as they are."""
        self.drop()
        self.refused = self.refused or "its run has ended"

    # --- inside ---

    def _look_at_model(self) -> None:
        """Drop what was recorded of another state of the model than it has now."""
        if self._modules and self._asked(lambda: stamp(self._modules)) == self._stamped:
            self._unchanged += 1
            if self._unchanged >= STEADY:
                self._changes = 0
            return
        self.drop()
        self.state += 1
        self._modules = list(self.model.modules())
        self._stamped = self._asked(lambda: stamp(self._modules))
        self._changes, self._unchanged = self._changes + 1, 0
        if self._changes > UNSTEADY:
            self._refuse("attributes of its modules change from step to step")

    def _key(self, leaves: list[Any], structure: Any) -> Hashable:
        """What has to be alike for one graph to serve; None for a batch that holds what can't be compared."""
        parts: list[Hashable] = [repr(structure)]
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.requires_grad:
                parts.append((leaf.shape, leaf.dtype))
            elif isinstance(leaf, PLAIN):
                parts.append((type(leaf), leaf))
            else:
                if self._is_first("kind"):
                    logger.log(
                        self.level,
                        "Cuttlefish: a batch holds %s, which no graph can take: leave it out, or make it a plain tensor.",
                        f"a tensor ({leaf.layout})" if isinstance(leaf, torch.Tensor) else type(leaf).__name__,
                    )
                return None
        if len(self._seen) >= MANY:
            if not self._graphs and self._is_first("many"):
                logger.log(
                    self.level,
                    "Cuttlefish: %d batches in a row differ in shape or in a value, so no step is recorded: pad to one length, and leave "
                    "out what is no tensor.",
                    MANY,
                )
            self._seen.clear()
        return tuple(parts)

    def _has_room(self) -> bool:
        if not self._is_full and self._asked(lambda: has_room_for(len(self._graphs), self._device)):
            return True
        if self.refused is None and self._is_first("room"):
            logger.log(
                self.level,
                "Cuttlefish: %s, and the others run without a CUDA graph: pad to one length, or to a few (pad_to_multiple_of=64 of the "
                "collator), and set dataloader_drop_last=True.",
                "the device has no memory for more graphs"
                if self._is_full
                else f"batches have had more than {max(MOST, len(self._graphs))} shapes",
            )
        return False

    def _is_first(self, what: str) -> bool:
        """Whether it is to be told: once."""
        is_first = what not in self._told
        self._told.add(what)
        return is_first

    def _warm_up(self, key: Hashable, batch: Any, structure: Any, looks: bool) -> Any:
        """A step as it is, on the stream that will be recorded. looks: whether to see what no graph can hold."""
        before = self._asked(_host_random_state) if looks else None
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self._masks(structure), waiting_seen(looks) as waits:
            result = self.function(batch)
        current.wait_stream(self._stream)
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            raise ValueError(
                "the function of a GraphedStep returns a tensor that has a graph: call backward() in it, and return loss.detach()"
            )
        if looks and self._asked(_host_random_state) != before:
            self._refuse("it draws random numbers on the host (layerdrop?), which a graph would repeat")
        elif waits:
            self._try_with_masks(key, f"it waits for the device in a step ({waits[0]})")
        return result

    def _masks(self, structure: Any) -> Any:
        """How masks are made of a batch: always where it may have some, or where recording without has failed."""
        names = repr(structure)
        packs = self.packs or "position_ids" in names or "dict" not in names
        return steady_masks(self._makes_masks or packs or "mask" in names, packs)

    def _try_to_record(self, key: Hashable, leaves: list[Any], structure: Any) -> RecordedStep | None:
        if self.suits is not None and not self._asked(self.suits):
            self._refuse("what runs in a step is not known any more to launch kernels alone")
            return None
        if self.careful and not self._asked(lambda: fits_beside(self._device)):
            if self._graphs:
                self._is_full = True
            else:
                self._refuse("the device has no room for one beside steps as they are")
            return None
        try:
            graph = self._record(leaves, structure)
        except NotCapturedError as error:
            why, no_room = str(error), error.no_room
        except Exception as error:
            if not self.careful:
                raise
            why, no_room = str(error), isinstance(error, torch.OutOfMemoryError)
        else:
            self._graphs[key] = graph
            self.made += 1
            self._given.add(graph.gradients)
            return graph
        if no_room and self._graphs:
            self._is_full = True
        else:
            self._try_with_masks(key, f"what it does can't be recorded ({why})")
        return None

    def _try_with_masks(self, key: Hashable, why: str) -> None:
        """Once: it may have read whether a mask of its own masks anything. why: what is said where it was not that."""
        if self._makes_masks:
            self._refuse(why)
        else:
            self._makes_masks = True
            self._seen[key] = 0

    def _record(self, leaves: list[Any], structure: Any) -> RecordedStep:
        """Raises NotCapturedError. Gradients and parameters stay as they are."""
        inputs = [leaf.to(self._device, copy=True) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        waiting = iter(inputs)
        batch = tree_unflatten(
            [next(waiting) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )
        trained = list({id(p): p for p in (*self.model.parameters(), *self.also()) if p.requires_grad}.values())
        if any(p._post_accumulate_grad_hooks for p in trained):
            raise NotCapturedError("parameters have hooks that run after backward")
        others = _other_gradients(trained)
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
        if changed := [p for p, gradient, version in others if _has_changed(p, gradient, version)]:
            for parameter, gradient, _ in others:
                parameter.grad = gradient
            raise NotCapturedError(f"{len(changed)} parameters that are not in the model get gradients")
        if not written:
            raise NotCapturedError("no parameter gets a gradient in it")
        if any(gradient.layout != torch.strided for _, gradient in written):
            raise NotCapturedError("gradients are sparse")
        if self._is_first("recorded"):
            logger.info("Cuttlefish: forward and backward run as one CUDA graph from this step on.")
        mine = {id(p) for p, _ in written}
        without = [p for p in trained if id(p) not in mine]
        return RecordedStep(graph, inputs, result, [p for p, _ in written], [g for _, g in written], without)

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The answer; None where it failed in a run that has not asked for graphs, whose steps then run as they are."""
        try:
            return question()
        except Exception as error:
            if not self.careful:
                raise
            self._refuse(f"what it would fix could not be asked ({type(error).__name__}: {error})")
            return None

    def _refuse(self, why: str) -> None:
        if self.refused is not None:
            return
        self.refused = why
        self.drop()
        logger.log(
            self.level,
            "Cuttlefish: steps run without CUDA graphs: %s. Training is right, and as fast as without the setting.",
            why,
        )


def only_device(model: nn.Module) -> torch.device:
    """The CUDA device that a model is on. Raises ValueError where it is on another, or on several."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        where = ", ".join(sorted(map(str, devices))) or "no device"
        raise ValueError(
            f"CUDA graphs need a model that is on one CUDA device, and this one is on {where}: run without them"
        )
    return next(iter(devices))


def drop_graphs(model: nn.Module) -> None:
    """Free the graphs of all graphed steps of this model."""
    for step in list(_ALIVE):
        if step.model is model:
            step.drop()


def is_graphed(model: nn.Module) -> bool:
    """Whether steps of this model are recorded, or will be."""
    return any(step.model is model and step.refused is None for step in _ALIVE)


def graphs_made(model: nn.Module) -> int:
    """How many graphs of steps of this model have been recorded."""
    return sum(step.made for step in _ALIVE if step.model is model)


def has_graphs() -> bool:
    """Whether anything is recorded in this process."""
    return any(step._graphs for step in _ALIVE)


def _other_gradients(trained: list[nn.Parameter]) -> list[tuple[nn.Parameter, torch.Tensor | None, int]]:
    """(parameter, gradient, its version) of all that are alive beside these: a graph would write to theirs unseen."""
    mine = set(map(id, trained))
    # By class: other objects may be stand-ins that warn when they are asked.
    found = [o for o in gc.get_objects() if issubclass(type(o), nn.Parameter) and o.requires_grad and id(o) not in mine]
    return [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in found]


def _has_changed(parameter: nn.Parameter, gradient: torch.Tensor | None, version: int) -> bool:
    return parameter.grad is not gradient or (gradient is not None and gradient._version != version)


def _host_random_state() -> Any:
    """Of Python, NumPy and torch on the CPU, to be compared."""
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else repr(numpy.random.get_state(legacy=False))
    return random.getstate(), drawn, torch.get_rng_state().tolist()
