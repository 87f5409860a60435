"""Trainer under tensor parallelism, run by torchrun: tensor_parallel_trainer.py FOLDER. Rank 0 writes FOLDER/results.json.

Accelerate takes tensor parallelism only where it finds GPUs: it is told that these are. Everything else is transformers',
Accelerate's and torch's own, on gloo. Each result says how the weights were divided.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

import trainers
from ending import leave
from hf_cuttlefish import (
    Cuttlefish,
    CuttlefishCallback,
    CuttlefishConfig,
    follow_checkpoints,
    last_whole_checkpoint,
)
from hf_cuttlefish.decide import schedule
from hf_cuttlefish.engines import tensor_parallel
from hf_cuttlefish.layers.low_rank import low_rank_layers
from tiny_models import BY_NAME

# The first token of a causal model attends to itself alone, so that the gradient at q_proj is exactly zero, and the token left
# out of the statistics, or not, by a rounding: with q_proj runs agree to 1e-3 only.
SETTINGS = CuttlefishConfig(
    switch_step=trainers.SWITCH, statistics_steps=4, rank_multiple=2, target_ratio=0.5, learning_rate_scale=1.0, on_error="raise", switch="restart",
    exclude_modules=["q_proj"],
)  # fmt: skip
LEFT_TO_ITSELF, SCALED = (replace(SETTINGS, learning_rate_scale=scale) for scale in (None, 1.5))
LAYER = "model.layers.1.mlp.up_proj"


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(3, 99, (48, 7), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def is_parallel() -> bool:
    return dist.is_initialized()


def load(folder: Path, **plan: str) -> Any:
    rules = {f"model.layers.*.{name}": style for name, style in plan.items()}
    config = DistributedConfig(tp_plan=rules or "auto") if is_parallel() else None
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def trainer(folder: Path, base: Path, callback: TrainerCallback, resume: str | None = None, **changes: Any) -> Trainer:
    AcceleratorState._reset_state()
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": trainers.STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "adam_epsilon": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3, "report_to": [], "disable_tqdm": True,
        "log_level": "error", "dataloader_pin_memory": False, "use_cpu": True, "resume_from_checkpoint": resume, **changes,
    }  # fmt: skip
    args = TrainingArguments(**options)
    if is_parallel():
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    return Trainer(model=load(base), args=args, train_dataset=Rows(), callbacks=[callback])


def divided(model: Any) -> dict[str, list[Any]]:
    """Of each parameter that is divided: how, the shape here and the whole one."""
    return {
        n: [str(p.placements[0]), list(p.to_local().shape), list(p.shape)]
        for n, p in model.named_parameters()
        if hasattr(p, "placements")
    }


def logged(made: Trainer) -> dict[str, Any]:
    logs = [r for r in made.state.log_history if "loss" in r]
    return {name: [r[key] for r in logs] for name, key in
            {"losses": "loss", "rates": "learning_rate", "epochs": "epoch"}.items()}  # fmt: skip


def run(folder: Path, base: Path, settings: CuttlefishConfig = SETTINGS, **changes: Any) -> dict[str, Any]:
    """Train to the switch, and on from there with a new Trainer and the same arguments."""
    callback = CuttlefishCallback(settings)
    first = trainer(folder, base, callback, **changes)
    first.train()
    checkpoint = Path(str(callback.restart_from))
    result: dict[str, Any] = {
        "divided": divided(first.model), "stopped": first.state.global_step, "restart_from": str(checkpoint),
        "left": sorted(p.name for p in checkpoint.iterdir()), "whole": last_whole_checkpoint(folder),
        "dense": not low_rank_layers(first.model), "optimizer": callback.report.optimizer if callback.report else "",
    }  # fmt: skip
    if is_parallel():
        result["moments"] = moments(first, checkpoint)
    second = trainer(folder, base, callback, str(checkpoint), **changes)
    second.train(resume_from_checkpoint=str(checkpoint))
    return result | logged(second) | {
        "divided again": divided(second.model), "switched": callback.switch_step, "plan": dict(callback.plan or {}),
        "ranks": {n: layer.rank for n, layer in low_rank_layers(second.model).items()},
        "increase": callback.plan.predicted_loss_increase if callback.plan else None,
    }  # fmt: skip


def moments(first: Trainer, checkpoint: Path) -> dict[str, list[float]]:
    """[size, difference] of the state saved of one layer's factors from that of its weight, projected."""
    state = torch.load(checkpoint / "optimizer.pt")["state"]
    old = first.optimizer.optimizer.state[first.model.get_submodule(LAYER).weight]
    old = {kind: value.full_tensor() for kind, value in old.items() if value.ndim}  # all processes take part
    if not state:
        return {}
    low = AutoModelForCausalLM.from_pretrained(checkpoint)
    weights = [name for name, p in low.named_parameters() if p.ndim > 1]  # in the optimizer's first group
    at = weights.index(f"{LAYER}.down.weight")
    down, up = low.get_submodule(LAYER).down.weight.data, low.get_submodule(LAYER).up.weight.data
    pairs = {
        "down exp_avg": (up.T @ old["exp_avg"], state[at]["exp_avg"]),
        "up exp_avg": (old["exp_avg"] @ down.T, state[at + 1]["exp_avg"]),
        "down exp_avg_sq": (up.square().T @ old["exp_avg_sq"], state[at]["exp_avg_sq"]),
        "up exp_avg_sq": (old["exp_avg_sq"] @ down.square().T, state[at + 1]["exp_avg_sq"]),
    }
    return {kind: [x.norm().item(), (x - y).norm().item()] for kind, (x, y) in pairs.items()}


