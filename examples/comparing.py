"""What the examples share that train dense, with Cuttlefish, or both: settings, measurements and the table."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig, write_model_card
from hf_cuttlefish.report.plotting import plot_ranks, plot_stable_ranks

SCORES = {"test_accuracy": ("test accuracy", "{:.2%}"), "test_perplexity": ("test perplexity", "{:.2f}")}
"""What a run may be judged by: title and format in the table."""


@dataclass
class MethodArguments:
    """How to train; what the examples' ModelArguments begin with."""

    method: str = field(
        default="cuttlefish",
        metadata={
            "help": "dense: ordinary training. cuttlefish: the same with CuttlefishCallback. both: one after the "
            "other from the same seed, compared.",
            "choices": ["dense", "cuttlefish", "both"],
        },
    )


@dataclass
class CuttlefishArguments:
    """Settings passed on to CuttlefishConfig; what is not given keeps its default there."""

    rank_rule: str | None = field(default=None, metadata={"help": "How ranks are chosen: loss, paper, ratio, ..."})
    rank_ratio: float | None = field(default=None, metadata={"help": "Rank as a share of the full rank."})
    switch_step: int | None = field(default=None, metadata={"help": "Switch after this step. None: when ranks settle."})
    target_ratio: float | None = field(default=None, metadata={"help": "Share of the parameters to keep."})
    embeddings: bool | None = field(default=None, metadata={"help": "The table of tokens and its output layer, too."})
    switch: str | None = field(
        default=None,
        metadata={"help": "auto, in_place, or restart: save at the switch, stop, go on with a new Trainer."},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "On one GPU: each step's forward and backward as one CUDA graph (not the dense run's). Else after the switch."
        },
    )

    def callbacks(self, method: str) -> list[TrainerCallback]:
        """Nothing for "dense"; else CuttlefishCallback(), or one with the settings that were given."""
        if method == "dense":
            return []
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        graphs = given.pop("cuda_graphs") or None  # else it decides by itself
        return [CuttlefishCallback(CuttlefishConfig(**given) if given else None, cuda_graphs=graphs)]


class StepTimer(TrainerCallback):
    """Seconds of every training step: forward, backward and optimizer.

    The clock stops as soon as the optimizer has stepped. What a callback does at the end of a step (estimate stable
    ranks, factorize), loading data, evaluating and saving show in the wall time instead.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._start = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._start = self._now()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the clock; the state does not count this step yet."""
        self.seconds[state.global_step + 1] = self._now() - self._start

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():  # kernels run behind Python's back: wait for them
            torch.cuda.synchronize()
        return time.perf_counter()


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters of the encoder's or decoder's blocks (their names hold a block number) and of the whole model."""
    blocks = [p.numel() for name, p in model.base_model.named_parameters() if re.search(r"(^|\.)\d+\.", name)]
    return {"encoder_parameters": sum(blocks), "total_parameters": sum(p.numel() for p in model.parameters())}


def median_seconds(step_seconds: dict[int, float], switch_step: int | None) -> tuple[float | None, float | None]:
    """Median seconds of the steps up to the switch and of those after it (None where there is no such step)."""
    before = [s for step, s in step_seconds.items() if switch_step is None or step <= switch_step]
    after = [s for step, s in step_seconds.items() if switch_step is not None and step > switch_step]
    return (statistics.median(before) if before else None, statistics.median(after) if after else None)


def train_and_measure(
    method: str, new_trainer: Callable[[], Trainer], test: Dataset | None, data: str = ""
) -> dict[str, Any]:
    """Train, save in the folder `model` of the Trainer's output folder, evaluate on `test`; what its arguments ask for.

    Args:
        new_trainer: makes model and Trainer, with the same callbacks each time; called again where --switch restart has
            stopped the run at its switch, to go on from there. test: None if it is the Trainer's own evaluation set. data: name of the data set, for a picture's title.

    Returns:
        What was measured, JSON-ready. With a CuttlefishCallback that switched, also step and ranks, which are drawn into
        the parent folder.
    """
    trainer, timer = new_trainer(), StepTimer()
    trainer.add_callback(timer)
    callbacks = trainer.callback_handler.callbacks
    cuttlefish = next((c for c in callbacks if isinstance(c, CuttlefishCallback)), None)
    args = trainer.args
    folder = Path(str(args.output_dir)) / "model"
    measured: dict[str, Any] = {"method": method, "switch_step": None}
    if args.do_train:
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        while cuttlefish is not None and cuttlefish.restart_from is not None:
            args.resume_from_checkpoint = cuttlefish.restart_from
            if args.deepspeed_plugin is not None:
                AcceleratorState._reset_state()  # Accelerate takes DeepSpeed's settings once in its life
            trainer = new_trainer()
            trainer.add_callback(timer)
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        measured["train_seconds"] = time.perf_counter() - start
        measured["train_steps"] = trainer.state.global_step
        measured["step_seconds"] = timer.seconds
        save_whole(trainer, folder)
        measured["model_folder"] = str(folder)
        if trainer.is_world_process_zero():  # the one process that saves
            if cuttlefish is not None and cuttlefish.plan is not None:
                write_model_card(folder, whole_model(trainer, folder), report=cuttlefish.report)
            measured["saved_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    if args.do_eval:
        found = trainer.evaluate(test, metric_key_prefix="test")
        measured |= {key: found[key] for key in ("test_loss", "test_accuracy") if key in found}
    measured |= count_parameters(whole_model(trainer, folder))

    if cuttlefish is not None and cuttlefish.plan is not None:
        measured["switch_step"], measured["ranks"] = cuttlefish.switch_step, dict(cuttlefish.plan)
        if trainer.is_world_process_zero():
            title = f"Stable ranks during training{f' on {data}' if data else ''}"
            plot_stable_ranks(cuttlefish.history, cuttlefish.switch_step, folder.parents[1] / "stable_ranks.png", title)
            plot_ranks(cuttlefish.plan, folder.parents[1] / "ranks.png")
    return measured


def save_whole(trainer: Trainer, folder: Path) -> None:
    """Save the model, also where FSDP writes sharded checkpoints (SHARDED_STATE_DICT): Trainer itself saves no model there."""
    trainer.save_model(str(folder))
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or "FULL" in str(plugin.state_dict_type):
        return
    state = trainer.accelerator.get_state_dict(trainer.model)  # every process takes part
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)


def whole_model(trainer: Trainer, folder: Path) -> torch.nn.Module:
    """The trained model without wrappers. FSDP1 leaves none of its layers their weights: there it is the one just saved."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if type(trainer.model_wrapped).__name__ == "FullyShardedDataParallel":
        return type(model).from_pretrained(folder)
    return model


