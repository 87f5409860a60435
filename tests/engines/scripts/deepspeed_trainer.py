"""Trainer under DeepSpeed, run by torchrun: deepspeed_trainer.py FOLDER. Rank 0 writes FOLDER/results.json.

Accelerate starts DeepSpeed on GPUs alone: told to run on the CPU it takes DDP, without a word. Here it is given processes that
are set up already (gloo) and DeepSpeed's own CPU backend; everything after that is real. Each result says whether it was on.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import transformers.training_args
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import distributed as dist
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import loops
import trainers
from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig, last_whole_checkpoint
from hf_cuttlefish.decide import schedule
from hf_cuttlefish.engines import restart
from hf_cuttlefish.engines.deepspeed_partitions import FlatPartitions, ParameterPartitions
from loops import tiny_bert

SETTINGS = CuttlefishConfig(
    switch_step=trainers.SWITCH,
    statistics_steps=4,
    rank_multiple=2,
    target_ratio=0.5,
    learning_rate_scale=1.0,
    on_error="raise",
)
LEFT_TO_ITSELF, SCALED = (replace(SETTINGS, learning_rate_scale=scale) for scale in (None, 1.5))
OWN_SCHEDULE = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_max_lr": 1e-2,
        "warmup_num_steps": 1,
        "warmup_type": "linear",
        "total_num_steps": trainers.STEPS,
    },
}
OWN_OPTIMIZER = {
    "type": "AdamW",
    "params": {"torch_adam": True, "adam_w_mode": True} | dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
}
SAVED: Path | None = None
"""Folder of saved models from which ZeRO-3 is to take them, divided from the start; else they are made whole."""
LAYER = "bert.encoder.layer.1.intermediate.dense"


def arguments(
    folder: Path, stage: int, zero: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **changes: Any
) -> TrainingArguments:
    """own: DeepSpeed's optimizer or scheduler in its config, in the place of the Trainer's."""
    # No parameter is so small that ZeRO-3 would leave it whole.
    # And none stays whole for its next use, as in a model that is larger than what may stay.
    all_divided = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0} if stage == 3 else {}
    deepspeed = {
        "zero_optimization": {"stage": stage, **all_divided, **(zero or {})},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    deepspeed |= {"gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"}, **(own or {})}
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": trainers.STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "adam_epsilon": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3, "report_to": [], "disable_tqdm": True,
        "log_level": "error", "average_tokens_across_devices": False, "dataloader_pin_memory": False, "optim": "adamw_torch",
        "deepspeed": deepspeed, "accelerator_config": {"use_configured_state": True}, **changes,
    }  # fmt: skip
    AcceleratorState._reset_state()
    return TrainingArguments(**options)


def trainer(args: TrainingArguments, callback: CuttlefishCallback, *more: TrainerCallback, seed: int = 0) -> Trainer:
    AcceleratorState._reset_state()  # as examples/comparing.py does: Accelerate takes DeepSpeed's settings once
    model = tiny_bert(seed)
    if SAVED is not None:  # from_pretrained divides the parameters as it makes them
        model = AutoModelForSequenceClassification.from_pretrained(SAVED / str(seed))
        assert all(hasattr(p, "ds_id") for p in model.parameters())
    return Trainer(model=model, args=args, train_dataset=trainers.Rows(), callbacks=[callback, *more])


def is_on(made: Trainer) -> bool:
    return (
        type(made.model_wrapped).__name__ == "DeepSpeedEngine"
        and type(made.optimizer.optimizer).__name__.startswith("DeepSpeedZeroOptimizer")
        and made.model_wrapped.dp_world_size == 2
    )


def flat_state(folder: Path, processes: int = 2) -> dict[str, torch.Tensor]:
    """{weight: its first moments} of the first group, out of DeepSpeed's files and by nothing of ours."""
    files = [next(folder.glob(f"*zero_pp_rank_{i}_*optim_states.pt")) for i in range(processes)]  # bf16_... under bf16
    parts = [torch.load(f, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"] for f in files]
    if not any(parts):
        return {}
    parts = [p[0] for p in parts]
    shapes = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"][0]
    found, at = {}, 0
    whole = {kind: torch.cat([p[kind] for p in parts]) for kind in ("exp_avg", "exp_avg_sq")}
    for name, shape in shapes.items():
        for kind, flat in whole.items():
            found[f"{name} {kind}"] = flat[at : at + shape.numel()].view(shape)
        at += shape.numel()
    found["step"] = parts[0]["step"]
    return found


class Watcher(TrainerCallback):
    """Notes the optimizer's state in the full-rank phase, at the switch, through DeepSpeed's own function."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.moments: dict[str, torch.Tensor] = {}
        self.resumed: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What a resumed run begins with (ZeRO-3, whose files are not as easily read)."""
        if state.global_step and self.trainer.model_wrapped.zero_optimization_stage() == 3:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            self.weights = {n: safe_get_full_fp32_param(p) for n, p in self.trainer.model.named_parameters()}
            for part in ("down", "up"):
                name = f"{LAYER}.{part}.weight"
                weight = self.trainer.model.get_parameter(name)
                self.resumed |= {
                    f"{name} {k}": safe_get_full_optimizer_state(weight, k) for k in ("exp_avg", "exp_avg_sq")
                }
            flats = self.trainer.optimizer.optimizer.fp32_partitioned_groups_flat
            self.resumed["step"] = self.trainer.optimizer.optimizer.optimizer.state[flats[0]]["step"].clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == trainers.SWITCH:
            from deepspeed.utils import safe_get_full_optimizer_state

            weight = self.trainer.model.get_submodule(LAYER).weight
            self.moments = {k: safe_get_full_optimizer_state(weight, k) for k in ("exp_avg", "exp_avg_sq")}


def run(folder: Path, stage: int, settings: CuttlefishConfig = SETTINGS, **changes: Any) -> dict[str, Any]:
    """Train to the switch, and on from there with a new Trainer and the same arguments."""
    args, callback, watcher = arguments(folder, stage, **changes), CuttlefishCallback(settings), Watcher()
    first = watcher.trainer = trainer(args, callback, watcher)
    first.train()
    result: dict[str, Any] = {
        "on": is_on(first), "stopped": first.state.global_step, "restart_from": callback.restart_from,
        "left": sorted(p.name for p in Path(str(callback.restart_from)).iterdir()),
        "whole": last_whole_checkpoint(folder), "still dense": not restart_ranks(first.model),
    }  # fmt: skip
    checkpoint = Path(str(callback.restart_from))
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint).state_dict()
    args.resume_from_checkpoint = callback.restart_from
    watcher_again = Watcher()
    second = watcher_again.trainer = trainer(args, callback, watcher_again, seed=9)
    if stage < 3:
        files = checkpoint / f"global_step{trainers.SWITCH}"
        parts = torch.load(files / "mp_rank_00_model_states.pt", weights_only=False)
        result["AutoModel"] = loaded.keys() == parts["module"].keys() and all(
            torch.equal(loaded[k], v.to(loaded[k].dtype)) for k, v in parts["module"].items()
        )
    second.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if stage == 3:
        weights = watcher_again.weights
        result["AutoModel"] = loaded.keys() == weights.keys() and all(
            torch.equal(v, weights[k].to(v.dtype)) for k, v in loaded.items()
        )
    state = watcher_again.resumed or flat_state(checkpoint / f"global_step{trainers.SWITCH}")
    down, up = (loaded[f"{LAYER}.{part}.weight"].float() for part in ("down", "up"))
    m, v = watcher.moments["exp_avg"], watcher.moments["exp_avg_sq"]
    expected = {
        f"{LAYER}.up.weight exp_avg": m @ down.T, f"{LAYER}.down.weight exp_avg": up.T @ m,
        f"{LAYER}.up.weight exp_avg_sq": v @ down.square().T, f"{LAYER}.down.weight exp_avg_sq": up.square().T @ v,
    }  # fmt: skip
    result["moments"] = {k: [x.norm().item(), (state[k] - x).norm().item()] for k, x in expected.items() if state}
    result["step count"] = float(state["step"]) if state else None
    logs = [r for r in second.state.log_history if "loss" in r]
    return result | {
        "on again": is_on(second), "steps": second.state.global_step, "switched": callback.switch_step,
        "plan": dict(callback.plan or {}), "ranks": restart_ranks(second.model),
        "increase": callback.plan.predicted_loss_increase if callback.plan else None,
        "losses": [r["loss"] for r in logs], "rates": [r["learning_rate"] for r in logs], "epochs": [r["epoch"] for r in logs],
        "unequal": trainers.unequal(second.model), "dtype": str(next(second.model.parameters()).dtype),
        "optimizer": callback.report.optimizer if callback.report else "",
    }  # fmt: skip


def restart_ranks(model: torch.nn.Module) -> dict[str, int]:
    from hf_cuttlefish.layers.low_rank import low_rank_layers

    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


def loop(folder: Path, stage: int) -> dict[str, Any]:
    """A loop of one's own: to the switch, and on from there, with the same lines."""
    result: dict[str, Any] = {"losses": [], "rates": []}
    batches, step, saved = loop_batches(), 0, None
    while step < len(batches):
        AcceleratorState._reset_state()
        plugin = DeepSpeedPlugin(
            hf_ds_config={
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "train_micro_batch_size_per_gpu": 4,
                "gradient_clipping": 0.0,
            }
        )
        accelerator = Accelerator(deepspeed_plugin=plugin)
        model: Any = tiny_bert(9)
        if saved is not None:
            model = AutoModelForSequenceClassification.from_pretrained(folder).train()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
        steps = len(batches) * dist.get_world_size()  # Accelerate steps the schedule once for each process
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s, steps=steps: 1 - s / steps)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if saved is not None:
            accelerator.load_state(str(folder))
        cuttlefish = Cuttlefish(
            model, optimizer, SCALED, total_steps=len(batches), scheduler=scheduler, can_restart=True
        )
        if saved is not None:
            cuttlefish.load_state_dict(saved)
        result["on"] = type(model).__name__ == "DeepSpeedEngine" and model.zero_optimization_stage() == stage
        while step < len(batches):
            loss = model(**loops.mine(batches[step])).loss
            accelerator.backward(loss)
            result["rates"].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            total = loss.detach().clone()
            dist.all_reduce(total)
            result["losses"].append(float(total) / dist.get_world_size())
            if cuttlefish.step():
                accelerator.save_state(str(folder))
                if cuttlefish.switch_in_checkpoint(folder):
                    saved = cuttlefish.state_dict()
                    break
    bare = accelerator.unwrap_model(model)
    return result | {
        "switched": cuttlefish.switch_step,
        "plan": dict(cuttlefish.plan or {}),
        "ranks": restart_ranks(bare),
    }


