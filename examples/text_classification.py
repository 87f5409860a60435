"""Fine-tune a text classifier with the Trainer: dense, with Cuttlefish, or one after the other (the demo).

With no arguments this fine-tunes a pretrained MiniLM on TREC questions, both from installed packages, so that no hub
is needed; `--method both` (`make demo`) does it twice from one seed, dense and with Cuttlefish, and compares the two.

    python examples/text_classification.py --method both
    python examples/text_classification.py --model_name_or_path bert-base-cased \\
        --dataset_name nyu-mll/glue --dataset_config mrpc --max_length 128 --learning_rate 2e-5

All of Cuttlefish is in `fine_tune` below: one callback more in the list. Every argument of TrainingArguments works as
usual. Results go to OUTPUT_DIR: a model folder for each method, results.json, and plots of stable ranks and ranks.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from accuracy import load_accuracy
from bundled_data import TEXT_DATASETS, minilm_folder
from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig, write_model_card
from hf_cuttlefish.plotting import plot_ranks, plot_stable_ranks
from loading import limited, load_raw, three_splits, with_classes

BUNDLED_DEFAULTS = {
    "output_dir": "runs/text_classification",
    "do_train": True,
    "do_eval": True,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 25,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""What TrainingArguments says when the command line does not; the seed is its own default, 42."""


@dataclass
class ModelArguments:
    """Which model, and how to train it."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A hub name or a local folder. None: the bundled MiniLM."}
    )
    method: str = field(
        default="cuttlefish",
        metadata={
            "help": "dense: an ordinary fine-tune. cuttlefish: the same with CuttlefishCallback. both: one after the "
            "other from the same seed, compared.",
            "choices": ["dense", "cuttlefish", "both"],
        },
    )


@dataclass
class DataArguments:
    """Which data, and how much of it."""

    dataset_name: str = field(
        default="trec",
        metadata={
            "help": f"A bundled set ({', '.join(TEXT_DATASETS)}), a file or folder (csv, json, parquet, or what "
            "save_to_disk wrote) or a hub name."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of a hub data set, as mrpc.", "aliases": ["--dataset_config_name"]},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One text column or two (a pair). None: the first one or two text columns."}
    )
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    max_length: int = field(default=48, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many rows at most."})


@dataclass
class CuttlefishArguments:
    """Settings passed on to CuttlefishConfig; what is not given keeps its default there."""

    rank_rule: str | None = field(default=None, metadata={"help": "How ranks follow from stable ranks."})
    rank_ratio: float | None = field(default=None, metadata={"help": "Rank as a share of the full rank."})
    switch_step: int | None = field(default=None, metadata={"help": "Switch after this step. None: when ranks settle."})
    target_ratio: float | None = field(default=None, metadata={"help": "Share of the parameters to keep."})
    switch: str | None = field(
        default=None, metadata={"help": "in_place, or restart: save at the switch, stop, and go on with a new Trainer."}
    )

    def callback(self) -> CuttlefishCallback:
        """The callback with the settings that were given, or with none at all."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return CuttlefishCallback(CuttlefishConfig(**given)) if given else CuttlefishCallback()


# -------------------------------------------------------------------------------------------------------- data


def load_splits(args: DataArguments) -> DatasetDict:
    """The data set with the splits train, validation and test, and the columns text, pair (if any) and label.

    Where the test labels are hidden (GLUE marks them -1) or there is no test split, test is the validation split.

    Raises:
        ValueError: a split or column is missing, or the label is no class; the message names what there is.
    """
    raw = three_splits(
        load_raw(args.dataset_name, args.dataset_config, TEXT_DATASETS), args.dataset_name, args.label_column
    )
    splits = with_classes(raw, args.label_column)
    available = splits["train"].column_names
    columns = args.text_columns or _guess_text_columns(splits["train"], args.label_column)
    unknown = [name for name in columns if name not in available]
    if unknown or not 1 <= len(columns) <= 2:
        raise ValueError(f"--text_columns needs one or two of {available}, got {columns}.")
    renamed = dict(zip([*columns, args.label_column], [*["text", "pair"][: len(columns)], "label"], strict=True))
    splits = splits.select_columns(list(renamed))
    splits = splits.rename_columns({old: new for old, new in renamed.items() if old != new})
    return limited(splits, args.max_train_samples, args.max_eval_samples)


