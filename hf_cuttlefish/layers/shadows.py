"""Shadows: let an experts module see something else in the place of a parameter, while its forward runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_NOTHING = object()


class Shadow:
    """Handle of the two hooks that put it there and take it away; nothing of the module's own is touched.

        handle = Shadow(experts, "gate_up_proj", lambda module, weight: StackView(...))
        handle.remove()

    Args:
        stand_in: called with the module that runs (or its replica) and the parameter it has; gives what it is to see instead, or
            None for the parameter.
        after: called with the module and its output.
    """

    def __init__(
        self,
        owner: nn.Module,
        attribute: str,
        stand_in: Callable[[nn.Module, torch.Tensor], Any],
        after: Callable[[nn.Module, Any], None] = lambda module, output: None,
    ) -> None:
        self.attribute, self._stand_in, self._after = attribute, stand_in, after
        self._before: list[Any] = []
        self._handles = [
            owner.register_forward_pre_hook(self._put),
            owner.register_forward_hook(self._take, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _put(self, module: nn.Module, args: tuple) -> None:
        # A replica of nn.DataParallel has its parameters as plain attributes.
        own = vars(module).get(self.attribute, _NOTHING)
        weight = module._parameters.get(self.attribute) if own is _NOTHING else own
        seen = None if weight is None else self._stand_in(module, weight)
        self._before.append((module, own, seen is not None))
        if seen is not None:
            vars(module)[self.attribute] = seen

    def _take(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._before or self._before[-1][0] is not module:
            return  # its pre-hook was not reached
        _, own, changed = self._before.pop()
        if changed and own is _NOTHING:
            vars(module).pop(self.attribute, None)
        elif changed:
            vars(module)[self.attribute] = own
        if output is not None:
            self._after(module, output)
