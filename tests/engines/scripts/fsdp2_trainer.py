"""Trainer and Accelerate under FSDP2, run by torchrun: fsdp2_trainer.py FOLDER. Rank 0 writes FOLDER/results.json.

Accelerate leaves FSDP out, without a word, where it finds no GPU. It is told that this is one here; everything after that
is its own and torch's real FSDP2, on gloo. Each result says whether FSDP was really on.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from ending import leave
from hf_cuttlefish import CuttlefishCallback, last_whole_checkpoint
from loops import tiny_bert
from trainers import UNTIL_KILLED, Rows, write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))

from comparing import save_whole

STEPS = 10


def trainer(
    folder: Path, kind: str, resume: str | None = None, seed: int = 0, **changes: Any
) -> tuple[Trainer, CuttlefishCallback]:
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": kind}
    sharding |= {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "seed": 3, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "average_tokens_across_devices": False, "fsdp": True, "fsdp_config": sharding,
        "resume_from_checkpoint": resume, **changes,
    }  # fmt: skip
    args = TrainingArguments(**options)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = CuttlefishCallback(replace(UNTIL_KILLED, even_ranks=False))  # one plan, compiled or not
    return Trainer(
        model=tiny_bert(seed), args=args, train_dataset=Rows(), eval_dataset=Rows(8), callbacks=[callback]
    ), callback


def run(folder: Path, kind: str, resume: str | None = None, seed: int = 0, **changes: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made, callback = trainer(folder, kind, resume, seed, **changes)
    made.train(resume_from_checkpoint=resume)
    if kind == "SHARDED_STATE_DICT" and resume is None:
        save_whole(made, folder / "whole")
        dist.barrier()
    return {
        "compiled": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0),
        "on": made.accelerator.distributed_type == "FSDP"
        and all(isinstance(p, DTensor) for p in made.model.parameters()),
        "losses": [r["loss"] for r in made.state.log_history if "loss" in r],
        "switched": callback.switch_step,
        "plan": dict(callback.plan or {}),
        "shards": [p.to_local().double().sum().item() for p in made.model.parameters()],
    }


def best_model(folder: Path) -> str:
    made, _ = trainer(
        folder,
        "FULL_STATE_DICT",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    try:
        made.train()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def main() -> None:
    folder = Path(sys.argv[1])
    results: dict[str, Any] = {"best": best_model(folder / "best")}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        results[kind] = run(folder / kind, kind)
        for step in (4, 6, 8):
            if last_whole_checkpoint(folder / kind) is None:
                raise RuntimeError(f"{kind}: no checkpoint counts as whole")
            results[f"{kind} {step}"] = run(folder / "again", kind, str(folder / kind / f"checkpoint-{step}"), seed=9)
    kind, compiled = "FULL_STATE_DICT", {"torch_compile": True, "torch_compile_backend": "eager"}
    results["compiled"] = run(folder / "compiled", kind, **compiled)
    results["compiled 8"] = run(folder / "again", kind, str(folder / "compiled" / "checkpoint-8"), seed=9, **compiled)
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
    results["compiled by blocks"] = run(folder / "again", kind, save_strategy="no", **compiled)
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "FULL_STATE_DICT" / f"checkpoint-{STEPS}")
    results["loaded"] = [p.double().sum().item() for p in whole.parameters()]
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "SHARDED_STATE_DICT" / "whole")
    results["saved by the examples"] = [p.double().sum().item() for p in whole.parameters()]
    write_results(folder, results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    leave()
