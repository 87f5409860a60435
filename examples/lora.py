"""LoRA on top of a factorized model: one small base for many tasks, and an adapter of a few MB for each (needs peft).

With no arguments this fine-tunes the bundled MiniLM on TREC with Cuttlefish, then adapts the factorized model, frozen, to
movie snippets by LoRA, loads the adapter from its folder in the ordinary way, and merges it. A factorized folder of
another run is adapted right away:

    python examples/lora.py
    python examples/lora.py --model_name_or_path runs/text_classification/cuttlefish/model --dataset_name amazon_snippets

A factorized layer is two linear layers, `down` and `up`, which is all that PEFT has to know. Merging happens twice, with
different meanings: `merge_and_unload` of PEFT adds LoRA into the factors, and the model stays small; `merge` of
hf_cuttlefish then multiplies the factors, for programs that do not know them.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bundled_data import TEXT_DATASETS, minilm_folder
from comparing import make_parser
from hf_cuttlefish import CuttlefishCallback, merge
from text_classification import DataArguments, load_splits, tokenize

DEFAULTS = {
    "output_dir": "runs/lora",
    "dataset_name": "movie_snippets",
    "learning_rate": 1e-3,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "save_strategy": "no",
    "logging_steps": 50,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""What the arguments say when the command line does not. LoRA wants a larger learning rate than a full fine-tune."""

BASE_LEARNING_RATE = 1e-4
"""Of the first fine-tune, which trains all weights."""


@dataclass
class LoraArguments:
    """The base model, and the size of the adapter."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A factorized folder. None: MiniLM is first fine-tuned on BASE_DATASET with Cuttlefish."},
    )
    base_dataset: str = field(
        default="trec", metadata={"help": "Bundled set for that first fine-tune.", "choices": [*TEXT_DATASETS]}
    )
    r: int = field(default=8, metadata={"help": "Rank of LoRA's own pairs, one beside each factor."})
    target_modules: list[str] = field(
        default_factory=lambda: ["down", "up"], metadata={"help": "Name endings of the layers that LoRA adapts."}
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right classes."""
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def make_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: DatasetDict,
    args: TrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
) -> Trainer:
    """A Trainer for the rows that `tokenize` gave."""
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def make_base(dataset: str, data_args: DataArguments, args: TrainingArguments, folder: Path) -> None:
    """Fine-tune the bundled MiniLM with Cuttlefish, and save it, factorized, in the folder."""
    args = copy.copy(args)
    args.learning_rate = BASE_LEARNING_RATE
    splits = load_splits(dataclasses.replace(data_args, dataset_name=dataset, dataset_config=None, text_columns=None))
    classes = splits["train"].features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=len(classes))
    rows = tokenize(splits, tokenizer, data_args.max_length)
    make_trainer(model, tokenizer, rows, args, [CuttlefishCallback()]).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Factorize (if need be), adapt, save, load, merge."""
    parser = make_parser(__doc__, (LoraArguments, DataArguments, TrainingArguments), DEFAULTS)
    lora_args, data_args, args = parser.parse_args_into_dataclasses()
    folder = Path(args.output_dir)
    base = Path(lora_args.model_name_or_path or folder / "base")
    if lora_args.model_name_or_path is None:
        make_base(lora_args.base_dataset, data_args, args, base)

    splits = load_splits(data_args)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = tokenize(splits, tokenizer, data_args.max_length)
    # The base's head is for other classes, so a new one is made (ignore_mismatched_sizes); PEFT trains and saves it too.
    head: dict[str, Any] = {
        "id2label": dict(enumerate(splits["train"].features["label"].names)),
        "ignore_mismatched_sizes": True,
    }
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, **head)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=lora_args.r, target_modules=lora_args.target_modules)
    adapted = get_peft_model(model, config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    trainer = make_trainer(adapted, tokenizer, rows, args)
    trainer.train()
    found = trainer.evaluate()["eval_accuracy"]
    adapted.save_pretrained(str(folder / "adapter"))

    # In another process `import hf_cuttlefish` is all that this needs: the adapter knows its base by name.
    loaded: Any = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", **head)
    merged: Any = loaded.merge_and_unload()  # LoRA added into the factors: as small as the base
    again = make_trainer(merged, tokenizer, rows, args).evaluate()["eval_accuracy"]
    small = sum(p.numel() for p in merged.parameters())
    merged.save_pretrained(folder / "merged")
    merge(merged)  # the factors multiplied: what is saved now loads without hf_cuttlefish
    merged.save_pretrained(folder / "dense")
    for name in ("merged", "dense"):
        tokenizer.save_pretrained(folder / name)
    print(f"{small:,} parameters; LoRA and the new head trained {trained:,} more")
    print(f"test accuracy: {found:.2%} with the adapter, {again:.2%} from its folder and merged")
    print(f"saved: {folder}/adapter, {folder}/merged (factorized), {folder}/dense")


if __name__ == "__main__":
    main()