def _guess_text_columns(split: Dataset, label_column: str) -> list[str]:
    """The first two text columns (as sentence1 and sentence2 in GLUE), or the only one."""
    texts = [
        name
        for name, kind in split.features.items()
        if isinstance(kind, Value) and kind.dtype in ("string", "large_string")
    ]
    return [name for name in texts if name != label_column][:2]


def tokenize(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Token ids of every row, cut to max_length; padding is left to the collator, batch by batch."""

    def encode(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(rows["text"], rows.get("pair"), truncation=True, max_length=max_length)

    text_columns = [name for name in splits["train"].column_names if name != "label"]
    return splits.map(encode, batched=True, remove_columns=text_columns, desc="tokenize")


# ------------------------------------------------------------------------------------------------- measurement


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


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the encoder's blocks (their names hold a block number) and of the whole model."""
    blocks = [p.numel() for name, p in model.base_model.named_parameters() if re.search(r"(^|\.)\d+\.", name)]
    return {"encoder_parameters": sum(blocks), "total_parameters": sum(p.numel() for p in model.parameters())}


def median_seconds(step_seconds: dict[int, float], switch_step: int | None) -> tuple[float | None, float | None]:
    """Median seconds of the steps up to the switch and of those after it (None where there is no such step)."""
    before = [s for step, s in step_seconds.items() if switch_step is None or step <= switch_step]
    after = [s for step, s in step_seconds.items() if switch_step is not None and step > switch_step]
    return (statistics.median(before) if before else None, statistics.median(after) if after else None)


# ---------------------------------------------------------------------------------------------------- training


def fine_tune(
    method: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    cuttlefish_args: CuttlefishArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Fine-tune and evaluate once, in the folder OUTPUT_DIR/method; returns what was measured."""
    output_dir = Path(str(training_args.output_dir))
    training_args = copy.copy(training_args)
    training_args.output_dir = str(output_dir / method)
    model_folder = output_dir / method / "model"
    name = model_args.model_name_or_path or str(minilm_folder())

    splits = load_splits(data_args)
    tokenizer = AutoTokenizer.from_pretrained(name)
    with training_args.main_process_first(desc="tokenize"):
        encoded = tokenize(splits, tokenizer, data_args.max_length)

    classes = splits["train"].features["label"].names
    names = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    timer = StepTimer()
    callbacks: list[TrainerCallback] = [timer]
    if method == "cuttlefish":
        cuttlefish = cuttlefish_args.callback()  # CuttlefishCallback(), unless a setting was given
        callbacks.append(cuttlefish)  # the only difference from the dense fine-tune

    metric = load_accuracy(hub=data_args.dataset_name not in TEXT_DATASETS)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        found = metric.compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)
        return {"accuracy": found["accuracy"]}

    def new_trainer() -> Trainer:
        set_seed(training_args.seed)  # before the model: its new classification head is random
        return Trainer(
            model=AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(classes), **names),
            args=training_args,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
        )

    trainer = new_trainer()
    measured: dict[str, Any] = {"method": method, "switch_step": None}
    if training_args.do_train:
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        while (
            method == "cuttlefish" and cuttlefish.restart_from is not None
        ):  # --switch restart: go on from its checkpoint
            training_args.resume_from_checkpoint = cuttlefish.restart_from
            trainer = new_trainer()
            trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        measured["train_seconds"] = time.perf_counter() - start
        measured["train_steps"] = trainer.state.global_step
        measured["step_seconds"] = timer.seconds
        trainer.save_model(str(model_folder))
        if method == "cuttlefish" and cuttlefish.plan is not None and trainer.is_world_process_zero():
            write_model_card(model_folder, trainer.accelerator.unwrap_model(trainer.model), report=cuttlefish.report)
        measured["model_folder"] = str(model_folder)
        if trainer.is_world_process_zero():  # the one process that saves
            measured["saved_bytes"] = sum(file.stat().st_size for file in model_folder.iterdir())
    if training_args.do_eval:
        measured["test_accuracy"] = trainer.evaluate(encoded["test"], metric_key_prefix="test")["test_accuracy"]
    measured.update(count_parameters(trainer.accelerator.unwrap_model(trainer.model)))

    if method == "cuttlefish" and training_args.do_train and cuttlefish.plan is not None:
        measured["switch_step"] = cuttlefish.switch_step
        measured["ranks"] = dict(cuttlefish.plan)
        if trainer.is_world_process_zero():
            title = f"Stable ranks during training on {data_args.dataset_name}"
            plot_stable_ranks(cuttlefish.history, cuttlefish.switch_step, output_dir / "stable_ranks.png", title)
            plot_ranks(cuttlefish.plan, output_dir / "ranks.png")
    return measured


# -------------------------------------------------------------------------------------------- what comes of it


def check_in_fresh_process(
    measured: dict[str, Any], data_args: DataArguments, batch_size: int, tolerance: float = 0.0
) -> float:
    """Load the saved folder in a new Python process, evaluate it there and compare the test accuracy.

    Raises:
        RuntimeError: the process fails, or finds another accuracy.
    """
    command = [sys.executable, str(Path(__file__).with_name("evaluate_saved.py"))]
    options = {**dataclasses.asdict(data_args), "folder": measured["model_folder"], "batch_size": batch_size}
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    # One ordinary process, also when this one is a rank of a distributed run.
    environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"{measured['model_folder']} does not load in a fresh process: see the error above.")
    accuracy = json.loads(process.stdout.splitlines()[-1])["accuracy"]
    if abs(accuracy - measured["test_accuracy"]) > tolerance:
        raise RuntimeError(
            f"{measured['model_folder']} has a test accuracy of {accuracy:.2%} in a fresh process, but had "
            f"{measured['test_accuracy']:.2%} when it was saved."
        )
    return accuracy


def comparison(results: list[dict[str, Any]]) -> str:
    """The table that compares the runs, a column each."""
    switch_step = next((r["switch_step"] for r in results if r["switch_step"] is not None), None)
    first = results[0]

    def share(value: int, base: int) -> str:
        return f"{value:,}" if value == base else f"{value:,} ({value / base:.0%})"

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = [["", *(r["method"] for r in results)]]
    if "test_accuracy" in first:
        rows.append(["test accuracy", *(f"{r['test_accuracy']:.2%}" for r in results)])
    for key, title in (("encoder_parameters", "encoder parameters"), ("total_parameters", "total parameters")):
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


def parse_arguments() -> tuple[ModelArguments, DataArguments, CuttlefishArguments, TrainingArguments]:
    """Read the command line; contradictions end the program with a message."""
    parser = HfArgumentParser((ModelArguments, DataArguments, CuttlefishArguments, TrainingArguments))  # type: ignore[arg-type]
    parser.set_defaults(**BUNDLED_DEFAULTS)
    model_args, data_args, cuttlefish_args, training_args = parser.parse_args_into_dataclasses()
    if not (training_args.do_train or training_args.do_eval):
        parser.error("nothing to do: give --do_train, --do_eval or both")
    if model_args.method == "both" and training_args.resume_from_checkpoint:
        parser.error("--resume_from_checkpoint resumes one run: give --method dense or --method cuttlefish with it")
    if model_args.method == "both" and not training_args.do_train:
        parser.error("--method both compares two fine-tunes: it needs --do_train")
    return model_args, data_args, cuttlefish_args, training_args


def main() -> None:
    """Run what the command line asks for."""
    model_args, data_args, cuttlefish_args, training_args = parse_arguments()
    output_dir = Path(str(training_args.output_dir))
    main_process = training_args.process_index == 0
    methods = ["dense", "cuttlefish"] if model_args.method == "both" else [model_args.method]

    results = []
    for method in methods:
        if main_process:
            print(f"\n=== {method} ===")
        results.append(fine_tune(method, model_args, data_args, cuttlefish_args, training_args))
    if not main_process:
        return

    print(f"\n{comparison(results)}\n")
    output_dir.mkdir(parents=True, exist_ok=True)
    record = {
        "model": model_args.model_name_or_path or "bundled MiniLM",
        "data": dataclasses.asdict(data_args),
        "seed": training_args.seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "runs": results,
    }
    (output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"results and plots: {output_dir}")

    last = results[-1]
    if training_args.do_train and training_args.do_eval:
        # Several processes made other batches, with other padding, so a row or two may round to another class.
        tolerance = 0.0 if training_args.world_size == 1 else 0.005
        accuracy = check_in_fresh_process(last, data_args, training_args.per_device_eval_batch_size, tolerance)
        print(f"{last['model_folder']} loaded in a fresh process: test accuracy {accuracy:.2%}, as before")


if __name__ == "__main__":
    main()
