"""What a model says of a batch: log-probabilities at the positions that have a label, and its loss; in bounded memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

ENTRIES = 2**25
"""Scores looked at in a batch: 128 MB in fp32. A batch that has more is seen at positions spread evenly over it."""


@dataclass(frozen=True)
class Scores:
    """Of one batch.

    Attributes:
        log_probabilities: (positions, classes) in fp32, or None where the model gives no class scores.
        loss: mean loss, or None where the model returns none.
        of_tokens: whether each token of an example has scores of its own.
    """

    log_probabilities: torch.Tensor | None
    loss: float | None
    of_tokens: bool = False


def scores_of(model: nn.Module, batch: Mapping[str, Any]) -> Scores:
    """Run the model on a batch as it stands.

        with torch.no_grad():
            scores_of(model, batch).loss

    A causal language model is asked for the scores of the positions that are looked at and for no others: a vocabulary of
    262,144 times all tokens of a batch may not fit.
    """
    labels = _classes(batch.get("labels"))
    if labels is not None and labels.ndim == 2 and (classes := _classes_of_tokens(model)):
        return _next_tokens(model, batch, labels, classes)
    output = model(**batch)
    loss = output.get("loss") if hasattr(output, "get") else None
    known = float(loss) if isinstance(loss, torch.Tensor) and loss.ndim == 0 else None
    found = _log_probabilities(model, output, labels)
    return Scores(found, known, found is not None and output["logits"].ndim > 2)


def _classes_of_tokens(model: nn.Module) -> int:
    """How many tokens a causal language model chooses from that can be asked for some positions alone; 0 for any other model."""
    if not _is_causal(model) or not _takes(model, "logits_to_keep"):
        return 0
    output_layer = cast(Any, model).get_output_embeddings()
    return 0 if output_layer is None else int(output_layer.weight.shape[0])


def _next_tokens(model: nn.Module, batch: Mapping[str, Any], labels: torch.Tensor, classes: int) -> Scores:
    """The scores of next tokens that are labels, of columns of the batch. labels: (rows, tokens). classes: tokens to choose from."""
    columns = labels[:, 1:].ne(-100).any(0).nonzero()[:, 0]
    columns = columns[_spread(len(columns), ENTRIES // (classes * len(labels)))]
    if not len(columns):
        return Scores(None, None)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, logits_to_keep=columns).logits
    following = labels.to(logits.device)[:, columns.to(logits.device) + 1]
    used = following.ne(-100)
    found = functional.log_softmax(logits[used].float(), -1)
    return Scores(found, float(functional.nll_loss(found, following[used])), True)


def _log_probabilities(model: nn.Module, output: Any, labels: torch.Tensor | None) -> torch.Tensor | None:
    logits = output.get("logits") if hasattr(output, "get") else None
    if not isinstance(logits, torch.Tensor) or logits.ndim < 2 or logits.shape[-1] < 2:
        return None
    if labels is not None and labels.shape == logits.shape[:-1]:
        if _is_causal(model):  # the scores at a position are of the token after it
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        logits = logits[labels.to(logits.device) != -100]
    logits = logits.reshape(-1, logits.shape[-1])
    logits = logits[_spread(len(logits), ENTRIES // logits.shape[-1]).to(logits.device)]
    return functional.log_softmax(logits.float(), -1)


def _spread(count: int, most: int) -> torch.Tensor:
    """At most so many whole numbers below `count` (one at least, if there is one), spread evenly."""
    most = min(count, max(1, most))
    return torch.arange(most) * count // max(1, most)


def _is_causal(model: nn.Module) -> bool:
    """Whether the model's loss shifts its labels."""
    return getattr(model, "loss_function", None) is ForCausalLMLoss


def _classes(labels: Any) -> torch.Tensor | None:
    return labels if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else None


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
