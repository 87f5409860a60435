"""Add samples of tokens to the sums of layers' moments, for layers of one shape in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
MOST_BYTES = 2**28
"""Of samples that wait to be added together on a GPU: a BERT-base, 32 x 128, adds them three times in a backward."""


LONE_BYTES = 2**24
"""Of the gradient that a sample is picked from: a larger one is not kept for the sample's sake, which becomes a copy."""


class Sample(NamedTuple):
    """Tokens of one layer in one micro-batch.

    Attributes:
        x: inputs (t, n), or numbers of tokens (t,), which stand for one-hot rows. g: output gradients (t, m).
        y: outputs (t, m) where m <= n; None: to be worked out from the inputs.
        stride: how many tokens each of them stands for. weight: (m, n), that the layer ran with.
        by: what each token's gradient is multiplied by, (t,); None: 1.
    """

    x: torch.Tensor
    y: torch.Tensor | None
    g: torch.Tensor
    stride: int
    weight: torch.Tensor
    by: torch.Tensor | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Samples of one kind can be added together."""
        x, y, g, stride, weight, by = self
        shapes = weight.shape, x.shape, stride, x.device, by is None
        return *shapes, x.dtype, None if y is None else y.dtype, g.dtype, weight.dtype


class Waiting(list[tuple[dict[str, torch.Tensor], Sample]]):
    """Samples that wait to be added together, each with the sums that it goes to.

    Attributes:
        nbytes: what they keep alive: all of the tensors that they were picked from, what several share once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self._inputs: set[int] = set()

    def add(self, sums: dict[str, torch.Tensor], sample: Sample) -> None:
        """One more."""
        held = sample.g.untyped_storage().nbytes()
        if held > max(LONE_BYTES, sample.g.nbytes):
            sample = sample._replace(g=sample.g.clone())
            held = sample.g.nbytes
        if id(sample.x) not in self._inputs:
            self._inputs.add(id(sample.x))
            held += sample.x.nbytes
        self.nbytes += held + (0 if sample.y is None else sample.y.nbytes)
        self.append((sums, sample))

    def take(self) -> list[list[tuple[dict[str, torch.Tensor], Sample]]]:
        """All of them, those that can be added together in one list; none wait any more."""
        found = kinds(self)
        self.clear()
        return found

    def clear(self) -> None:
        super().clear()
        self._inputs.clear()
        self.nbytes = 0


def kinds(waiting: Sequence[tuple[T, Sample]]) -> list[list[tuple[T, Sample]]]:
    """Samples, each with what belongs to it, that can be added together, in the order in which they came."""
    found: dict[tuple[object, ...], list[tuple[T, Sample]]] = {}
    for beside, sample in waiting:
        found.setdefault(sample.kind, []).append((beside, sample))
    return list(found.values())


@torch.no_grad()
def add_samples(
    sums: Sequence[Mapping[str, torch.Tensor]],
    samples: Sequence[Sample],
    scale: torch.Tensor | float,
    far: bool | None = None,
) -> None:
    """Add samples of one kind to the sums of their layers, in fp32.

    Args:
        sums: those of each sample: signal and metric (k, k), x (n,), y (m,), count and other ().
        scale: by which all gradients are multiplied, too.
        far: whether the sums are on the CPU and the samples are not; None: looked up. Products then come to them.
    """
    first = samples[0]
    m, n = first.weight.shape
    far = sums[0]["count"].device != first.g.device if far is None else far
    with torch.autocast(device_type=first.weight.device.type, enabled=False):
        g = _together([s.g for s in samples])
        if first.by is None:
            g = g.float() * scale
        else:  # most layers of a batch share one
            shared = all(s.by is first.by for s in samples)
            by = first.by[None] if shared else _together([s.by for s in samples])  # type: ignore[misc]
            g = (g * (by * scale)[..., None]).float()
        # Tokens with a gradient. Where one is not finite, as in an overflow under fp16, none of the layer's count.
        size = torch.linalg.vector_norm(g, 1, dim=-1, keepdim=True)
        used = (size > 0) & (size.sum(1, keepdim=True) < torch.inf)
        unused = used.logical_not()
        g = g.masked_fill_(unused, 0.0)
        sized = {"count": used.sum((1, 2), dtype=torch.float32)}
        x = _together([s.x for s in samples])
        if first.x.ndim == 1:
            for own, tokens, counts in zip(sums, x, used[..., 0], strict=True):
                own["x"].index_add_(0, tokens, counts.to(own["x"]), alpha=first.stride)
            x = used.float()
        else:
            x = x.masked_fill(unused, 0.0).float()
            sized["x"] = x.sum(1)
        if m <= n:  # covariance of the outputs (without the bias: about their mean), moment of the output gradients
            if first.y is None:
                y = x @ _together([s.weight for s in samples]).float().mT
            else:
                y = _together([s.y for s in samples]).masked_fill(unused, 0.0).float()  # type: ignore[misc]
            sized |= {"y": y.sum(1), "other": _squares(x)}
            squared = {"signal": y, "metric": g}
        else:  # m > n: moment of the input gradients, covariance of the inputs
            sized["other"] = _squares(g)
            squared = {"signal": g @ _together([s.weight for s in samples]).float(), "metric": x}
        if len(sums) == 1 and not far:
            for key, rows in squared.items():
                sums[0][key].addmm_(rows[0].mT, rows[0], alpha=first.stride)
        else:
            sized |= {key: torch.bmm(rows.mT, rows) for key, rows in squared.items()}
        # All in one call: to a GPU that is a launch or two, whatever the shapes.
        to = [own[key] for key in sized for own in sums]
        new = [v for values in sized.values() for v in (values.to(to[0].device) if far else values).unbind()]
        torch._foreach_add_(to, new, alpha=first.stride)


def _together(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of each layer's, (layers, t, k) -> (layers,)."""
    return torch.linalg.vector_norm(rows, dim=(1, 2)).square()
