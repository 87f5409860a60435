"""Linear algebra of batches of matrices, with what to do where a driver fails."""

from __future__ import annotations

import torch


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD that retries on the CPU and then on a slightly disturbed matrix where a driver does not converge."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        host = matrix.double().cpu()
        try:
            parts = torch.linalg.svd(host, full_matrices=False)
        except torch.linalg.LinAlgError:
            parts = torch.linalg.svd(host + 1e-12 * host.abs().amax() * torch.eye(*host.shape), full_matrices=False)
        return tuple(part.to(matrix) for part in parts)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of each of a batch; of one alone as one matrix, which CPUs do faster."""
    return (left[0] @ right[0])[None] if len(left) == 1 else left @ right


def eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.linalg.eigh` of a batch, by SVD where a driver does not converge."""
    try:
        return torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        parts = [svd(one) for one in gram]
        return torch.stack([s.flip(-1) for _, s, _ in parts]), torch.stack([p.flip(-1) for p, _, _ in parts])


def positive(x: torch.Tensor) -> torch.Tensor:
    """x where it is positive, else 1: what may be divided by."""
    return torch.where(x > 0, x, 1.0)