def comparison(results: list[dict[str, Any]], blocks: str = "encoder") -> str:
    """The table that compares the runs, a column each; `blocks` names what the repeated blocks form."""
    switch_step = next((r["switch_step"] for r in results if r["switch_step"] is not None), None)
    first = results[0]

    def share(value: int, base: int) -> str:
        return f"{value:,}" if value == base else f"{value:,} ({value / base:.0%})"

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = [["", *(r["method"] for r in results)]]
    for key, (title, form) in SCORES.items():
        if key in first:
            rows.append([title, *(form.format(r[key]) for r in results)])
    for key, title in (("encoder_parameters", f"{blocks} parameters"), ("total_parameters", "total parameters")):
        rows.append([title, *(share(r[key], first[key]) for r in results)])
    if "step_seconds" in first:
        # The same steps of each run, so that the batches compared are the same ones.
        medians = [median_seconds(r["step_seconds"], switch_step) for r in results]
        when = "training" if switch_step is None else f"steps 1 to {switch_step}"
        rows.append([f"seconds a step, {when}", *(seconds(before) for before, _ in medians)])
        if switch_step is not None:
            rows.append([f"seconds a step, from {switch_step + 1}", *(seconds(after) for _, after in medians)])
        rows.append(["wall time of training, seconds", *(f"{r['train_seconds']:.0f}" for r in results)])
        rows.append(["switch after step", *(_of(r["switch_step"], r["train_steps"]) for r in results)])
        rows.append(["saved folder, bytes", *(share(r["saved_bytes"], first["saved_bytes"]) for r in results)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _of(step: int | None, steps: int) -> str:
    return "-" if step is None else f"{step} of {steps}"


def run_methods(
    method: str,
    args: TrainingArguments,
    run: Callable[[str, TrainingArguments], dict[str, Any]],
    blocks: str = "encoder",
    about: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Call `run` for the method, or for dense and cuttlefish in turn, each with an output folder of its own.

    Prints the comparison and writes results.json into OUTPUT_DIR, with `about` in it; `blocks` names what the repeated
    blocks form.
    """
    output_dir = Path(str(args.output_dir))
    results = []
    for each in ["dense", "cuttlefish"] if method == "both" else [method]:
        if args.process_index == 0:
            print(f"\n=== {each} ===")
        own = copy.copy(args)
        own.output_dir = str(output_dir / each)
        results.append(run(each, own))
    if args.process_index == 0:
        print(f"\n{comparison(results, blocks)}\n")
        record = {
            "arguments": sys.argv[1:],
            **(about or {}),
            "seed": args.seed,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "runs": results,
        }
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"results and plots: {output_dir}")
    return results


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def make_parser(description: str | None, dataclasses_: tuple[Any, ...], defaults: dict[str, Any]) -> HfArgumentParser:
    """A parser whose --help starts with the script's own docstring instead of two screens of usage."""
    parser = HfArgumentParser(
        dataclasses_, description=description, usage="%(prog)s [options]", formatter_class=_HelpFormatter
    )
    parser.set_defaults(**defaults)
    return parser


def check_arguments(parser: HfArgumentParser, method: str, args: TrainingArguments) -> None:
    """End the program with a message where method and training arguments contradict each other."""
    if not (args.do_train or args.do_eval):
        parser.error("nothing to do: give --do_train, --do_eval or both")
    if method == "both" and args.resume_from_checkpoint:
        parser.error("--resume_from_checkpoint resumes one run: give --method dense or --method cuttlefish with it")
    if method == "both" and not args.do_train:
        parser.error("--method both compares two runs of training: it needs --do_train")
