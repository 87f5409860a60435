"""Cuttlefish for Hugging Face: a smaller and faster transformer out of the same fine-tuning run (arXiv 2305.02538)."""

from __future__ import annotations

import logging as _logging

from .callback import CuttlefishCallback
from .config import CuttlefishConfig
from .controller import Cuttlefish
from .layers import LowRankLinear
from .patching import factorize, merge
from .plan import RankPlan
from .ranks import estimate_ranks
from .saving import follow_checkpoints
from .saving import register as _register
from .spectrum import stable_rank

__version__ = "0.1.0"

__all__ = [
    "Cuttlefish",
    "CuttlefishCallback",
    "CuttlefishConfig",
    "LowRankLinear",
    "RankPlan",
    "estimate_ranks",
    "factorize",
    "follow_checkpoints",
    "merge",
    "stable_rank",
]


class _Console(_logging.StreamHandler):
    """Shows our lines where the program has configured no logging of its own, as transformers does."""

    def emit(self, record: _logging.LogRecord) -> None:
        if not _logging.getLogger().handlers:
            super().emit(record)


_logger = _logging.getLogger(__name__)
if not _logger.handlers:
    _logger.addHandler(_Console())
    if _logger.level == _logging.NOTSET:
        _logger.setLevel(_logging.INFO)

_register()
