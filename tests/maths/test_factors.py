"""The mathematics of one layer: Eckart-Young, the loss metric against its direct form, the mean in the bias, odd weights."""

import pytest
import torch

from hf_cuttlefish.maths.factors import (
    GRADIENT_DAMPING,
    INPUT_DAMPING,
    LayerMoments,
    balance,
    cut,
    decompose,
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