def loop_batches() -> list[dict[str, torch.Tensor]]:
    return [{k: v[:8] for k, v in batch.items()} for batch in loops.batches()]


def in_place() -> dict[str, Any]:
    """The same run on DDP, switching in place."""
    model, batches = tiny_bert(9), loop_batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / len(batches))
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    cuttlefish = Cuttlefish(ddp, optimizer, SCALED, total_steps=len(batches), scheduler=scheduler)
    losses = []
    for batch in batches:
        loss = ddp(**loops.mine(batch)).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        cuttlefish.step()
    return {"losses": losses, "plan": dict(cuttlefish.plan or {}), "switched": cuttlefish.switch_step}


def failing(folder: Path, where: str, stage: int = 2) -> dict[str, Any]:
    """An error on one process in the middle of writing, or of the exchange; then a run from the last whole checkpoint."""
    holder, name = {
        "writing": (restart, "save_model"), "filling": (FlatPartitions if stage == 2 else ParameterPartitions, "write"), "exchange": (restart, "_exchange"),
    }[where]  # fmt: skip
    real = getattr(holder, name)

    def fail(*given: Any) -> None:
        if where == "exchange":
            os.replace(given[0] / "trainer_state.json", given[0] / restart.FULL_RANK_STATE)
            (given[0] / "latest").unlink()
        if where != "filling" or dist.get_rank() == 1:
            raise OSError("no space left on device")
        real(*given)

    setattr(holder, name, fail)
    settings = replace(SETTINGS, on_error="continue")
    callback = CuttlefishCallback(settings)
    try:
        made = trainer(arguments(folder, stage, save_strategy="steps", save_steps=1, max_steps=7), callback)
        made.train()
    finally:
        setattr(holder, name, real)
    dist.barrier()
    result = {
        "on": is_on(made), "steps": made.state.global_step, "reason": callback.reason, "restart_from": callback.restart_from,
        "dense": not restart_ranks(made.model),
        "staging": (folder / f"checkpoint-{trainers.SWITCH}" / restart.STAGING).exists(),
    }  # fmt: skip
    dist.barrier()
    if dist.get_rank() == 0:
        os.rename(folder / "checkpoint-7", folder / "later")  # as if it had been killed there
    dist.barrier()
    result["whole"] = last_whole_checkpoint(folder)
    callback = CuttlefishCallback(settings)
    again = trainer(arguments(folder, stage, resume_from_checkpoint=result["whole"], max_steps=7), callback, seed=9)
    again.train(resume_from_checkpoint=result["whole"])
    return result | {"stopped again": again.state.global_step, "switched": callback.switch_step}


