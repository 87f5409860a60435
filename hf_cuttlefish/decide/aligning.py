"""Of which number ranks are multiples: 32 in a wide decoder, 8 elsewhere, or what the config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..config import CuttlefishConfig
from ..layers.kinds import kind_of

MULTIPLE, DECODER_MULTIPLE = 8, 32
"""Formats for serving pack the rows of a weight in blocks of 32, and a factor's rows are as long as its rank."""
WIDE = 512
"""Features from which on steps of 32 are fine enough."""


def aligned(config: CuttlefishConfig, model: nn.Module, layers: Mapping[str, nn.Module]) -> CuttlefishConfig:
    """The config with a `rank_multiple` for this model, unless it has one.

    config = aligned(CuttlefishConfig(), model, find_targets(model))
    """
    if config.rank_multiple is not None:
        return config
    widest = max((min(kind_of(layer).size) for layer in layers.values()), default=0)
    return replace(config, rank_multiple=DECODER_MULTIPLE if is_decoder(model) and widest >= WIDE else MULTIPLE)


def multiple_of(config: CuttlefishConfig) -> int:
    """The config's `rank_multiple`, or what holds where no model is known."""
    return config.rank_multiple or MULTIPLE


def is_decoder(model: nn.Module) -> bool:
    """Whether it generates text from its own blocks alone."""
    generates = getattr(model, "can_generate", None)
    return generates is not None and generates() and not getattr(model.config, "is_encoder_decoder", False)
