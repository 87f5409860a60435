"""Gather statistics of a model that is not being trained, from batches with or without labels.

The training run has a loss of its own. Here one is made of what there is:

    labels, or a language model's own text     the model's loss
    a classifier without labels                its loss on labels drawn from its own predictions (the Fisher matrix)
    any other model                            random signs times its outputs: half the squared change of the outputs,
                                               in expectation (E[v v^T] = I, so E[J^T v v^T J] = J^T J)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..maths.factors import Moments
from .moments import MomentCollector


def gather_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: Mapping[str, nn.Module],
    tokens: int = 1024,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Moments]:
    """Moments of layers over the batches, for `estimate_ranks` and `factorize`; the model does not change.

        from hf_cuttlefish.decide.targets import find_targets

        statistics = gather_statistics(model, batches, find_targets(model))
        factorize(model, estimate_ranks(model, statistics=statistics), statistics=statistics)

    Runs forward and backward in eval mode, so nothing depends on dropout. Gradients are cleared before and after. Memory: the
    weights, their gradients, and 2 k^2 + n numbers a layer (see `MomentCollector`).

    Args:
        model: on its device, not wrapped. batches: keyword arguments of its forward; with labels its own loss counts.
        layers: name -> dense layer of the model, as `find_targets` gives them.
        tokens: of a layer and batch that enter at most.
        progress: wraps the batches as they are worked on, as tqdm does.

    Raises:
        ValueError: no batches; a model that returns no floating-point output.
    """
    collector = MomentCollector(model, layers, tokens)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    collector.start()
    try:
        for batch in progress(list(batches)):
            here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            with torch.enable_grad():
                output = model(**here)
                loss = output.get("loss") if hasattr(output, "get") else None
                if loss is None:
                    loss = _own_loss(model, output, here.get("attention_mask"), generator)
                loss.backward()
            model.zero_grad(set_to_none=True)
            collector.step()
    finally:
        collector.stop()
        model.train(training)
    if not collector.steps:
        raise ValueError("there are no batches to gather statistics from")
    return collector.moments()


def _own_loss(model: nn.Module, output: Any, mask: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """A loss for a model without labels (see above), a mean over the rows of the batch."""
    found = output[0] if not isinstance(output, torch.Tensor) else output
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        raise ValueError(
            f"{type(model).__name__} returns no floating-point tensor first: give labels, so that it has a loss"
        )
    scores = found.float()
    if scores.ndim == 2 and scores.shape[1] > 1 and "Classification" in type(model).__name__:
        chances = scores.detach().softmax(-1).cpu()
        return cross_entropy(scores, torch.multinomial(chances, 1, generator=generator)[:, 0].to(scores.device))
    signs = (torch.randint(0, 2, scores.shape, generator=generator) * 2 - 1).to(scores)
    if mask is not None and mask.shape == scores.shape[:2]:
        signs = signs * mask[..., None]
    return (scores * signs).sum() / len(scores)
