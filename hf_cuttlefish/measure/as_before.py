"""As before: what a model keeps of a forward that is a trial is gone afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_PLAIN = (bool, int, float, str, torch.Tensor)


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Buffers, plain attributes and modes of all modules are afterwards what they were; hooks of parameters are away meanwhile."""
    modules = list(model.modules())
    attributes = [(m, {k: v for k, v in vars(m).items() if v is None or isinstance(v, _PLAIN)}) for m in modules]
    buffers = [
        (m, name, buffer, buffer.detach().clone())
        for m in modules
        for name, buffer in m._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    hooks = [(p, p._backward_hooks) for p in model.parameters() if p._backward_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, table in hooks:
            parameter._backward_hooks = table
        for module, known in attributes:
            vars(module).update(known)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
