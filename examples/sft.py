"""Fine-tune a decoder on chats with TRL's SFTTrainer: dense, with Cuttlefish, or both compared; then LoRA on top.

With no arguments this trains a small Llama from random weights on dialogs from films, asked and answered, so that no hub is
needed: 5.5 minutes for both on 2 cores. So few tokens teach it which words are frequent, no more: it
answers every question alike (docs/language-models.md). Bring a decoder of your own for the real thing:

    python examples/sft.py --method both
    python examples/sft.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name HuggingFaceH4/no_robots \\
        --max_length 1024 --learning_rate 1e-5 --per_device_train_batch_size 8 --bf16
    python examples/sft.py --model_name_or_path folder --gguf_file gemma-3-270m-q4_k_m.gguf --learning_rate 5e-5

All of Cuttlefish is one callback more in the list. The loss is that of the answers alone (completion_only_loss), several
chats share a row (packing), and activations are worked out anew in backward (activation_checkpointing); each is an argument of
SFTConfig and can be set to False. Results go to OUTPUT_DIR: a model folder for each method, results.json with perplexities and
with what was generated before and after, and plots.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from bundled_data import DIALOG_DATASETS
from comparing import CuttlefishArguments, MethodArguments, check_arguments, make_parser, run_methods, train_and_measure
from language_modeling import make_small_llama, make_tokenizer
from loading import check_gguf, from_gguf, limited, load_raw, three_splits

CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__
    else "gradient_checkpointing"
)
"""Its name in newer transformers, or in older ones."""

DEFAULTS = {
    "output_dir": "runs/sft",
    "do_train": True,
    "do_eval": True,
    "learning_rate": 2e-3,
    "warmup_steps": 0.05,
    "num_train_epochs": 1.0,
    "max_length": 128,
    "packing": True,
    "completion_only_loss": True,
    CHECKPOINTING: True,
    "bf16": torch.cuda.is_available(),
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""What SFTConfig says when the command line does not."""

ASKED = ("what's your name?", "where are you going?", "do you know what time it is?")
"""What is generated before and after answers these."""

TEMPLATE = """{{- bos_token }}{% for message in messages %}{{ message['role'] }}:
{{ message['content'] }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:
{% endif %}"""
"""How a chat is written for a tokenizer that does not say it."""


@dataclass
class ModelArguments(MethodArguments):
    """Which model, and what is done with it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A hub name or a local folder of a decoder. None: a small Llama with random weights."},
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "A GGUF file in MODEL_NAME_OR_PATH, read as full weights (needs gguf)."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Sizes of the Llama with random weights, as hidden_size=256,num_hidden_layers=6."},
    )
    lora_steps: int = field(
        default=40, metadata={"help": "Steps of LoRA on the factors, on the validation split. 0: none."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA's own pairs, one beside each factor."})
    new_tokens: int = field(default=24, metadata={"help": "Tokens to generate for each of three prompts. 0: none."})


@dataclass
class DataArguments:
    """Which chats, and how many of them."""

    dataset_name: str = field(
        default="movie_dialogs",
        metadata={
            "help": "movie_dialogs, or a file, a folder or a hub name with a column `messages` (the last one is learnt) or the columns "
            "`prompt` and `completion`."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    vocab_size: int = field(
        default=2048, metadata={"help": "Tokens of the tokenizer that is made for a model with random weights."}
    )
    max_train_samples: int | None = field(default=12000, metadata={"help": "Train on this many chats at most."})
    max_eval_samples: int | None = field(default=1000, metadata={"help": "Evaluate on this many chats at most."})


def load_chats(args: DataArguments) -> DatasetDict:
    """The splits train, validation and test with the columns `prompt` and `completion`, each a list of messages.

    Raises:
        ValueError: no such data, no train split, or columns that are no chats.
    """
    splits = three_splits(load_raw(args.dataset_name, args.dataset_config, DIALOG_DATASETS), args.dataset_name)
    splits = limited(splits, args.max_train_samples, args.max_eval_samples)
    columns = splits["train"].column_names
    if {"prompt", "completion"} <= {*columns}:
        return splits.select_columns(["prompt", "completion"])
    if "messages" in columns:
        as_chat = _last_is_learnt
    elif args.dataset_name == "movie_dialogs":
        as_chat = _asked_and_answered
    else:
        raise ValueError(
            f"--dataset_name {args.dataset_name} has the columns {columns}; needed: messages, or prompt and completion."
        )
    return splits.map(as_chat, remove_columns=columns, desc="chats")


def _asked_and_answered(row: dict[str, Any]) -> dict[str, Any]:
    asked, _, answered = row["text"].partition("\n")
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": answered}],
    }


def _last_is_learnt(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def load_tokenizer(args: ModelArguments, chats: DatasetDict, vocab_size: int) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one made from the chats; with a chat template and a token for padding."""
    if args.model_name_or_path is None:
        texts = (m["content"] for row in chats["train"] for m in (*row["prompt"], *row["completion"]))
        tokenizer: PreTrainedTokenizerBase = make_tokenizer(texts, vocab_size)
        tokenizer.bos_token = tokenizer.eos_token
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, gguf_file=args.gguf_file)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def make_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
    """The pretrained model in fp32, or a small Llama with random weights for this tokenizer and length."""
    if args.model_name_or_path is None:
        return make_small_llama(len(tokenizer), length, tokenizer.eos_token_id, args.config_overrides)
    if args.gguf_file is not None:
        return from_gguf(args.model_name_or_path, args.gguf_file)
    return AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)


