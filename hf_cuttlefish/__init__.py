"""Cuttlefish for Hugging Face: a smaller and faster transformer out of the same fine-tuning run (arXiv 2305.02538).

In the order in which data flows, and in which packages may import each other:

    maths      pure functions: stable ranks, factors, an optimizer's moments
    layers     dense layers, the low-rank one, sharded tensors
    measure    what is seen of a run; changes nothing
    decide     when, where, how much; a plan comes out
    patch      the one place that changes a model or an optimizer
    engines    what trains the model; one file an engine
    saving     folders that load, checkpoints that resume
    report     lines, tables, cards and plots
    switch, cuttlefish, trainer, callback    the switch, the run, what Trainer knows and runs, its door
    cli        the command
"""

from __future__ import annotations

import importlib as _importlib
import logging as _logging
import os as _os
import sys as _sys
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from .callback import CuttlefishCallback
    from .config import CuttlefishConfig
    from .cuttlefish import Cuttlefish
    from .decide.plan import RankPlan
    from .decide.ranks import estimate_ranks
    from .layers.low_rank import LowRankLinear
    from .patch.graphed_step import GraphedStep
    from .report.model_card import write_model_card
    from .saving.checkpoints import last_whole_checkpoint
    from .saving.following import follow_checkpoints
    from .saving.merged import save_merged
    from .switch import factorize, merge

__version__ = "0.2.0"

__all__ = [
    "Cuttlefish",
    "CuttlefishCallback",
    "CuttlefishConfig",
    "GraphedStep",
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

_PLACES = {
    "Cuttlefish": "cuttlefish",
    "CuttlefishCallback": "callback",
    "CuttlefishConfig": "config",
    "GraphedStep": "patch.graphed_step",
    "LowRankLinear": "layers.low_rank",
    "RankPlan": "decide.plan",
    "estimate_ranks": "decide.ranks",
    "factorize": "switch",
    "follow_checkpoints": "saving.following",
    "last_whole_checkpoint": "saving.checkpoints",
    "merge": "switch",
    "save_merged": "saving.merged",
    "write_model_card": "report.model_card",
}


class _Console(_logging.StreamHandler):
    """Shows our lines where the program has configured no logging of its own, as transformers does.

    A progress bar that stands in the way, such as Trainer's, is taken away and drawn again below.
    """

    def emit(self, record: _logging.LogRecord) -> None:
        if _logging.getLogger().handlers:
            return
        # Without tqdm's lock, which processes share: one that was killed with it in hand would stop us for ever.
        tqdm = getattr(_sys.modules.get("tqdm"), "tqdm", None)
        bars = [bar for bar in getattr(tqdm, "_instances", ()) if hasattr(bar, "clear")]
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


def load() -> None:
    """Import torch, transformers and all of the package, and make `from_pretrained` know factorized folders.

    `import hf_cuttlefish` has done so, except where it is run as the command, whose --help need not wait for them.
    """
    from .patch.report import FactorizationReport
    from .report.model_card import write_companion_card
    from .report.story import run_page
    from .saving.companions import keep_companions
    from .saving.doors import open_doors
    from .saving.loading import register
    from .trainer.known import complete_created_cards

    register()
    complete_created_cards()
    open_doors(keep_companions, write_companion_card)
    FactorizationReport.page = staticmethod(run_page)
    for name, place in _PLACES.items():
        globals()[name] = getattr(_importlib.import_module(f".{place}", __name__), name)


def _is_the_command() -> bool:
    """Whether this is `hf-cuttlefish`, or `python -m hf_cuttlefish`, while Python looks for what to run."""
    name = _os.path.basename(_sys.argv[0]).removesuffix(".exe") if getattr(_sys, "argv", None) else ""
    if name == "-m":
        after = _sys.orig_argv[_sys.orig_argv.index("-m") + 1 :] if "-m" in _sys.orig_argv else []
        return after[:1] == [__name__] or after[:1] == [f"{__name__}.cli.main"]
    return name == "hf-cuttlefish"


if not _is_the_command():
    load()


def __getattr__(name: str) -> _Any:
    if name in _PLACES:
        load()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
