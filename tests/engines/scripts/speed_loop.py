"""objective="speed" under plain DDP, run by torchrun: the main process runs whole steps of its bare model, and all carry out what it chose."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.measure import whole_steps
from loops import rank, unequal
from tiny_trainer import tiny_bert

seen: list[tuple[str, bool]] = []


def timer(candidate: whole_steps.Candidate, step: whole_steps.Step, warm_up: int) -> float:
    step()
    runs_bare = step.run is step.model or vars(step.run)["_modules"]["_orig_mod"] is step.model
    assert runs_bare and not isinstance(step.model, DistributedDataParallel)
    seen.append((candidate.words, step.is_compiled))
    return 1.0 if candidate.words == "as planned" else 2.0


def main() -> None:
    dist.init_process_group("gloo")
    whole_steps.time_steps = timer
    for is_compiled in (False, True):
        train(is_compiled)
    if rank() == 0:
        print("both took the plan of whole steps, eager and compiled")
    leave()


def train(is_compiled: bool) -> None:
    seen.clear()
    model = tiny_bert().train()
    ddp = DistributedDataParallel(model)
    runs = torch.compile(ddp, backend="eager") if is_compiled else ddp
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CuttlefishConfig(objective="speed", switch_step=8, rank_rule="ratio", rank_multiple=4, on_error="raise")
    cuttlefish = Cuttlefish(runs, optimizer, config, total_steps=20)
    torch.manual_seed(rank())
    for _ in range(12):
        ids = torch.randint(3, 50, (8, 10))
        runs(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
    plans: list[object] = [None, None]
    dist.all_gather_object(plans, [dict(cuttlefish.plan or {}), cuttlefish.switch_step])
    measured = ("as planned", is_compiled) in seen if rank() == 0 else not seen
    if plans[0] != plans[1] or len(cuttlefish.plan or {}) != 12 or unequal(model) or not measured:
        raise SystemExit(f"process {rank()}: plans {plans}; unequal {unequal(model)}; measured {seen}")


if __name__ == "__main__":
    main()
