"""Processes whose labels differ in number settle on one window and one switch, run by torchrun under plain DDP."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from loops import rank, unequal

STEPS, LABELS = 60, (3, 12)


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, **shape))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Converged as soon as may be, so that the window alone says when the switch comes.
    settings = CuttlefishConfig(target_ratio=0.5, rank_multiple=1, stable_rank_tolerance=1e6, on_error="raise")
    cuttlefish = Cuttlefish(ddp, optimizer, settings, total_steps=STEPS)
    ids = torch.randint(3, 50, (1, 16), generator=torch.Generator().manual_seed(rank()))
    labels = ids.clone()
    labels[:, : -LABELS[rank()]] = -100  # the answer alone counts, and answers are not equally long
    seen = []
    for _ in range(STEPS):
        ddp(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
        if not seen:
            seen = [cuttlefish.schedule.statistics_needed]
    everywhere: list[list[object]] = [[], []]
    dist.all_gather_object(everywhere, [*seen, cuttlefish.switch_step])
    if everywhere[0] != everywhere[1] or cuttlefish.switch_step is None or unequal(model):
        raise SystemExit(f"process {rank()}: window and switch {everywhere}; unequal {unequal(model)}")
    if rank() == 0:
        print("window and switch on all processes:", everywhere[0])
    leave()


if __name__ == "__main__":
    main()