def refusals(folder: Path) -> dict[str, str]:
    """What is raised at the start, by name."""
    answers = {}
    for name, settings, stage, changes in (
        ("in_place", replace(SETTINGS, switch="in_place"), 2, {}),
        ("learning rate", SCALED, 2, {"own": {"scheduler": OWN_SCHEDULE}}),
        ("ZeRO-0", SETTINGS, 0, {}),
        ("offloading", SETTINGS, 3, {"zero": {"offload_param": {"device": "cpu"}}}),
        ("best", SETTINGS, 2, {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}),
        ("only the model", SETTINGS, 2, {"save_only_model": True}),
    ):
        try:
            trainer(arguments(folder / "refused", stage, **changes), CuttlefishCallback(settings)).train()
            answers[name] = "nothing was raised"
        except (TypeError, ValueError) as error:
            answers[name] = str(error)
    made = trainer(arguments(folder / "refused", 2, max_steps=1), CuttlefishCallback(replace(SETTINGS, switch_step=1)))
    made.remove_callback(CuttlefishCallback)
    made.train()
    for name, model in (("loop", made.model), ("engine", made.model_wrapped)):
        try:
            Cuttlefish(model, made.optimizer, SETTINGS, total_steps=10)
            answers[name] = "nothing was raised"
        except ValueError as error:
            answers[name] = str(error)
    for stage in (2, 3):  # the checkpoint is no training argument, so that the model is dense when DeepSpeed takes it
        try:
            late = trainer(arguments(folder / "late", stage), CuttlefishCallback(SETTINGS))
            late.train(resume_from_checkpoint=str(folder / f"ZeRO-{stage}" / f"checkpoint-{trainers.SWITCH}"))
            answers[f"late {stage}"] = "nothing was raised"
        except ValueError as error:
            answers[f"late {stage}"] = str(error)
    return answers


