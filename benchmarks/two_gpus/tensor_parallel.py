"""Trainer under tensor parallelism through the switch and on, run by torchrun: tensor_parallel.py --folder OUT.

A small Llama of random weights; the run stops at its switch and goes on from the checkpoint, as the examples do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig
from hf_cuttlefish.layers.low_rank import low_rank_layers

STEPS, SWITCH, LENGTH = 20, 8, 64
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


class Rows(torch.utils.data.Dataset):
    """Token numbers that repeat themselves."""

    def __init__(self) -> None:
        first = torch.randint(3, 900, (256, LENGTH // 2), generator=torch.Generator().manual_seed(1))
        self.ids = torch.cat([first, first], dim=1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def main() -> None:
    """Train to the switch, and on from there with a new Trainer and the same arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    torch.cuda.set_device(int(__import__("os").environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=1000, max_position_embeddings=LENGTH, **SHAPE)).save_pretrained(
            folder / "dense"
        )
    dist.barrier()
    callback = CuttlefishCallback(CuttlefishConfig(switch_step=SWITCH, target_ratio=0.5, on_error="raise"))

    def trainer(resume: str | None = None) -> Trainer:
        AcceleratorState._reset_state()
        args = TrainingArguments(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, bf16=True, resume_from_checkpoint=resume,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            folder / "dense", distributed_config=DistributedConfig(tp_plan="auto")
        )
        return Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])

    first = trainer()
    divided = sum(hasattr(p, "placements") for p in first.model.parameters())
    first.train()
    checkpoint = str(callback.restart_from)
    second = trainer(checkpoint)
    second.train(resume_from_checkpoint=checkpoint)
    if dist.get_rank() == 0:
        said = {
            "divided parameters": divided,
            "switch_step": callback.switch_step,
            "low-rank layers": len(low_rank_layers(second.model)),
            "losses": [r["loss"] for r in second.state.log_history if "loss" in r],
        }
        (folder / "said.json").write_text(json.dumps(said), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
