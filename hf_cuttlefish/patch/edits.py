"""Edit: one thing that the switch changes. All of them are made on all processes, or none on any."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..processes import Processes

logger = logging.getLogger(__name__)


class Edit:
    """One change, prepared: nothing has been changed before `apply`, and the defaults do nothing.

        class Rename(Edit):
            def apply(self): self.old, thing.name = thing.name, "new"

    Attributes:
        summary: what the report of the switch says of it, once it has been made; "" for nothing.
    """

    summary: str = ""

    def apply(self) -> None:
        """Make the change. It may fail half-way: `undo` follows then."""

    def undo(self) -> None:
        """Put back whatever `apply` came to; nothing if it was never called."""

    def finish(self) -> None:
        """Let the old go. Called when all edits have been made everywhere."""


def commit(edits: Sequence[Edit], processes: Processes) -> None:
    """Make all edits on all processes, or none on any; what one process raises is raised on all.

        commit([SwapModules(change), SwapParameters(change)], Processes.alone())

    Raises:
        What an edit raises, after all that were begun have been undone; OtherProcessError on the other processes.
    """
    begun: list[Edit] = []
    try:
        for edit in edits:
            begun.append(edit)
            with processes.together():
                edit.apply()
    except BaseException:
        for edit in reversed(begun):
            edit.undo()
        raise
    # From here on the change stands: what fails now must not look like a switch that failed.
    for edit in edits:
        try:
            edit.finish()
        except Exception as error:
            logger.warning(
                "Cuttlefish: all was changed, but %s could not let the old go: %s", type(edit).__name__, error
            )
