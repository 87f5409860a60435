"""What every engine promises, run by torchrun, or in one process: contract.py ENGINE FOLDER [OLD]. Rank 0 writes FOLDER/results.json.

The same tiny run each time: 10 steps of 8 rows, the switch at step 6, statistics from step 3 on. OLD is a folder of checkpoints
that an earlier version has written (data/checkpoints/write.py), from which the run goes on too.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import trainers
from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig, LowRankLinear, follow_checkpoints
from hf_cuttlefish.layers.low_rank import low_rank_layers
from loops import batches, mine, rank, size

STEPS, SWITCH, BEFORE, AFTER = 10, 6, 5, 8
GIVEN = {
    "switch_step": SWITCH,
    "statistics_steps": 4,
    "rank_multiple": 2,
    "target_ratio": 0.5,
    "on_error": "raise",
    "learning_rate_scale": 1.0,
}
PROCESSES = {
    "one process": 1, "nn.DataParallel": 1, "DDP": 2, "ZeroRedundancyOptimizer": 2, "FSDP2": 2,
    "FSDP1": 2, "tensor parallel": 2, "DeepSpeed": 2,
}  # fmt: skip
BY_RESTART = ("FSDP1", "tensor parallel", "DeepSpeed")


def saved_at(engine: str) -> tuple[int, ...]:
    """From which checkpoints a run goes on. Trainer saves none of tensor parallel models but that of the switch."""
    return (SWITCH,) if engine == "tensor parallel" else (BEFORE, AFTER)


def saving(engine: str) -> dict[str, Any]:
    return {} if engine == "tensor parallel" else {"save_strategy": "steps", "save_steps": 1}


def settings(engine: str, **changes: Any) -> CuttlefishConfig:
    # A causal model's first token makes its queries' gradients zero but for roundings (tensor_parallel_trainer.py).
    given = {**GIVEN, "exclude_modules": ["q_proj"]} if engine == "tensor parallel" else GIVEN
    return CuttlefishConfig(**{**given, **changes})


def micro_bert(seed: int = 0) -> BertForSequenceClassification:
    """1,200 parameters."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 40,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = BertConfig(
        **shape, max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return shaken(BertForSequenceClassification(config))


def micro_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 99,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return shaken(LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=16, tie_word_embeddings=True)))


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def script(*names: str) -> Any:
    """A script beside this one, which had another name once."""
    for name in names:
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
        else:
            found.tiny_bert = micro_bert
            return found
    raise ModuleNotFoundError(names)


# --- a Trainer under each engine ---


def plain(folder: Path, callback: Any, resume: str | None, seed: int, gpus: int = 1, **changes: Any) -> Trainer:
    """One process, DDP, or nn.DataParallel (which without a GPU calls the model itself)."""
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8 // size() // gpus, "learning_rate": 1e-2,
        "resume_from_checkpoint": resume,
        "adam_epsilon": 1e-3, "logging_steps": 1, "save_strategy": "no", "seed": 3, "report_to": [], "disable_tqdm": True,
        "log_level": "error", "average_tokens_across_devices": False, "dataloader_pin_memory": False, "use_cpu": True, **changes,
    }  # fmt: skip
    args = TrainingArguments(**options)
    args._n_gpu = gpus
    made = Trainer(model=micro_bert(seed), args=args, train_dataset=trainers.Rows(), callbacks=[callback])
    made.args._n_gpu = gpus
    return made


def fsdp2(folder: Path, callback: Any, resume: str | None, seed: int, **changes: Any) -> Trainer:
    AcceleratorState._reset_state()
    kind = "FULL_STATE_DICT"
    changes = {"save_strategy": "no", **changes}
    made, own = script("fsdp2_trainer", "fsdp_trainer").trainer(folder, kind, resume, seed, **changes)
    made.remove_callback(own)
    made.add_callback(callback)
    callback.on_init_end(
        made.args, made.state, made.control, model=made.model
    )  # as Trainer does with those given to it
    return made


def fsdp1(folder: Path, callback: Any, resume: str | None, seed: int, **changes: Any) -> Trainer:
    return script("fsdp1_trainer").trainer(folder, callback, resume, seed, **changes)


