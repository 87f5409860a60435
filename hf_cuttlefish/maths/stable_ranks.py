"""The stable rank of a tensor, exactly, and fast for large weights: a cold start and a warm step."""

from __future__ import annotations

import torch

BLOCK = 8
"""Vectors iterated together: the ones beside the leading one make the iteration converge where the spectrum is flat."""


COLD_STEPS, TOLERANCE = 24, 1e-4
"""A cold start ends when a step changes no sigma_1^2 of the group by more than this share, or after so many steps."""


SMALL = 64
"""Up to this many rows or columns the spectrum itself is cheap."""


SQUARINGS = 14
"""Of a matrix whose largest eigenvalue is asked for: those of two that differ by a share of 1e-4 end at 1 and 0.2."""


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


def small_spectra(weights: list[torch.Tensor]) -> torch.Tensor:
    """||W||_F^2 and sigma_1^2 of small weights of one shape, (len(weights), 2) in float64, from the whole spectrum."""
    gram = _gram(torch.stack(weights).double())
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.stack([total, torch.linalg.eigvalsh(torch.nan_to_num(gram))[:, -1]], -1)


def squared_norms(weights: list[torch.Tensor]) -> torch.Tensor:
    """||W||_F^2 of each weight, (len(weights),) in float64."""
    return torch.stack([torch.linalg.vector_norm(_exact(w)) for w in weights]).double().square()


def warm_step(rows: list[torch.Tensor], weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma_1^2 of each weight, and its rows u W anew, by one step of block iteration from the rows of the last check."""
    u = _orthonormal(_times_transposed(torch.stack(rows), weights))
    new = _times(u, weights)
    return _largest_eigenvalue(new).double(), new


def cold_start(weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest squared singular value of each weight, and the rows u W of its leading left singular vectors, from a cold start."""
    m, n = weights[0].shape
    rows = _start(BLOCK, n).to(weights[0].device, _exact(weights[0]).dtype).expand(len(weights), -1, -1)
    basis, images = rows.new_zeros(len(weights), 0, m), rows.new_zeros(len(weights), 0, n)
    top = rows.new_zeros(len(weights))
    for step in range(min(COLD_STEPS, min(m, n) // BLOCK)):
        u = _times_transposed(rows, weights)
        for again in range(2):  # twice: the first leaves rounding errors along the basis
            u = u - (u @ basis.mT) @ basis
            if again:  # what is mostly in the basis now was a rounding error
                u = u * (torch.linalg.vector_norm(u, dim=-1, keepdim=True) > 0.5)
            u = _orthonormal(u)
        # Where W has no more directions QR makes some up, which the basis may hold already: those must not count twice.
        u = u * (torch.linalg.vector_norm(u @ basis.mT, dim=-1, keepdim=True) < 1e-3)
        rows = _times(u, weights)
        basis, images = torch.cat([basis, u], -2), torch.cat([images, rows], -2)
        if step < 2:  # never enough
            continue
        last, top = top, _nearly_largest_eigenvalue(images)
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
    """Orthonormal rows with the span of those of each, (b, k, n). On a GPU by products: QR is called there matrix by matrix."""
    return torch.linalg.qr(rows.mT).Q.mT if _on_host(rows) else orthonormal_by_products(rows)


def orthonormal_by_products(rows: torch.Tensor) -> torch.Tensor:
    """As QR would make them, by Cholesky of the few inner products (Yamamoto et al. 2015, "CholeskyQR2"): (b, k, n), k small.

    Rows that depend on those before them become zero. In float64; the second time mends what the first leaves.
    """
    found = rows.double()
    found = found / _nonzero(torch.linalg.vector_norm(found, dim=-1, keepdim=True))
    for _ in range(2):
        gram = torch.nan_to_num(found @ found.mT)
        gram.diagonal(dim1=-2, dim2=-1).add_(1e-14)  # so that Cholesky ends where rows depend on one another
        lower = torch.linalg.cholesky_ex(gram).L
        is_new = lower.diagonal(dim1=-2, dim2=-1)[..., None] > 1e-6
        found = torch.linalg.solve_triangular(lower, found, upper=False) * is_new
    return found.to(rows.dtype)


def _gram(w: torch.Tensor) -> torch.Tensor:
    """Inner products of the rows, or of the columns where those are fewer."""
    return w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w


def _largest_eigenvalue(rows: torch.Tensor) -> torch.Tensor:
    """Of rows rows^T: (b, k, n) -> (b,)."""
    return torch.linalg.eigvalsh(torch.nan_to_num(rows @ rows.mT))[:, -1]


def _nearly_largest_eigenvalue(rows: torch.Tensor) -> torch.Tensor:
    """As `_largest_eigenvalue`, near enough to see whether it still grows. On a GPU by products: eigenvalues take it 20 ms a batch."""
    if _on_host(rows):
        return _largest_eigenvalue(rows)
    return largest_by_squaring(torch.nan_to_num(rows @ rows.mT))


def largest_by_squaring(gram: torch.Tensor) -> torch.Tensor:
    """Largest eigenvalue of positive semidefinite matrices, (b, k, k) -> (b,); too small by a share of log(k) / 2^14 at most.

    The mean of the eigenvalues, each weighted by its 2^14-th power: no more than products and sums.
    """
    power = gram
    for _ in range(SQUARINGS):
        power = power / _nonzero(power.diagonal(dim1=-2, dim2=-1).sum(-1))[:, None, None]
        power = power @ power
    return (gram * power).sum((-2, -1)) / _nonzero(power.diagonal(dim1=-2, dim2=-1).sum(-1))


def _on_host(x: torch.Tensor) -> bool:
    """Whether decompositions of small matrices are cheap here: LAPACK's are, a GPU's are not."""
    return x.device.type == "cpu"


def _exact(w: torch.Tensor) -> torch.Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _start(count: int, size: int) -> torch.Tensor:
    """Random rows (count, size), always the same ones, that leave the global random state alone."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
