"""Run a factorized model in another form while its forward is under way: hooks of the model open it and close it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers.low_rank import LowRankLinear
from ..layers.multiplied import Multiplied, in_batches


class RunMultiplied:
    """Let the low-rank layers of a model run multiplied out (`layers.multiplied`), from `start` to `stop`.

        form = RunMultiplied(model); form.start(); model(**inputs).loss.backward(); form.stop()

    The structure stays as it is. It steps aside by itself in compiled code, in replicas of nn.DataParallel, in checkpointed
    blocks, and for layers whose factors hold adapters or hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.batches: list[Multiplied] = []
        self._handles: list[Any] = []

    @property
    def is_on(self) -> bool:
        return bool(self._handles)

    def start(self) -> bool:
        """Whether there is something to run in this form; if so, from the next forward on."""
        self.batches = self.batches or in_batches([m for m in self.model.modules() if isinstance(m, LowRankLinear)])
        if self.batches and not self._handles:
            self._handles = [
                self.model.register_forward_pre_hook(self._open, prepend=True),
                self.model.register_forward_hook(self._close, always_call=True),
            ]
        return self.is_on

    def stop(self) -> None:
        """Pairs again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for batch in self.batches:
            batch.close()

    def _open(self, module: nn.Module, args: Any) -> None:
        if module is self.model and not torch.compiler.is_compiling():
            for batch in self.batches:
                batch.open()

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.model and not torch.compiler.is_compiling():
            for batch in self.batches:
                batch.close()
