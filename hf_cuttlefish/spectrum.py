"""Measure: the stable rank of one tensor, and the stable ranks of a whole model as it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

BLOCK = 8
"""Vectors iterated together: the ones beside the leading one make the iteration converge where the spectrum is flat."""
CHUNK = 16_000_000
"""Largest number of elements stacked at once (64 MB in fp32), so that measuring needs little memory."""
WARM_ITERATIONS, COLD_ITERATIONS, TOLERANCE = 2, 100, 2e-6


def stable_rank(weight: torch.Tensor) -> torch.Tensor:
    """Stable rank ||W||_F^2 / sigma_1(W)^2 of each matrix (arXiv 2305.02538, section 3.1).

    Args:
        weight: (..., m, n), floating point, any device.

    Returns:
        (...) tensor, float32 (float64 for float64), between 1 and min(m, n); 0 for a zero matrix. Computed in float64.

    Raises:
        TypeError: not a floating-point tensor. ValueError: fewer than two dimensions, an empty matrix, or NaN/Inf in it.
    """
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"stable_rank needs a floating-point tensor, got {getattr(weight, 'dtype', type(weight).__name__)}"
        )
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise ValueError(f"stable_rank needs matrices (..., m, n) that are not empty, got shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("stable_rank needs values, and this tensor is on the meta device: load the weights first")
    if not torch.isfinite(weight).all():
        raise ValueError("stable_rank needs finite numbers, and this tensor holds NaN or Inf")
    w = weight.detach().double()
    w = w / _nonzero(w.abs().amax((-2, -1), keepdim=True))  # squares of huge or tiny entries would leave the range
    if w.shape[-2] > w.shape[-1]:
        w = w.mT
    gram = w @ w.mT
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    top = torch.linalg.eigvalsh(gram)[..., -1]
    result = torch.where(total > 0, total / _nonzero(top), torch.zeros_like(total))
    return result.to(weight.dtype if weight.dtype == torch.float64 else torch.float32)


class StableRankTracker:
    """Stable ranks of many weights, batched by shape on their own device, each check starting from the last one's vectors.

    A check runs a block power iteration with a Rayleigh-Ritz step; between two checks the leading singular space hardly
    moves, so two iterations from the last block are exact enough (relative error below 1e-3; tests/test_spectrum.py).
    """

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """Start cold at the next check. Called when a checkpoint is saved: a resumed run then measures the same bits."""
        self._blocks.clear()

    def measure(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Stable rank of each weight (m, n), by name; NaN where a weight is not finite. One device synchronization a group."""
        groups: dict[tuple[torch.Size, torch.device], list[str]] = {}
        for name, weight in weights.items():
            groups.setdefault((weight.shape, weight.device), []).append(name)
        pending: list[tuple[list[str], torch.Tensor]] = []
        for (shape, _), names in groups.items():
            for chunk in _chunks(names, max(1, CHUNK // shape.numel())):
                pending.append((chunk, self._measure_stack(chunk, weights)))
        found = {name: v for names, values in pending for name, v in zip(names, values.tolist(), strict=True)}
        return {name: found[name] for name in weights}

    @torch.no_grad()
    def _measure_stack(self, names: list[str], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        first = weights[names[0]]
        transpose = first.shape[0] < first.shape[1]  # iterate on the smaller side
        exact = torch.promote_types(first.dtype, torch.float32)
        device_type = first.device.type
        with torch.autocast(device_type=device_type, enabled=False):
            w = torch.stack([weights[n].detach() for n in names]).to(exact)
            scale = _nonzero(w.abs().amax((-2, -1), keepdim=True))
            w = w.mT / scale if transpose else w / scale
            total = w.square().sum((-2, -1))
            warm = all(n in self._blocks for n in names)
            if warm:
                x = torch.stack([self._blocks[n] for n in names]).to(w)
            else:
                x = _start(w.shape[-1], min(BLOCK, w.shape[-1])).to(w).expand(len(names), -1, -1)
            top, x = _leading(w, x, WARM_ITERATIONS if warm else COLD_ITERATIONS)
            for n, block in zip(names, x, strict=True):
                self._blocks[n] = block
            ranks = torch.where(total > 0, total / _nonzero(top), torch.zeros_like(total))
        return torch.where(torch.isfinite(total), ranks, torch.full_like(ranks, torch.nan))


def _leading(w: torch.Tensor, x: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest squared singular value of each w (b, m, n), m >= n, by iterating the block x (b, n, k); returns it and the block."""
    top = torch.zeros(len(w), dtype=w.dtype, device=w.device)
    for _ in range(most):
        z = torch.nan_to_num(w.mT @ (w @ x))
        x = torch.linalg.qr(z).Q
        y = w @ x
        last, top = top, torch.nan_to_num(torch.linalg.eigvalsh(torch.nan_to_num(y.mT @ y))[..., -1])
        # A warm start runs its few iterations without asking; a cold one asks the device once an iteration.
        if most > WARM_ITERATIONS and bool(((top - last) <= TOLERANCE * top).all()):
            break
    return top, x


def _start(size: int, width: int) -> torch.Tensor:
    """A fixed start (size, width) that leaves the global random state alone."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0))


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))