def main() -> None:
    folder = Path(sys.argv[1])
    schedule.SHORTEST_STRETCH = 1  # so that the weights' travel is known at the switch
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    global SAVED
    saved = folder / "saved"
    if dist.get_rank() == 0:
        for seed in (0, 9):
            tiny_bert(seed).save_pretrained(saved / str(seed))
    dist.barrier()
    results: dict[str, Any] = {f"loop, ZeRO-{stage}": loop(folder / f"loop {stage}", stage) for stage in (1, 2, 3)}
    results["loop, DDP"] = in_place()
    if sys.argv[2:] == ["loop"]:
        trainers.write_results(folder, results)
        return
    results["ZeRO-3"] = run(folder / "ZeRO-3", 3)
    SAVED = saved
    results["ZeRO-3, divided from the start"] = run(folder / "divided", 3, gradient_accumulation_steps=1)
    results["ZeRO-3, bf16"] = run(folder / "bf16 3", 3, bf16=True)
    SAVED = None
    results |= {
        "ZeRO-1": run(folder / "ZeRO-1", 1),
        "ZeRO-2": run(folder / "ZeRO-2", 2, save_strategy="epoch"),  # saves twice at the switch, which ends an epoch
        "accumulation": run(
            folder / "accumulation", 2, LEFT_TO_ITSELF, gradient_accumulation_steps=2, per_device_train_batch_size=2
        ),
        "own schedule": run(folder / "own schedule", 2, LEFT_TO_ITSELF, own={"scheduler": OWN_SCHEDULE}),
        "own optimizer": run(folder / "own optimizer", 3, SCALED, own={"optimizer": OWN_OPTIMIZER}),
        "bf16": run(folder / "bf16", 1, bf16=True),
        "reset": run(folder / "reset", 2, replace(SETTINGS, optimizer_state="reset", switch="restart")),
        "failing in writing": failing(folder / "writing", "writing"),
        "failing in filling": failing(folder / "filling", "filling"),
        "failing in exchange": failing(folder / "exchange", "exchange"),
        "failing in filling, ZeRO-3": failing(folder / "filling 3", "filling", 3),
        "failing in exchange, ZeRO-3": failing(folder / "exchange 3", "exchange", 3),
        "refusals": refusals(folder),
    }
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    AcceleratorState._reset_state(reset_partial_state=True)
    half: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    half |= {"settings": LEFT_TO_ITSELF}
    for name, changes in (("DDP", {}), ("DDP, accumulation", half), ("DDP, scaled", {"settings": SCALED})):
        _, _, results[name] = trainers.run(folder, name, optim="adamw_torch", **changes)
        results[name].pop("_weights")
    trainers.write_results(folder, results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    leave()
