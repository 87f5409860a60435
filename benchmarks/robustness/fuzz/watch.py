"""The watch: what a case does, and whether its error is a clear one."""

from __future__ import annotations

import os
import random
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .doors import NotAskedError
from .good_files import WrongLoadError

ROOT = Path(__file__).resolve().parents[3]
CLEAR = (ValueError, TypeError, FileNotFoundError)
"""What our own code may raise, with a message; transformers, torch and safetensors raise what they like."""

FORBIDDEN = {
    *(
        "socket.connect",
        "socket.getaddrinfo",
        "socket.sendto",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
    ),
    *("pickle.find_class", "ctypes.dlopen", "os.fork", "shutil.rmtree"),
}


class Watch:
    """An audit hook: what a case opens, runs, imports and connects to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = str(folder), False, ""
        self.readable = tuple(
            {self.folder, sys.prefix, sys.base_prefix, str(ROOT), "/proc", "/sys", "/dev/null", "/usr", "/lib"}
        )
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            writes = isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if not path.startswith(self.folder if writes else self.readable):
                self.seen = self.seen or f"{'writes' if writes else 'reads'} {path}"
        elif event in ("exec", "compile") and str(getattr(arguments[0], "co_filename", "")).startswith(self.folder):
            self.seen = self.seen or f"runs code of {arguments[0].co_filename}"
        elif event in FORBIDDEN and not self._is_own_checkpoint(event):
            self.seen = self.seen or f"{event} {arguments!r:.100}"

    @staticmethod
    def _is_own_checkpoint(event: str) -> bool:
        """The Trainer keeps its optimizer and random state in torch's own files, which it reads without running code."""
        return event == "pickle.find_class" and any(
            "trainer" in frame.filename for frame in traceback.extract_stack(limit=40)
        )


def judge(
    door: Callable[[Path, random.Random], None], folder: Path, rng: random.Random, watch: Watch
) -> tuple[str, str]:
    """("loaded" | "refused" | "not ours" | "finding", detail) of one case."""
    watch.seen, watch.on = "", True
    try:
        door(folder, rng)
        outcome, detail = "loaded", ""
    except NotAskedError as error:
        outcome, detail = "not ours", str(error)
    except Exception as error:
        outcome, detail = "refused", describe(error)
        ours = is_ours(error)
        text = str(error)
        unclear = ours and not (isinstance(error, CLEAR) and raised_on_purpose(error))
        unclear = unclear or isinstance(error, (MemoryError, WrongLoadError)) or "can't allocate memory" in text
        if unclear or re.search(r"not enough memory|bad_alloc|internal assert", text, re.I):
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
            outcome, detail = "finding", f"{detail} ({' '.join(frames)})"
    finally:
        watch.on = False
    return ("finding", watch.seen) if watch.seen else (outcome, detail)


def is_ours(error: BaseException) -> bool:
    """Whether the last frame that raised it, standard library aside, is the package's."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    files = [f for f in files if "site-packages" in f or str(ROOT) in f]
    return bool(files) and str(ROOT / "hf_cuttlefish") in files[-1]


def raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` of the package made it, and not a value that something stumbled over."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT / "hf_cuttlefish") in f.filename]
    return bool(frames) and (frames[-1].line or "").startswith("raise ")


def describe(error: BaseException) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]!r}"