def resume(folder: Path, base: Path, checkpoint: Path) -> list[float]:
    """The losses of a run that goes on from a checkpoint."""
    made = trainer(folder, base, CuttlefishCallback(SETTINGS), str(checkpoint))
    made.train(resume_from_checkpoint=str(checkpoint))
    return logged(made)["losses"]


def failing(folder: Path, base: Path) -> dict[str, Any]:
    """No space left while the low-rank form is written: the run goes on, and its checkpoint of that step resumes full rank."""
    real = tensor_parallel.save_model

    def fails(*given: Any) -> None:
        raise OSError("no space left")

    tensor_parallel.save_model = fails
    callback = CuttlefishCallback(replace(SETTINGS, on_error="continue"))
    made = trainer(folder, base, callback)
    made.train()
    whole = last_whole_checkpoint(folder)
    again = trainer(folder / "again", base, CuttlefishCallback(replace(SETTINGS, on_error="continue")), whole)
    again.train(resume_from_checkpoint=whole)  # it tries again, in vain
    tensor_parallel.save_model = real
    return {
        "reason": callback.reason, "steps": made.state.global_step, "dense": not low_rank_layers(made.model), "whole": whole,
        "losses": logged(made)["losses"], "again": logged(again)["losses"], "divided": divided(again.model),
    }  # fmt: skip


def loaded(checkpoint: Path, base: Path) -> dict[str, Any]:
    """The factorized folder as `from_pretrained` makes it tensor parallel: outputs, saving, and a run that goes on from it."""
    model, ids = load(checkpoint), Rows().ids[:4]
    alone = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = alone(input_ids=ids).logits
        difference = (model(input_ids=ids).logits - expected).abs().max().item()
    with_gradients = (model(input_ids=ids).logits - expected).abs().max().item()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    same = torch.equal(model.generate(ids, **options), alone.generate(ids, **options))
    model.save_pretrained(checkpoint.parent / "saved")
    saved = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "saved").state_dict()
    return {
        "divided": divided(model), "difference": max(difference, with_gradients), "size": expected.abs().max().item(),
        "generated": same, "saved": all(torch.equal(saved[k], v) for k, v in alone.state_dict().items()), "losses": resume(checkpoint.parent, checkpoint, checkpoint),
    }  # fmt: skip


def said(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def cuttlefish(model: Any, **settings: Any) -> Cuttlefish:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Cuttlefish(model, optimizer, replace(SETTINGS, **settings), total_steps=10, can_restart=True)


def noting(model: Any, **attributes: Any) -> Any:
    """The model with other sizes of parallelism than it has, as transformers would note them."""
    for name, value in attributes.items():
        setattr(model if name == "_tp_size" else model.config.distributed_config, name, value)
    return model


def parts_in_the_file(folder: Path, base: Path) -> str:
    """optimizer.pt as Trainer alone writes it, from which the callback is to go on."""

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_save = state.global_step == 2

    trainer(folder, base, Saves(), max_steps=2).train()
    at = str(folder / "checkpoint-2")
    return said(lambda: trainer(folder, base, CuttlefishCallback(SETTINGS), at).train(resume_from_checkpoint=at))


def refusals(folder: Path, base: Path, factorized: Path) -> dict[str, str]:
    low, dense = load(factorized), AutoModelForCausalLM.from_pretrained(base).state_dict()
    follow_checkpoints(low)
    alone = {"save_only_model": True}
    return {
        "in place": said(lambda: cuttlefish(load(base), switch="in_place")),
        "speed": said(lambda: cuttlefish(load(base), objective="speed")),
        "data parallel": said(lambda: cuttlefish(noting(load(base), _tp_size=4))),
        "experts": said(lambda: cuttlefish(noting(load(base), ep_size=2))),
        "packed": said(lambda: cuttlefish(load(base, **{"mlp.gate_proj": "packed_colwise"}))),
        "style": said(lambda: cuttlefish(load(base, **{"mlp.gate_proj": "replicated_with_grad_allreduce"}))),
        "save_only_model": said(lambda: trainer(folder, base, CuttlefishCallback(SETTINGS), **alone).train()),
        "dense into factors": said(lambda: low.load_state_dict(dense, strict=False)),
        "rules that do not fit": said(lambda: load(factorized, **{"mlp.gate_proj": "rowwise"})),
        "parts in the file": parts_in_the_file(folder / "parts", base),
    }  # fmt: skip


def make_bases(folder: Path) -> None:
    BY_NAME["llama"].build().save_pretrained(folder / "base")
    BY_NAME["qwen2"].build().save_pretrained(folder / "biased")  # biases at q, k and v


def main() -> None:
    folder = Path(sys.argv[1])
    schedule.SHORTEST_STRETCH = 1  # so that the weights' travel is known at the switch
    dist.init_process_group("gloo")
    base = folder / "base"  # made by the test
    half = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    results: dict[str, Any] = {
        "plain": run(folder / "plain", base),
        "accumulation": run(folder / "accumulation", base, LEFT_TO_ITSELF, **half),
        "reset": run(folder / "reset", base, replace(SETTINGS, optimizer_state="reset")),
        "with q_proj": run(folder / "q_proj", base, replace(SETTINGS, exclude_modules=None)),
        "biased": run(folder / "biased run", folder / "biased", SCALED),
        "failing": failing(folder / "failing", base),
    }
    checkpoint = Path(results["plain"]["restart_from"])
    results["loaded"] = loaded(checkpoint, base)
    results["refused"] = refusals(folder / "refused", base, checkpoint)
    trainers.write_results(folder, results)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    main()
    leave()
