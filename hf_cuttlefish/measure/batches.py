"""What is known of the micro-batches whose gradients arrive: of how many terms each loss is a mean, and each example's weight.

Told by what runs: by the batch where it has labels; by the gradient of the scores where somebody else has the labels (label
smoothing, a loss function of one's own), since each position that has a term there has one; else by the batch's rows. A
micro-batch begins with a forward of the model, or of a part of it, and counts once its gradients arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class Batches:
    """The micro-batches between `start` and `stop`, as forwards and gradients show them.

    Attributes:
        number: of the forward that is under way. count: backward passes. total: loss terms of all of them.
        terms: of how many terms the loss of the batch under way is a mean. rows: examples in it.
        losses: sum of the losses that forwards have returned; a float while none has.
        is_accumulated: whether the loss is divided by the number of micro-batches in a step.
        loss_scale, loss_factor, replicas: see `MomentCollector`.
        spread: what `factors` has given in this step, by number, shape without features, and first and step of the pick.
        norms, squares: sums over examples of the norm of an example's gradient, and of its square.
    """

    def __init__(self) -> None:
        self.number = self.count = 0
        self.total: torch.Tensor | float = 0.0
        self.terms: torch.Tensor | float = 1.0
        self.rows = 1
        self.losses: torch.Tensor | float = 0.0
        self.is_accumulated = True
        self.loss_scale = self.loss_factor = 1.0
        self.replicas = 1
        self.norms: torch.Tensor | float = 0.0
        self.squares: torch.Tensor | float = 0.0
        self._pending: torch.Tensor | float | None = None
        self._is_told = False
        self._weights: dict[int, torch.Tensor] = {}
        self.spread: dict[tuple[Any, ...], torch.Tensor] = {}

    def hooks(self, model: nn.Module, is_here: Callable[[nn.Module], bool]) -> list[Any]:
        """Follow the forwards of the model; returns handles. is_here: whether a module is the model, or its replica here."""

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled() and is_here(module):
                self._is_told = True
                self._begin_with(args, kwargs)

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if torch.is_grad_enabled() and is_here(module):
                self._note_output(kwargs, output)

        return [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]

    @property
    def pending(self) -> torch.Tensor | float:
        """Loss terms of the forwards whose gradients have not been seen to arrive."""
        return self._pending or 0.0

    def called(self, rows: int) -> None:
        """A layer is called. Where the model's own forward is not (a loss of one's own calls its parts), a batch begins here."""
        if not self._is_told and self._pending is None and not in_backward():
            self._begin(rows, rows)

    def arrived(self) -> None:
        """A gradient has arrived: the forwards under way count as one batch."""
        if self._pending is not None:
            self.total, self.count, self._pending = self.total + self._pending, self.count + 1, None

    def step(self) -> None:
        """An optimizer step has ended."""
        self._weights.clear()
        self.spread.clear()
        self._pending = None

    def settle(self) -> None:
        """Ask the device for the sums once, before they are asked for by each layer."""
        self.total, self.norms, self.squares = (float(v) for v in (self.total, self.norms, self.squares))

    def factors(self, number: int, grad: torch.Tensor, rows: int, pick: slice | None = None) -> torch.Tensor:
        """By what each token's output gradient is multiplied: one over the square root of its example's norm, (tokens,) in fp32.

        The first layer that backward reaches in a batch has the norms. Examples may be in parts (windows of images, tokens
        one below the other) that follow one another; where that cannot be, as with experts, all get one number for the mean.

        Args:
            number: of the forward. grad: (examples or parts of them, ..., m). rows: examples of the batch.
            pick: tokens that are asked for; all by default.
        """
        pick = slice(None) if pick is None else pick
        key = number, grad.shape[:-1], pick.start, pick.step
        if key not in self.spread:
            with torch.no_grad():
                self.spread[key] = self._spread_over(number, grad, rows, pick)
        return self.spread[key]

    def _spread_over(self, number: int, grad: torch.Tensor, rows: int, pick: slice) -> torch.Tensor:
        tokens = grad.numel() // grad.shape[-1]
        weights = self._weights.get(number)
        if weights is None and tokens:
            examples = grad.reshape(rows, -1) if rows and len(grad) % rows == 0 else grad.flatten(1)
            examples = examples.float() if examples.dtype == torch.float64 else examples
            norms = torch.linalg.vector_norm(examples, dim=1, dtype=torch.float32) * (self.terms / self.loss_scale)
            norms = torch.where(torch.isfinite(norms), norms, 0.0)
            self._weights[number] = weights = torch.where(norms > 0, norms, torch.inf).rsqrt()
            self.norms, self.squares = self.norms + norms.sum(), self.squares + norms.square().sum()
        if weights is None or not tokens:
            return torch.ones(tokens, device=grad.device)[pick]
        if len(grad) % len(weights):
            return self.mean_factor(number, grad.device).expand(tokens)[pick]
        return weights.repeat_interleave(tokens // len(weights))[pick]

    def mean_factor(self, number: int, device: torch.device) -> torch.Tensor:
        """One number for all tokens of a forward, where nobody knows whose they are; 1 before backward has reached a layer."""
        weights = self._weights.get(number)
        if weights is None:
            return torch.ones((), device=device)
        norms = torch.where(weights > 0, weights.pow(-2), 0.0)
        return (norms.sum() / norms.square().sum()).sqrt().nan_to_num()

    def _begin_with(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward of the model: its labels that count, its rows, or the Trainer's number of items."""
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        tensors = [t for t in (labels, *args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim]
        rows = len(tensors[0]) if tensors else 1
        over_tokens = isinstance(labels, torch.Tensor) and labels.ndim >= 2
        terms: torch.Tensor | float = rows
        if isinstance(labels, torch.Tensor) and over_tokens and not labels.is_floating_point():
            terms = labels.ne(-100).sum()
        self._begin(rows, terms)
        # The Trainer's number of items spans all micro-batches of a step, and it does not divide the loss by their number.
        # Losses over tokens are sums over that number, and so are those that are worked out outside; a model's own losses
        # over rows take their own mean all the same.
        self.is_accumulated = items is None
        if isinstance(items, torch.Tensor):
            items = items.flatten()[0]  # nn.DataParallel gives each replica a table of one
        outside = not isinstance(labels, torch.Tensor)
        if items is not None and (over_tokens or outside):
            self.terms = items * self.replicas
        if items is not None:
            self.terms = self.terms / self.loss_factor

    def _begin(self, rows: int, terms: torch.Tensor | float) -> None:
        self.number += 1
        self.rows, self.terms = rows, terms * self.replicas
        self._pending = terms if self._pending is None else self._pending + terms

    def _note_output(self, kwargs: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else None
        if isinstance(loss, torch.Tensor) and loss.ndim == 0:
            self.losses = self.losses + loss.detach().float()
        scores = output.get("logits") if hasattr(output, "get") else None
        outside = not isinstance(kwargs.get("labels"), torch.Tensor)
        if outside and isinstance(scores, torch.Tensor) and scores.ndim >= 2 and scores.requires_grad:
            rows, items, values = self.rows, kwargs.get("num_items_in_batch"), scores.detach()
            scores.register_hook(lambda grad: self._read_scores(values, grad, rows, items is None))

    @torch.no_grad()
    def _read_scores(self, scores: torch.Tensor, grad: torch.Tensor, rows: int, takes_mean: bool) -> None:
        """The loss was worked out outside, from scores (..., classes): its terms are the positions that have a gradient."""
        used = (grad != 0).any(-1)
        if scores.ndim >= 3:
            terms = used.sum()
            if self._pending is not None:
                self._pending = self._pending + terms - rows
            if takes_mean:
                self.terms = terms * self.replicas
        loss = _cross_entropy_behind(scores, grad, used)
        if loss is not None:
            self.losses = self.losses + loss


def _cross_entropy_behind(scores: torch.Tensor, grad: torch.Tensor, used: torch.Tensor) -> torch.Tensor | None:
    """The mean cross-entropy that a gradient by scores belongs to; None where it is the gradient of something else.

    The gradient by the scores of one position is in proportion to p - e_y: its entries sum to zero, and the label y has the
    least. At most 512 positions are looked at.
    """
    positions = used.reshape(-1).nonzero()[:, 0]
    positions = positions[:: max(1, len(positions) // 512)]
    if scores.shape[-1] < 2 or not len(positions):
        return None
    g, s = (t.reshape(-1, t.shape[-1])[positions].float() for t in (grad, scores))
    if not bool((g.sum(-1).abs() <= 0.02 * g.abs().sum(-1)).all()):
        return None
    return torch.nn.functional.cross_entropy(s, g.argmin(-1))


def in_backward() -> bool:
    """Whether a backward pass is under way, in which a checkpointed block runs once more."""
    return _current is not None and _current() != -1


_current = getattr(torch._C, "_current_graph_task_id", None)


def steps_in(flat: Mapping[str, torch.Tensor]) -> int:
    """The steps that saved statistics were gathered in. Raises ValueError where they do not say it."""
    if "steps" not in flat or flat["steps"].numel() != 1:
        raise ValueError("the saved statistics do not say in how many steps they were gathered")
    return int(flat["steps"])
