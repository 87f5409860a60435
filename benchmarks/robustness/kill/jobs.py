"""The jobs: what each process of a run does in its folder, from a checkpoint or from the start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


class Rows(torch.utils.data.Dataset):
    """Sentences whose label is their first token modulo 3: 12 steps of 4 are one epoch, and of 2 x 4 two.

    A run that `max_steps` ends within an epoch would take a step too many when resumed from its last checkpoint: Trainer
    (transformers 5.23) looks at `max_steps` only after a step.
    """

    def __init__(self, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 50, (count, 10), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": int(self.ids[i, 0]) % 3}


def tiny(config: CuttlefishConfig, **arguments: Any) -> Callable[[Path, Any], None]:
    """A job that trains a random BERT of 2 x 32, with dropout, so that random states matter."""

    def job(folder: Path, resume: Any) -> None:
        options: dict[str, Any] = {
            "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 3, "logging_steps": 1,
            "save_strategy": "steps", "save_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
            "dataloader_pin_memory": False, "log_level": "error",
        }  # fmt: skip
        torch.manual_seed(0 if resume is None else 9)  # other weights: everything must come from the checkpoint
        model = BertForSequenceClassification(
            BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                       max_position_embeddings=16, num_labels=3)
        )  # fmt: skip
        Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(folder), **{**options, **arguments}),
            train_dataset=Rows(),
            callbacks=[CuttlefishCallback(config)],
        ).train(resume_from_checkpoint=resume)

    return job


def import_example() -> Any:
    """The script of the real example, which imports its neighbours as it does when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import text_classification

    return text_classification


def example(folder: Path, resume: Any) -> None:
    """The real example on the bundled model and data, with few rows."""
    options = {
        "method": "cuttlefish", "max_train_samples": 96, "max_eval_samples": 16, "max_length": 16, "switch_step": 6,
        "per_device_train_batch_size": 8, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 2, "logging_steps": 1, "eval_strategy": "no", "do_eval": False, "target_ratio": 0.4,
        "output_dir": folder.parent, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    options |= {} if resume is None else {"resume_from_checkpoint": resume}
    sys.argv = [
        "text_classification.py",
        *(str(part) for name, value in options.items() for part in (f"--{name}", value)),
    ]
    import_example().main()


FIXED = CuttlefishConfig(switch_step=6, statistics_steps=3, rank_multiple=4, target_ratio=0.4)
FOUND = CuttlefishConfig(statistics_steps=2, rank_multiple=4, target_ratio=0.4, stable_rank_tolerance=100.0)
JOBS: dict[str, tuple[int, Callable[[Path, Any], None]]] = {
    "every step": (1, tiny(FIXED)),
    "every 2 steps, one kept": (1, tiny(FOUND, save_steps=2, save_total_limit=1)),
    "two processes": (2, tiny(FIXED, save_total_limit=2, ddp_backend="gloo")),
    "example": (1, example),
}
"""Name -> (processes, what each of them runs in the folder, from a checkpoint)."""

NIGHTLY = ["every step", "every 2 steps, one kept", "two processes", "every step", "every 2 steps, one kept", "example"]
"""Whose turn it is; the example's checkpoints are 270 MB each."""