def tensor_parallel(folder: Path, callback: Any, resume: str | None, seed: int, **changes: Any) -> Trainer:
    base = folder.parent / f"base {seed}"
    if rank() == 0:
        micro_llama(seed).save_pretrained(base)
    barrier()
    return script("tensor_parallel_trainer", "tp_trainer").trainer(
        base=base, folder=folder, callback=callback, resume=resume, **changes
    )


def deepspeed(folder: Path, callback: Any, resume: str | None, seed: int, **changes: Any) -> Trainer:
    module = script("deepspeed_trainer")
    args = module.arguments(folder, 2, resume_from_checkpoint=resume, **changes)
    return module.trainer(args, callback, seed=seed)


MAKERS: dict[str, Callable[..., Trainer]] = {
    "one process": plain, "DDP": plain, "FSDP2": fsdp2, "FSDP1": fsdp1, "tensor parallel": tensor_parallel, "DeepSpeed": deepspeed,
    "nn.DataParallel": lambda *given, **changes: plain(*given, gpus=2, **changes),
}  # fmt: skip


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def run(engine: str, folder: Path, config: Any = None, resume: str | None = None, seed: int = 0, **changes: Any) -> dict[str, Any]:  # fmt: skip
    """Train to the end, through a restart where the engine needs one."""
    config = config or settings(engine)
    if engine == "ZeroRedundancyOptimizer":
        return loop(folder, config, resume, seed, **changes)
    wrapped, together = [], False
    while True:
        callback = CuttlefishCallback(config)
        made = MAKERS[engine](folder, callback, resume, seed, **changes)
        made.add_callback(gatherer := Gatherer(callback))
        made.train(resume_from_checkpoint=resume)
        together = together or gatherer.together
        barrier()
        wrapped.append(type(made.model_wrapped).__name__)
        if callback.restart_from is None:
            break
        resume, seed = callback.restart_from, 9
    return {
        "losses": [r["loss"] for r in made.state.log_history if "loss" in r], "plan": dict(callback.plan or {}),
        "switched": callback.switch_step, "reason": callback.reason, "wrapped": wrapped, "together": together,
        "low rank": any(isinstance(m, LowRankLinear) for m in made.model.modules()),
        "saved": saved(made, folder / "model") if engine != "tensor parallel" else None,
    }  # fmt: skip


class Gatherer(TrainerCallback):
    """Notes whether samples of several layers would wait on a GPU for backward's end, when sharded weights are gone."""

    def __init__(self, ours: CuttlefishCallback) -> None:
        self.ours, self.together = ours, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        run = self.ours.cuttlefish
        moments = None if run is None else run.watch.moments
        if moments is not None:
            was, moments._on_gpu = moments._on_gpu, True
            self.together = self.together or moments.spares_launches
            moments._on_gpu = was


def saved(made: Trainer, folder: Path) -> dict[str, Any]:
    """What Trainer's own folder of the trained model loads as."""
    made.save_model(str(folder))
    barrier()
    low_rank = low_rank_layers(AutoModelForSequenceClassification.from_pretrained(folder))
    card = (folder / "README.md").read_text("utf-8") if low_rank else ""
    return {"ranks": {name: layer.rank for name, layer in low_rank.items()}, "card": "low-rank" in card}


# --- a loop of one's own, for what Trainer cannot save ---


