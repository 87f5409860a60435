"""Fine-tune a text classifier in a plain loop with Accelerate and Cuttlefish, on one process or several.

With no arguments this fine-tunes a pretrained MiniLM on TREC questions, both from installed packages, so that no hub is
needed. Cuttlefish is two lines below: one makes it, one calls it after each step.

    python examples/text_classification_no_trainer.py
    accelerate launch --config_file examples/accelerate_configs/cpu_2_processes.yaml \\
        examples/text_classification_no_trainer.py --max_train_samples 640
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    get_linear_schedule_with_warmup,
)

from bundled_data import minilm_folder
from hf_cuttlefish import Cuttlefish, CuttlefishConfig
from text_classification import DataArguments, load_splits, tokenize


@dataclass
class LoopArguments:
    """Model, length of the run, and what else the loop needs."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A hub name or a local folder. None: the bundled MiniLM."}
    )
    output_dir: str = field(default="runs/no_trainer", metadata={"help": "Where the fine-tuned model is saved."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training rows."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Stop after this many optimizer steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows a process and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches an optimizer step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "At the start; it falls linearly to 0."})
    switch_step: int | None = field(default=None, metadata={"help": "Switch after this step. None: when ranks settle."})
    seed: int = field(default=42, metadata={"help": "Of the new classification head and the order of the rows."})


def main() -> None:
    """Fine-tune, print the accuracy of each epoch, save."""
    args, data_args = HfArgumentParser((LoopArguments, DataArguments)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    # Unless it is told that there is no GPU, Accelerate gives several processes on CPUs no DDP, and says nothing.
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=not torch.cuda.is_available()
    )
    set_seed(args.seed)

    name = args.model_name_or_path or str(minilm_folder())
    splits = load_splits(data_args)
    tokenizer = AutoTokenizer.from_pretrained(name)
    with accelerator.main_process_first():
        encoded = tokenize(splits, tokenizer, data_args.max_length).rename_column("label", "labels")
    collate = DataCollatorWithPadding(tokenizer)
    train = DataLoader(encoded["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collate)
    test = DataLoader(encoded["test"], 64, collate_fn=collate)
    classes = splits["train"].features["label"].names
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)

    steps = args.num_train_epochs * math.ceil(len(train) / args.gradient_accumulation_steps)
    total_steps = min(steps, args.max_train_steps or steps)
    # Accelerate steps the schedule once for each process, so it is as many times as long.
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, total_steps * accelerator.num_processes)
    scheduler = accelerator.prepare(scheduler)
    config = CuttlefishConfig(switch_step=args.switch_step)
    # The first line of Cuttlefish. It takes the schedule to scale the learning rate after the switch.
    cuttlefish = Cuttlefish(model, optimizer, config, total_steps=total_steps, scheduler=scheduler)

    while cuttlefish.global_step < total_steps:
        model.train()
        for batch in train:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            cuttlefish.step()  # the second: after each batch; micro-batches are not counted
            if cuttlefish.global_step == total_steps:
                break
        model.eval()
        right = rows = 0
        for batch in test:
            with torch.no_grad():
                predicted = model(**batch).logits.argmax(-1)
            predicted, labels = accelerator.gather_for_metrics((predicted, batch["labels"]))
            right, rows = right + int((predicted == labels).sum()), rows + len(labels)
        accelerator.print(f"step {cuttlefish.global_step} of {total_steps}: test accuracy {right / rows:.2%}")
    cuttlefish.end()

    bare = accelerator.unwrap_model(model)
    weights = accelerator.get_state_dict(model)  # whole, also where FSDP2 gives each process a part
    bare.save_pretrained(
        args.output_dir,
        state_dict=weights,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    size = sum(p.numel() for p in bare.parameters())
    accelerator.print(
        f"{accelerator.num_processes} process(es), {accelerator.distributed_type.value}: switched at step "
        f"{cuttlefish.switch_step}, {size:,} parameters, saved to {args.output_dir}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
