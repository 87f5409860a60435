"""How far one step moves the product, before the switch and after it, at the same rate: by optimizer, at sizes above and below a quarter."""

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from benchmarks.optimizer_rates import PACES, SIZES, gain
from hf_cuttlefish import factorize

ROWS, COLUMNS = 96, 64
BEFORE, AFTER = 60, 5


class Small(nn.Module):
    """Two layers; `size` multiplies the first one's weight and divides the second one's, and the outputs stay the same."""

    def __init__(self, size=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.size = nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, COLUMNS), size
        with torch.no_grad():
            self.first.weight *= size
            self.second.weight /= size

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) / self.size) * self.size)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2302.06675, algorithm 2; the packages that have it are in test_optimizer_kinds.py."""

    def __init__(self, params, lr, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                b1, b2 = group["betas"]
                p.sub_(group["lr"] * average.lerp(p.grad, 1 - b1).sign())
                average.lerp_(p.grad, 1 - b2)


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


OPTIMIZERS = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "SGD, momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "SGD, Nesterov, decay": lambda m: torch.optim.SGD(
        m.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "Lion": lambda m: Lion(m.parameters(), lr=1e-4),
    "Adafactor": lambda m: Adafactor(m.parameters(), lr=1e-3, scale_parameter=False, relative_step=False),
    "Adafactor, relative to the parameter": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "Muon": lambda m: torch.optim.Muon(matrices(m), lr=1e-3),
    "Muon, as AdamW": lambda m: torch.optim.Muon(matrices(m), lr=1e-3, adjust_lr_fn="match_rms_adamw"),
}


def train(model, optimizer, steps, first):
    """The relative changes of both layers' products, the mean over the steps."""
    moves = []
    for step in range(first, first + steps):
        x = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        layers = (model.first, model.second)
        now = [layer.weight.detach().clone() for layer in layers]
        optimizer.step()
        moves.append([float((la.weight.detach() - w).norm() / w.norm()) for la, w in zip(layers, now, strict=True)])
    return torch.tensor(moves).mean(0)


def pace(make, kept, size=1.0):
    """The mean relative change per step over the same batches: with a share of the parameters kept, or dense (None)."""
    model = Small(size)
    optimizer = make(model)
    train(model, optimizer, BEFORE, 0)
    if kept is not None:
        rank = int(kept * ROWS * COLUMNS / (ROWS + COLUMNS))
        factorize(model, {"first": rank, "second": rank}, optimizer)
    return train(model, optimizer, AFTER, BEFORE), model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_product_goes_on_at_about_the_dense_pace(name):
    """Of the same run on the same batches, the optimizer's state carried and its rate as it was."""
    dense, _ = pace(OPTIMIZERS[name], None)
    assert (dense > 1e-4).all()
    for kept, (least, most) in zip(SIZES, PACES[name], strict=True):
        ratio = pace(OPTIMIZERS[name], kept)[0] / dense
        assert float(ratio.min()) == pytest.approx(least, rel=0.1), kept
        assert float(ratio.max()) == pytest.approx(most, rel=0.1), kept


@pytest.mark.parametrize(("name", "power"), [("Lion", 0.5), ("Muon", 0.5), ("Adafactor, relative to the parameter", 0)])
def test_how_the_pace_follows_the_size_of_the_weights(name, power):
    """Signs and orthogonal steps move the product as the root of its singular values, relative ones as it is."""
    make, large = OPTIMIZERS[name], 4.0
    plain, scaled = (pace(make, 0.4, size)[0] / pace(make, None, size)[0] for size in (1.0, large))
    assert (scaled / plain).tolist() == pytest.approx([large**power, large**-power], rel=0.05)


def test_the_gain_of_an_sgd_step():
    """The formula of `gain` against steps along random gradients, at weights of a small and a large size."""
    for size in (0.3, 3.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, COLUMNS))
        with torch.no_grad():
            for layer in model:
                layer.weight *= size
        factorize(model, {"0": 12, "1": 12})
        moved = reached = 0.0
        for layer in model:
            up, down = layer.up.weight.detach().double(), layer.down.weight.detach().double()
            out, back = torch.linalg.qr(up)[0], torch.linalg.qr(down.T)[0]
            for _ in range(20):
                g = torch.randn(len(up), down.shape[1], dtype=torch.float64)
                moved += float((g @ down.T @ down + up @ up.T @ g).square().sum())
                rest = g - out @ (out.T @ g)
                reached += float(g.square().sum() - (rest - rest @ back @ back.T).square().sum())
        assert gain(model) == pytest.approx((moved / reached) ** 0.5, rel=0.02)
