"""Measure: the stable rank of one tensor, and the stable ranks of a whole model as it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

BLOCK = 8
"""Vectors iterated together: the ones beside the leading one make the iteration converge where the spectrum is flat."""
COLD_STEPS, TOLERANCE = 24, 1e-4
"""A cold start ends when a step changes no sigma_1^2 of the group by more than this share, or after so many steps."""
SMALL = 64
"""Up to this many rows or columns the spectrum itself is cheap."""
CHUNK = 16_000_000
"""Largest number of elements that the vectors of a group may have (64 MB in fp32), so that measuring needs little memory."""
SMALLEST, LARGEST = 1e-25, 1e25
"""Range of ||W||_F^2 in which fp32 is good enough."""


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
    """Stable ranks of many weights, each check starting from the last one's vectors.

    Kept of each weight are rows v = u W, where the orthonormal rows u span nearly its leading left singular vectors. A check
    is one step of block iteration, u = orth(v W^T) and v = u W, and the leading eigenvalue of v v^T: two thin products
    and a norm, so each weight is read three times and never copied. Between two checks the leading singular space hardly
    moves, and one step is exact enough (relative error below 1e-3; tests/test_spectrum.py). The first check has no such
    rows and builds a block Krylov space (Golub and Kahan), which a flat spectrum needs.
    """

    def __init__(self) -> None:
        self._rows: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """Start cold at the next check. Called when a checkpoint is saved: a resumed run then measures the same bits."""
        self._rows.clear()

    def measure(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Stable rank of each weight (m, n), by name; NaN where a weight is not finite. One device synchronization a group."""
        groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[str]] = {}
        for name, weight in weights.items():
            groups.setdefault((weight.shape, weight.dtype, weight.device), []).append(name)
        pending: list[tuple[list[str], torch.Tensor]] = []
        for (shape, _, device), names in groups.items():
            # On a CPU one at a time, while it is in the cache; elsewhere together, for fewer launches.
            most = 1 if device.type == "cpu" else max(1, CHUNK // (BLOCK * COLD_STEPS * sum(shape)))
            for chunk in _chunks(names, most):
                pending.append((chunk, self._measure_group(chunk, [weights[n].detach() for n in chunk])))
        found: dict[str, float] = {}
        for names, values in pending:
            for name, (total, top) in zip(names, values.tolist(), strict=True):
                # Outside this range fp32 loses squares of the entries; NaN lies outside every range.
                safe = SMALLEST < total < LARGEST and top > 0
                found[name] = max(1.0, total / top) if safe else _carefully(weights[name])
        return {name: found[name] for name in weights}

    @torch.no_grad()
    def _measure_group(self, names: list[str], weights: list[torch.Tensor]) -> torch.Tensor:
        """||W||_F^2 and sigma_1^2 of weights of one shape, (len(names), 2) in float64."""
        with torch.autocast(device_type=weights[0].device.type, enabled=False):
            if min(weights[0].shape) <= SMALL:
                gram = _gram(torch.stack(weights).double())
                total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
                return torch.stack([total, torch.linalg.eigvalsh(torch.nan_to_num(gram))[:, -1]], -1)
            if all(n in self._rows for n in names):
                u = _orthonormal(_times_transposed(torch.stack([self._rows[n] for n in names]), weights))
                rows = _times(u, weights)
                top = _largest_eigenvalue(rows).double()
            else:
                top, rows = _krylov(weights)
            self._rows.update(zip(names, rows, strict=True))
            total = torch.stack([torch.linalg.vector_norm(_exact(w)) for w in weights]).double().square()
        return torch.stack([total, top], -1)


def _krylov(weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest squared singular value of each weight, and the rows u W of its leading left singular vectors, from a cold start."""
    m, n = weights[0].shape
    rows = _start(BLOCK, n).to(weights[0].device, _exact(weights[0]).dtype).expand(len(weights), -1, -1)
    basis, images = rows.new_zeros(len(weights), 0, m), rows.new_zeros(len(weights), 0, n)
    top = rows.new_zeros(len(weights))
    for step in range(min(COLD_STEPS, min(m, n) // BLOCK)):
        u = _times_transposed(rows, weights)
        for _ in range(2):  # twice: the first leaves rounding errors along the basis
            u = _orthonormal(u - (u @ basis.mT) @ basis)
        # Where W has no more directions QR makes some up, which the basis may hold already: those must not count twice.
        u = u * (torch.linalg.vector_norm(u @ basis.mT, dim=-1, keepdim=True) < 1e-3)
        rows = _times(u, weights)
        basis, images = torch.cat([basis, u], -2), torch.cat([images, rows], -2)
        if step < 2:  # never enough
            continue
        last, top = top, _largest_eigenvalue(images)
        if bool((top - last <= TOLERANCE * top).all()):
            break
    values, vectors = torch.linalg.eigh(torch.nan_to_num(images @ images.mT))
    return values[:, -1].double(), vectors[..., -BLOCK:].mT @ images


def _times(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """x W of each weight, (b, k, m) -> (b, k, n). Products of rows: a CPU is ten times as slow at W^T times few columns."""
    return torch.stack([row @ _exact(w) for row, w in zip(x, weights, strict=True)])


def _times_transposed(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """x W^T of each weight, (b, k, n) -> (b, k, m)."""
    return torch.stack([row @ _exact(w).mT for row, w in zip(x, weights, strict=True)])


def _orthonormal(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(rows.mT).Q.mT


def _gram(w: torch.Tensor) -> torch.Tensor:
    """Inner products of the rows, or of the columns where those are fewer."""
    return w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w


def _largest_eigenvalue(rows: torch.Tensor) -> torch.Tensor:
    """Of rows rows^T: (b, k, n) -> (b,)."""
    return torch.linalg.eigvalsh(torch.nan_to_num(rows @ rows.mT))[:, -1]


def _exact(w: torch.Tensor) -> torch.Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _carefully(weight: torch.Tensor) -> float:
    """For a weight of zeros, of huge or of tiny entries, or one that is not finite."""
    return float(stable_rank(weight)) if bool(torch.isfinite(weight).all()) else math.nan


def _start(count: int, size: int) -> torch.Tensor:
    """Random rows (count, size), always the same ones, that leave the global random state alone."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))
