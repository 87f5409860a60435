"""A mixture of experts under DDP and FSDP2, in two processes, and in one: the switch, and steps before and after it.

    torchrun --nproc_per_node 2 expert_loops.py FOLDER

Rank 0 writes FOLDER/experts.json. The same global batches are used whole in one process. Labels of equal number in each row, so that a
mean over processes is the mean over the batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.layers.low_rank import low_rank_layers
from tiny_experts import build, tokens

STEPS, SWITCH, ROWS = 8, 5, 8
ENGINES = ("one process", "DDP", "FSDP2")
CONFIG = CuttlefishConfig(
    switch_step=SWITCH, statistics_steps=3, rank_multiple=2, target_ratio=0.6, on_error="raise", learning_rate_scale=1.0
)


def run(engine: str, name: str = "gpt-oss") -> dict[str, Any]:
    """Losses, the plan and a sum of all weights afterwards."""
    model = build(name).train()
    runner: nn.Module = model
    if engine == "FSDP2":
        for block in model.model.layers:
            fully_shard(block)
        runner = fully_shard(model)
    if engine == "DDP":
        runner = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    cuttlefish = Cuttlefish(model, optimizer, total_steps=STEPS, config=CONFIG)
    losses = []
    for step in range(STEPS):
        batch = tokens(step, ROWS, 12)
        if engine != "one process":
            batch = {k: v[dist.get_rank() :: dist.get_world_size()] for k, v in batch.items()}
        loss = runner(**batch).loss
        loss.backward()
        total = loss.detach().clone()
        if engine != "one process":
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
    cuttlefish.end()
    state = {n: whole(p) for n, p in model.named_parameters()}
    moments = {n: whole(optimizer.state[p]["exp_avg"]) for n, p in model.named_parameters() if ".experts." in n}
    return {
        "switched": cuttlefish.switch_step,
        "losses": losses,
        "plan": dict(cuttlefish.report.plan),
        "notes": cuttlefish.report.plan.notes,
        "optimizer": cuttlefish.report.optimizer,
        "experts": [n for n, layer in low_rank_layers(model).items() if layer.count > 1],
        "norms": {n: float(p.norm()) for n, p in state.items()},
        "moments": {n: float(m.norm()) for n, m in moments.items()},
        "sharded": sum(hasattr(p, "full_tensor") for p in model.parameters()) / len(state),
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on all processes."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {engine: run(engine) for engine in ENGINES[1:]}
    if dist.get_rank() == 0:
        Path(sys.argv[1], "experts.json").write_text(json.dumps(results))
    leave()
