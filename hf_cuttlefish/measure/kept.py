"""Measure: batches kept for the switch, and what a cut does to the model's loss and outputs on them. Forward passes only."""

from __future__ import annotations

import contextlib
import inspect
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Cache

from ..layers.kinds import kind_of
from ..maths.factors import Factors
from .as_before import as_before
from .eager import eagerly
from .random_states import random_states_kept
from .scores import Scores, scores_of

_NOT_KEPT = ("num_items_in_batch", "fused_lm_head")
"""The Trainer's number of items: the loss is to be the batch's own mean. TRL's fused head: it gives no scores."""
BATCHES = 4
"""Batches kept: one reference and three sizes measured are 16 forward passes, about five training steps."""


@dataclass(frozen=True)
class Effect:
    """What a cut does on the kept batches.

    Attributes:
        loss: mean loss, or None where the model returns none. divergence: mean Kullback-Leibler divergence of its outputs from
            those of the uncut model, nats an example or token; None where there are no class scores.
        of_tokens: whether each token of an example has scores of its own, as in language models.
        is_whole: whether all batches were looked at; if not, the divergence is at least so large, and the loss is that of some.
    """

    loss: float | None
    divergence: float | None
    of_tokens: bool = False
    is_whole: bool = True


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the model got it.

    Attributes:
        given: arguments of forward by name. autocast: whether it was on, and its dtype. more: what else training gives.
    """

    given: dict[str, Any]
    autocast: tuple[bool, torch.dtype]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Numbers in all its tensors."""
        return sum(v.numel() for v in self.given.values() if isinstance(v, torch.Tensor))


