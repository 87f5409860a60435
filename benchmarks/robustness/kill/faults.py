"""Faults: what disturbs a run, and where."""

from __future__ import annotations

from dataclasses import dataclass

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
DISK = ("file cut short", "read-only folder")
PLACES = ("anywhere", "in a save", "in the switch")


@dataclass
class Fault:
    """One disturbance: which, where, and what it hit."""

    kind: str
    place: str
    nth: int = 1
    share: float = 0.0
    victim: int = 0
    limit: int = 0
    job: str = ""
    hit: str = ""
    step: int = 0
    error: str = ""
    newest_is_whole: bool = True
    trainers_choice: str = ""
    survived: bool | None = None
