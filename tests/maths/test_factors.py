"""The mathematics of one layer: Eckart-Young, the loss metric against its direct form, the mean in the bias, odd weights."""

import pytest
import torch

from hf_cuttlefish.maths.balance import balance, balance_together
from hf_cuttlefish.maths.factors import (
    GRADIENT_DAMPING,
    INPUT_DAMPING,
    LayerMoments,
    cut,
    cut_together,
    decompose,
    decompose_together,
    factor_weight,
)

SHAPES = [(12, 12), (9, 20), (20, 9), (1, 7), (7, 1)]


def moment(size: int, seed: int) -> torch.Tensor:
    a = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.mT / a.shape[1]


def damped(c: torch.Tensor, damping: float) -> torch.Tensor:
    return c + damping * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)


def metric_loss(error: torch.Tensor, c: torch.Tensor, g: torch.Tensor) -> float:
    return float((error.mT @ g @ error @ c).diagonal().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_error_is_the_tail_of_the_spectrum(shape):
    w = torch.randn(*shape, dtype=torch.float64)
    s = torch.linalg.svdvals(w)
    d = decompose(w)
    torch.testing.assert_close(d.spectrum, s, rtol=1e-7, atol=1e-7)
    for rank in range(1, min(shape) + 1):
        f = cut(d, rank)
        assert f.down.shape == (rank, shape[1]) and f.up.shape == (shape[0], rank) and f.bias_shift is None
        error = (w - f.up @ f.down).square().sum()
        torch.testing.assert_close(error, s[rank:].square().sum(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_identity(shape):
    w = torch.randn(*shape, dtype=torch.float64)
    moments = LayerMoments.from_full(w, moment(shape[1], 1), moment(shape[0], 2), torch.randn(shape[1]).double())
    for m in (None, moments):
        f = factor_weight(w, min(shape), m)
        assert (f.up @ f.down - w).abs().max() < 1e-6 * w.abs().max()


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_loss_metric_equals_its_direct_form(shape):
    """The small-side formulas against the SVD of K^T W L written out, as the method note has it."""
    w = torch.randn(*shape, dtype=torch.float64)
    c, g = moment(shape[1], 1), moment(shape[0], 2)
    left, right = torch.linalg.cholesky(damped(g, GRADIENT_DAMPING)), torch.linalg.cholesky(damped(c, INPUT_DAMPING))
    p, s, qt = torch.linalg.svd(left.mT @ w @ right, full_matrices=False)
    d = decompose(w, LayerMoments.from_full(w, c, g))
    torch.testing.assert_close(d.spectrum, s, rtol=1e-6, atol=1e-9)
    rank = 4
    direct = torch.linalg.solve(left.mT, (p[:, :rank] * s[:rank]) @ qt[:rank]) @ torch.linalg.inv(right)
    f = cut(d, rank)
    torch.testing.assert_close(f.up @ f.down, direct, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_no_factors_of_that_rank_lose_less_in_the_metric(shape):
    w = torch.randn(*shape, dtype=torch.float64)
    c, g = moment(shape[1], 5), moment(shape[0], 6)
    cd, gd = damped(c, INPUT_DAMPING), damped(g, GRADIENT_DAMPING)
    ours = factor_weight(w, 3, LayerMoments.from_full(w, c, g))
    best = metric_loss(w - ours.up @ ours.down, cd, gd)
    plain = factor_weight(w, 3)
    assert best <= metric_loss(w - plain.up @ plain.down, cd, gd) * (1 + 1e-9)
    for seed in range(20):
        noise = torch.Generator().manual_seed(seed)
        up = ours.up + 0.05 * torch.randn(ours.up.shape, generator=noise, dtype=torch.float64)
        assert best <= metric_loss(w - up @ ours.down, cd, gd)


def test_the_mean_goes_into_the_bias_exactly():
    w, mean = torch.randn(8, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    f = factor_weight(w, 2, LayerMoments.from_full(w, moment(6, 1), moment(8, 2), mean))
    torch.testing.assert_close(f.up @ (f.down @ mean) + f.bias_shift, w @ mean)


def test_balanced_factors():
    up, down = balance(torch.randn(9, 4, dtype=torch.float64) * 100, torch.randn(4, 7, dtype=torch.float64))
    torch.testing.assert_close(up.mT @ up, down @ down.mT, rtol=1e-9, atol=1e-9)
    off = up.mT @ up - torch.diag((up.mT @ up).diagonal())
    assert off.abs().max() < 1e-9
    # The sign of a singular vector is free: fixing it makes equal products give equal factors.
    again_up, again_down = balance(-up, -down)
    torch.testing.assert_close(again_up, up)
    torch.testing.assert_close(again_down, down)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(6, 5),
        lambda: torch.ones(6, 5),
        lambda: torch.randn(6, 5) * 1e-30,
        lambda: torch.randn(6, 5) * 1e30,
        lambda: torch.diag(torch.logspace(0, -12, 6)),
    ],
    ids=["zero", "rank one", "tiny", "huge", "condition 1e12"],
)
def test_odd_weights_give_finite_factors(make):
    w = make()
    for moments in (
        None,
        LayerMoments.from_full(w, torch.zeros(w.shape[1], w.shape[1]), torch.zeros(w.shape[0], w.shape[0])),
    ):
        f = factor_weight(w, 5, moments)
        assert torch.isfinite(f.up).all() and torch.isfinite(f.down).all()
    assert ((f := factor_weight(w, 5)).up @ f.down - w.double()).abs().max() <= 1e-6 * max(w.abs().max().item(), 1e-37)


def test_constant_inputs():
    """A singular covariance (every input the same) must not make the factors explode."""
    w, mean = torch.randn(6, 8), torch.randn(8)
    f = factor_weight(w, 2, LayerMoments.from_full(w, torch.zeros(8, 8), moment(6, 2), mean))
    assert torch.isfinite(f.up).all() and f.up.abs().max() < 1e3
    torch.testing.assert_close((f.up @ (f.down @ mean.double()) + f.bias_shift).float(), w @ mean)


def test_shortened_decomposition_cuts_the_same():
    w = torch.randn(10, 14)
    d = decompose(w)
    short = d.shortened(5, torch.float32)
    full, cheap = cut(d, 4), cut(short, 4)
    torch.testing.assert_close(cheap.up @ cheap.down, full.up @ full.down, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="between 1 and 5"):
        cut(short, 6)


def test_bad_input_is_named():
    w = torch.randn(4, 5)
    with pytest.raises(ValueError, match="NaN"):
        decompose(w / 0)
    with pytest.raises(ValueError, match="shape"):
        decompose(torch.randn(4))
    with pytest.raises(ValueError, match="signal has shape"):
        decompose(w, LayerMoments(torch.eye(5), None))
    with pytest.raises(ValueError, match="metric holds NaN"):
        decompose(w, LayerMoments(torch.eye(4), torch.full((4, 4), torch.nan)))
    with pytest.raises(ValueError, match="rank is 0"):
        factor_weight(w, 0)
    with pytest.raises(ValueError, match="rank is 5"):
        factor_weight(w, 5)


def moments_of(weight, seed, with_bias, rank=None):
    """Moments that were seen in `rank` directions alone, if given."""
    g = torch.Generator().manual_seed(seed)
    m, n = weight.shape
    x = torch.randn(3 * n, n, generator=g, dtype=torch.float64) + 0.5
    grads = torch.randn(3 * m, rank or m, generator=g, dtype=torch.float64)
    grads = torch.cat([grads, torch.zeros(3 * m, m - (rank or m), dtype=torch.float64)], 1)
    mean = x.mean(0) if with_bias else None
    covariance = x.mT @ x / len(x) - (0 if mean is None else torch.outer(mean, mean))
    return LayerMoments.from_full(weight, covariance, grads.mT @ grads / len(grads), mean)


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (20, 12)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_batch_gives_what_each_gives_alone(shape, with_bias):
    """Of several kinds in one batch: plain ones, with moments, with moments of few directions, of zeros."""
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(6, *shape, generator=g, dtype=torch.float64)
    moments = [moments_of(w, i, with_bias) for i, w in enumerate(weights)]
    moments[1] = None
    moments[2] = moments_of(weights[2], 2, with_bias, rank=3)
    moments[4] = LayerMoments(
        torch.zeros_like(moments[3].signal), torch.zeros_like(moments[3].metric), 0.0, moments[3].mean
    )
    together = decompose_together(weights, moments)
    ranks = [4, 6, 3, 5, 2, 6]
    factors = cut_together(together, ranks)
    for i, rank in enumerate(ranks):
        alone = decompose(weights[i], moments[i])
        torch.testing.assert_close(
            together[i].spectrum, alone.spectrum, rtol=1e-6, atol=1e-6 * float(alone.spectrum[0] + 1)
        )
        one = cut(alone, rank)
        torch.testing.assert_close(factors[i].up @ factors[i].down, one.up @ one.down, rtol=1e-7, atol=1e-9)
        assert factors[i].down.shape == (rank, shape[1])
        if i != 4:  # of zeros all directions are alike
            torch.testing.assert_close(factors[i].up, one.up, rtol=1e-6, atol=1e-8)
        if with_bias and moments[i] is not None:
            torch.testing.assert_close(factors[i].bias_shift, one.bias_shift, rtol=1e-7, atol=1e-9)


def test_a_batch_is_balanced_where_one_of_it_needs_an_svd():
    g = torch.Generator().manual_seed(0)
    ups = [torch.randn(9, r, generator=g, dtype=torch.float64) for r in (3, 5, 4)]
    downs = [torch.randn(r, 7, generator=g, dtype=torch.float64) for r in (3, 5, 4)]
    ups[1][:, 0] = ups[1][:, 1] * (1 + 1e-14)  # the Gram matrix has no Cholesky factor
    for (up, down), a, b in zip(balance_together(ups, downs), ups, downs, strict=True):
        torch.testing.assert_close(up @ down, a @ b)
        torch.testing.assert_close(up.mT @ up, down @ down.mT, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("which", ["weight", "signal", "metric"])
def test_a_batch_names_what_is_not_finite(which):
    weights = torch.ones(2, 3, 3)
    moments = [LayerMoments(torch.eye(3), torch.eye(3)) for _ in range(2)]
    (weights if which == "weight" else getattr(moments[1], which))[1, 1] = torch.nan
    with pytest.raises(ValueError, match=f"{which} holds NaN or Inf"):
        decompose_together(weights, moments)
