"""Trainer under DDP, FSDP2, FSDP1 and DeepSpeed on a GPU, run by torchrun: gpu_trainer.py FOLDER BACKEND SCENARIO [SCENARIO ...].

Several processes can share one GPU where the backend is gloo and all have LOCAL_RANK=0; NCCL wants a GPU for each.
Rank 0 writes FOLDER/results.json. Each result says what was really on; an exception ends its scenario alone.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from ending import leave
from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig
from loops import tiny_bert
from trainers import SWITCH, Rows, ddp_at_work, write_results

FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
    },
}
FSDP1: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 1,
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    },
}


def zero(stage: int) -> dict[str, Any]:
    whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config: dict[str, Any] = {"zero_optimization": {"stage": stage, **whole}, **dict.fromkeys(auto, "auto")}
    config |= {"fp16": {"enabled": "auto", "initial_scale_power": 12}, "bf16": {"enabled": "auto"}}
    return {"deepspeed": config, "optim": "adamw_torch"}


SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp fp32": {},
    "ddp fp16": {"fp16": True},
    "ddp fp16 accumulation": {"fp16": True, "gradient_accumulation_steps": 2},
    "ddp bf16": {"bf16": True},
    "ddp bf16 compiled": {"bf16": True, "torch_compile": True},
    "fsdp2 fp32": FSDP2,
    "fsdp2 bf16": {"bf16": True, **FSDP2},
    "fsdp2 bf16 compiled": {"bf16": True, "torch_compile": True, **FSDP2},
    "fsdp1 fp32": FSDP1,
    # torch's ShardedGradScaler and its fused AdamW, which is Trainer's default, do not go together.
    "fsdp1 fp16": {"fp16": True, "optim": "adamw_torch", **FSDP1},
    "fsdp1 bf16": {"bf16": True, **FSDP1},
    "zero1 fp16": {"fp16": True, **zero(1)},
    "zero2 fp16": {"fp16": True, **zero(2)},
    "zero3 fp16": {"fp16": True, **zero(3)},
    "zero2 bf16": {"bf16": True, **zero(2)},
    "zero3 bf16": {"bf16": True, **zero(3)},
}


def make(folder: Path, backend: str, seed: int = 0, **changes: Any) -> tuple[Trainer, CuttlefishCallback]:
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 8 // int(os.environ["WORLD_SIZE"]), "learning_rate": 1e-2,
        "adam_epsilon": 1e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 4, "seed": 3, "report_to": [],
        "disable_tqdm": True, "average_tokens_across_devices": False, "ddp_backend": backend, **changes,
    }  # fmt: skip
    settings = CuttlefishConfig(
        switch_step=SWITCH, statistics_steps=4, rank_multiple=2, target_ratio=0.5, on_error="raise"
    )
    callback = CuttlefishCallback(settings)
    AcceleratorState._reset_state()  # Accelerate takes DeepSpeed's settings once
    args = TrainingArguments(**options)
    return Trainer(model=tiny_bert(seed), args=args, train_dataset=Rows(), callbacks=[callback]), callback


def unequal(model: torch.nn.Module) -> int:
    """How many parameters are not the same bits on all processes (through the CPU, which every backend's objects take)."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [p.detach().cpu() for p in model.parameters()])
    return sum(not torch.equal(a, b) for other in everywhere for a, b in zip(everywhere[0], other, strict=True))


def run(folder: Path, backend: str, name: str) -> dict[str, Any]:
    torch._dynamo.reset()
    changes = SCENARIOS[name]
    trainer, callback = make(folder, backend, **changes)
    trainer.train()
    accelerator, sharded = trainer.accelerator, "fsdp" in changes
    parameters = list(trainer.model.parameters())
    scaler = accelerator.scaler
    result: dict[str, Any] = {
        "backend": dist.get_backend(),
        "processes": dist.get_world_size(),
        "device": parameters[0].device.type,
        "on": all(isinstance(p, DTensor) for p in parameters) if sharded else ddp_at_work(trainer),
        "mixed_precision": accelerator.mixed_precision,
        "scale": scaler.get_scale() if scaler is not None and scaler.is_enabled() else None,
        "losses": [r["loss"] for r in trainer.state.log_history if "loss" in r],
        "switched": callback.switch_step,
        "plan": dict(callback.plan or {}),
        "unequal": 0 if sharded else unequal(trainer.model),
    }
    for step in (4, 8):
        changed = {**changes, "save_strategy": "no", "resume_from_checkpoint": str(folder / f"checkpoint-{step}")}
        again, other = make(folder / "again", backend, seed=9, **changed)
        again.train(resume_from_checkpoint=changed["resume_from_checkpoint"])
        result[f"resumed at {step}"] = {
            "losses": [r["loss"] for r in again.state.log_history if "loss" in r],
            "plan": dict(other.plan or {}),
        }
    if dist.get_rank() == 0:
        loaded = AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint-12")
        result["loaded"] = sum(p.numel() for p in loaded.parameters())
    result["size"] = sum(p.numel() for p in parameters)
    return result


def by_restart(folder: Path, backend: str, name: str) -> dict[str, Any]:
    """Train to the switch, and on from there with a new Trainer and the same arguments."""
    changes = {**SCENARIOS[name], "save_strategy": "no"}
    first, callback = make(folder, backend, **changes)
    dense = sum(p.numel() for p in first.model.parameters())
    first.train()
    scales = [scale_of(first)]
    resume = {"resume_from_checkpoint": callback.restart_from}
    second, other = make(folder, backend, seed=9, **changes, **resume)
    second.train(**resume)
    scales.append(scale_of(second))
    loaded = AutoModelForSequenceClassification.from_pretrained(str(callback.restart_from))
    return {
        "backend": dist.get_backend(), "processes": dist.get_world_size(), "device": next(second.model.parameters()).device.type,
        "on": is_on(first), "on again": is_on(second), "mixed_precision": first.accelerator.mixed_precision, "scale": scales[1],
        "scales": scales, "losses": [r["loss"] for r in second.state.log_history if "loss" in r], "stopped": first.state.global_step,
        "steps": second.state.global_step, "switched": other.switch_step, "plan": dict(other.plan or {}), "dense": dense,
        "optimizer": callback.report.optimizer if callback.report else "", "loaded": sum(p.numel() for p in loaded.parameters()),
    }  # fmt: skip


def scale_of(trainer: Trainer) -> float | None:
    scaler = trainer.accelerator.scaler
    if trainer.is_deepspeed_enabled:
        return float(trainer.model_wrapped.optimizer.loss_scale) if trainer.args.fp16 else None
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None


def is_on(trainer: Trainer) -> bool:
    kind = type(trainer.model_wrapped).__name__
    return kind == ("DeepSpeedEngine" if trainer.is_deepspeed_enabled else "FullyShardedDataParallel")


def main() -> None:
    folder, backend = Path(sys.argv[1]), sys.argv[2]
    results: dict[str, Any] = {}
    for name in sys.argv[3:]:
        try:
            switched = by_restart if name.startswith(("fsdp1", "zero")) else run
            results[name] = switched(folder / name.replace(" ", "_"), backend, name)
        except Exception:
            results[name] = {"error": traceback.format_exc()[-3000:]}
        if dist.get_rank() == 0:
            print(json.dumps({name: results[name]}), flush=True)
    write_results(folder, results)


if __name__ == "__main__":
    main()
    leave()
