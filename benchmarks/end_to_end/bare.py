"""A step of a trained model without the Trainer around it: its time, the device's own, and the host's for each part."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from hf_cuttlefish.trainer.graphs import GraphedTrainer

from ..speed.clock import gpu_time


def bare(trainer: Trainer, as_graph: bool = False, steps: int = 10) -> dict[str, Any]:
    """What a step of the trained model takes without the Trainer around it, and the device's own time of such a step.

    The same forward, backward, clipping, optimizer and batch; milliseconds.

    Args:
        as_graph: whether forward, backward and clipping are one CUDA graph.
    """
    optimizer, model = trainer.optimizer, trainer.model_wrapped.train()
    batch = next(iter(trainer.get_train_dataloader()))
    graphs = GraphedTrainer(trainer) if as_graph else None
    if graphs is not None:
        graphs.start()

    def step() -> None:
        if as_graph:
            trainer.training_step(model, batch)
        else:
            with trainer.compute_loss_context_manager():
                loss = model(**batch).loss
            trainer.accelerator.backward(loss)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    found = {"bare_ms": 1000 * took / steps, "bare_host_ms": 1000 * launched / steps}
    found |= gpu_time(lambda: [step() for _ in range(4)], 4)
    parts = host_parts(trainer, batch, as_graph)
    if graphs is not None:
        graphs.stop()
    return found | {"tensors": len(list(model.parameters())), "host_parts": parts}


def host_parts(trainer: Trainer, batch: Any, as_graph: bool = False, steps: int = 15) -> dict[str, float]:
    """Milliseconds that the host needs for each part of the Trainer's step, medians; as one graph all is in "forward".

    The device is waited for before each step, so that the host never waits for it within one: what is left is the host's own work.
    """
    model, optimizer, accelerator = trainer.model_wrapped, trainer.optimizer, trainer.accelerator
    loss: list[torch.Tensor] = []

    def forward() -> None:
        if as_graph:
            trainer.training_step(model, batch)
            return
        with trainer.compute_loss_context_manager():
            loss[:] = [model(**batch).loss]

    parts: dict[str, Callable[[], Any]] = {
        "train": lambda: None if as_graph else model.train(),
        "forward": forward,
        "backward": lambda: None if as_graph else accelerator.backward(loss.pop()),
        "clip": lambda: accelerator.clip_grad_norm_(model.parameters(), 1.0),
        "optimizer": optimizer.step,
        "zero_grad": model.zero_grad,
        "count": lambda: trainer.floating_point_ops(batch),
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(steps):
        torch.cuda.synchronize()
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            taken[name].append(1000 * (time.perf_counter() - began))
    return {name: round(statistics.median(values), 3) for name, values in taken.items()}
