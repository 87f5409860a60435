"""What is launched: example scripts under Accelerate's configs as they are shipped, with the options that a user would add."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = EXAMPLES / "accelerate_configs"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Launch:
    """One command.

    Attributes:
        name: of its record and its folder. script: an example, or one of ours.
        config: of Accelerate, or "torchrun", or "python". processes: how many. options: of `accelerate launch`.
        arguments: of the script. after: name of the launch whose folder this one reads. fails: it is to fail.
        limit: seconds.
    """

    name: str
    script: Path
    config: str
    processes: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    fails: bool = False
    limit: int = 150

    def command(self, out: Path, port: int) -> list[str]:
        """As it is typed."""
        arguments = [str(part) for key, value in self.arguments.items() for part in (f"--{key}", value)]
        arguments = [part.replace("{out}", str(out)) for part in arguments]
        if self.after is not None:
            found = checkpoints(out / self.after, self.processes)
            arguments = [{"{first}": found[:1], "{last}": found[-1:]}.get(part, [part])[0] for part in arguments]
        if self.config == "python":
            return [sys.executable, str(self.script), *arguments]
        if self.config == "torchrun":
            run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={self.processes}"]
            return [*run, f"--master_port={port}", str(self.script), *arguments]
        from accelerate.commands import accelerate_cli

        options = {"num_processes": self.processes, "main_process_port": port, **self.options}
        run = [sys.executable, accelerate_cli.__file__, "launch", "--config_file", str(CONFIGS / self.config)]
        run += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        return [*run, str(self.script), *arguments]


def checkpoints(folder: Path, processes: int) -> list[str]:
    """The checkpoints of a run that are whole, in their order; [""] where there is none."""
    from hf_cuttlefish.saving.checkpoints import last_whole_checkpoint

    last = last_whole_checkpoint(folder / "cuttlefish", processes)
    if last is None:
        return [""]
    steps = sorted(int(p.name.split("-")[1]) for p in Path(last).parent.glob("checkpoint-*"))
    return [str(Path(last).with_name(f"checkpoint-{n}")) for n in steps if n <= int(Path(last).name.split("-")[1])]


DDP, FSDP, ONE = "multi_gpu_ddp_fp16.yaml", "fsdp2.yaml", "one_gpu_bf16.yaml"
ZERO = "deepspeed_zero{}.yaml"


def arguments(data: Path, rows: int, quick: bool, cpu: bool) -> tuple[dict[str, Any], ...]:
    """What a user would add, by script: a text classifier, a language model, chats, images, the loop without a Trainer."""
    text: dict[str, Any] = {
        "model_name_or_path": data / "minilm",
        "dataset_name": data / "trec",
        "max_train_samples": rows,
        "max_eval_samples": 64 if quick else 400,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "average_tokens_across_devices": False,
        "eval_strategy": "no",
        "save_strategy": "epoch",
        "save_total_limit": 3,
        "logging_steps": 1,
        "target_ratio": 0.4,
        "disable_tqdm": True,
    }
    dialogs: dict[str, Any] = {
        "dataset_name": data / "dialogs.txt",
        "max_train_samples": 300 if quick else 12_000,
        "max_eval_samples": 100 if quick else 1_000,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4 if quick else 16,
        "average_tokens_across_devices": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "target_ratio": 0.4,
        "disable_tqdm": True,
    }
    chats: dict[str, Any] = {
        "dataset_name": data / "chats",
        "max_train_samples": 300 if quick else 6_000,
        "max_eval_samples": 50 if quick else 400,
        "per_device_train_batch_size": 4 if quick else 8,
        "average_tokens_across_devices": False,
        "logging_steps": 5,
        "target_ratio": 0.4,
        "disable_tqdm": True,
    }
    images: dict[str, Any] = {"num_train_epochs": 4, "per_device_train_batch_size": 32, "logging_steps": 5}
    images |= {"save_strategy": "no", "target_ratio": 0.4, "disable_tqdm": True}
    loop = {key: text[key] for key in ("model_name_or_path", "dataset_name", "max_train_samples", "max_eval_samples")}
    loop |= {"num_train_epochs": 2, "per_device_train_batch_size": 16}
    if cpu:
        text["use_cpu"] = dialogs["use_cpu"] = True
    return text, dialogs, chats, images, loop


def all_launches(data: Path, quick: bool, cpu: bool) -> list[Launch]:
    """Every launch, those that read another's folder after it. quick: few steps. cpu: for a trial without GPUs."""
    rows, ddp = (96 if quick else 1600), ("cpu_2_processes.yaml" if cpu else DDP)
    text, dialogs, chats, images, loop = arguments(data, rows, quick, cpu)
    classify, model = EXAMPLES / "text_classification.py", EXAMPLES / "language_modeling.py"
    own: dict[str, Any] = {} if cpu else {"mixed_precision": "bf16"}

    def classified(name: str, config: str, options: dict[str, Any] | None = None, **more: Any) -> Launch:
        processes, after, fails = more.pop("processes", 2), more.pop("after", None), more.pop("fails", False)
        script = more.pop("script", classify)
        arguments = {**text, "output_dir": f"{{out}}/{name}", **more}
        return Launch(name, script, config, processes, options or {}, arguments, after, fails, limit=240)

    def modelled(name: str, config: str, options: dict[str, Any] | None = None, **more: Any) -> Launch:
        processes = more.pop("processes", 2)
        arguments = {**dialogs, "output_dir": f"{{out}}/{name}", **more}
        return Launch(name, model, config, processes, options or {}, arguments, limit=200)

    steps = -(-rows // 32)
    llama = {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}

    def example(name: str, script: str, options: dict[str, Any], arguments: dict[str, Any]) -> Launch:
        return Launch(
            name, EXAMPLES / script, DDP, 2, options, {**arguments, "output_dir": f"{{out}}/{name}"}, limit=200
        )

    found = [
        classified("ddp bf16", ddp, own),
        classified("ddp accumulation", ddp, own, per_device_train_batch_size=8, gradient_accumulation_steps=2),
        classified("communication hook bf16", ddp, own, script=HERE / "hooked.py"),
        classified("killed at the switch", ddp, own, script=HERE / "killed.py", fails=True, save_strategy="steps", save_steps=steps // 2),
        classified("killed, resumed", ddp, own, after="killed at the switch", resume_from_checkpoint="{last}"),
    ]  # fmt: skip
    if cpu:  # torch's bf16 hook wants CUDA
        return [launch for launch in found if launch.name != "communication hook bf16"]
    return [
        classified("one gpu bf16", ONE, processes=1, per_device_train_batch_size=32),
        classified("ddp fp16", DDP),
        *found,
        classified("nn.DataParallel bf16", "python", bf16=True),
        classified("fsdp2 bf16", FSDP),
        classified("fsdp2 bf16, resumed", FSDP, after="fsdp2 bf16", resume_from_checkpoint="{first}"),
        classified("fsdp2 bf16 sharded", FSDP, {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}),
        classified(
            "fsdp2 bf16 sharded, resumed",
            FSDP,
            {"fsdp_state_dict_type": "SHARDED_STATE_DICT"},
            after="fsdp2 bf16 sharded",
            resume_from_checkpoint="{first}",
        ),
        classified("fsdp1 bf16", FSDP, {"fsdp_version": 1}),
        *(classified(f"ZeRO-{stage} bf16", ZERO.format(stage), bf16=True) for stage in (2, 3)),
        example("sft ddp bf16", "sft.py", own, chats),
        example("images ddp bf16", "image_classification.py", own, images),
        example("loop ddp bf16", "text_classification_no_trainer.py", own, loop),
        modelled("language model ddp bf16", DDP, own),
        modelled("language model ddp bf16 compiled", DDP, own, torch_compile=True),
        modelled("language model ddp bf16 reduce-overhead", DDP, own, torch_compile=True, torch_compile_mode="reduce-overhead"),
        modelled("language model fsdp2 bf16", FSDP, llama),
        Launch("generate", HERE / "generate.py", "python", 1, {}, {"folder": "{out}/language model fsdp2 bf16"}, "language model fsdp2 bf16"),
        Launch("tensor parallelism", HERE / "tensor_parallel.py", "torchrun", 2, {}, {"folder": "{out}/tensor parallelism"}),
    ]  # fmt: skip


def outcome(folder: Path) -> dict[str, Any]:
    """What a launch has left in its folder, for the record."""
    found: dict[str, Any] = {}
    results = folder / "results.json"
    if results.is_file():
        run = json.loads(results.read_text("utf-8"))["runs"][-1]
        times, switch = run.pop("step_seconds", None), run.get("switch_step")
        if times and switch:
            seconds = {int(step): value for step, value in times.items()}
            found["seconds before"] = _median([s for n, s in seconds.items() if 5 < n <= switch])
            found["seconds after"] = _median([s for n, s in seconds.items() if n > switch + 5])
        found |= {key: run[key] for key in ("switch_step", "ranks", "total_parameters", "train_seconds") if key in run}
        found |= {key: value for key, value in run.items() if key.startswith("test_") or key == "saved_bytes"}
    states = sorted(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if states:
        logs = json.loads(states[-1].read_text("utf-8"))["log_history"]
        found["losses"] = [log["loss"] for log in logs if "loss" in log]
    said = folder / "said.json"
    return found | (json.loads(said.read_text("utf-8")) if said.is_file() else {})


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
