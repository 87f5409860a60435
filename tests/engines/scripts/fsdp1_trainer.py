"""Trainer under FSDP1, run by torchrun: fsdp1_trainer.py FOLDER. Rank 0 writes FOLDER/results.json.

Accelerate leaves FSDP out, without a word, where it finds no GPU: it is told that this is one. On a CPU torch's FSDP1 loses
what it "moves" to the CPU, where it is already, so both moves are turned off (`arguments`, `to_cpu`). Everything else is
Accelerate's and torch's own, on gloo. Each result says whether FSDP1 was on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._flat_param import FlatParamHandle
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import loops
import trainers
from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig, last_whole_checkpoint
from hf_cuttlefish.decide import schedule
from hf_cuttlefish.engines import fsdp1, restart
from hf_cuttlefish.layers.low_rank import low_rank_layers
from loops import tiny_bert

SETTINGS = CuttlefishConfig(
    switch_step=trainers.SWITCH,
    statistics_steps=4,
    rank_multiple=2,
    target_ratio=0.5,
    learning_rate_scale=1.0,
    on_error="raise",
)
LEFT_TO_ITSELF = replace(SETTINGS, learning_rate_scale=None)
SCALED = replace(SETTINGS, learning_rate_scale=1.5)
LAYER = "bert.encoder.layer.1.intermediate.dense"
FlatParamHandle.to_cpu = lambda self: contextlib.nullcontext()  # type: ignore[method-assign,assignment]


def trainer(
    folder: Path, callback: CuttlefishCallback, resume: str | None = None, seed: int = 0,
    sharding: dict[str, Any] | None = None, strategy: str = "FULL_SHARD", **changes: Any,
) -> Trainer:  # fmt: skip
    config = {
        "version": 1,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["BertLayer"],
    }
    config |= {"state_dict_type": "FULL_STATE_DICT", "sync_module_states": False, "cpu_ram_efficient_loading": False}
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": trainers.STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "adam_epsilon": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3, "report_to": [], "disable_tqdm": True,
        "log_level": "error", "average_tokens_across_devices": False, "dataloader_pin_memory": False, "use_cpu": True,
        "fsdp": True, "fsdp_config": config | (sharding or {}), "resume_from_checkpoint": resume, **changes,
    }  # fmt: skip
    AcceleratorState._reset_state()
    os.environ["FSDP_SHARDING_STRATEGY"] = (
        strategy  # as accelerate launch sets it; Trainer's own field does not reach FSDP1
    )
    args = TrainingArguments(**options)
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    rows = {"train_dataset": trainers.Rows(), "eval_dataset": trainers.Rows(8)}
    made = Trainer(model=tiny_bert(seed), args=args, callbacks=[callback], **rows)
    made.accelerator.state.fsdp_plugin.optim_state_dict_config.offload_to_cpu = False
    return made


def units(made: Trainer) -> int:
    """How many modules FSDP1 is around; 0 where it is off."""
    found = FSDP.fsdp_modules(made.model) if isinstance(made.model, FSDP) else []
    return len(found) if all(unit.world_size == 2 for unit in found) else 0


def ranks(made: Trainer) -> dict[str, int]:
    found = low_rank_layers(made.model)
    wrappers = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return {".".join(p for p in name.split(".") if p not in wrappers): layer.rank for name, layer in found.items()}


def run(
    folder: Path, settings: CuttlefishConfig = SETTINGS, sharding: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Train to the switch, and on from there with a new Trainer and the same arguments."""
    callback, moments = CuttlefishCallback(settings), {}
    first = trainer(folder, callback, sharding=sharding, **changes)
    real = fsdp1._low_rank_weights

    def look(dense: Any, exact: Any) -> Any:  # at the full-rank checkpoint, before it is exchanged
        at = folder / f"checkpoint-{trainers.SWITCH}"
        moments.update(torch.load(at / "optimizer.bin")["state"][f"{LAYER}.weight"])
        return real(dense, exact)

    fsdp1._low_rank_weights = look
    try:
        first.train()
    finally:
        fsdp1._low_rank_weights = real
    dist.barrier()
    checkpoint = Path(str(callback.restart_from))
    result: dict[str, Any] = {
        "units": units(first), "stopped": first.state.global_step, "restart_from": callback.restart_from,
        "left": sorted(p.name for p in checkpoint.iterdir()), "whole": last_whole_checkpoint(folder), "dense": not ranks(first),
        "optimizer": callback.report.optimizer if callback.report else "",
        "strategy": first.model.sharding_strategy.name, "precision": str(first.model.mixed_precision.param_dtype),
    }  # fmt: skip
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint).state_dict()
    raw = torch.load(checkpoint / "pytorch_model_fsdp.bin")
    result["AutoModel"] = loaded.keys() == raw.keys() and all(torch.equal(loaded[k], v) for k, v in raw.items())
    state = torch.load(checkpoint / "optimizer.bin")["state"]
    down, up = (loaded[f"{LAYER}.{part}.weight"] for part in ("down", "up"))
    if moments:
        m, v = moments["exp_avg"], moments["exp_avg_sq"]
        expected = {
            ("up", "exp_avg"): m @ down.T, ("down", "exp_avg"): up.T @ m,
            ("up", "exp_avg_sq"): v @ down.square().T, ("down", "exp_avg_sq"): up.square().T @ v,
        }  # fmt: skip
        result["moments"] = [
            [x.norm().item(), (state[f"{LAYER}.{part}.weight"][kind] - x).norm().item()] if state else None
            for (part, kind), x in expected.items()
        ]
    second = trainer(folder, callback, callback.restart_from, seed=9, sharding=sharding, **changes)
    second.train(resume_from_checkpoint=callback.restart_from)
    logs = [r for r in second.state.log_history if "loss" in r]
    return result | {
        "units again": units(second), "steps": second.state.global_step, "switched": callback.switch_step,
        "plan": dict(callback.plan or {}), "ranks": ranks(second),
        "increase": callback.plan.predicted_loss_increase if callback.plan else None,
        "losses": [r["loss"] for r in logs], "rates": [r["learning_rate"] for r in logs], "epochs": [r["epoch"] for r in logs],
    }  # fmt: skip


