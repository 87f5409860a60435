"""Run a factorized model in another form while its forward is under way: hooks of the model open it and close it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers.low_rank import LowRankLinear
from ..layers.multiplied import Multiplied, in_batches
from ..measure.shapes import FlowRecorder


class RunMultiplied:
    """Let the low-rank layers of a model run multiplied out (`layers.multiplied`), from `start` to `stop`.

        form = RunMultiplied(model); form.start(); model(**inputs).loss.backward(); form.stop()

    The structure stays as it is, and in evaluation pairs run. The first training forward shows which layers read one tensor. It steps aside by itself in
    compiled code, in replicas of nn.DataParallel, in checkpointed blocks, and where factors hold adapters, parametrizations or hooks.

    Args:
        together: whether layers that read one tensor run as one product.
    """

    def __init__(self, model: nn.Module, together: bool = True) -> None:
        self.model, self.together = model, together
        self.batches: list[Multiplied] | None = None
        self._flow: FlowRecorder | None = None
        self._handles: list[Any] = []

    @property
    def is_on(self) -> bool:
        return bool(self._handles)

    def start(self) -> bool:
        """Whether there may be something to run in this form; if so, from the next forward but one on."""
        if _linear_pairs(self.model) and not self._handles:
            self._handles = [
                self.model.register_forward_pre_hook(self._open, prepend=True),
                self.model.register_forward_hook(self._close, always_call=True),
            ]
            for batch in self.batches or ():
                batch.start()
        return self.is_on

    def stop(self) -> None:
        """Pairs again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._break_off()
        for batch in self.batches or ():
            batch.stop()

    def _break_off(self) -> None:
        """Of a forward that never ended (Ctrl-C) nothing stays."""
        if self._flow is not None:
            self._flow.stop()
            self._flow = None
        for batch in self.batches or ():
            batch.close()

    def _open(self, module: nn.Module, args: Any) -> None:
        if module is not self.model or torch.compiler.is_compiling():
            return
        self._break_off()
        if not module.training:
            return  # a step of generation would multiply all out for one token
        if self.batches is None:
            self._flow = FlowRecorder(self.model, _linear_pairs(self.model))
            self._flow.start()
        for batch in self.batches or ():
            batch.open()

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self.model or torch.compiler.is_compiling():
            return
        if self._flow is not None:
            self._flow.stop()
            layers, groups = _linear_pairs(self.model), self._flow.groups()
            self._flow = None
            if groups:
                names = [g.layers for g in groups] if self.together else [(name,) for g in groups for name in g.layers]
                self.batches = in_batches([[layers[name] for name in some] for some in names])
                for batch in self.batches:
                    batch.start()
        for batch in self.batches or ():
            batch.close()


def _linear_pairs(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if type(module) is LowRankLinear}
