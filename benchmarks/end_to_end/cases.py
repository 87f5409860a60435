"""The models that are trained whole: shapes, blocks, random weights, random data of one length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import default_data_collator

from ..steps.cases import LARGE, LLAMA, build, make_batch

BATCHES = 8
"""Distinct batches, which return in turn."""
MANY = 64
"""So many where their lengths differ."""
MIDDLE, SPREAD = 12, 0.35
"""Tokens of a row in the middle, and the deviation of the logarithm."""


@dataclass(frozen=True)
class Case:
    """One model and its batches.

    Attributes:
        kind: "bert", "vit" or "llama". sizes: of its config. rows: of a batch. length: tokens of a row (0: an image).
        blocks: that are trained. of_blocks: that the model of this name has.
        shortest: tokens of the shortest rows, where lengths differ and a batch is as long as its longest row.
    """

    kind: str
    sizes: dict[str, Any]
    rows: int
    length: int
    blocks: int
    of_blocks: int = 0
    shortest: int = 0

    def cut(self, blocks: int | None) -> Case:
        """The same with fewer blocks, which compile in less time; None: with all."""
        return replace(self, blocks=blocks or self.blocks, of_blocks=self.blocks)

    def model(self, device: torch.device) -> Any:
        """With random weights, drawn where it is trained: a billion of them take a CPU long."""
        with device:
            return build(self.kind, self.sizes | {"num_hidden_layers": self.blocks})


TINY = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
CASES = {
    "bert-tiny": Case("bert", TINY, 4, 16, 2),
    "vit-tiny": Case("vit", TINY | {"image_size": 32, "patch_size": 8}, 4, 0, 2),
    "llama-tiny": Case("llama", LLAMA | TINY | {"num_key_value_heads": 1, "vocab_size": 256}, 4, 16, 2),
    "bert-base": Case("bert", {}, 32, 128, 12),
    # Lengths are spread about as those of TREC's questions: half of the batches' lengths lie within 6 tokens.
    "bert-base-questions": Case("bert", {}, 32, 48, 12, shortest=6),
    "bert-tiny-questions": Case("bert", TINY, 4, 48, 2, shortest=6),
    "bert-large": Case("bert", LARGE, 64, 128, 24),
    "vit-large": Case("vit", LARGE, 64, 0, 24),
    # Its vocabulary is small: all that a larger one would add to a step is the same in both runs.
    "llama-1b": Case(
        "llama", LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 8192}, 8, 1024, 16
    ),
}


class Rows(Dataset[dict[str, Any]]):
    """Rows for so many steps: `BATCHES` batches, again and again, so that no epoch ends."""

    def __init__(self, case: Case, config: Any, steps: int) -> None:
        rows = case.rows * (MANY if case.shortest else BATCHES)
        self.columns = make_batch(case.kind, config, rows, case.length, torch.device("cpu"))
        if case.kind != "llama":
            self.columns["labels"] = torch.randint(2, (rows,), generator=torch.Generator().manual_seed(0))
        if case.shortest:
            spread = torch.randn(rows, generator=torch.Generator().manual_seed(0)) * SPREAD
            lengths = (MIDDLE * spread.exp()).round().clamp(case.shortest, case.length)
            self.columns["attention_mask"] = (torch.arange(case.length) < lengths[:, None]).long()
        self.rows, self.count = rows, case.rows * steps

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {name: column[at % self.rows] for name, column in self.columns.items()}


def cut_to_longest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as long as its longest row, as a collator that pads makes it."""
    batch: dict[str, Any] = default_data_collator(rows)
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: column[:, :longest] if column.ndim == 2 else column for name, column in batch.items()}
