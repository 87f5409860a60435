"""Trainer under FSDP1, run by torchrun: fsdp1_trainer.py FOLDER. Rank 0 writes FOLDER/results.json.

As in fsdp_trainer.py Accelerate is told that the CPU is a GPU; everything after that is its own and torch's real FSDP1, on
gloo. What torch would move to the CPU is there already, and would be freed by the move.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trainers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from loops import tiny_bert
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig, last_whole_checkpoint, restart
from hf_cuttlefish.patching import low_rank_layers

SETTINGS = CuttlefishConfig(
    switch_step=trainers.SWITCH, statistics_steps=4, rank_multiple=2, target_ratio=0.5, on_error="raise"
)
LAYER = "bert.encoder.layer.1.intermediate.dense"


def trainer(
    folder: Path, callback: CuttlefishCallback, resume: str | None = None, sharding: dict | None = None, **changes: Any
) -> Trainer:
    options = {"version": 1, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": "FULL_STATE_DICT"}
    options |= {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "use_orig_params": False, "sync_module_states": False}
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": trainers.STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "adam_epsilon": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3, "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "log_level": "error", "average_tokens_across_devices": False, "optim": "adamw_torch",
        "fsdp": "full_shard auto_wrap", "fsdp_config": options | (sharding or {}), "resume_from_checkpoint": resume, **changes,
    }  # fmt: skip
    args = TrainingArguments(**arguments)
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    model = tiny_bert(0 if resume is None else 9)
    return Trainer(model=model, args=args, train_dataset=trainers.Rows(), callbacks=[callback])


def run(folder: Path, settings: CuttlefishConfig = SETTINGS, **changes: Any) -> dict[str, Any]:
    """Train to the switch, and on from there with a new Trainer and the same arguments."""
    callback = CuttlefishCallback(settings)
    first = trainer(folder, callback, **changes)
    first.train()
    checkpoint = Path(str(callback.restart_from))
    result: dict[str, Any] = {
        "on": isinstance(first.model, FullyShardedDataParallel), "stopped": first.state.global_step,
        "restart_from": str(checkpoint), "whole": last_whole_checkpoint(folder), "left": sorted(p.name for p in checkpoint.iterdir()),
    }  # fmt: skip
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint).state_dict()
    saved = torch.load(checkpoint / "pytorch_model_fsdp.bin")
    result["AutoModel"] = loaded.keys() == saved.keys() and all(torch.equal(loaded[k], v) for k, v in saved.items())
    state = torch.load(checkpoint / "optimizer.bin")["state"]
    with FullyShardedDataParallel.state_dict_type(first.model, *kinds()):
        before = FullyShardedDataParallel.optim_state_dict(first.model, first.optimizer.optimizer)["state"]
    if state:
        m, v = (before[f"{LAYER}.weight"][k] for k in ("exp_avg", "exp_avg_sq"))
        down, up = (loaded[f"{LAYER}.{part}.weight"] for part in ("down", "up"))
        pairs = {
            "up exp_avg": (m @ down.T, state[f"{LAYER}.up.weight"]["exp_avg"]),
            "down exp_avg": (up.T @ m, state[f"{LAYER}.down.weight"]["exp_avg"]),
            "up exp_avg_sq": (v @ down.square().T, state[f"{LAYER}.up.weight"]["exp_avg_sq"]),
            "down exp_avg_sq": (up.square().T @ v, state[f"{LAYER}.down.weight"]["exp_avg_sq"]),
        }
        result["moments"] = {k: [x.norm().item(), (x - y).norm().item()] for k, (x, y) in pairs.items()}
    second = trainer(folder, callback, str(checkpoint), **changes)
    second.train(resume_from_checkpoint=str(checkpoint))
    logs = [r for r in second.state.log_history if "loss" in r]
    return result | {
        "on again": isinstance(second.model, FullyShardedDataParallel), "switched": callback.switch_step,
        "plan": dict(callback.plan or {}), "optimizer": callback.report.optimizer if callback.report else "",
        "losses": [r["loss"] for r in logs], "rates": [r["learning_rate"] for r in logs], "epochs": [r["epoch"] for r in logs],
    }  # fmt: skip


def kinds() -> tuple[Any, ...]:
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType

    return StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig()


def failing(folder: Path, where: str) -> dict[str, Any]:
    """No space left on the main process while the low-rank form is written, or in the middle of the exchange."""
    kept = getattr(restart, where)

    def fails(*given: Any) -> None:
        if where == "_exchange":
            os.replace(given[0] / "trainer_state.json", given[0] / restart.FULL_RANK_STATE)
            (given[0] / "optimizer.bin").unlink()
        raise OSError("no space left")

    setattr(restart, where, fails)
    callback = CuttlefishCallback(replace(SETTINGS, on_error="continue"))
    made = trainer(folder, callback, save_strategy="steps", save_steps=1, max_steps=7)
    made.train()
    setattr(restart, where, kept)
    dist.barrier()
    if dist.get_rank() == 0:
        os.rename(folder / "checkpoint-7", folder / "later")  # as if it had been killed there
    dist.barrier()
    return {
        "steps": made.state.global_step, "reason": callback.reason, "whole": last_whole_checkpoint(folder),
        "dense": not low_rank_layers(made.model), "at the switch": sorted(p.name for p in (folder / "checkpoint-6").iterdir()),
    }  # fmt: skip


def refused(folder: Path, settings: CuttlefishConfig = SETTINGS, **changes: Any) -> str:
    try:
        trainer(folder, CuttlefishCallback(settings), **changes).train()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def main() -> None:
    folder = Path(sys.argv[1])
    FlatParamHandle.to_cpu = lambda self: nullcontext()
    results: dict[str, Any] = {
        "plain": run(folder / "plain"),
        "accumulation": run(folder / "accumulation", gradient_accumulation_steps=2, per_device_train_batch_size=2),
        "reset": run(folder / "reset", replace(SETTINGS, optimizer_state="reset")),
        "failing in writing": failing(folder / "writing", "_save_model"),
        "failing in exchange": failing(folder / "exchange", "_exchange"),
        "in_place": refused(folder, replace(SETTINGS, switch="in_place")),
        "sharded": refused(folder, sharding={"state_dict_type": "SHARDED_STATE_DICT"}),
        "original": refused(folder, sharding={"use_orig_params": True}),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    half = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    for name, changes in (("DDP", {}), ("DDP, accumulation", half)):
        _, _, results[name] = trainers.run(folder, name, optim="adamw_torch", **changes)
        results[name].pop("_weights")
    trainers.write_results(folder, results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
