"""The command line: look at a model, factorize it, merge it, plot a run, and say what is installed.

Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted, 141 the reader of our output went away, 143
terminated.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from .parser import make_parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    # Only now: torch and transformers take seconds, which --help and a mistyped option need not wait for.
    import transformers

    from .. import load
    from . import commands
    from .talking import one_line

    load()
    quiet = transformers.utils.logging
    quiet.set_verbosity_error()
    if not sys.stderr.isatty():
        quiet.disable_progress_bar()
    try:
        with _ends_tidily():
            getattr(commands, options.command)(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            raise
        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _ends_tidily() -> Iterator[None]:
    """SIGTERM ends the command like an exception, so that what was begun in OUT is taken away."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    except ValueError:  # not the main thread, in which signals arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
