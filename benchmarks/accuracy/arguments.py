"""What the command lines here share."""

from __future__ import annotations

import argparse


def share(text: str) -> float:
    """A number between 0 and 1, also written as a fraction."""
    over, _, under = text.partition("/")
    value = float(over) / float(under or 1)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return value
