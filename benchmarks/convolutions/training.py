"""One run: train, switch, test; and its record."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_cuttlefish.layers.low_rank import low_rank_layers

from .data import Images, load
from .methods import controller, frobenius_decay, start
from .networks import NETWORKS, Classifier


@dataclass(frozen=True)
class Job:
    """A run. budget: share of the targets' parameters. clip: longest gradient (0: any). The rate rises for a tenth of the steps and falls to zero as a cosine."""

    task: str
    network: str
    method: str
    seed: int
    budget: float
    epochs: int
    batch: int
    width: int
    rate: float
    decay: float = 5e-4
    clip: float = 2.0

    @property
    def name(self) -> str:
        return f"{self.task}-{self.network}-{self.method}-{self.seed}"


def guarded(job: Job, folder: Path | None, device: str, ends: float | None) -> dict[str, Any] | None:
    """The record of a run, or what went wrong in it, so that others go on; None once it is too late to begin (seconds of the epoch)."""
    if ends is not None and time.time() > ends:
        return None
    try:
        return run(job, folder, device)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def run(job: Job, folder: Path | None, device: str) -> dict[str, Any]:
    """The record of a run: parameters before and after, test accuracy, seconds, ranks."""
    where = torch.device(device)
    torch.manual_seed(job.seed)
    torch.backends.cudnn.benchmark = True
    images = load(job.task, folder, where)
    model = Classifier(NETWORKS[job.network](1, 10, job.width)).to(where, memory_format=torch.channels_last)
    before = sum(p.numel() for p in model.parameters())
    epoch_steps = len(images.train) // job.batch
    total = job.epochs * epoch_steps
    config = start(job.method, model, job.budget, total, epoch_steps)
    optimizer = torch.optim.SGD(_groups(model, job), lr=job.rate, momentum=0.9, nesterov=True)
    warm = max(1, total // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / max(1, total - warm)))),
    )
    told = controller(job.method, model, optimizer, scheduler, config, job.budget, total)
    began = time.perf_counter()
    losses = _train(job, model, images, optimizer, scheduler, told, total, epoch_steps)
    seconds = time.perf_counter() - began
    plan = getattr(told, "plan", None)
    return {
        **asdict(job),
        "accuracy": accuracy(model, images),
        "parameters_before": before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "factorized": len(low_rank_layers(model)),
        "ranks": {name: layer.rank for name, layer in low_rank_layers(model).items()},
        "switch_step": getattr(told, "switch_step", None),
        "steps": total,
        "notes": list(plan.notes) if plan is not None else [],
        "reason": getattr(told, "reason", None),
        "switch_seconds": getattr(getattr(told, "report", None), "seconds", None),
        "losses": losses,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if where.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def _groups(model: nn.Module, job: Job) -> list[dict[str, Any]]:
    """No weight decay on norms and biases; under Frobenius decay (sifd) none on factors."""
    factors = {id(p) for layer in low_rank_layers(model).values() for p in layer.factors}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in factors]
    rest = [p for p in model.parameters() if p.ndim <= 1 or id(p) in factors]
    return [{"params": decayed, "weight_decay": job.decay}, {"params": rest, "weight_decay": 0.0}]


def _train(
    job: Job, model: nn.Module, images: Images, optimizer: Any, scheduler: Any, told: Any, total: int, epoch_steps: int
) -> list[float]:
    device = images.train.device
    generator = torch.Generator(device).manual_seed(job.seed)
    kind, losses = device.type, []
    model.train()
    for step in range(total):
        at = step % epoch_steps
        if at == 0:
            order = torch.randperm(len(images.train), generator=generator, device=device)
            sums = torch.zeros((), device=device)
        rows = order[at * job.batch : (at + 1) * job.batch]
        x = images.batch(rows, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            loss = model(pixel_values=x, labels=images.train_labels[rows])["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if job.method == "sifd":
            frobenius_decay(model, job.decay)
        if job.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        scheduler.step()
        sums += loss.detach()
        if told is not None:
            told.step()
        if at == epoch_steps - 1:
            losses.append(round(float(sums) / epoch_steps, 4))
    if told is not None:
        told.end()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Percent of the test images that are told right."""
    model.eval()
    kind, right = images.test.device.type, 0
    for rows in torch.arange(len(images.test), device=images.test.device).split(1000):
        x = images.test[rows].contiguous(memory_format=torch.channels_last)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            right += int((model(pixel_values=x)["logits"].argmax(-1) == images.test_labels[rows]).sum())
    return 100 * right / len(images.test)
