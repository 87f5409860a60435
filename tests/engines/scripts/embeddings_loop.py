"""A masked language model with its table of tokens cut, by torchrun: embeddings_loop.py FOLDER. Rank 0 writes FOLDER/results.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM

from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from hf_cuttlefish.processes import Processes

SHAPE = {"vocab_size": 80, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS, SWITCH = 10, 5


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForMaskedLM(config)
    running = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-3)
    settings = CuttlefishConfig(
        embeddings=True,
        switch_step=SWITCH,
        statistics_steps=4,
        rank_multiple=2,
        target_ratio=0.3,
        on_error="raise",
        learning_rate_scale=1.0,
    )
    cuttlefish = Cuttlefish(running, optimizer, settings, total_steps=STEPS)
    ids = torch.randint(3, 70, (STEPS, 8, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for rows in ids:
        mine = rows[rank * 8 // size : (rank + 1) * 8 // size]
        loss = running(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole) / size)
    differing = Processes().differing({name: p.detach() for name, p in model.named_parameters()})
    if rank == 0:
        plan = dict(cuttlefish.plan or {})
        table = model.get_input_embeddings()
        found = {
            "losses": losses,
            "plan": plan,
            "differing": differing,
            "rank": table.rank,
            "shape": list(table.down.weight.shape),
        }
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps(found))
    assert os.environ["WORLD_SIZE"] == str(size)


if __name__ == "__main__":
    main()
    leave()
