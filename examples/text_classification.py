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

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bundled_data import TEXT_DATASETS, minilm_folder
from class_accuracy import metrics
from comparing import CuttlefishArguments, MethodArguments, check_arguments, make_parser, run_methods, train_and_measure
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
class ModelArguments(MethodArguments):
    """Which model, and how to train it."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A hub name or a local folder. None: the bundled MiniLM."}
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


# ---------------------------------------------------------------------------------------------------- training


def fine_tune(
    method: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    cuttlefish_args: CuttlefishArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Fine-tune and evaluate once; returns what was measured."""
    name = model_args.model_name_or_path or str(minilm_folder())
    splits = load_splits(data_args)
    tokenizer = AutoTokenizer.from_pretrained(name)
    with training_args.main_process_first(desc="tokenize"):
        encoded = tokenize(splits, tokenizer, data_args.max_length)

    classes = splits["train"].features["label"].names
    names = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    callbacks = cuttlefish_args.callbacks(method)  # the only difference from the dense fine-tune
    compute_metrics = metrics(hub=data_args.dataset_name not in TEXT_DATASETS)

    def new_trainer() -> Trainer:
        set_seed(training_args.seed)  # before the model: its new classification head is random
        return Trainer(
            model=AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(classes), **names),
            args=training_args,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=tokenizer,
            # A CUDA graph serves one length: few of them.
            data_collator=DataCollatorWithPadding(
                tokenizer, pad_to_multiple_of=16 if cuttlefish_args.cuda_graphs else None
            ),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
        )

    return train_and_measure(method, new_trainer, encoded["test"], data_args.dataset_name)


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
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_", "FSDP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
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


def main() -> None:
    """Run what the command line asks for."""
    parser = make_parser(
        __doc__, (ModelArguments, DataArguments, CuttlefishArguments, TrainingArguments), BUNDLED_DEFAULTS
    )
    model_args, data_args, cuttlefish_args, training_args = parser.parse_args_into_dataclasses()
    check_arguments(parser, model_args.method, training_args)

    def run(method: str, args: TrainingArguments) -> dict[str, Any]:
        return fine_tune(method, model_args, data_args, cuttlefish_args, args)

    about = {"model": model_args.model_name_or_path or "bundled MiniLM", "data": dataclasses.asdict(data_args)}
    last = run_methods(model_args.method, training_args, run, about=about)[-1]
    if training_args.do_train and training_args.do_eval and training_args.process_index == 0:
        # Several processes made other batches, with other padding, so a row or two may round to another class.
        tolerance = 0.0 if training_args.world_size == 1 else 0.005
        accuracy = check_in_fresh_process(last, data_args, training_args.per_device_eval_batch_size, tolerance)
        print(f"{last['model_folder']} loaded in a fresh process: test accuracy {accuracy:.2%}, as before")


if __name__ == "__main__":
    main()
