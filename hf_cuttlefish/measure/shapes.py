"""What flows: which layers read the same tensor in a few ordinary steps, its shape and precision, and how long a step takes."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers.dense import bias_of
from ..layers.kind import Form
from ..layers.kinds import kind_of
from ..layers.low_rank import LowRankLayer
from .eager import run_eagerly

TIMED_STEPS = 3
"""Steps that a FlowRecorder times on a GPU; the quickest counts: a check of the stable ranks may fall into the others."""


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensor, and what flows there.

    Attributes:
        layers: their names. in_features: n. outs: (out_features, has a bias) of each.
        tokens: rows that enter in one call. calls: calls in one optimizer step.
        device, weight_dtype: of the weights. input_dtype: of what arrives. autocast: dtype of autocast, or None.
        input_grad, weight_grad: whether backward needs them.
        forms, input_shape: of layers that are not linear; their in_features and out_features are those of the matrix.
    """

    layers: tuple[str, ...]
    in_features: int
    outs: tuple[tuple[int, bool], ...]
    tokens: int
    device: torch.device
    weight_dtype: torch.dtype
    input_dtype: torch.dtype
    autocast: torch.dtype | None = None
    input_grad: bool = True
    weight_grad: bool = True
    calls: int = 1
    forms: tuple[Form | None, ...] = ()
    input_shape: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What its time depends on, names aside."""
        shape = (self.in_features, self.outs, self.tokens, self.forms, self.input_shape)
        return (
            *shape,
            self.device,
            self.weight_dtype,
            self.input_dtype,
            self.autocast,
            self.input_grad,
            self.weight_grad,
        )


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a whole training step, and how much of it the host worked rather than waited for the device."""

    total_ms: float
    host_ms: float


class FlowRecorder:
    """See, in a few ordinary training steps, what flows through the layers, and how long a step takes.

    Call `start` before and `step` after each optimizer step until `done`. A step or two show the shapes: hooks do not fire in
    a compiled model, which tells that it is one, and its next step runs eagerly. On a GPU a few more steps, without hooks and
    each ended by a synchronization, tell the step's time and the host's share in it.

    Args:
        model: the module whose forward gets the batch. layers: name -> dense or low-rank layer.
        inference: look at forward passes without gradients, and not at those with them.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], inference: bool = False) -> None:
        self.model, self.layers, self.inference = model, dict(layers), inference
        self.compiled: bool | None = None
        """Whether the model runs compiled; None until it is known."""
        self.step_time: StepTime | None = None
        self._seen: list[tuple[weakref.ref[torch.Tensor], list[str], dict[str, Any]]] = []
        self._calls: dict[str, int] = {}
        self._names: set[str] = set()
        self._handles: list[Any] = []
        self._steps = 0
        self._forced = False
        self._last: float | None = None
        self._clocked: list[StepTime] = []

    @property
    def done(self) -> bool:
        """Whether enough has been seen."""
        return self.compiled is not None and not self._handles and (self.step_time is not None or not self._needs_clock)

    @property
    def running(self) -> bool:
        """Whether hooks are in place, or steps are being timed."""
        return bool(self._handles) or (self._steps > 0 and not self.done)

    @property
    def _needs_clock(self) -> bool:
        return self.compiled is False and any(layer.weight.device.type == "cuda" for layer in self.layers.values())

    def start(self) -> None:
        """Install the hooks."""
        if not self._handles and self.compiled is None:
            for name, layer in self.layers.items():
                self._handles.append(layer.register_forward_pre_hook(self._hook(name)))

    def step(self) -> None:
        """An optimizer step has ended."""
        self._steps += 1
        if self._handles:
            if self._seen:
                self.compiled = self._forced
                self.stop()
            elif not self._forced:
                run_eagerly(True)
                self._forced = True
            else:  # no layer runs at all
                self.compiled = True
                self.stop()
        if self._needs_clock and self.step_time is None:
            self._clock()

    def stop(self) -> None:
        """Remove the hooks; what was seen stays."""
        if self._forced and self._handles:
            run_eagerly(False)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def groups(self) -> list[Group]:
        """The layers by the tensor that they read, in the order in which they ran."""
        found = []
        for _, names, what in self._seen:
            layers = [self.layers[name] for name in names]
            outs = tuple((_out_features(layer), bias_of(layer) is not None) for layer in layers)
            first = layers[0]
            found.append(
                Group(
                    layers=tuple(names),
                    in_features=what["in_features"],
                    outs=outs,
                    tokens=what["tokens"],
                    device=what["device"],
                    weight_dtype=_any_weight(first).dtype,
                    input_dtype=what["dtype"],
                    autocast=what["autocast"],
                    input_grad=what["grad"],
                    weight_grad=_any_weight(first).requires_grad,
                    calls=max(self._calls[name] for name in names),
                    forms=what["forms"],
                    input_shape=what["input_shape"],
                )
            )
        return found

    def _hook(self, name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            if torch.compiler.is_compiling():  # compiled anew at this very step: nothing here to be seen
                return
            if not args or not isinstance(args[0], torch.Tensor) or torch.is_grad_enabled() == self.inference:
                return
            if args[0].device != _any_weight(self.layers[name]).device:  # a replica of nn.DataParallel, elsewhere
                return
            kind = kind_of(self.layers[name])
            form = kind.form()
            if form is None and not kind.is_linear:
                return  # a kind that cannot be timed by itself
            self._calls[name] = self._calls.get(name, 0) + 1
            if name in self._names:
                return
            self._names.add(name)
            x = args[0]
            for ref, names, seen in self._seen:
                if ref() is x and form is None and not seen["forms"]:
                    names.append(name)
                    return
            where = x.device.type
            autocast = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None
            what = {"in_features": x.shape[-1], "tokens": x.numel() // max(1, x.shape[-1]), "device": x.device}
            what |= {"forms": (), "input_shape": ()}
            if form is not None:
                what |= {"in_features": kind.size[1], "forms": (form,), "input_shape": tuple(x.shape)}
            what |= {"dtype": x.dtype, "autocast": autocast, "grad": x.requires_grad}
            self._seen.append((weakref.ref(x), [name], what))

        return hook

    def _clock(self) -> None:
        began = time.perf_counter()
        torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self._clocked.append(StepTime(1000 * (now - self._last), 1000 * (began - self._last)))
        self._last = now
        if len(self._clocked) == TIMED_STEPS:
            self.step_time = min(self._clocked, key=lambda t: t.total_ms)


def _any_weight(layer: nn.Module) -> torch.Tensor:
    return layer.factors[1] if isinstance(layer, LowRankLayer) else layer.weight  # type: ignore[return-value]


def _out_features(layer: nn.Module) -> int:
    return kind_of(layer).size[0]