class KeptBatches:
    """The last few batches that a model trained on, to try sizes on.

    kept = KeptBatches(model); kept.start()
    ...; kept.stop(); kept.effect(layers, factors).loss
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: deque[Batch] = deque(maxlen=BATCHES)
        self._handle: Any = None
        self._reference: list[Scores] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def start(self) -> None:
        """Keep batches from now on."""
        if self._handle is None:
            self._handle = self.model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def stop(self) -> None:
        """Remove the hook; the batches stay."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def forget(self) -> None:
        """Let go of the batches, and of what the model said of them."""
        self._kept.clear()
        self._reference = None

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = _by_name(module, args)
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return  # each forward makes it longer, so that no two would see the same
        if torch.is_grad_enabled() and named is not None and not getattr(module, "_is_replica", False):
            kind = next(module.parameters()).device.type
            given = {name: _own(value) for name, value in {**named, **kwargs}.items()}
            more = {name: given.pop(name) for name in _NOT_KEPT if name in given}
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            self._kept.append(Batch(given, autocast, more))

    def typical(self) -> Batch | None:
        """The batch of middle size; None where none is kept."""
        return sorted(self._kept, key=lambda batch: batch.size)[len(self._kept) // 2] if self._kept else None

    def effect(
        self, layers: Mapping[str, nn.Module], factors: Mapping[str, Factors], most: float | None = None
    ) -> Effect:
        """Loss and outputs with these factors in the places of their layers; with none, of the model as it is.

        most: a divergence. When it is known to be larger, no more batches are looked at.
        """
        if self._reference is None:
            self._reference = list(self._forward())
        before = [scores.log_probabilities for scores in self._reference]
        measured = all(old is not None and old.shape[-1] > 1 for old in before) and bool(before)
        of_tokens = measured and all(scores.of_tokens for scores in self._reference)
        if not factors:
            return Effect(_mean(scores.loss for scores in self._reference), 0.0 if measured else None, of_tokens)
        losses: list[float | None] = []
        total = 0.0
        count = sum(len(old) for old in before if old is not None)
        with standing_in(self.model, layers, factors), contextlib.closing(self._forward()) as forward:
            for old, scores in zip(before, forward, strict=True):
                new = scores.log_probabilities
                losses.append(scores.loss)
                if old is not None and new is not None:
                    total += float((old.exp() * (old - new)).sum())
                if most is not None and measured and total > most * count:  # what the other batches add is not negative
                    break
        divergence = total / count if measured and count else None
        return Effect(_mean(losses), divergence, of_tokens, len(losses) == len(before))

    @torch.no_grad()
    def _forward(self) -> Generator[Scores, None, None]:
        """What the model says of each batch, one after the other: only one is held.

        Every pass begins at the random states of this moment: a model that draws in evaluation too (ViTMAE masks patches) draws
        the same for each cut.
        """
        kind = next(self.model.parameters()).device.type
        with random_states_kept(), as_before(self.model), eagerly():
            self.model.eval()
            with _norms_of_the_batch(self.model):
                for batch in self._kept:
                    enabled, dtype = batch.autocast
                    with torch.autocast(kind, dtype=dtype, enabled=enabled):
                        scores = scores_of(self.model, batch.given)
                    yield scores

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The batches as a flat dictionary of tensors on the CPU; a batch that holds anything else is left out."""
        flat: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(self._kept):
            enabled, dtype = batch.autocast
            if all(isinstance(v, torch.Tensor) or v is None for v in batch.given.values()):
                flat |= {f"kept/{i}/{k}": v.cpu().contiguous() for k, v in batch.given.items() if v is not None}
                flat[f"kept/{i}/"] = torch.zeros(int(enabled), dtype=dtype)
        return flat

    def load_state_dict(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Reads what `state_dict` gave, among other entries. Raises ValueError for anything else."""
        device = next(self.model.parameters()).device
        batches: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in flat.items():
            if key.startswith("kept/"):
                number, _, name = key.removeprefix("kept/").partition("/")
                batches.setdefault(_whole(number, key), {})[name] = value
        whole = [batch for _, batch in sorted(batches.items()) if "" in batch]
        if len(whole) < len(batches):
            raise ValueError("the saved statistics hold a batch of which they do not say in what precision it ran")
        self._kept.clear()
        for batch in whole:
            mark = batch.pop("")
            self._kept.append(Batch({k: v.to(device) for k, v in batch.items()}, (bool(len(mark)), mark.dtype)))


def _whole(number: str, key: str) -> int:
    """The number of a batch; ValueError for other text."""
    if not number.isdecimal():
        raise ValueError(f"the saved statistics hold {key!r:.80}, which is no batch's")
    return int(number)


def _own(value: Any) -> Any:
    """A copy of a tensor: loops fill one buffer again and again, or give one tensor twice, which safetensors does not store."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _by_name(module: nn.Module, args: tuple) -> dict[str, Any] | None:
    """Positional arguments under the names that forward has for them; None where it has none, as behind a bare *args."""
    if not args:
        return {}
    parameters = list(inspect.signature(module.forward).parameters.values())[: len(args)]
    if len(parameters) < len(args) or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    return {parameter.name: value for parameter, value in zip(parameters, args, strict=True)}


def _mean(losses: Iterable[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else None


@contextlib.contextmanager
def _norms_of_the_batch(model: nn.Module) -> Iterator[None]:
    """Let batch norms take each batch's own mean and variance, as in training, and remember nothing of it.

    Their running ones belong to the dense layers: with them a cut looks far worse than what training goes on from.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(m, m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    running = [(m, m.running_mean, m.running_var) for m in norms]
    try:
        for norm in norms:
            if isinstance(norm, nn.SyncBatchNorm):
                # In training it would wait for the other processes, which are not asked. With no running ones it takes the batch's.
                norm.running_mean = norm.running_var = None
            else:
                norm.training, norm.momentum = True, 0.0
        yield
    finally:
        for norm, momentum, count in kept:
            norm.training, norm.momentum = False, momentum
            if count is not None:
                norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        for norm, mean, variance in running:
            norm.running_mean, norm.running_var = mean, variance


@contextlib.contextmanager
def standing_in(model: nn.Module, layers: Mapping[str, nn.Module], factors: Mapping[str, Factors]) -> Iterator[None]:
    """Let the layers answer as their factors would, without touching the model's structure."""
    handles = contextlib.ExitStack()
    try:
        try:
            for name, f in factors.items():
                handles.callback(kind_of(layers[name]).standing_in(f).remove)
                for module in kind_of(layers[name]).tied(model):
                    same = f if kind_of(module).is_vocabulary else Factors(f.up.mT, f.down.mT)
                    handles.callback(kind_of(module).standing_in(same).remove)
            yield
        finally:
            handles.close()
    except BaseException:
        handles.close()  # where the line above was interrupted
        raise
