"""Whether the running statistics of batch norms matter after the cut: test accuracy before it, right after it, and after forward passes."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishConfig

from .data import Images, load
from .networks import NETWORKS, Classifier
from .training import accuracy

PASSES = (10, 40)
"""Forward passes in training mode, without a step."""
RATE, BATCH, SWITCH = 0.05, 64, 0.3


def norms(network: str, width: int, epochs: int, budget: float, seed: int) -> dict[str, Any]:
    """A run on the digits that is looked at around its switch, with its running statistics as they are and renewed."""
    torch.manual_seed(seed)
    images = load("digits", None, torch.device("cpu"))
    model = Classifier(NETWORKS[network](1, 10, width))
    total = epochs * (len(images.train) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / total)))
    config = CuttlefishConfig(target_ratio=budget, switch_step=round(SWITCH * total))
    run = Cuttlefish(model, optimizer, config, total_steps=total, scheduler=scheduler)
    generator, found = torch.Generator().manual_seed(seed), {"network": network, "width": width, "seed": seed}
    for step in range(1, total + 1):
        model.train()
        rows = torch.randint(0, len(images.train), (BATCH,), generator=generator)
        model(pixel_values=images.batch(rows, generator), labels=images.train_labels[rows])["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == config.switch_step:
            twin = Classifier(NETWORKS[network](1, 10, width))  # no deep copy: hooks gather statistics
            twin.load_state_dict(model.state_dict())
            found |= {"dense": accuracy(model, images), **_renewed(twin, images, "dense_")}
        if run.step():
            found |= {"right_after": accuracy(model, images), **_renewed(model, images, "low_rank_")}
        if run.switch_step is not None and step == run.switch_step + PASSES[-1]:
            found[f"after_{PASSES[-1]}_steps"] = accuracy(model, images)
    run.end()
    return {**found, "steps": total, "switch_step": run.switch_step, "end": accuracy(model, images)}


def _renewed(model: nn.Module, images: Images, name: str) -> dict[str, float]:
    """Test accuracy of a copy after forward passes in training mode."""
    model, found, generator = copy.deepcopy(model), {}, torch.Generator().manual_seed(0)
    for count in range(1, PASSES[-1] + 1):
        rows = torch.randint(0, len(images.train), (BATCH,), generator=generator)
        with torch.no_grad():
            model.train()(pixel_values=images.batch(rows, generator))
        if count in PASSES:
            found[f"{name}after_{count}_passes"] = accuracy(model, images)
    return found
