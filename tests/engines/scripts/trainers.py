"""Trainer under DDP, run by torchrun and, for comparison, in one ordinary process.

torchrun --nproc_per_node 2 trainers.py FOLDER            all scenarios; rank 0 writes FOLDER/results.json
RANK=.. WORLD_SIZE=.. trainers.py FOLDER killed           process 1 kills itself during the switch
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from ending import leave
from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig
from loops import rank, size, tiny_bert, unequal, unequal_state, weights

STEPS, SWITCH, GLOBAL_BATCH = 10, 6, 8


UNTIL_KILLED = CuttlefishConfig(
    switch_step=SWITCH, statistics_steps=4, rank_multiple=2, target_ratio=0.5, learning_rate_scale=1.0
)


def scheduled(scale: float = 1.0, ahead: int = 0) -> list[float]:
    """The rate logged with each step of the Trainer's own schedule, scaled from the switch on. ahead: steps that the log is ahead."""
    return [1e-2 * (1 - (i + ahead) / STEPS) * (scale if i >= SWITCH else 1) for i in range(STEPS)]


def scale_of(rates: list[float]) -> float:
    """What the rate was multiplied by at the switch."""
    return float(f"{rates[SWITCH] / scheduled()[SWITCH]:.7g}")


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """All processes' results, in one file that the main one writes."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(everywhere), encoding="utf-8")


class Rows(torch.utils.data.Dataset):
    """Sentences whose label is their first token modulo 3."""

    def __init__(self, count: int = 48):
        g = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 40, (count, 8), generator=g)
        self.lengths = torch.randint(4, 9, (count,), generator=g)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        mask = (torch.arange(8) < self.lengths[i]).long()
        return {"input_ids": self.ids[i] * mask, "attention_mask": mask, "labels": int(self.ids[i, 0]) % 3}


def ddp_at_work(trainer: Trainer) -> bool:
    """Whether one and the same DDP has reduced the gradients of the last steps, by its own count of iterations."""
    around = [m for m in trainer.accelerator._models if m is not trainer.model] + [trainer.model_wrapped]
    ddps = {id(d): d for d in (getattr(m, "_orig_mod", m) for m in around) if isinstance(d, DistributedDataParallel)}
    if len(ddps) != 1:
        return False
    (ddp,) = ddps.values()
    return ddp.module is trainer.model and int(ddp._get_ddp_logging_data().get("iteration", 0)) >= 2


def run(
    folder: Path, name: str, resume: str | bool | None = None, rows: int = 48, settings: CuttlefishConfig | None = None, model: Any = None,
    **arguments: Any,
) -> tuple[Trainer, CuttlefishCallback, dict[str, Any]]:  # fmt: skip
    options: dict[str, Any] = {
        **{
            "output_dir": str(folder / name),
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "adam_epsilon": 1e-3,
            "seed": 3,
        },
        **{"per_device_train_batch_size": GLOBAL_BATCH // size(), "per_device_eval_batch_size": 4, "logging_steps": 1},
        **{"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "log_level": "error"},
        **{"average_tokens_across_devices": False, "dataloader_pin_memory": False},
    }
    options.update(arguments)
    callback = CuttlefishCallback(
        settings
        or CuttlefishConfig(
            switch_step=SWITCH,
            statistics_steps=4,
            rank_multiple=2,
            target_ratio=0.5,
            learning_rate_scale=1.0,
            on_error="raise",
        )
    )
    trainer = Trainer(
        model=model or tiny_bert(), args=TrainingArguments(**options), train_dataset=Rows(rows), eval_dataset=Rows(10),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    result = {
        "ddp": ddp_at_work(trainer),
        "size": size(),
        "losses": [r["loss"] for r in trainer.state.log_history if "loss" in r],
        "rates": [r["learning_rate"] for r in trainer.state.log_history if "loss" in r],
        "switched": callback.switch_step,
        "plan": dict(callback.plan or {}),
        "increase": callback.plan.predicted_loss_increase if callback.plan else None,
        "history": callback.history,
        "unequal": unequal(trainer.model) if size() > 1 else [],
        "unequal_state": unequal_state(trainer.model, trainer.optimizer.optimizer) if size() > 1 else [],
        "_weights": weights(trainer.model),
    }
    return trainer, callback, result


def same_bits(a: Trainer, b: Trainer) -> list[str]:
    """What is not the same in two runs."""
    left, right = a.model.state_dict(), b.model.state_dict()
    found = [n for n in {**left, **right} if n not in left or n not in right or not torch.equal(left[n], right[n])]
    one, other = a.optimizer.state_dict(), b.optimizer.state_dict()
    if one["param_groups"] != other["param_groups"]:
        found.append("param_groups")
    for key, state in one["state"].items():
        for part, value in state.items():
            if not torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][key][part])):
                found.append(f"{key}.{part}")
    return found


def comparable(folder: Path) -> dict[str, dict[str, Any]]:
    """Runs that must come out the same with any number of processes."""
    still = {"learning_rate": 1e-30, "weight_decay": 0.0}  # the same weights everywhere, whatever the gradients' factor
    return {
        "plain": run(folder, "plain")[2],
        "accumulation": run(
            folder,
            "accumulation",
            gradient_accumulation_steps=2,
            per_device_train_batch_size=GLOBAL_BATCH // size() // 2,
        )[2],
        "standing still": run(folder, "still", **still)[2],
        "standing still, averaged": run(folder, "averaged", average_tokens_across_devices=True, **still)[2],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    PartialState(cpu=True)  # the processes find each other
    if sys.argv[2:] == ["killed"]:
        return killed(folder)
    if sys.argv[2:] == ["resumed"]:
        _, callback, result = run(folder, "killed", resume=True, save_strategy="no", settings=UNTIL_KILLED)
        assert result["ddp"] and not result["unequal"] and result["switched"] == SWITCH == callback.report.step
        return None
    results = comparable(folder)
    whole, callback, result = run(folder, "whole", save_strategy="steps", save_steps=1)
    results["whole"] = result
    for step in (2, SWITCH - 2, SWITCH - 1, SWITCH, SWITCH + 1):
        # Other weights: everything must come from the checkpoint. Saving changes nothing but where a check starts cold.
        again, other, result = run(
            folder, "whole", resume=str(folder / "whole" / f"checkpoint-{step}"), model=tiny_bert(seed=9),
            save_strategy="steps" if step < SWITCH else "no", save_steps=1,
        )  # fmt: skip
        result["differences"] = same_bits(whole, again)
        result["same_run"] = (
            other.history == callback.history and other.plan == callback.plan and other.switch_step == SWITCH
        )
        results[f"resumed at {step}"] = result
    often = {"save_strategy": "steps", "save_steps": 1, "settings": replace(callback.config, switch="restart")}
    stopped, _, _ = run(folder, "restart", **often)
    again, other, result = run(folder, "restart", resume=True, model=tiny_bert(seed=9), **often)
    result["stopped_at"], result["differences"] = stopped.state.global_step, same_bits(whole, again)
    results["restart"] = result
    results["uneven, checkpointing"] = run(
        folder,
        "uneven",
        rows=45,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )[2]
    results["bf16, accumulation"] = run(
        folder, "bf16", bf16=True, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )[2]
    results["compiled"] = run(folder, "compiled", torch_compile=True, torch_compile_backend="eager")[2]
    best, _, result = run(
        folder, "best", save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    result["best"] = best.state.best_model_checkpoint.rpartition("-")[2]
    results["best"] = result
    tensors = {name: result.pop("_weights") for name, result in results.items()}
    write_results(folder, results)
    if rank() == 0:
        torch.save(tensors, folder / "weights.pt")


def killed(folder: Path) -> None:
    """Process 1 ends without a word after everything has changed, before it has said so."""
    from hf_cuttlefish.processes import Processes

    agree = Processes.agree

    def die(self: Processes, error: Any = None) -> None:
        if self.rank == 1 and (folder / "killed" / f"checkpoint-{SWITCH - 1}").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        agree(self, error)

    Processes.agree = die
    run(folder, "killed", save_strategy="steps", save_steps=1, settings=UNTIL_KILLED)


if __name__ == "__main__":
    main()
    # Trainer leaves the process group to the end of Python, where gloo's threads may be cut off and abort the process.
    leave()
