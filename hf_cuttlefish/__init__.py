"""Cuttlefish for Hugging Face: a smaller and faster transformer out of the same fine-tuning run (arXiv 2305.02538)."""

from __future__ import annotations

import logging as _logging

from tqdm import tqdm as _tqdm  # type: ignore[import-untyped]  # comes with transformers

from .callback import CuttlefishCallback
from .config import CuttlefishConfig
from .cuttlefish import Cuttlefish
from .decide.plan import RankPlan
from .decide.ranks import estimate_ranks
from .layers.low_rank import LowRankLinear
from .report.model_card import write_model_card
from .saving.checkpoints import last_whole_checkpoint
from .saving.following import follow_checkpoints
from .saving.loading import register as _register
from .saving.merged import save_merged
from .switch import factorize, merge

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
    "last_whole_checkpoint",
    "merge",
    "save_merged",
    "write_model_card",
]


class _Console(_logging.StreamHandler):
    """Shows our lines where the program has configured no logging of its own, as transformers does.

    A progress bar that stands in the way, such as Trainer's, is taken away and drawn again below.
    """

    def emit(self, record: _logging.LogRecord) -> None:
        if _logging.getLogger().handlers:
            return
        # Without tqdm's lock, which processes share: one that was killed with it in hand would stop us for ever.
        bars = [bar for bar in getattr(_tqdm, "_instances", ()) if hasattr(bar, "clear")]
        for bar in bars:
            bar.clear(nolock=True)
        super().emit(record)
        for bar in bars:
            bar.refresh(nolock=True)


_logger = _logging.getLogger(__name__)
if not _logger.handlers:
    _logger.addHandler(_Console())
    if _logger.level == _logging.NOTSET:
        _logger.setLevel(_logging.INFO)

_register()
