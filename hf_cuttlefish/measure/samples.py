"""Add samples of tokens to the sums of layers' moments, for layers of one shape in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
MOST_BYTES = 2**27
"""Of samples that wait to be added together on a GPU."""


@dataclass(frozen=True)
class Sample:
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
        dtypes = (self.x.dtype, None if self.y is None else self.y.dtype, self.g.dtype, self.weight.dtype)
        return (*self.weight.shape, len(self.x), self.stride, self.x.device, self.by is None, *dtypes)

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.g.nbytes + (0 if self.y is None else self.y.nbytes)


def kinds(waiting: Sequence[tuple[T, Sample]]) -> list[list[tuple[T, Sample]]]:
    """Samples, each with what belongs to it, that can be added together, in the order in which they came."""
    found: dict[tuple[object, ...], list[tuple[T, Sample]]] = {}
    for beside, sample in waiting:
        found.setdefault(sample.kind, []).append((beside, sample))
    return list(found.values())


@torch.no_grad()
def add_samples(
    sums: Sequence[Mapping[str, torch.Tensor]], samples: Sequence[Sample], scale: torch.Tensor | float
) -> None:
    """Add samples of one kind to the sums of their layers, in fp32.

    Args:
        sums: those of each sample: signal and metric (k, k), x (n,), y (m,), count and other ().
        scale: by which all gradients are multiplied, too.
    """
    first = samples[0]
    with torch.autocast(device_type=first.weight.device.type, enabled=False):
        by = torch.as_tensor(scale) if first.by is None else (_together([s.by for s in samples]) * scale)[..., None]  # type: ignore[misc]
        g = _together([s.g for s in samples]).float() * by
        finite = (
            torch.isfinite(g).all(-1).all(-1)[:, None, None]
        )  # an overflow step under fp16 is left out whole, unasked
        g = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) * finite
        used = (g != 0).any(-1, keepdim=True)
        x = _together([s.x for s in samples])
        if first.x.ndim == 1:
            for own, tokens, counts in zip(sums, x, used[..., 0], strict=True):
                own["x"].index_add_(0, tokens, counts.to(own["x"]), alpha=first.stride)
            x = used.float()
        else:
            x = torch.where(used, x.float(), 0.0)
            _add(sums, "x", x.sum(1), first.stride)
        _add(sums, "count", used.sum((1, 2)).float(), first.stride)
        m, n = first.weight.shape
        if m <= n:  # covariance of the outputs (without the bias: about their mean), moment of the output gradients
            if first.y is None:
                y = x @ _together([s.weight for s in samples]).float().mT
            else:
                y = torch.where(used, _together([s.y for s in samples]).float(), 0.0)  # type: ignore[misc]
            _add_squares(sums, "signal", y, first.stride)
            _add_squares(sums, "metric", g, first.stride)
            _add(sums, "y", y.sum(1), first.stride)
            _add(sums, "other", x.square().sum((1, 2)), first.stride)
        else:  # m > n: moment of the input gradients, covariance of the inputs
            _add_squares(sums, "signal", g @ _together([s.weight for s in samples]).float(), first.stride)
            _add_squares(sums, "metric", x, first.stride)
            _add(sums, "other", g.square().sum((1, 2)), first.stride)


def _together(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _add(sums: Sequence[Mapping[str, torch.Tensor]], key: str, values: torch.Tensor, stride: int) -> None:
    torch._foreach_add_([s[key] for s in sums], list(values.unbind()), alpha=stride)


def _add_squares(sums: Sequence[Mapping[str, torch.Tensor]], key: str, rows: torch.Tensor, stride: int) -> None:
    """rows (layers, t, k): rows^T rows of each."""
    if len(sums) == 1:
        sums[0][key].addmm_(rows[0].mT, rows[0], alpha=stride)
    else:
        _add(sums, key, torch.bmm(rows.mT, rows), stride)
