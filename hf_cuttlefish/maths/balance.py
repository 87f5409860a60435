"""Balance: factors of the same product that share its singular values equally."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .linalg import eigh, positive, product, svd


def balance(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with the singular values shared equally: up^T up == down down^T == diag(S).

    From the Gram matrices, which have r rows: with up^T up = L L^T and L^T (down down^T) L = V S^2 V^T the factors are
    up L^-T V S^1/2 and S^-1/2 V^T L^T down. Where these squares have lost too much, from QR and SVD.

    The sign of each pair is fixed (largest entry of each column of `up` positive), so that equal products give equal factors.
    """
    return balance_together([up], [down])[0]


def balance_together(
    ups: Sequence[torch.Tensor], downs: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As `balance` of each pair, in one batch; all of matrices of one shape, at ranks of their own."""
    ranks = [len(down) for down in downs]
    by_gram, exact = _balance_by_gram(_filled([up.mT for up in ups]).mT, _filled(downs), ranks)
    found = []
    for i, rank in enumerate(ranks):
        up, down = (by_gram[0][i, :, :rank], by_gram[1][i, :rank]) if exact[i] else _balance_by_svd(ups[i], downs[i])
        peaks = up.gather(0, up.abs().argmax(0, keepdim=True))
        sign = torch.where(peaks < 0, -1.0, 1.0).to(up)
        found.append((up * sign, down * sign.mT))
    return found


def _filled(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """(count, most, n), with zeros below those of fewer rows."""
    if len({len(m) for m in matrices}) == 1:
        return torch.stack(list(matrices))
    return torch.nn.utils.rnn.pad_sequence(list(matrices), batch_first=True)


def _balance_by_gram(
    up: torch.Tensor, down: torch.Tensor, ranks: Sequence[int]
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[bool]]:
    """As `balance`, but for signs, of up (count, m, r) and down (count, r, n); and whether each is exact to about nine digits.

    Of smaller ranks the last columns and rows are zeros, which stay last: in their place the Gram matrix of `up` is the identity.
    """
    most = torch.tensor(ranks, device=up.device)[:, None]
    real = torch.arange(up.shape[-1], device=up.device) < most  # (count, r)
    scale = positive(up.abs().amax((1, 2))) / positive(down.abs().amax((1, 2)))
    scale = scale.sqrt()[:, None, None]
    up, down = up / scale, down * scale
    root, info = torch.linalg.cholesky_ex(product(up.mT, up) + torch.diag_embed((~real).to(up)))
    root = torch.where((info == 0)[:, None, None], root, torch.eye(root.shape[-1]).to(root))
    values, vectors = eigh(product(product(root.mT, product(down, down.mT)), root))
    values, vectors = values.flip(-1), vectors.flip(-1)
    least = values.gather(1, most - 1)[:, 0]
    exact = (info == 0) & (least > 1e-9 * values[:, 0])  # s^2: what is left of the least has seven digits
    s = torch.where(real, values, 1.0).clamp_min(torch.finfo(up.dtype).tiny).sqrt()[:, None]
    new_up = product(up, torch.linalg.solve_triangular(root.mT, vectors, upper=True)) * s.sqrt()
    new_down = product((vectors / s.sqrt()).mT, product(root.mT, down))
    off = product(new_down, new_down.mT) - torch.diag_embed(torch.where(real, s[:, 0], 0.0))
    exact &= off.abs().amax((1, 2)) <= 1e-9 * s[:, 0, 0]
    return (new_up, new_down), exact.tolist()


def _balance_by_svd(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    p, s, qt = svd(r_up @ r_down.mT)
    root = s.sqrt()
    return (q_up @ p) * root, root[:, None] * (qt @ q_down.mT)
