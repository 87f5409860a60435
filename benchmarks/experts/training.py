"""Train a small Mixtral from random weights on dialogs from films: dense, all at a size, and with the experts left dense."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DefaultDataCollator, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments, set_seed

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig, __version__
from hf_cuttlefish.layers.low_rank import low_rank_layers

from ..files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

EXPERTS = ["gate_up_proj", "down_proj"]

METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "experts at 1/2": {"target_modules": EXPERTS, "target_ratio": 0.5},
    "all at 1/2": {"target_modules": [*EXPERTS, "q_proj", "k_proj", "v_proj", "o_proj"], "target_ratio": 0.5},
    "attention at 1/2, experts dense": {"target_modules": "all-linear", "target_ratio": 0.5},
}
"""What is trained: Cuttlefish's choices, None for no Cuttlefish."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8, help="pieces of 128 tokens in a batch")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--evaluated", type=int, default=400, help="pieces of the test split, evenly spaced")


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing, one seed after the other, and write the record after each run."""
    record = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {"runs": []}
    record |= {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_cuttlefish": __version__,
        },
        "sizes": {name: getattr(arguments, name) for name in ("steps", "rows", "hidden", "layers", "evaluated")},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
    }
    data = _data()
    done = {(found["method"], found["seed"]) for found in record["runs"]}
    for seed in arguments.seeds:
        for method in arguments.methods:
            if (method, seed) not in done:
                record["runs"].append(
                    {"method": method, "seed": seed, **_train(METHODS[method], seed, data, arguments)}
                )
                write_json(arguments.out, record)
    print("\n".join(table(record)))


def _data() -> dict[str, Any]:
    import language_modeling  # which needs datasets, and `speed` does not

    options = language_modeling.DataArguments()
    splits = language_modeling.load_texts(options)
    tokenizer = language_modeling.make_tokenizer(splits["train"]["text"], options.vocab_size)
    return dict(language_modeling.to_blocks(splits, tokenizer, options.block_size)) | {"vocabulary": len(tokenizer)}


def _train(
    choices: dict[str, Any] | None, seed: int, data: dict[str, Any], sizes: argparse.Namespace
) -> dict[str, Any]:
    set_seed(seed)
    config = MixtralConfig(
        **{"vocab_size": data["vocabulary"], "hidden_size": sizes.hidden, "intermediate_size": sizes.hidden},
        **{"num_hidden_layers": sizes.layers, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 128, "tie_word_embeddings": True, "sliding_window": None},
    )
    model = MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")
    callbacks = [] if choices is None else [CuttlefishCallback(CuttlefishConfig(**choices))]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            **{
                "max_steps": sizes.steps,
                "learning_rate": 2e-3,
                "warmup_steps": 0.05,
                "weight_decay": 0.1,
                "seed": seed,
            },
            **{"per_device_train_batch_size": sizes.rows, "per_device_eval_batch_size": 32, "report_to": "none"},
            **{
                "save_strategy": "no",
                "logging_steps": 50,
                "disable_tqdm": True,
                "use_cpu": not torch.cuda.is_available(),
            },
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=data["train"],
            data_collator=DefaultDataCollator(),
            callbacks=callbacks,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        test = data["test"]
        loss = trainer.evaluate(test.select(range(0, len(test), max(1, len(test) // sizes.evaluated))))["eval_loss"]
    return {"test_perplexity": math.exp(loss), "seconds": seconds, **_sizes(model, callbacks)}


def _sizes(model: Any, callbacks: list[Any]) -> dict[str, Any]:
    layers = low_rank_layers(model)
    after = sum(f.numel() for layer in layers.values() for f in layer.factors)
    before = sum(layer.count * layer.in_features * layer.out_features for layer in layers.values())
    report = callbacks[0].cuttlefish.report if callbacks else None
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "factorized": len(layers),
        "kept_of_factorized": after / before if before else None,
        "kept_of_targets": None if report is None else report.target_parameters_after / report.target_parameters_before,
        "switch_step": callbacks[0].cuttlefish.switch_step if callbacks else None,
        "notes": [] if report is None else list(report.plan.notes),
    }


def table(record: dict[str, Any]) -> list[str]:
    """Perplexities by method: mean, spread over seeds, and against dense at the same seed."""
    dense = {r["seed"]: r["test_perplexity"] for r in record["runs"] if r["method"] == "dense"}
    lines = ["| | parameters | kept of the targets | test perplexity | against dense |", "|---|---|---|---|---|"]
    for method in METHODS:
        runs = [r for r in record["runs"] if r["method"] == method]
        if not runs:
            continue
        values = [r["test_perplexity"] for r in runs]
        against = [r["test_perplexity"] / dense[r["seed"]] - 1 for r in runs if r["seed"] in dense]
        kept = [r["kept_of_targets"] for r in runs if r["kept_of_targets"]]
        lines.append(
            f"| {method} | {statistics.mean(r['parameters'] for r in runs) / 1e6:.2f}M "
            f"| {f'{statistics.mean(kept):.2f}' if kept else ''} | {_spread(values, '.2f', 1)} "
            f"| {_spread(against, '+.1f', 100, '%') if method != 'dense' else ''} |"
        )
    return lines


def _spread(values: list[float], form: str, scale: float, unit: str = "") -> str:
    """Mean ± standard error."""
    if not values:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5 * scale if len(values) > 1 else math.nan
    return f"{statistics.mean(values) * scale:{form}}{unit} ± {error:.2f} (n {len(values)})"