def loop(folder: Path, config: Any, resume: str | None, seed: int, save_steps: int = 0, max_steps: int = STEPS, **_: Any) -> dict[str, Any]:  # fmt: skip
    """ZeroRedundancyOptimizer under DDP; in one process the ordinary optimizer on the same batches."""
    torch.manual_seed(seed)
    model: Any = micro_bert(seed)
    follow_checkpoints(model)
    saved = torch.load(resume, weights_only=False) if resume else None
    if saved:
        model.load_state_dict(saved["model"])
    options = {"lr": 1e-2, "eps": 1e-3}
    parallel = dist.is_initialized()
    runner: Any = DistributedDataParallel(model) if parallel else model
    optimizer: Any = torch.optim.AdamW(model.parameters(), **options)
    if parallel:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    run = Cuttlefish(runner, optimizer, config, total_steps=STEPS)
    if saved:
        run.load_state_dict(saved["run"], saved["statistics"])
    losses = list(saved["losses"]) if saved else []
    for batch in batches()[len(losses) : max_steps]:
        loss = runner(**mine({k: v[:8] for k, v in batch.items()})).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if parallel:
            dist.all_reduce(total)
        losses.append(float(total) / size())
        run.step()
        if save_steps and parallel:
            statistics = run.statistics_state()
            optimizer.consolidate_state_dict(to=0)
            if rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run.state_dict()}
                torch.save(state | {"statistics": statistics, "losses": losses}, folder / f"checkpoint-{len(losses)}")
            run.note_save()
            barrier()
    run.end()
    return {
        "losses": losses, "plan": dict(run.plan or {}), "switched": run.switch_step, "reason": run.reason,
        "wrapped": [f"{type(optimizer).__name__} in {type(runner).__name__}"],
        "low rank": any(isinstance(m, LowRankLinear) for m in model.modules()),
    }  # fmt: skip


# --- the promises ---


def failing(engine: str, folder: Path, at: int, culprit: int, names: list[str] | None = None) -> dict[str, Any]:
    """A run in which one process raises when it has made the edit number `at`; names: takes those of all edits."""
    from hf_cuttlefish.patch import modules

    real = modules.commit

    def commit(edits: Any, processes: Any) -> None:
        if names is not None:
            names.extend(type(edit).__name__ for edit in edits)
        if rank() == culprit and at < len(edits):
            apply = edits[at].apply

            def broken() -> None:
                apply()
                raise ZeroDivisionError("injected")

            edits[at].apply = broken
        real(edits, processes)

    modules.commit = commit
    try:
        return run(engine, folder, settings(engine, on_error="continue"), max_steps=AFTER)
    finally:
        modules.commit = real


def refusals(engine: str, folder: Path) -> dict[str, str]:
    """What is said at the start, before the first step."""
    said = {}
    cases = {"too late": settings(engine, switch_step=99)}
    if size() > 1:
        cases["other config"] = settings(engine, rank_multiple=2 + rank())
    for name, config in cases.items():
        try:
            run(engine, folder, config)
            said[name] = "nothing was raised"
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)
    return said


def promises(engine: str, folder: Path, old: Path | None = None) -> dict[str, Any]:
    whole = folder / "whole"
    result: dict[str, Any] = {"whole": run(engine, whole, **saving(engine))}
    for step in saved_at(engine):
        result[f"resumed at {step}"] = run(engine, folder / "again", None, str(whole / f"checkpoint-{step}"), 9)
    result["dense"] = run(engine, folder / "dense", settings(engine, switch_step=AFTER), max_steps=AFTER)
    names: list[str] = []
    result["none"] = failing(engine, folder / "none", at=999, culprit=0, names=names)
    everyone = gathered(names)
    able = [r for r, theirs in enumerate(everyone) if theirs]  # by restart, one process alone may make the edits
    for at, name in enumerate(everyone[able[0]]):
        result[f"fails at {at} {name}"] = failing(engine, folder / f"failing {at}", at, able[at % len(able)])
    result["refusals"] = refusals(engine, folder / "refused")
    for path in sorted(old.glob("checkpoint-*")) if old else ():
        result[f"old {path.name}"] = run(engine, folder / "old", None, str(path), 9)
    return result


def gathered(value: Any) -> list[Any]:
    everywhere: list[Any] = [value]
    if dist.is_initialized():
        everywhere = [None] * size()
        dist.all_gather_object(everywhere, value)
    return everywhere


def begin(engine: str) -> None:
    """Let the processes find each other."""
    torch.set_num_threads(1)
    if engine == "DeepSpeed":
        import transformers

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    elif engine == "tensor parallel":
        dist.init_process_group("gloo")
    else:
        PartialState(cpu=True)


def main() -> None:
    engine, folder = sys.argv[1], Path(sys.argv[2])
    begin(engine)
    trainers.write_results(folder, promises(engine, folder, *map(Path, sys.argv[3:])))


if __name__ == "__main__":
    main()
    leave()
