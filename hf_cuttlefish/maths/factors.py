"""Factorize: the mathematics of one layer. Tensors in, tensors out; nothing here knows a module.

A layer computes y = W x + b with W (m, n). Its inputs have mean mu (n) and covariance C (n, n) about that mean, the
gradients of the loss by its outputs the second moment G (m, m). To second order, and in K-FAC's approximation of the
Fisher matrix (Martens and Grosse 2015, arXiv 1503.05671), replacing W by A B raises the loss per token by

    1/2 || K^T (W - A B) L ||_F^2,     C = L L^T,  G = K K^T,     with the bias b + (W - A B) mu.

The best factors of rank r come from the leading singular vectors of M = K^T W L, and every singular value s that is
dropped costs s^2 / 2 per token, in one currency for all layers of the model. Only moments of the smaller side are needed:

    m <= n:  M M^T = K^T (W C W^T) K,  A B = K^-T P P^T K^T W    W C W^T is the covariance of the outputs: (m, m)
    m >  n:  M^T M = L^T (W^T G W) L,  A B = W L Q Q^T L^-1      W^T G W is the second moment of the input gradients: (n, n)

so an MLP of 4096 x 14336 needs two matrices of 4096^2 and none of 14336^2. With C and G the identity and mu zero this is
the plain truncated SVD (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

INPUT_DAMPING = 1e-3
"""Share of the mean variance added to C: directions that the sample did not show must not be free to drop."""


GRADIENT_DAMPING = 0.1
"""Share of the mean diagonal added to G; 0.03 to 0.3 do equally well with enough examples, and with few ones more is better
(docs/results.md)."""


@dataclass(frozen=True)
class LayerMoments:
    """What flowed through one layer W (m, n), per token, on its smaller side; k = min(m, n).

    Attributes:
        signal: (k, k). m <= n: covariance of the outputs, W C W^T. m > n: second moment of the input gradients, W^T G W.
        metric: (k, k). m <= n: second moment G of the output gradients. m > n: covariance C of the inputs. None: identity.
        other_level: mean diagonal of the moment that is not kept (C if m <= n, else G); scales its damping.
        mean: input mean (n,), whose part goes into the bias; None where the layer has no bias: C is then about zero.
        tokens: tokens of one example that reach the loss through this layer (1 where an example is a token).
    """

    signal: torch.Tensor
    metric: torch.Tensor | None
    other_level: float = 0.0
    mean: torch.Tensor | None = None
    tokens: float = 1.0

    @classmethod
    def from_full(
        cls,
        weight: torch.Tensor,
        covariance: torch.Tensor | None = None,
        gradient: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
        tokens: float = 1.0,
    ) -> LayerMoments:
        """The same from full moments: covariance C (n, n), gradient G (m, m), each None for the identity, mean (n,)."""
        w = weight.detach().double()
        m, n = w.shape
        on_left = m <= n
        inner, outer = (covariance, gradient) if on_left else (gradient, covariance)
        side = w if on_left else w.mT
        inner = None if inner is None else inner.to(w)
        signal = side @ side.mT if inner is None else side @ inner @ side.mT
        level = 0.0 if inner is None else float(inner.diagonal().mean())
        return cls(signal, outer, level, mean, tokens)


Moments = LayerMoments | Sequence[LayerMoments | None]
"""Of one weight, or one for each matrix of a stack (None: nothing was seen of it)."""


@dataclass(frozen=True)
class Factors:
    """down (r, n) and up (m, r) with W ~ up @ down, and bias_shift (m,) to be added to the bias (None: nothing).

    Of a stack of matrices all have one dimension more, in front.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias_shift: torch.Tensor | None = None


@dataclass(frozen=True)
class Decomposition:
    """A weight in its metric, ready to be cut at any rank up to `up.shape[1]`.

    Attributes:
        spectrum: singular values of K^T W L, falling, (min(m, n),), float64.
        up: (m, k), down: (k, n): the product of the first r columns and rows is the best approximation of rank r.
        mean: (n,) or None; mapped_mean: W mu, (m,).

    Of a stack of matrices all but the spectrum have one dimension more, in front; the spectrum is what a rank costs all of them.
    """

    spectrum: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    mean: torch.Tensor | None = None
    mapped_mean: torch.Tensor | None = None

    def shortened(self, rank: int, dtype: torch.dtype, device: torch.device | str | None = None) -> Decomposition:
        """Only what a cut at `rank` or less needs, in another dtype or place; below break-even no larger than the weight."""
        up = self.up[..., :rank].to(device=device, dtype=dtype, copy=True)
        down = self.down[..., :rank, :].to(device=device, dtype=dtype, copy=True)
        return Decomposition(
            self.spectrum.to(device=device or self.spectrum.device), up, down, self.mean, self.mapped_mean
        )


