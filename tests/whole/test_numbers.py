"""Hard numbers: whatever a layer or a loss holds, no NaN comes out of us, and a switch changes outputs by a stated amount."""

import gc
import logging
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, LowRankLinear
from hf_cuttlefish.decide.rules import allowed_rank
from hf_cuttlefish.maths import stable_rank
from hf_cuttlefish.maths.factors import LayerMoments, decompose, factor_weight
from hf_cuttlefish.measure.forgotten_scaler import say_forgotten_scaler
from hf_cuttlefish.measure.moments import MomentCollector
from hf_cuttlefish.measure.tracker import StableRankTracker


def ill_conditioned(m: int, n: int) -> torch.Tensor:
    """Singular values from 1 to 1e-12."""
    k = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))
    return ((u * torch.logspace(0, -12, k, dtype=torch.float64)) @ v.mT).float()


WEIGHTS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "random": torch.randn,
    "zero": torch.zeros,
    "one entry": lambda m, n: torch.zeros(m, n).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(3.0)),
    "constant": torch.ones,
    "rank 2": lambda m, n: torch.randn(m, 2) @ torch.randn(2, n),
    "condition 1e12": ill_conditioned,
    "tiny": lambda m, n: torch.randn(m, n) * 1e-30,
    "denormal": lambda m, n: torch.randn(m, n) * 1e-40,
    "huge": lambda m, n: torch.randn(m, n) * 1e30,
    "both": lambda m, n: torch.randn(m, n) * torch.logspace(-30, 30, n),
}
SHAPES = [(1, 7), (7, 1), (1, 1), (6, 10), (10, 6), (8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_factors_are_finite_and_as_near_as_their_rank_allows(kind, shape):
    """||W - A B|| <= tail of the spectrum + 1e-6 ||W|| without statistics, at every rank."""
    w = WEIGHTS[kind](*shape)
    exact = torch.linalg.svdvals(w.double())
    for rank in range(1, min(shape) + 1):
        f = factor_weight(w, rank)
        assert torch.isfinite(f.up).all() and torch.isfinite(f.down).all()
        error = torch.linalg.norm(w.double() - f.up @ f.down)
        assert error <= exact[rank:].square().sum().sqrt() + 1e-6 * torch.linalg.norm(w.double()) + 1e-45
    d = decompose(w)
    assert torch.isfinite(d.spectrum).all() and (d.spectrum >= 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("moment", ["zero", "one direction", "tiny", "huge"])
@pytest.mark.parametrize("kind", ["random", "zero", "rank 2", "condition 1e12", "tiny", "huge"])
def test_singular_moments_give_finite_factors_that_keep_the_weight_at_full_rank(kind, moment, shape):
    """Constant inputs, no gradients, one gradient, moments of 1e-20 and 1e20: finite, and the identity at full rank."""
    m, n = shape
    w = WEIGHTS[kind](m, n)

    def make(size: int) -> torch.Tensor:
        v = torch.randn(size, dtype=torch.float64)
        whole = torch.outer(v, v) + torch.eye(size, dtype=torch.float64)
        return {"zero": 0 * whole, "one direction": torch.outer(v, v), "tiny": 1e-20 * whole, "huge": 1e20 * whole}[
            moment
        ]

    moments = LayerMoments.from_full(w, make(n), make(m), mean=torch.randn(n))
    f = factor_weight(w, min(m, n), moments)
    assert all(torch.isfinite(t).all() for t in (f.up, f.down, f.bias_shift))
    largest = w.double().abs().max()
    assert (f.up @ f.down - w.double()).abs().max() <= 1e-5 * largest
    assert torch.isfinite(decompose(w, moments).spectrum).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_stable_ranks_are_finite_and_between_0_and_full(kind):
    for shape in SHAPES:
        w = WEIGHTS[kind](*shape)
        measured = StableRankTracker().measure({"w": w})["w"]
        for value in (float(stable_rank(w)), measured):
            assert math.isfinite(value) and 0 <= value <= min(shape) * (1 + 1e-5)
        assert (measured == 0) == bool((w == 0).all())


def test_layers_of_one_row_or_column_stay_dense():
    assert allowed_rank(1.0, 1, 50, 8)[0] is None and allowed_rank(1.0, 50, 1, 8)[0] is None


def test_a_driver_that_fails_is_followed_by_sturdier_ones(monkeypatch):
    """eigh, then SVD of the driver, then on the CPU in fp64, then slightly disturbed: the factors hold all the same."""
    w = torch.randn(12, 9)
    expected = factor_weight(w, 4)
    svd = torch.linalg.svd
    calls = []

    def no_eigh(matrix: torch.Tensor) -> torch.Tensor:
        raise torch.linalg.LinAlgError("eigh did not converge")

    def svd_at_last(matrix: torch.Tensor, full_matrices: bool = True) -> torch.Tensor:
        calls.append(matrix.dtype)
        if len(calls) < 3:
            raise torch.linalg.LinAlgError("svd did not converge")
        return svd(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "eigh", no_eigh)
    monkeypatch.setattr(torch.linalg, "svd", svd_at_last)
    found = factor_weight(w, 4)
    assert len(calls) >= 4
    torch.testing.assert_close(found.up @ found.down, expected.up @ expected.down, rtol=1e-8, atol=1e-8)


# --- runs ---

WIDTH = 16


class Net(nn.Module):
    """Two blocks with a residual connection; the loss can be made anything."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") if labels is not None else logits.sum()
        return {"loss": loss / max(1, len(x)), "logits": logits}


def train(
    batches: list[dict[str, torch.Tensor]],
    scaler: torch.amp.GradScaler | None = None,
    is_given: bool = True,
    **options: object,
):
    """Steps over the batches, with a switch after the last; whoever wants a NaN puts it into a batch."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    settings = {"switch_step": len(batches), "statistics_steps": len(batches), "rank_multiple": 1, **options}
    cuttlefish = Cuttlefish(
        model, optimizer, CuttlefishConfig(**settings), total_steps=20, scaler=scaler if is_given else None
    )  # type: ignore[arg-type]
    for batch in batches:
        loss = model(**batch)["loss"]
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        cuttlefish.step()
    return model, cuttlefish


def rows(count: int = 12, value: float | None = None) -> dict[str, torch.Tensor]:
    x = torch.randn(count, WIDTH) if value is None else torch.full((count, WIDTH), value)
    return {"x": x, "labels": torch.arange(count) % 3}


def check_finite_and_switched(model: nn.Module, cuttlefish: Cuttlefish) -> None:
    assert cuttlefish.switch_step is not None and any(isinstance(m, LowRankLinear) for m in model.modules())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(**rows())["logits"]).all()


def test_a_step_whose_gradients_overflow_is_left_out():
    """fp16's overflow: a scale that makes gradients infinite. The scaler skips the step, and the statistics leave it out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert scaler.is_enabled()
    overflow = rows()
    overflow["x"] = overflow["x"] * 1e38
    model, cuttlefish = train([rows(), overflow, rows(), rows()], scaler)
    assert scaler.get_scale() == 2.0**9  # it did overflow, once
    check_finite_and_switched(model, cuttlefish)
    assert not any("no usable statistics" in note for note in cuttlefish.plan.notes)
    assert math.isfinite(cuttlefish.plan.predicted_loss_increase)


@pytest.mark.parametrize("is_given", [True, False])
def test_a_scaler_that_the_run_was_not_given_is_named(caplog, is_given):
    """Without a word the predicted increase of the loss was 31,165."""
    gc.collect()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with caplog.at_level(logging.WARNING):
        train([rows(), rows(), rows()], scaler, is_given=is_given)
    named = [r.message for r in caplog.records if "a GradScaler multiplies a loss by 1024" in r.message]
    assert len(named) == (not is_given)


def test_a_loss_in_bfloat16_has_no_scaler(caplog):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    with caplog.at_level(logging.WARNING):
        say_forgotten_scaler(1.0, (True, torch.bfloat16))
        assert not caplog.text
        say_forgotten_scaler(1.0, (True, torch.float16))
    assert "multiplies a loss by 1024" in caplog.text


def test_empty_batches_and_constant_inputs_are_taken():
    model, cuttlefish = train([rows(), rows(0), rows(1), rows(value=2.0)])
    check_finite_and_switched(model, cuttlefish)
    model, cuttlefish = train([rows(value=1.0)] * 3)
    check_finite_and_switched(model, cuttlefish)
    model, cuttlefish = train([rows(value=0.0)] * 3)
    check_finite_and_switched(model, cuttlefish)


def test_weights_that_a_nan_loss_has_spoilt_are_named_and_stay_dense(caplog):
    spoilt = rows()
    spoilt["x"][0, 0] = math.nan
    with caplog.at_level(logging.WARNING):
        model, cuttlefish = train([rows(), spoilt, rows()])
    assert cuttlefish.switch_step is None and not any(isinstance(m, LowRankLinear) for m in model.modules())
    named = r"layers\.\d\.\d cannot be factorized: the weight holds NaN"  # the first that was seen to run with finite numbers
    assert "goes on full rank" in caplog.text and re.search(named, caplog.text)
    with pytest.raises(ValueError, match=named):
        train([rows(), spoilt, rows()], on_error="raise")


def test_statistics_of_a_nan_loss_are_not_used():
    """Only the moments are spoilt: the gradient is not finite, and the optimizer does not step."""
    model = Net()
    collector = MomentCollector(model, {"layers.0.0": model.layers[0][0]})
    collector.start()
    for factor in (1.0, math.nan, math.inf, 1.0):
        (model(**rows())["loss"] * factor).backward()
        collector.step()
    collector.stop()
    moments = collector.moments()["layers.0.0"]
    assert torch.isfinite(moments.signal).all() and torch.isfinite(moments.metric).all() and moments.tokens > 0


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_outputs_move_by_no_more_than_the_weights_did(share):
    """One layer, plain SVD: ||y' - y|| <= sigma_{r+1} ||x|| for every input, in fp32 to 1e-5."""
    layer = nn.Linear(48, 32)
    rank = max(1, round(share * 32))
    low = LowRankLinear.from_linear(layer, rank)
    x = torch.randn(100, 48)
    bound = torch.linalg.svdvals(layer.weight.double())[rank] * x.double().norm(dim=-1)
    moved = (low(x) - layer(x)).double().norm(dim=-1)
    assert (moved <= bound + 1e-5 * layer(x).double().norm(dim=-1)).all() and moved.max() > 0.1 * bound.max()
