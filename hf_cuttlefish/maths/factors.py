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

from .balance import balance_together
from .linalg import eigh, positive, product

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
    return decompose_together(weight[None], [moments])[0]


def decompose_together(weights: torch.Tensor, moments: Sequence[LayerMoments | None]) -> list[Decomposition]:
    """As `decompose` of each matrix of (count, m, n), in one batch where their moments are of one kind. Raises as it does."""
    if not torch.isfinite(weights).all():
        raise ValueError("the weight holds NaN or Inf")
    kinds: dict[tuple[bool, bool, bool], list[int]] = {}
    _check_moments(weights, moments)
    for i, given in enumerate(moments):
        kinds.setdefault(
            (given is None, given is None or given.metric is None, given is None or given.mean is None), []
        ).append(i)
    found: dict[int, Decomposition] = {}
    for numbers in kinds.values():
        some = weights if len(numbers) == len(weights) else weights[numbers]
        found |= zip(numbers, _decompose_batch(some.detach().double(), [moments[i] for i in numbers]), strict=True)
    return [found[i] for i in range(len(weights))]


def _decompose_batch(w: torch.Tensor, moments: Sequence[LayerMoments | None]) -> list[Decomposition]:
    """Of weights (count, m, n) in float64 whose moments are all there or all missing."""
    *_, m, n = w.shape
    on_left = m <= n
    side = w if on_left else w.mT  # (k, other)
    root, means, given = None, None, [each for each in moments if each is not None]
    if not given:
        scale = positive(side.abs().amax((1, 2), keepdim=True))
        gram = product(side / scale, (side / scale).mT)  # squares of huge or tiny entries would leave the range
    else:
        means = None if given[0].mean is None else torch.stack([each.mean.to(w) for each in given])  # type: ignore[union-attr]
        if given[0].metric is not None:
            metric = torch.stack([each.metric.to(w) for each in given])  # type: ignore[union-attr]
            root = _roots(metric, GRADIENT_DAMPING if on_left else INPUT_DAMPING)
        gram = torch.stack([each.signal.to(w) for each in given])
        levels = [(INPUT_DAMPING if on_left else GRADIENT_DAMPING) * max(each.other_level, 0.0) for each in given]
        if any(levels):
            gram = gram + torch.tensor(levels, dtype=w.dtype, device=w.device)[:, None, None] * product(side, side.mT)
        if root is not None:
            gram = product(product(root.mT, gram), root)
        scale = positive(gram.diagonal(dim1=1, dim2=2).abs().amax(1)).sqrt()[:, None, None]
        gram = gram / scale.square()
    values, vectors = eigh((gram + gram.mT) / 2)
    p = vectors.flip(-1)
    spectrum = values.flip(-1).clamp_min(0).sqrt() * scale[:, 0]
    if on_left:
        up = p if root is None else torch.linalg.solve_triangular(root.mT, p, upper=True)
        down = product(p.mT, w if root is None else product(root.mT, w))
    else:
        up = product(w if root is None else product(w, root), p)
        down = p.mT if root is None else torch.linalg.solve_triangular(root, p.mT, upper=False, left=False)
    mapped = None if means is None else (w @ means[..., None])[..., 0]
    return [
        Decomposition(
            spectrum[i], up[i], down[i], None if means is None else means[i], None if mapped is None else mapped[i]
        )
        for i in range(len(w))
    ]


def _decompose_stack(weights: torch.Tensor, moments: Moments | None) -> Decomposition:
    """Each matrix of a stack; they are cut at one rank, so the spectrum is the root of the sum of their squares.

    A matrix counts by the tokens that it saw, so that the spectrum's own are 1; one that saw none does not count beside others.
    """
    if isinstance(moments, LayerMoments) or (moments is not None and len(moments) != len(weights)):
        raise ValueError(f"a stack of {len(weights)} matrices needs as many moments")
    each = [None] * len(weights) if moments is None else list(moments)
    parts = decompose_together(weights, each)
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
    return cut_together([d], [rank])[0]


def cut_together(parts: Sequence[Decomposition], ranks: Sequence[int]) -> list[Factors]:
    """As `cut` of each, in one batch; all of weights of one shape. Raises as it does."""
    rough = [rough_cut(d, rank, torch.float64) for d, rank in zip(parts, ranks, strict=True)]
    stacks = [f.up.ndim == 3 for f in rough]
    ups = [up for f, stack in zip(rough, stacks, strict=True) for up in (f.up if stack else [f.up])]
    downs = [down for f, stack in zip(rough, stacks, strict=True) for down in (f.down if stack else [f.down])]
    balanced = iter(balance_together(ups, downs))
    found = []
    for f, stack in zip(rough, stacks, strict=True):
        pairs = [next(balanced) for _ in range(len(f.up) if stack else 1)]
        up, down = (torch.stack(both) if stack else both[0] for both in zip(*pairs, strict=True))
        found.append(Factors(down, up, f.bias_shift))
    return found


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


def _roots(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """Cholesky factors of moments (count, k, k) + damping * mean(diagonal) * I; the identity where a moment is zero."""
    moments = (moments + moments.mT) / 2
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    level = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    moments, level = torch.where(level > 0, moments, eye), level.clamp_min(0)
    share = torch.full_like(level, damping)
    for _ in range(8):
        roots, info = torch.linalg.cholesky_ex(moments + share * level * eye)
        failed = (info != 0)[:, None, None]
        if not bool(failed.any()):
            break
        share = torch.where(failed, (10 * share).clamp_min(1e-6), share)  # rounding made it indefinite
    return torch.where(failed, eye, roots)


def _check_moments(weights: torch.Tensor, moments: Sequence[LayerMoments | None]) -> None:
    *_, m, n = weights.shape
    k = min(m, n)
    shapes = {"mean": (n,), "signal": (k, k), "metric": (k, k)}
    given = [(name, value) for each in moments for name in shapes if (value := getattr(each, name, None)) is not None]
    for name, value in given:
        if tuple(value.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, a weight of shape {(m, n)} needs {shapes[name]}")
    finite = [torch.isfinite(value).all().to(weights.device) for _, value in given]
    if finite and not bool(torch.stack(finite).all()):  # the device is asked once
        name = next(name for (name, _), ok in zip(given, finite, strict=True) if not bool(ok))
        raise ValueError(f"{name} holds NaN or Inf")


def frobenius_gradients(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ||up down||_F^2 / 2 by `up` (m, r) and by `down` (r, n), or stacks of them, without the product (arXiv 2105.01029)."""
    return up @ (down @ down.mT), (up.mT @ up) @ down
