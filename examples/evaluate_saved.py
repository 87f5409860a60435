"""Load a saved folder, factorized or not, in a process of its own and evaluate it.

    python examples/evaluate_saved.py --folder runs/text_classification/cuttlefish/model

Importing hf_cuttlefish is all that it takes: from then on `from_pretrained` knows factorized folders. The last line
printed is JSON: the accuracy on the test split, the parameters, the number of rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import hf_cuttlefish  # noqa: F401  (this line teaches from_pretrained to load factorized folders)
from bundled_data import TEXT_DATASETS
from class_accuracy import load_accuracy
from text_classification import DataArguments, load_splits, tokenize


@dataclass
class EvaluationArguments:
    """What to evaluate."""

    folder: str = field(metadata={"help": "Folder that save_pretrained or Trainer.save_model wrote."})
    batch_size: int = field(default=64, metadata={"help": "Rows in a batch."})


def main() -> None:
    """Evaluate and print."""
    args, data_args = HfArgumentParser((EvaluationArguments, DataArguments)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    model = AutoModelForSequenceClassification.from_pretrained(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    test = tokenize(load_splits(data_args), tokenizer, data_args.max_length)["test"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.folder,
            per_device_eval_batch_size=args.batch_size,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    prediction = trainer.predict(test)
    metric = load_accuracy(hub=data_args.dataset_name not in TEXT_DATASETS)
    found = metric.compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"accuracy": found["accuracy"], "parameters": parameters, "rows": len(test)}))


if __name__ == "__main__":
    main()