def resumed(folder: Path, step: int) -> dict[str, Any]:
    """From another checkpoint of a run that has ended: losses, and where it stops."""
    callback = CuttlefishCallback(SETTINGS)
    checkpoint = str(folder / f"checkpoint-{step}")
    made = trainer(folder.with_name("again"), callback, checkpoint, seed=9)
    made.train(resume_from_checkpoint=checkpoint)
    return {
        "units": units(made), "stopped": made.state.global_step, "plan": dict(callback.plan or {}), "switched": callback.switch_step,
        "losses": [r["loss"] for r in made.state.log_history if "loss" in r],
    }  # fmt: skip


def failing(folder: Path, where: str) -> dict[str, Any]:
    """An error while the factors are worked out, on process 1 alone, in the middle of writing, or of the exchange."""
    places = {
        "exchange": (restart, "_exchange"),
        "factors": (fsdp1, "make_change"),
        "writing": (fsdp1, "save_model"),
    }
    holder, name = places[where]
    real = getattr(holder, name)

    def fail(*given: Any, **named: Any) -> Any:
        if where == "factors" and dist.get_rank() == 0:
            return real(*given, **named)
        if where == "exchange":
            os.replace(given[0] / "trainer_state.json", given[0] / restart.FULL_RANK_STATE)
            (given[0] / "model.safetensors").unlink()
        raise OSError("no space left on device")

    setattr(holder, name, fail)
    settings, often = (
        replace(SETTINGS, on_error="continue"),
        {"save_strategy": "steps", "save_steps": 1, "max_steps": 7},
    )
    callback = CuttlefishCallback(settings)
    try:
        made = trainer(folder, callback, **often)
        made.train()
    finally:
        setattr(holder, name, real)
    dist.barrier()
    result = {
        "units": units(made), "steps": made.state.global_step, "reason": callback.reason, "dense": not ranks(made),
        "restart_from": callback.restart_from, "staging": (folder / f"checkpoint-{trainers.SWITCH}" / restart.STAGING).exists(),
    }  # fmt: skip
    dist.barrier()
    if dist.get_rank() == 0:
        os.rename(folder / "checkpoint-7", folder / "later")  # as if it had been killed there
    dist.barrier()
    result["whole"] = last_whole_checkpoint(folder)
    callback = CuttlefishCallback(settings)
    again = trainer(folder, callback, result["whole"], seed=9, max_steps=7)
    again.train(resume_from_checkpoint=result["whole"])
    return result | {"stopped again": again.state.global_step, "switched": callback.switch_step}


