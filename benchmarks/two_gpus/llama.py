"""Llama-1B's shapes under FSDP2: time of a step and peak memory before the switch and after it. Run by torchrun.

torchrun --nproc_per_node 2 benchmarks/two_gpus/llama.py --folder OUT
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from begin import begin
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from hf_cuttlefish import Cuttlefish, CuttlefishConfig

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QUICK = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BEFORE, AFTER = 10, 10


def main() -> None:
    """Command line."""
    arguments, device = begin(__doc__)
    cuda = device.type == "cuda"
    rows, length = (2, 16) if arguments.quick else (4, 1024)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000 if not arguments.quick else 500,
        max_position_embeddings=length,
        **(QUICK if arguments.quick else SHAPE),
    )
    model = LlamaForCausalLM(config).to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(
        3, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(dist.get_rank())
    ).to(device)
    settings = CuttlefishConfig(
        rank_rule="ratio",
        rank_ratio=0.25,
        statistics_steps=0,
        switch_step=BEFORE,
        on_error="raise",
        learning_rate_scale=1.0,
    )
    cuttlefish = Cuttlefish(model, optimizer, settings, total_steps=BEFORE + AFTER)
    found: dict[str, Any] = {"rows a GPU": rows, "length": length}
    for phase, steps in (("before", BEFORE), ("after", AFTER)):
        found[phase] = train(model, optimizer, cuttlefish, ids, steps, cuda)
    found["ranks"] = dict(cuttlefish.plan or {})
    found["parameters"] = (
        [cuttlefish.report.parameters_before, cuttlefish.report.parameters_after] if cuttlefish.report else None
    )
    found["seconds of the switch"] = cuttlefish.report.seconds if cuttlefish.report else None
    if dist.get_rank() == 0:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / "said.json").write_text(json.dumps({"llama": found}), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def train(
    model: Any, optimizer: Any, cuttlefish: Cuttlefish, ids: torch.Tensor, steps: int, cuda: bool
) -> dict[str, Any]:
    """So many steps: their median time without what Cuttlefish does after them, losses, and the peak of the memory."""
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, peak = [], [], None
    for _ in range(steps):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        seconds.append(time.perf_counter() - started)
        before_switch = time.perf_counter()
        if cuttlefish.step():
            losses.append(-(time.perf_counter() - before_switch))
    switch = -losses.pop() if losses[-1] < 0 else None
    return {"step": sorted(seconds[3:])[len(seconds[3:]) // 2], "losses": losses, "peak bytes": peak, "switch": switch}


if __name__ == "__main__":
    main()
