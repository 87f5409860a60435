"""Which learning rate after the switch suits SGD, beside AdamW: digits, an MLP from scratch, one fifth of the blocks kept.

`python -m benchmarks.optimizer_rates` writes benchmarks/results/optimizer_rates.json (ten minutes on one core), `--show` the table of
docs/optimizers.md. SGD's step on the product grows with the weights' singular values (`gain`), so that a lower rate might be
thought right; this measures whether it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.layers.low_rank import low_rank_layers

RECORD = Path(__file__).parent / "results" / "optimizer_rates.json"
WIDTH, STEPS, SWITCH, KEPT, SEEDS = 96, 300, 100, 0.2, 3
SCALES = ("dense", 0.3, 1.0, 1.35, 2.5, "default")
RATES = {"SGD": (0.01, 0.05, 0.1), "AdamW": (3e-4, 2e-3)}


SIZES = (0.6, 0.4, 0.2, 0.1)
PACES = {
    "AdamW": [(0.99, 1.04), (0.85, 0.91), (0.70, 0.78), (0.58, 0.68)],
    "SGD": [(0.71, 0.84), (0.62, 0.73), (0.51, 0.60), (0.31, 0.37)],
    "SGD, momentum": [(0.72, 0.88), (0.65, 0.80), (0.59, 0.72), (0.54, 0.63)],
    "SGD, Nesterov, decay": [(0.70, 0.86), (0.63, 0.78), (0.56, 0.68), (0.50, 0.58)],
    "Lion": [(0.90, 0.99), (0.85, 0.94), (0.80, 0.87), (0.78, 0.84)],
    "Adafactor": [(0.98, 1.17), (0.90, 1.06), (0.76, 0.91), (0.47, 0.63)],
    "Adafactor, relative to the parameter": [(1.49, 1.51), (1.34, 1.36), (1.16, 1.19), (0.69, 0.78)],
    "Muon": [(1.37, 1.42), (1.56, 1.70), (2.12, 2.37), (2.97, 3.43)],
    "Muon, as AdamW": [(0.91, 1.00), (0.89, 1.01), (0.88, 0.98), (0.87, 0.93)],
}
"""Relative change of a product per step after the switch / of the weight before, over two layers, at SIZES kept: held by
tests/patch/test_pace_of_products.py."""

SECTION = """## The learning rate after the switch

How much the product changes in a step, relative to itself, as a multiple of what the dense step does: same batches, rate and state, a small net of
two layers (`tests/patch/test_pace_of_products.py`).

{paces}

Large weights change this. The steps of SGD grow as the singular values, those of AdamW, Lion and Muon as their root, relative ones (Adafactor) not
at all. The rate is not corrected for it. SGD with momentum wants what AdamW wants: more where the rate is low; a third of it was nowhere better. Test loss on
digits (an MLP from scratch, a fifth of its blocks kept; mean and spread of three seeds); gain: how many times as far the products move as the part
of the gradient that they can follow; default: the rate that is chosen.

{rates}

`python -m benchmarks.optimizer_rates`, on a CPU. The rates of SGD, Lion, Adafactor and Muon were
compared on nothing larger. SGD at its default also trained [ResNet-18 and a VGG](convolutional-networks.md).
"""


class Block(nn.Module):
    """LayerNorm, two layers of He's initialization, and what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        for layer in (self.up, self.down):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Four blocks, a layer before and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(64, WIDTH), nn.ModuleList(Block() for _ in range(4))
        self.last = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def gain(model: nn.Module) -> float:
    """How many times as far an SGD step moves the products as the part of the gradient that they can follow.

    |G V^T V + U U^T G| over the norm of G on the tangent space, of dimension r (m + n - r), root mean square over all G.
    """
    moved = reached = 0.0
    for layer in low_rank_layers(model).values():
        up, down = layer.up.weight.detach(), layer.down.weight.detach()
        (m, r), n = up.shape, down.shape[1]
        squares = m * (down @ down.mT).square().sum() + n * (up.mT @ up).square().sum()
        moved += float(squares + 2 * up.square().sum() * down.square().sum())
        reached += r * (m + n - r)
    return float((moved / reached) ** 0.5)


def run(name: str, rate: float, scale: float | str, seed: int) -> dict[str, float]:
    """Train; scale: of the rate after the switch, "default" as it is chosen, or "dense"."""
    from sklearn.datasets import load_digits

    inputs, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    inputs, order = inputs.float() / 16, torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    torch.manual_seed(seed)
    model = Net()
    make: Any = {"SGD": lambda p: torch.optim.SGD(p, rate, momentum=0.9), "AdamW": lambda p: torch.optim.AdamW(p, rate)}
    optimizer = make[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / STEPS)
    chosen = scale if isinstance(scale, float) else None
    settings = CuttlefishConfig(
        switch_step=SWITCH, target_ratio=KEPT, rank_multiple=1, learning_rate_scale=chosen, on_error="raise"
    )
    rest = {"total_steps": STEPS, "scheduler": scheduler}
    cuttlefish = None if scale == "dense" else Cuttlefish(model, optimizer, settings, **rest)
    batches, found = torch.Generator().manual_seed(seed), {}
    for _ in range(STEPS):
        rows = train[torch.randint(0, len(train), (64,), generator=batches)]
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if cuttlefish is not None and cuttlefish.step():
            found |= {"gain": gain(model), "times": optimizer.param_groups[0]["lr"] / (rate * (1 - SWITCH / STEPS))}
    with torch.no_grad():
        logits = model(inputs[test])
    right = (logits.argmax(-1) == labels[test]).float().mean()
    return found | {"accuracy": float(right), "loss": float(nn.functional.cross_entropy(logits, labels[test]))}


def table() -> str:
    """The record as a table: test loss, mean and spread over the seeds."""
    rows: dict[tuple[str, float], dict[float | str, list[dict[str, float]]]] = {}
    for r in json.loads(RECORD.read_text("utf-8")):
        rows.setdefault((r["optimizer"], r["rate"]), {}).setdefault(r["scale"], []).append(r)
    heads = [s if isinstance(s, str) else f"times {s:g}" for s in SCALES]
    lines = ["| | gain | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for (name, rate), found in rows.items():
        cells = []
        for scale in SCALES:
            losses = [r["loss"] for r in found[scale]]
            times = f" (times {statistics.mean(r['times'] for r in found[scale]):.1f})" if scale == "default" else ""
            cells.append(f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}{times}")
        mean = statistics.mean(r["gain"] for r in found[1.0])
        lines.append(f"| {name}, {rate:g} | {mean:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section() -> str:
    """What docs/optimizers.md says of the rate."""
    lines = ["| kept | " + " | ".join(f"{kept:g}" for kept in SIZES) + " |", "|---|" + "---|" * len(SIZES)]
    for name, found in PACES.items():
        lines.append(f"| {name} | " + " | ".join(f"{least:.2f} to {most:.2f}" for least, most in found) + " |")
    return SECTION.format(paces="\n".join(lines), rates=table())


def main() -> None:
    """Measure and write, or show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="only the table of what is recorded")
    if not parser.parse_args().show:
        torch.set_num_threads(1)
        cases = [(n, r, s, seed) for n, rates in RATES.items() for r in rates for s in SCALES for seed in range(SEEDS)]
        names = ("optimizer", "rate", "scale", "seed")
        records = [dict(zip(names, case, strict=True)) | run(*case) for case in cases]
        RECORD.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
