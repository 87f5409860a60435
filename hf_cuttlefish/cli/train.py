"""Train: a file or a folder and a model in; a smaller model, its card and the page of the run out."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments, set_seed

from ..callback import CuttlefishCallback
from ..config import CuttlefishConfig
from ..decide.tables import text_table
from ..layers.sizes import count_parameters
from ..saving.checkpoints import last_whole_checkpoint
from .tasks import Task, make_task, perplexity

RATES = ((50_000_000, 1e-4), (300_000_000, 5e-5), (float("inf"), 2e-5))
"""Learning rates by the number of parameters, for a fine-tune with AdamW."""


def train(options: argparse.Namespace) -> None:
    """Fine-tune a model with Cuttlefish, and write it into a folder.

    Raises:
        FileExistsError, NotADirectoryError: OUT cannot be taken. ValueError: --resume without a checkpoint; as `make_task`.
    """
    config = _config(options)
    out = _folder(options)
    task = make_task(options)
    print(_told(options, task), file=sys.stderr)
    configs = [None, config] if options.compare else [config]
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its log lines; stdout is for the results
        results = [_train_once(options, task, each, out) for each in configs]
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(_table(results))
    if results[-1]["switch_step"] is None:
        print(f"\nsaved in {out}: a dense model, since there was no switch; the warning above says why")
        return
    print(f"\nsaved in {out}: load it after `import hf_cuttlefish`; {out / 'report.html'} tells the run")


def _config(options: argparse.Namespace) -> CuttlefishConfig:
    given = {"target_ratio": options.ratio, "max_loss_increase": options.max_loss_increase}
    given["embeddings"] = options.embeddings
    return CuttlefishConfig(**{name: value for name, value in given.items() if value is not None})


def _folder(options: argparse.Namespace) -> Path:
    """OUT, made. A folder with something in it is taken with --force or --resume alone."""
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (options.force or options.resume):
        raise FileExistsError(
            f"{out} is not empty: give another folder, or --force to replace the model in it, or --resume to go on"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{out} cannot be written: {error.strerror}") from error
    return out


def _told(options: argparse.Namespace, task: Task) -> str:
    classes = f", {len(task.classes)} classes" if task.classes else ""
    return f"{options.data}: {task.kind}, {len(task.train):,} rows to train on, {len(task.evaluation):,} to evaluate on{classes}"


def _train_once(options: argparse.Namespace, task: Task, config: CuttlefishConfig | None, out: Path) -> dict[str, Any]:
    """Dense (no config) or with Cuttlefish; what came of it, JSON-ready. The model is saved with Cuttlefish alone."""
    set_seed(options.seed)  # before the model: its new head is random
    model = task.new_model()
    before = count_parameters(model)
    checkpoints = out / "checkpoints"
    callback = None if config is None else CuttlefishCallback(config)
    trainer = Trainer(
        model=model,
        args=_arguments(options, model, checkpoints, saves=config is not None),
        train_dataset=task.train,
        eval_dataset=task.evaluation,
        processing_class=task.processing,
        data_collator=task.collator,
        compute_metrics=task.metrics,
        callbacks=[] if callback is None else [callback],
    )
    resume = _checkpoint(options, checkpoints) if callback is not None else None
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    if callback is not None:
        trainer.save_model(str(out))
        if callback.report is not None:
            callback.report.to_html(out / "report.html")
        shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        "method": "dense" if callback is None else "cuttlefish",
        "accuracy": metrics.get("eval_accuracy"),
        "perplexity": perplexity(metrics["eval_loss"]) if task.metrics is None else None,
        "loss": metrics["eval_loss"],
        "parameters": count_parameters(trainer.accelerator.unwrap_model(trainer.model)),
        "parameters_before": before,
        "switch_step": None if callback is None else callback.switch_step,
        "steps": trainer.state.global_step,
        "train_seconds": seconds,
        "learning_rate": trainer.args.learning_rate,
    }


def _arguments(options: argparse.Namespace, model: Any, folder: Path, saves: bool) -> TrainingArguments:
    size = count_parameters(model)
    rate = options.learning_rate or next(rate for most, rate in RATES if size <= most)
    on_gpu = torch.cuda.is_available() and not options.cpu
    quiet = not sys.stderr.isatty()
    if not quiet:
        transformers.utils.logging.enable_progress_bar()
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        learning_rate=rate,
        warmup_steps=0.05,
        weight_decay=0.01,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        eval_strategy="epoch",
        save_strategy="epoch" if saves else "no",
        save_total_limit=2,
        logging_steps=10,
        seed=options.seed,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=options.cpu,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        disable_tqdm=quiet,
        report_to=[],
    )


def _checkpoint(options: argparse.Namespace, folder: Path) -> str | None:
    if not options.resume:
        return None
    found = last_whole_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"--resume: {folder} holds no whole checkpoint: leave it out to begin anew")
    return str(found)


def _table(results: list[dict[str, Any]]) -> str:
    """A column a run."""

    def row(name: str, key: str, form: str) -> list[list[str]]:
        values = [r[key] for r in results]
        return [] if values[-1] is None else [[name, *(form.format(v) for v in values)]]

    first = results[0]["parameters_before"]
    switched = ["-" if r["switch_step"] is None else f"{r['switch_step']} of {r['steps']}" for r in results]
    rows = [
        ["", *(r["method"] for r in results)],
        *row("accuracy on rows held out", "accuracy", "{:.2%}"),
        *row("perplexity on rows held out", "perplexity", "{:.2f}"),
        ["parameters", *(f"{r['parameters']:,} ({r['parameters'] / first:.0%})" for r in results)],
        ["switch after step", *switched],
        *row("seconds of training", "train_seconds", "{:.0f}"),
    ]
    return text_table(rows)
