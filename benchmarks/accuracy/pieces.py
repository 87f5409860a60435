"""Texts for language models: tokens put end to end and cut to pieces, each begun by <bos>; a piece is its own label."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch

from .splits import Split

LENGTH = 256
"""Tokens of a piece, <bos> among them."""


def cut_to_pieces(texts: Iterable[list[int]], begin: int, length: int = LENGTH) -> np.ndarray:
    """Pieces of exactly `length` tokens, (pieces, length): `begin`, and what comes next of the texts; the very end is dropped."""
    stream = np.fromiter(chain.from_iterable(texts), dtype=np.int64)
    rows = len(stream) // (length - 1)
    pieces = np.full((rows, length), begin, dtype=np.int64)
    pieces[:, 1:] = stream[: rows * (length - 1)].reshape(rows, length - 1)
    return pieces


class PieceSplit(Split):
    """Pieces of text; every token but the first is to be predicted from those before it."""

    evaluation_batch = 16
    measured_rows = 128

    def __init__(self, pieces: np.ndarray, device: torch.device) -> None:
        super().__init__(pieces, device)

    def inputs(self, rows: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """input_ids, (rows, tokens)."""
        return {"input_ids": self.labels[rows]}

    def terms(self, scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of each next token, (terms, tokens), and what it is."""
        return scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
