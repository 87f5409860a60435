"""Measure: batches kept for the switch, and what a cut does to the model's loss and outputs on them. Forward passes only."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..layers.kinds import kind_of
from ..maths.factors import Factors
from .eager import eagerly

BATCHES = 4
"""Batches kept: one reference and three sizes measured are 16 forward passes, about five training steps."""


@dataclass(frozen=True)
class Effect:
    """What a cut does on the kept batches.

    Attributes:
        loss: mean loss, or None where the model returns none. divergence: mean Kullback-Leibler divergence of its outputs from
            those of the uncut model, nats an example or token; None where there are no class scores.
    """

    loss: float | None
    divergence: float | None


class KeptBatches:
    """The last few batches that a model trained on, to try sizes on.

    kept = KeptBatches(model); kept.start()
    ...; kept.stop(); kept.effect(layers, factors).loss
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: deque[tuple[dict[str, Any], tuple[bool, torch.dtype]]] = deque(maxlen=BATCHES)
        self._handle: Any = None
        self._reference: tuple[list[torch.Tensor], float | None] | None = None

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

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not args and not getattr(module, "_is_replica", False):
            kind = next(module.parameters()).device.type
            # Without the Trainer's number of items: the loss is to be the batch's own mean.
            given = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
            self._kept.append((given, (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))))

    def effect(self, layers: Mapping[str, nn.Module], factors: Mapping[str, Factors]) -> Effect:
        """Loss and outputs with these factors in the places of their layers; with none, of the model as it is."""
        if self._reference is None:
            self._reference = self._forward()
        before, loss = self._reference
        if not factors:
            return Effect(loss, 0.0 if before else None)
        with _standing_in(layers, factors):
            after, loss = self._forward()
        if not before or before[0].shape[-1] < 2:
            return Effect(loss, None)
        total = count = 0.0
        for old, new in zip(before, after, strict=True):
            total += float((old.exp() * (old - new)).sum())
            count += old.numel() / old.shape[-1]
        return Effect(loss, total / count if count else None)

    @torch.no_grad()
    def _forward(self) -> tuple[list[torch.Tensor], float | None]:
        """Log-probabilities of each batch (none where the model gives no scores), and the mean loss."""
        modes = [(module, module.training) for module in self.model.modules()]
        outputs: list[torch.Tensor] = []
        losses: list[float] = []
        kind = next(self.model.parameters()).device.type
        self.model.eval()
        try:
            with eagerly():
                for kwargs, (enabled, dtype) in self._kept:
                    with torch.autocast(kind, dtype=dtype, enabled=enabled):
                        output = self.model(**kwargs)
                    outputs += _log_probabilities(output, kwargs.get("labels"))
                    loss = output.get("loss") if hasattr(output, "get") else None
                    if isinstance(loss, torch.Tensor) and loss.ndim == 0:
                        losses.append(float(loss))
        finally:
            for module, mode in modes:
                module.training = mode
        if len(outputs) != len(self._kept):
            outputs = []
        return outputs, sum(losses) / len(losses) if losses else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The batches as a flat dictionary of tensors on the CPU; a batch that holds anything else is left out."""
        flat: dict[str, torch.Tensor] = {}
        for i, (kwargs, (enabled, dtype)) in enumerate(self._kept):
            if all(isinstance(v, torch.Tensor) or v is None for v in kwargs.values()):
                flat |= {f"kept/{i}/{k}": v.cpu().contiguous() for k, v in kwargs.items() if v is not None}
                flat[f"kept/{i}/"] = torch.zeros(int(enabled), dtype=dtype)
        return flat

    def load_state_dict(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Reads what `state_dict` gave, among other entries."""
        device = next(self.model.parameters()).device
        batches: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in flat.items():
            if key.startswith("kept/"):
                _, number, name = key.split("/", 2)
                batches.setdefault(int(number), {})[name] = value
        self._kept.clear()
        for _, batch in sorted(batches.items()):
            mark = batch.pop("")
            self._kept.append(({k: v.to(device) for k, v in batch.items()}, (bool(len(mark)), mark.dtype)))


def _log_probabilities(output: Any, labels: Any) -> list[torch.Tensor]:
    """Of the positions that have a label, (positions, classes) in fp32, as a list of one; empty where there are no scores."""
    logits = output.get("logits") if hasattr(output, "get") else None
    if not isinstance(logits, torch.Tensor) or logits.ndim < 2 or logits.shape[-1] < 2:
        return []
    logits = logits.reshape(-1, logits.shape[-1])
    if isinstance(labels, torch.Tensor) and labels.numel() == len(logits) and not labels.is_floating_point():
        logits = logits[labels.reshape(-1) != -100]
    return [functional.log_softmax(logits.float(), -1)]


@contextlib.contextmanager
def _standing_in(layers: Mapping[str, nn.Module], factors: Mapping[str, Factors]) -> Iterator[None]:
    """Let the layers answer as their factors would, without touching the model's structure."""
    handles: list[Any] = []
    try:
        for name, f in factors.items():
            handles.append(kind_of(layers[name]).standing_in(f))
        yield
    finally:
        for handle in handles:
            handle.remove()