@torch.no_grad()
def answers(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], new_tokens: int) -> list[str]:
    """What the model says to each prompt, the likeliest token at each step."""
    model.eval()
    said = []
    for prompt in prompts:
        inputs: Any = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(model.device)
        tokens = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        said.append(str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip())
    return said


def train(
    method: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    cuttlefish_args: CuttlefishArguments,
    training_args: SFTConfig,
) -> dict[str, Any]:
    """Train, evaluate, generate and adapt once; returns what was measured."""
    chats = load_chats(data_args)
    tokenizer = load_tokenizer(model_args, chats, data_args.vocab_size)
    prompts = [[{"role": "user", "content": asked}] for asked in ASKED] if model_args.new_tokens else []
    said: dict[str, list[str]] = {}

    def new_trainer() -> SFTTrainer:
        set_seed(training_args.seed)  # before the model: its weights may be random
        model = make_model(model_args, tokenizer, training_args.max_length)
        said.setdefault("before", answers(model, tokenizer, prompts, model_args.new_tokens))
        return SFTTrainer(
            model=model,
            args=training_args,
            train_dataset=chats["train"],
            eval_dataset=chats["test"],
            processing_class=tokenizer,
            callbacks=cuttlefish_args.callbacks(method),  # the only difference from dense training
        )

    measured = train_and_measure(method, new_trainer, None, data_args.dataset_name)
    if "test_loss" in measured:
        measured["test_perplexity"] = math.exp(measured["test_loss"])
    if not training_args.do_train:
        return measured
    # The saved folder, loaded as anyone would: `import hf_cuttlefish` is all that a factorized one needs.
    folder = measured["model_folder"]
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(training_args.device)
    said["after"] = answers(saved, tokenizer, prompts, model_args.new_tokens)
    measured["generated"] = [
        {"prompt": prompt[-1]["content"], **{when: lines[i] for when, lines in said.items()}}
        for i, prompt in enumerate(prompts)
    ]
    for row in measured["generated"]:
        print(f"{row['prompt']!r}\n    before: {row['before']!r}\n    {method}: {row['after']!r}")
    if measured["switch_step"] is not None and model_args.lora_steps:
        measured["lora"] = adapt(saved, tokenizer, chats, model_args, training_args)
    return measured


def adapt(
    model: Any, tokenizer: PreTrainedTokenizerBase, chats: DatasetDict, model_args: ModelArguments, args: SFTConfig
) -> dict[str, Any]:
    """LoRA on the factors, on chats that came later: perplexity before and after, and numbers trained. Saves the adapter."""
    args = copy.copy(args)
    args.output_dir, args.max_steps = str(Path(str(args.output_dir)) / "adapter"), model_args.lora_steps
    config = LoraConfig(task_type="CAUSAL_LM", r=model_args.lora_rank, target_modules=["down", "up"])
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=chats["validation"],
        eval_dataset=chats["test"],
        processing_class=tokenizer,
        peft_config=config,
    )
    before = math.exp(trainer.evaluate()["eval_loss"])
    trainer.train()
    after = math.exp(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"LoRA on the factors, {trained:,} numbers: test perplexity {before:.2f} -> {after:.2f}")
    return {"perplexity_before": before, "perplexity_after": after, "trained": trained}


def main() -> None:
    """Run what the command line asks for."""
    parser = make_parser(__doc__, (ModelArguments, DataArguments, CuttlefishArguments, SFTConfig), DEFAULTS)
    model_args, data_args, cuttlefish_args, training_args = parser.parse_args_into_dataclasses()
    check_arguments(parser, model_args.method, training_args)
    if model_args.gguf_file and not model_args.model_name_or_path:
        parser.error("--gguf_file lies in a folder or on the hub: give --model_name_or_path with it")
    if model_args.gguf_file:
        check_gguf(model_args.model_name_or_path, model_args.gguf_file)  # before the data is read
    if model_args.config_overrides and model_args.model_name_or_path:
        parser.error("--config_overrides shapes a model with random weights: leave out --model_name_or_path")

    def run(method: str, args: SFTConfig) -> dict[str, Any]:
        return train(method, model_args, data_args, cuttlefish_args, args)

    run_methods(model_args.method, training_args, run, blocks="decoder")


if __name__ == "__main__":
    main()
