"""Forgotten scaler: a GradScaler multiplies the loss, and the run was not given it."""

from __future__ import annotations

import gc
import logging

import torch

logger = logging.getLogger(__name__)


def say_forgotten_scaler(known: float, autocast: tuple[bool, torch.dtype] | None) -> None:
    """Warn where a GradScaler that has scaled a loss is alive, and the run knows of none.

        say_forgotten_scaler(known=1.0, autocast=(True, torch.float16))

    Nothing else would show it: the gradients are so many times too large, and so is what a cut is predicted to cost.

    Args:
        known: by how much the run knows its loss to be multiplied; 1 where it was told nothing. autocast: of the run's batches, and its dtype; None where it is not known.
    """
    if known != 1 or (autocast is not None and autocast[0] and autocast[1] != torch.float16):
        return
    scalers = [o for o in gc.get_objects() if issubclass(type(o), torch.amp.GradScaler)]
    scales = [s.get_scale() for s in scalers if s.is_enabled() and s._scale is not None]
    if scales and max(scales) > 1:
        logger.warning(
            "Cuttlefish: a GradScaler multiplies a loss by %g, and this run was not given it. If it scales this model's loss, the statistics "
            "are so many times too large, and so is the predicted increase of the loss: pass it, Cuttlefish(..., scaler=scaler).",
            max(scales),
        )
