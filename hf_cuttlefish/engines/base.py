"""The engine: what trains the model, alone or with others, and all that a run asks of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from ..config import CuttlefishConfig
from ..layers.parts import whole
from ..maths.factors import Factors
from ..patch.edits import Edit
from ..patch.learning_rate import check_can_scale
from ..patch.modules import Change, make_change
from ..patch.optimizer import check_can_switch, check_holds, check_state, inner_optimizer
from ..patch.structure import Exchanges
from ..patch.weight_hooks import check_weight_hooks
from ..processes import Processes
from .around import Around, check_not_wrapped, forget_compiled
from .zero_redundancy import ShardAnew, check_redundant, is_redundant

if TYPE_CHECKING:
    from .restart import LowRankCheckpoint

logger = logging.getLogger(__name__)

T = TypeVar("T")
Layers = Mapping[str, nn.Module]
"""Name -> layer."""


class Engine:
    """What trains the model, alone or with others: all that a run asks of it. This one is a single process.

    An engine overrides what is different with it; the defaults do nothing.

        engine = find_engine(model, optimizer)
        engine.check(layers, config)

    Attributes:
        model: bare. optimizer: as it was given.
        processes: who decides together. peers: who sees other batches, so that statistics are summed over them.
        replicas: over how many devices of this process a batch is split.
    """

    fixed: ClassVar[str] = ""
    """What of the engine cannot be edited once it is built, so that the switch is by restart; nothing where it can."""
    holds_whole_weights: bool = True
    """Whether each process holds every weight whole."""
    takes_vocabulary: ClassVar[bool] = True
    takes_parts: ClassVar[bool] = True  # layers that are parameters of larger modules: stacks of experts
    """Whether `embeddings=True` can be carried out."""
    replicas: int = 1

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.processes = self.peers = Processes()

    @classmethod
    def find(cls, around: Around, optimizer: Any) -> Engine | None:
        """The engine of this kind that trains the model, or None."""
        return None

    def forget_compiled(self) -> None:
        """Drop what torch.compile has made of the model, and the memory of its CUDA graphs; it compiles anew when it runs."""
        forget_compiled(self.model)

    # --- before the first step ---

    @property
    def is_alone(self) -> bool:
        """Whether nothing is known that would exchange the gradients of several processes."""
        return type(self) is Engine

    def check(self, layers: Layers, config: CuttlefishConfig, can_restart: bool = False) -> None:
        """Raises ValueError, naming what it is, for what would go wrong at the switch.

        Args:
            layers: name -> dense target. can_restart: whether the caller can go on from a checkpoint of the switch.
        """
        check_not_wrapped(self.model)
        self.check_optimizer(layers, config.optimizer_state)

    def check_optimizer(self, layers: Layers, mode: str = "carry") -> None:
        """Raises ValueError unless the optimizer holds the target layers' weights and can be edited, by what the switch will do.

        Args:
            mode: what the switch does with the state, "carry" or "reset".
        """
        if is_redundant(self.optimizer):
            check_redundant(self.optimizer, self.processes)
        weights = _weights(layers)
        check_holds(self.optimizer, weights)
        if self.fixed:
            return  # the state goes through the checkpoint, by its names
        verdicts = check_can_switch(self._stepping, weights, mode)
        check_state(self._stepping, weights, mode)  # what a constructor or a checkpoint has made already
        check_weight_hooks(layers, self.optimizer, say=self.processes.is_main)
        anew = {verdict.why for verdict in verdicts.values() if verdict.how == "fresh"} if mode == "carry" else set()
        if anew and self.processes.is_main:
            logger.info("Cuttlefish: at the switch optimizer state starts anew: %s.", "; ".join(sorted(anew)))

    def check_state(self, layers: Layers, mode: str) -> None:
        """After the first step, when the optimizer's state has appeared: raises ValueError for what could not go on."""
        if not self.fixed:
            check_state(self._stepping, _weights(layers), mode)

    @property
    def _stepping(self) -> torch.optim.Optimizer:
        """The optimizer that steps the parameters on this process."""
        inner: Any = inner_optimizer(self.optimizer)
        return cast(torch.optim.Optimizer, inner.optim) if is_redundant(inner) else inner

    def check_saving(self, args: Any) -> None:
        """Raises ValueError where Trainer saves in a form that a switch could not go through. args: TrainingArguments."""

    def rated(self, scheduler: Any) -> tuple[Any, Any]:
        """The optimizer whose groups hold the learning rate, and the scheduler that drives it. scheduler: as it was given."""
        return self.optimizer, scheduler

    def check_rate(self, scheduler: Any) -> None:
        """Raises TypeError, ValueError unless the learning rate could be scaled: as `check_can_scale`."""
        check_can_scale(*self.rated(scheduler))

    # --- while training ---

    def check_step(self) -> None:
        """Raises RuntimeError where some processes might not take part in what is to come."""

    def check_replicas(self, when: str) -> None:
        """Raises RuntimeError unless all processes have the same parameters."""

    def taps(self, layers: Layers) -> Layers:
        """The modules whose hooks fire, where those given only describe them."""
        return layers

    def whole_flow(self, name: str, tensor: torch.Tensor, side: str) -> torch.Tensor:
        """All of a layer's "input", or "output" or its gradient, (..., features), where a process sees some features alone."""
        return tensor

    def loss_scale(self, scaler: Any = None) -> float:
        """By how much the loss is multiplied at backward."""
        scaler = scaler or getattr(self.optimizer, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def from_main(self, layers: Layers, function: Callable[[Layers], T]) -> T:
        """What `function` of the layers, with whole weights, gives on the main process, on all of them."""
        return self.processes.from_main(lambda: function(layers))

    # --- at the switch: one of the two ---

    def change(self, plan: Mapping[str, int], factors: Mapping[str, Factors], mode: str) -> tuple[Change, list[Edit]]:
        """The switch worked out, and the edits that make it, in their order. Nothing is changed yet.

        Args:
            factors: of the plan's layers, asked for one after the other. mode: of the optimizer's state, "carry" or "reset".
        """
        change = make_change(self.model, plan, self.optimizer, factors=factors, optimizer_state=mode)
        return change, self.edits(change)

    def edits(self, change: Change) -> list[Edit]:
        """The edits that make a change."""
        swap = ShardAnew(change) if is_redundant(self.optimizer) else None
        return [*change.edits(swap), ForgetCompiled(self.model)]

    def checkpoint(
        self,
        plan: Any,
        factors: Mapping[str, Factors],
        config: CuttlefishConfig,
        scheduler: Any,
        alignment: float | None,
    ) -> LowRankCheckpoint:
        """The low-rank form of a checkpoint, for an engine that is `fixed`. Arguments as of `switch_in_place`."""
        raise RuntimeError(f"{type(self).__name__} is changed in place and writes no checkpoint of the switch")

    # --- around files ---

    @classmethod
    def before_loading(cls, model: nn.Module, state: dict[str, torch.Tensor], prefix: str) -> bool:
        """Before weights are loaded into the model: whether the engine takes them as they are (or raises ValueError)."""
        return False

    @classmethod
    def check_loaded(cls, name: str, layer: nn.Module, part: str) -> bool:
        """Whether the engine has fixed the structure of this layer; ValueError if what is loaded has another.

        Args:
            part: "down", "up" or "dense": what is about to be loaded.
        """
        return False

    @classmethod
    def exchanging(cls, model: nn.Module, changes: Exchanges) -> None:
        """Before layers are exchanged for weights about to be loaded. Raises ValueError where that cannot be."""

    @classmethod
    def exchanged(cls, model: nn.Module, changes: Exchanges) -> None:
        """After layers have been exchanged for weights about to be loaded."""

    @classmethod
    def shard_loaded(cls, model: nn.Module, state: dict[str, torch.Tensor], prefix: str) -> None:
        """Of whole tensors about to be loaded keep this process's parts, in place."""

    @classmethod
    def extend_parallel_plan(cls, model: nn.Module, plan: dict[str, str]) -> None:
        """Before transformers makes a model parallel: add rules for the factors of its low-rank layers, in place."""

    @classmethod
    def settle_loaded(cls, model: nn.Module) -> None:
        """After `from_pretrained` has loaded a factorized model."""

    @classmethod
    def checkpoint_files(cls, folder: Path, processes: int) -> tuple[list[str], str | None] | None:
        """Files that a checkpoint of this engine must have, and what it lacks besides (or None); None for another's folder."""
        return None

    def after_loading_optimizer(self, optimizer: Any) -> None:
        """After the optimizer's state was loaded: keep this process's parts."""

    def after_saving(self, folder: Path, optimizer: Any) -> None:
        """After Trainer has saved a checkpoint: complete it. All processes call."""


def _weights(layers: Layers) -> dict[str, nn.Parameter]:
    return {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}


class ShardedEngine(Engine):
    """An engine under which no process need hold a weight whole: each is gathered, used and dropped, one layer at a time."""

    holds_whole_weights = False
    takes_vocabulary = False

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a weight, detached; every process must ask at the same time."""
        return whole(tensor)

    def from_main(self, layers: Layers, function: Callable[[Layers], T]) -> T:
        """As of `Engine`; the layers' weights are gathered when they are asked for.

        The other processes take part in the gathering until the function has ended. Nobody keeps more than one weight.
        """
        processes = self.processes

        def work() -> T:
            try:
                return function(WholeLayers(layers, processes, self.gather))
            finally:
                processes.from_main(lambda: None)  # nothing more is asked for

        if not processes.is_main:
            while (name := processes.from_main(lambda: None)) is not None:
                self.gather(cast(torch.Tensor, layers[name].weight))
        return processes.from_main(work)


class ForgetCompiled(Edit):
    """What torch.compile has made of the old model is dropped; it compiles anew, whatever comes of the switch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def apply(self) -> None:
        forget_compiled(self.model)


def refuse(engine: str, unsupported: Mapping[str, bool], instead: str) -> None:
    """Raises ValueError for the first that is on. unsupported: what it is -> whether it is on. instead: what to use."""
    for what, is_on in unsupported.items():
        if is_on:
            raise ValueError(f"{engine} with {what} is not supported: use {instead}")


def check_same_shapes(processes: Processes, mine: list[tuple[str, tuple[int, ...]]], when: str) -> None:
    """Raises RuntimeError on all processes unless all have parameters of the same names and shapes."""
    everywhere = processes.gather(mine)
    wrong = next((rank for rank, theirs in enumerate(everywhere) if theirs != everywhere[0]), None)
    if wrong is not None:
        raise RuntimeError(f"{DIFFERENT} {when}: process {wrong} has others than process 0. {RESUME}")


DIFFERENT = "the processes hold different parameters"
RESUME = "Training on would go wrong in silence; resume from the last checkpoint"


def check_same_bits(processes: Processes, tensors: Mapping[str, torch.Tensor], when: str) -> None:
    """Raises RuntimeError, naming parameters, unless all processes hold the same bits."""
    differing = processes.differing(tensors)
    if differing:
        raise RuntimeError(
            f"the replicas of the model hold different parameters {when}: {differing[0]} and {len(differing) - 1} more. {RESUME}"
        )


class WholeLayers(Mapping[str, nn.Module]):
    """The main process's view: name -> a copy of the layer that holds its whole weight. The bias is left as it is."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        processes: Processes,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._layers, self._processes, self._gather = layers, processes, gather

    def __getitem__(self, name: str) -> nn.Module:
        layer = self._layers[name]
        self._processes.from_main(lambda: name)  # asks the others
        held = cast(torch.Tensor, layer.weight)
        whole_weight = nn.Parameter(
            self._gather(held), requires_grad=held.requires_grad
        )  # frozen layers are left alone
        view = copy.copy(layer)
        view._parameters = {**layer._parameters, "weight": whole_weight}
        return view

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