def looped(folder: Path | None) -> dict[str, Any]:
    """A loop of one's own: to the switch, and on from there, with the same lines. Without a folder: DDP, in place."""
    batches, step, saved = [{k: v[:8] for k, v in batch.items()} for batch in loops.batches()], 0, None
    result: dict[str, Any] = {"losses": [], "rates": []}
    while step < len(batches):
        model: Any = tiny_bert(9)
        if saved is not None:
            model = AutoModelForSequenceClassification.from_pretrained(folder).train()
        if folder is None:
            model = torch.nn.parallel.DistributedDataParallel(model)
        else:
            AcceleratorState._reset_state()
            os.environ.pop("FSDP_SHARDING_STRATEGY", None)
            wanted = {"fsdp_version": 1, "sharding_strategy": "FULL_SHARD", "state_dict_type": "FULL_STATE_DICT"}
            wanted |= {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["BertLayer"]}
            wanted |= {"cpu_ram_efficient_loading": False, "sync_module_states": False, "use_orig_params": True}
            plugin = FullyShardedDataParallelPlugin(**wanted)
            shared = {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
            PartialState._shared_state |= shared
            accelerator = Accelerator(fsdp_plugin=plugin)
            plugin.optim_state_dict_config.offload_to_cpu = False
            model = accelerator.prepare(model)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
        if folder is not None:
            optimizer = accelerator.prepare(optimizer)
            accelerator.step_scheduler_with_optimizer = False
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / len(batches))
        if folder is not None:
            accelerator.register_for_checkpointing(scheduler)
        if saved is not None:
            accelerator.load_state(str(folder))
        cuttlefish = Cuttlefish(
            model, optimizer, SCALED, total_steps=len(batches), scheduler=scheduler, can_restart=True
        )
        if saved is not None:
            cuttlefish.load_state_dict(saved)
        result["on"] = isinstance(model, FSDP)
        while step < len(batches):
            loss = model(**loops.mine(batches[step])).loss
            loss.backward()
            result["rates"].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            total = loss.detach().clone()
            dist.all_reduce(total)
            result["losses"].append(float(total) / dist.get_world_size())
            if cuttlefish.step() and cuttlefish.restarts:
                accelerator.save_state(str(folder))
                if cuttlefish.switch_in_checkpoint(Path(str(folder))):
                    saved = cuttlefish.state_dict()
                    break
    said = cuttlefish.report.optimizer if cuttlefish.report else ""
    return result | {"switched": cuttlefish.switch_step, "plan": dict(cuttlefish.plan or {}), "optimizer": said}


def refusals(folder: Path) -> dict[str, str]:
    """What is raised, by name."""
    answers = {}

    def answer(name: str, call: Any) -> None:
        try:
            call()
            answers[name] = "nothing was raised"
        except (ValueError, RuntimeError) as error:
            answers[name] = str(error)

    for name, settings, sharding, changes in (
        ("in_place", replace(SETTINGS, switch="in_place"), {}, {}),
        ("sharded", SETTINGS, {"state_dict_type": "SHARDED_STATE_DICT"}, {}),
        ("strategy", SETTINGS, {}, {"strategy": "NO_SHARD"}),
        ("offload", SETTINGS, {"cpu_offload": True}, {}),
        ("best", SETTINGS, {}, {"load_best_model_at_end": True}),
        ("only the model", SETTINGS, {}, {"save_only_model": True}),
    ):
        made = trainer(folder / "refused", CuttlefishCallback(settings), sharding=sharding, **changes)
        answer(name, made.train)
    made = trainer(folder / "refused", CuttlefishCallback(), max_steps=1)
    made.remove_callback(CuttlefishCallback)
    made.train()
    for name, model in (("loop", made.model), ("inner", made.model.module)):
        answer(name, lambda model=model: Cuttlefish(model, made.optimizer, SETTINGS, total_steps=10))
    # The checkpoint is no training argument, so that the model is dense when FSDP1 takes it.
    late = trainer(folder / "late", CuttlefishCallback(SETTINGS))
    checkpoint = str(folder / "orig" / f"checkpoint-{trainers.SWITCH}")
    answer("late", lambda: late.train(resume_from_checkpoint=checkpoint))
    return answers


def main() -> None:
    folder = Path(sys.argv[1])
    schedule.SHORTEST_STRETCH = 1  # so that the weights' travel is known at the switch
    PartialState(cpu=True)
    half: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    half |= {"settings": LEFT_TO_ITSELF}
    results: dict[str, Any] = {}
    for name, changes in (("DDP", {}), ("DDP, accumulation", half)):
        _, _, results[name] = trainers.run(folder, name, **changes)
        results[name].pop("_weights")
    # An evaluation leaves the outermost weights whole, just before the checkpoint is written.
    flat, often = {"use_orig_params": False}, {"save_strategy": "epoch", "eval_strategy": "epoch"}
    evaluated = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    by_size = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 1000}
    results |= {
        "orig": run(folder / "orig", **evaluated),
        "resumed at 4": resumed(folder / "orig", 4),
        "resumed at 8": resumed(folder / "orig", 8),
        "flat": run(folder / "flat", sharding=flat, **often),  # saves twice at the switch, which ends an epoch
        "accumulation": run(folder / "accumulation", sharding=flat, **half),
        "by size, grad op": run(folder / "size", sharding=by_size, strategy="SHARD_GRAD_OP"),
        "bf16": run(folder / "bf16", bf16=True, sharding={"activation_checkpointing": True}),
        "reset": run(folder / "reset", replace(SETTINGS, optimizer_state="reset", switch="restart")),
        "failing in factors": failing(folder / "factors", "factors"),
        "failing in writing": failing(folder / "writing", "writing"),
        "failing in exchange": failing(folder / "exchange", "exchange"),
        "refusals": refusals(folder),
        "loop": looped(folder / "loop"),
        "loop, DDP": looped(None),
    }
    trainers.write_results(folder, results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    leave()
