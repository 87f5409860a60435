"""Train a language model with the Trainer: dense, with Cuttlefish, or one after the other.

With no arguments this trains a small Llama from random weights on dialogs from films, with a tokenizer made from the same
texts, so that no hub is needed; `--method both` does it twice from one seed, dense and with Cuttlefish, and compares the
perplexities. In a pretraining the stable ranks really move, and the switch waits for them.

    python examples/language_modeling.py --method both
    python examples/language_modeling.py --dataset_name path/to/texts.txt --config_overrides hidden_size=256 \\
        --max_steps 2000
    python examples/language_modeling.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name Salesforce/wikitext \\
        --dataset_config wikitext-2-raw-v1 --block_size 512 --learning_rate 1e-5 --per_device_train_batch_size 4 --bf16

All of Cuttlefish is one callback more in the list. Every argument of TrainingArguments works as usual. Results go to
OUTPUT_DIR: a model folder for each method, results.json, and plots of stable ranks and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from datasets import DatasetDict, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DefaultDataCollator,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bundled_data import DIALOG_DATASETS
from comparing import CuttlefishArguments, MethodArguments, check_arguments, make_parser, run_methods, train_and_measure
from loading import limited, load_raw, three_splits

DEFAULTS = {
    "output_dir": "runs/language_modeling",
    "do_train": True,
    "do_eval": True,
    "learning_rate": 2e-3,
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 1,
    "logging_steps": 50,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""What TrainingArguments says when the command line does not."""

END = "<|end|>"
"""The token between two texts."""


@dataclass
class ModelArguments(MethodArguments):
    """Which model, and how to train it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A hub name or a local folder, with its tokenizer. None: a small Llama with random weights."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Sizes of the Llama with random weights, as hidden_size=256,num_hidden_layers=6."},
    )


@dataclass
class DataArguments:
    """Which texts, how many of them, and in what pieces."""

    dataset_name: str = field(
        default="movie_dialogs",
        metadata={
            "help": f"A bundled set ({', '.join(DIALOG_DATASETS)}), a file or folder (txt, csv, json, parquet) or a hub name."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    block_size: int = field(
        default=128, metadata={"help": "Texts are put end to end and cut to pieces of this many tokens."}
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "Tokens of the tokenizer that is made for a model with random weights."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many texts at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many texts at most."})


def load_texts(args: DataArguments) -> DatasetDict:
    """The splits train, validation and test with the column `text`, empty texts left out.

    Raises:
        ValueError: no such data, no train split, or no text in the column.
    """
    splits = three_splits(load_raw(args.dataset_name, args.dataset_config, DIALOG_DATASETS), args.dataset_name)
    features = splits["train"].features
    texts = [name for name, kind in features.items() if kind in (Value("string"), Value("large_string"))]
    if args.text_column not in texts:
        raise ValueError(f"--text_column {args.text_column} is no column of texts; those that are: {texts}.")
    splits = splits.select_columns([args.text_column])
    if args.text_column != "text":
        splits = splits.rename_column(args.text_column, "text")
    return limited(splits.filter(lambda row: row["text"].strip()), args.max_train_samples, args.max_eval_samples)


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2's and Llama 3's, learned from the texts; no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def to_blocks(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int) -> DatasetDict:
    """Pieces of exactly `block_size` tokens of the texts put end to end, what is left over at the end dropped.

    Raises:
        ValueError: a split is shorter than one piece.
    """

    def cut(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(rows["text"], add_special_tokens=False)["input_ids"]
        tokens = list(chain.from_iterable([*text, tokenizer.eos_token_id] for text in ids))
        pieces = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": pieces, "labels": pieces}

    # batch_size=-1: all texts in one batch, so that nothing but the very end is left over.
    blocks = splits.map(cut, batched=True, batch_size=-1, remove_columns=["text"], desc="cut into pieces")
    short = [name for name, rows in blocks.items() if len(rows) == 0]
    if short:
        raise ValueError(
            f"--block_size {block_size} is longer than all of {short[0]}: give more text or smaller pieces."
        )
    return blocks


def make_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Any:
    """The pretrained model, or a Llama with random weights for this tokenizer and length."""
    if args.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    return make_small_llama(len(tokenizer), block_size, tokenizer.eos_token_id, args.config_overrides)


def make_small_llama(vocab_size: int, length: int, end: int, overrides: str | None) -> LlamaForCausalLM:
    """A Llama with random weights; overrides: of its config, as "hidden_size=256,num_hidden_layers=6"."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    if overrides:
        config.update_from_string(overrides)
    return LlamaForCausalLM(config)


def train(
    method: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    cuttlefish_args: CuttlefishArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Train and evaluate once; returns what was measured."""
    splits = load_texts(data_args)
    if model_args.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    else:
        tokenizer = make_tokenizer(splits["train"]["text"], data_args.vocab_size)
    with training_args.main_process_first(desc="cut into pieces"):
        blocks = to_blocks(splits, tokenizer, data_args.block_size)

    callbacks = cuttlefish_args.callbacks(method)  # the only difference from dense training

    def new_trainer() -> Trainer:
        set_seed(training_args.seed)  # before the model: its weights are random
        return Trainer(
            model=make_model(model_args, tokenizer, data_args.block_size),
            args=training_args,
            train_dataset=blocks["train"],
            eval_dataset=blocks["validation"],
            processing_class=tokenizer,
            data_collator=DefaultDataCollator(),
            callbacks=callbacks,
        )

    measured = train_and_measure(method, new_trainer, blocks["test"], data_args.dataset_name)
    if "test_loss" in measured:
        measured["test_perplexity"] = math.exp(measured["test_loss"])
    return measured


def main() -> None:
    """Run what the command line asks for."""
    parser = make_parser(__doc__, (ModelArguments, DataArguments, CuttlefishArguments, TrainingArguments), DEFAULTS)
    model_args, data_args, cuttlefish_args, training_args = parser.parse_args_into_dataclasses()
    check_arguments(parser, model_args.method, training_args)
    if model_args.config_overrides and model_args.model_name_or_path:
        parser.error("--config_overrides shapes a model with random weights: leave out --model_name_or_path")

    def run(method: str, args: TrainingArguments) -> dict[str, Any]:
        return train(method, model_args, data_args, cuttlefish_args, args)

    run_methods(model_args.method, training_args, run, blocks="decoder")


if __name__ == "__main__":
    main()
