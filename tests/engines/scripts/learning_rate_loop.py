"""learning_rate_scale under plain DDP, run by torchrun: rates and weights are compared between the processes, bit for bit."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ending import leave
from hf_cuttlefish import Cuttlefish
from loops import STEPS, SWITCH, batches, config, mine, rank, size, tiny_bert, unequal, unequal_state

SCALE = 1.5


def main() -> None:
    dist.init_process_group("gloo")
    model = tiny_bert()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    settings = config(learning_rate_scale=SCALE)
    cuttlefish = Cuttlefish(ddp, optimizer, settings, total_steps=STEPS, scheduler=scheduler)
    rates = []
    for batch in batches():
        rates.append(optimizer.param_groups[0]["lr"])
        ddp(**mine(batch)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        cuttlefish.step()
    everywhere: list[list[float]] = [[] for _ in range(size())]
    dist.all_gather_object(everywhere, rates)
    expected = [1e-2 * (1 - s / STEPS) * (SCALE if s >= SWITCH else 1) for s in range(STEPS)]
    wrong = [s for s in range(STEPS) if abs(rates[s] - expected[s]) > 1e-9]
    if wrong or any(other != rates for other in everywhere) or unequal(model) or unequal_state(model, optimizer):
        raise SystemExit(f"process {rank()}: rates {everywhere}, expected {expected}; unequal {unequal(model)}")
    if rank() == 0:
        print("the same on all processes:", size())
    leave()


if __name__ == "__main__":
    main()