def decompose(weight: torch.Tensor, moments: Moments | None = None) -> Decomposition:
    """Singular values and vectors of K^T W L, from the eigenvectors of its smaller Gram matrix in float64.

    Args:
        weight: (m, n), finite, or a stack (count, m, n). moments: None for the plain spectrum of W.

    Raises:
        ValueError: weight or moments not finite, or of shapes that do not fit.
    """
    if weight.ndim == 3 and 0 not in weight.shape:
        return _decompose_stack(weight, moments)
    if moments is not None and not isinstance(moments, LayerMoments):
        raise ValueError(f"{len(moments)} moments were given for one matrix")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a weight to factorize has two dimensions and is not empty, got shape {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or Inf")
    w = weight.detach().double()
    m, n = w.shape
    on_left = m <= n
    side = w if on_left else w.mT  # (k, other)
    root, mean = None, None
    if moments is None:
        peak = _positive(float(side.abs().amax()))
        gram, scale = (side / peak) @ (side / peak).mT, peak  # squares of huge or tiny entries would leave the range
    else:
        _check_moments(moments, m, n)
        mean = None if moments.mean is None else moments.mean.to(w)
        root = _root(moments.metric, GRADIENT_DAMPING if on_left else INPUT_DAMPING, w)
        gram = moments.signal.to(w)
        damping = (INPUT_DAMPING if on_left else GRADIENT_DAMPING) * moments.other_level
        if damping > 0:
            gram = gram + damping * (side @ side.mT)
        if root is not None:
            gram = root.mT @ gram @ root
        scale = _positive(float(gram.diagonal().abs().amax())) ** 0.5
        gram = gram / scale**2
    values, vectors = _eigh((gram + gram.mT) / 2)
    p = vectors.flip(-1)
    spectrum = values.flip(-1).clamp_min(0).sqrt() * scale
    if on_left:
        up = p if root is None else torch.linalg.solve_triangular(root.mT, p, upper=True)
        down = p.mT @ (w if root is None else root.mT @ w)
    else:
        up = (w if root is None else w @ root) @ p
        down = p.mT if root is None else torch.linalg.solve_triangular(root, p.mT, upper=False, left=False)
    return Decomposition(spectrum, up, down, mean, None if mean is None else w @ mean)


def _decompose_stack(weights: torch.Tensor, moments: Moments | None) -> Decomposition:
    """Each matrix of a stack; they are cut at one rank, so the spectrum is the root of the sum of their squares.

    A matrix counts by the tokens that it saw, so that the spectrum's own are 1; one that saw none does not count beside others.
    """
    if isinstance(moments, LayerMoments) or (moments is not None and len(moments) != len(weights)):
        raise ValueError(f"a stack of {len(weights)} matrices needs as many moments")
    each = [None] * len(weights) if moments is None else list(moments)
    parts = [decompose(w, m) for w, m in zip(weights, each, strict=True)]
    unseen = 1.0 if moments is None else 0.0
    squares = [p.spectrum.square() * (unseen if m is None else m.tokens) for p, m in zip(parts, each, strict=True)]
    mean = mapped = None
    if any(p.mean is not None for p in parts):
        w = weights.detach().double()
        means = [w.new_zeros(w.shape[2]) if p.mean is None else p.mean for p in parts]
        mapped = torch.stack([w_i @ mu for w_i, mu in zip(w, means, strict=True)])
        mean = torch.stack(means)
    up, down = torch.stack([p.up for p in parts]), torch.stack([p.down for p in parts])
    return Decomposition(torch.stack(squares).sum(0).sqrt(), up, down, mean, mapped)


def cut(d: Decomposition, rank: int) -> Factors:
    """The best factors of the given rank, balanced (see `balance`), in float64.

    Raises ValueError unless 1 <= rank <= the number of columns kept in `d`.
    """
    f = rough_cut(d, rank, torch.float64)
    if f.up.ndim == 3:
        ups, downs = zip(*map(balance, f.up, f.down), strict=True)
        return Factors(torch.stack(downs), torch.stack(ups), f.bias_shift)
    up, down = balance(f.up, f.down)
    return Factors(down, up, f.bias_shift)


def rough_cut(d: Decomposition, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
    """As `cut`, but not balanced: cheap, and the product is the same. Raises as it does."""
    if not 1 <= rank <= d.up.shape[-1]:
        raise ValueError(f"rank is {rank}: it must lie between 1 and {d.up.shape[-1]}")
    up, down = d.up[..., :rank].to(dtype), d.down[..., :rank, :].to(dtype)
    shift = None
    if d.mean is not None and d.mapped_mean is not None:
        mean = d.mean.to(up)
        kept = up @ (down @ mean) if up.ndim == 2 else (up @ (down @ mean.unsqueeze(-1))).squeeze(-1)
        shift = d.mapped_mean.to(up) - kept
    return Factors(down, up, shift)


def factor_weight(weight: torch.Tensor, rank: int, moments: LayerMoments | None = None) -> Factors:
    """`cut(decompose(weight, moments), rank)`: factors of one weight (m, n), in float64."""
    return cut(decompose(weight, moments), rank)


def balance(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with the singular values shared equally: up^T up == down down^T == diag(S).

    From the Gram matrices, which have r rows: with up^T up = L L^T and L^T (down down^T) L = V S^2 V^T the factors are
    up L^-T V S^1/2 and S^-1/2 V^T L^T down. Where these squares have lost too much, from QR and SVD.

    The sign of each pair is fixed (largest entry of each column of `up` positive), so that equal products give equal factors.
    """
    found = _balance_by_gram(up, down)
    up, down = _balance_by_svd(up, down) if found is None else found
    peaks = up.gather(0, up.abs().argmax(0, keepdim=True))
    sign = torch.where(peaks < 0, -1.0, 1.0).to(up)
    return up * sign, down * sign.mT


def _balance_by_gram(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As `balance`, but for signs; None where it is not exact to about nine digits."""
    scale = _positive(float(up.abs().amax())) / _positive(float(down.abs().amax()))
    up, down = up / scale**0.5, down * scale**0.5
    root, info = torch.linalg.cholesky_ex(up.mT @ up)
    if int(info):
        return None
    values, vectors = _eigh(root.mT @ (down @ down.mT) @ root)
    values, vectors = values.flip(-1), vectors.flip(-1)
    if not bool(values[-1] > 1e-9 * values[0]):  # s^2: what is left of the least has seven digits
        return None
    s = values.sqrt()
    new_up = (up @ torch.linalg.solve_triangular(root.mT, vectors, upper=True)) * s.sqrt()
    new_down = (vectors / s.sqrt()).mT @ (root.mT @ down)
    balanced = new_down @ new_down.mT - torch.diag(s)
    return None if float(balanced.abs().amax()) > 1e-9 * float(s[0]) else (new_up, new_down)


def _balance_by_svd(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    p, s, qt = svd(r_up @ r_down.mT)
    root = s.sqrt()
    return (q_up @ p) * root, root[:, None] * (qt @ q_down.mT)


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


def _eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        p, s, _ = svd(gram)
        return s.flip(-1), p.flip(-1)


def _root(moment: torch.Tensor | None, damping: float, like: torch.Tensor) -> torch.Tensor | None:
    """Cholesky factor of moment + damping * mean(diagonal) * I; None (the identity) where the moment is missing or zero."""
    if moment is None:
        return None
    moment = moment.to(like)
    level = float(moment.diagonal().mean())
    if level <= 0:
        return None
    moment = (moment + moment.mT) / 2
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for _ in range(8):
        root, info = torch.linalg.cholesky_ex(moment + damping * level * eye)
        if int(info) == 0:
            return root
        damping = max(10 * damping, 1e-6)  # rounding made it indefinite
    return None


def _positive(x: float) -> float:
    return x if x > 0 else 1.0


def _check_moments(moments: LayerMoments, m: int, n: int) -> None:
    k = min(m, n)
    for name, value, shape in (
        ("mean", moments.mean, (n,)),
        ("signal", moments.signal, (k, k)),
        ("metric", moments.metric, (k, k)),
    ):
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, a weight of shape {(m, n)} needs {shape}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or Inf")
