"""Measure: what several cuts do to loss, outputs and metric on held-out batches. Forward passes only, one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..maths.factors import Factors
from .kept import standing_in
from .random_states import random_states_kept
from .scores import Scores, scores_of


@dataclass(frozen=True)
class Measured:
    """A model, or a cut of it, on the batches.

    Attributes:
        loss: mean loss, or None where there are no labels. accuracy: share of the right classes, 0 to 1; perplexity: of a language
            model; None where it is not one or has no labels.
        divergence: mean Kullback-Leibler divergence from the uncut model's outputs, nats an example or token; agreement: share
            of them whose likeliest class is the uncut model's; None where there are no class scores.
    """

    loss: float | None = None
    accuracy: float | None = None
    perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None


@torch.no_grad()
def measure_cuts(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    cuts: Sequence[Mapping[str, Factors]],
    batches: Iterable[Mapping[str, Any]],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Measured]:
    """The model as it is, then with each cut's factors in the places of their layers. The model does not change.

        before, half = measure_cuts(model, layers, [factors], batches)

    Args:
        model: on its device, not wrapped. layers: name -> dense layer. cuts: name -> factors, for each cut.
        batches: keyword arguments of the model's forward. progress: wraps them as they are worked on.
    """
    tallies = [_Tally() for _ in range(1 + len(cuts))]
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for batch in progress(list(batches)):
            here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            labels = here.get("labels")
            reference = None
            for tally, factors in zip(tallies, [{}, *cuts], strict=True):
                with random_states_kept(), standing_in(model, layers, factors):  # the same draws for each cut
                    scores = scores_of(model, here)
                reference = reference if factors else scores.log_probabilities
                tally.add(scores, reference, labels)
    finally:
        model.train(training)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    return [tally.result(vocabulary) for tally in tallies]


class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.loss = self.right = self.divergence = self.agreed = 0.0
        self.losses = self.labelled = self.scored = self.classes = 0
        self.is_sequence = False

    def add(self, scores: Scores, reference: torch.Tensor | None, labels: Any) -> None:
        """One batch. reference: log-probabilities (positions, classes) of the uncut model."""
        found = scores.log_probabilities
        classes = labels if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else None
        count = len(found) if found is not None else 1 if labels is None else len(labels)
        if scores.loss is not None:
            self.loss, self.losses = self.loss + scores.loss * count, self.losses + count
        if found is None or reference is None:
            return
        self.classes, self.scored = found.shape[-1], self.scored + len(found)
        self.divergence += float((reference.exp() * (reference - found)).sum())
        answers = found.argmax(-1)
        self.agreed += int((answers == reference.argmax(-1)).sum())
        if classes is not None:
            self.is_sequence |= classes.ndim > 1
            right = classes[classes != -100].reshape(-1).to(answers.device)
            if len(right) == len(answers):
                self.labelled, self.right = self.labelled + len(right), self.right + int((answers == right).sum())

    def result(self, vocabulary: int | None) -> Measured:
        """vocabulary: tokens that a language model knows: with as many classes, it is one."""
        loss = self.loss / self.losses if self.losses else None
        speaks = self.is_sequence and self.classes == vocabulary
        return Measured(
            loss,
            self.right / self.labelled if self.labelled and not speaks else None,
            math.exp(min(loss, 50.0)) if loss is not None and speaks else None,
            self.divergence / self.scored if self.scored else None,
            self.agreed / self.scored if self.scored else None,
        )
