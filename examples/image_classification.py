"""Train an image classifier with the Trainer: dense, with Cuttlefish, or one after the other.

With no arguments this trains a small ViT from random weights on scikit-learn's handwritten digits, which takes a minute
and needs no hub; `--method both` does it twice from one seed, dense and with Cuttlefish, and compares the two.

    python examples/image_classification.py --method both
    python examples/image_classification.py --dataset_name fashion_mnist --num_train_epochs 10 \\
        --config_overrides hidden_size=192,intermediate_size=768,num_hidden_layers=6
    python examples/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --dataset_name path/to/photos --num_train_epochs 3 --learning_rate 5e-5 --per_device_train_batch_size 32

A folder of photos has a folder for each class, or one for each split that holds these. All of Cuttlefish is one callback
more in the list. Images are read with Pillow: torchvision is not needed. Every argument of TrainingArguments works as
usual. Results go to OUTPUT_DIR: a model folder for each method, results.json, and plots of stable ranks and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, Image
from PIL import Image as Pictures
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    DefaultDataCollator,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from bundled_data import IMAGE_DATASETS, fashion_mnist
from class_accuracy import metrics
from comparing import CuttlefishArguments, MethodArguments, check_arguments, make_parser, run_methods, train_and_measure
from loading import limited, load_raw, three_splits, with_classes

DEFAULTS = {
    "output_dir": "runs/image_classification",
    "do_train": True,
    "do_eval": True,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup_steps": 0.05,
    "num_train_epochs": 40.0,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 1,
    "logging_steps": 50,
    "remove_unused_columns": False,  # the images are turned into pixel values when a batch is drawn
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""What TrainingArguments says when the command line does not: enough steps to learn digits from random weights."""


@dataclass
class ModelArguments(MethodArguments):
    """Which model, and how to train it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A hub name or a local folder. None: a small ViT with random weights, as large as the images ask."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Sizes of the ViT with random weights, as hidden_size=192,num_hidden_layers=6,patch_size=4."},
    )


@dataclass
class DataArguments:
    """Which data, and how much of it."""

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": f"A bundled set ({', '.join(IMAGE_DATASETS)}), a folder of images (a folder for each class), a folder "
            "with Fashion-MNIST's four *-ubyte.gz files, or a hub name."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the image. None: the first that holds images."}
    )
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many rows at most."})


def load_splits(args: DataArguments) -> DatasetDict:
    """The splits train, validation and test with the columns `image` (PIL, or numpy [height, width]) and `labels`.

    Raises:
        ValueError: no such data, no train split, no such column, or no classes in it.
    """
    if (Path(args.dataset_name) / "train-images-idx3-ubyte.gz").is_file():
        raw = fashion_mnist(args.dataset_name)
    else:
        raw = load_raw(args.dataset_name, args.dataset_config, IMAGE_DATASETS)
    splits = with_classes(three_splits(raw, args.dataset_name, args.label_column), args.label_column)
    features = splits["train"].features
    images = [name for name, kind in features.items() if isinstance(kind, Image) or name == "image"]
    image_column = args.image_column or (images[0] if images else None)
    if image_column not in features:
        raise ValueError(f"--image_column {image_column} is not among {list(features)}.")
    columns = {image_column: "image", args.label_column: "labels"}
    splits = splits.select_columns(list(columns))
    splits = splits.rename_columns({old: new for old, new in columns.items() if old != new})
    return limited(splits, args.max_train_samples, args.max_eval_samples)


def to_picture(image: Any, brightest: int) -> Pictures.Image:
    """A PIL image in RGB, from one of any mode or from rows of numbers [height, width] from 0 to `brightest`."""
    if not isinstance(image, Pictures.Image):
        image = Pictures.fromarray((np.asarray(image) * (255 / brightest)).astype(np.uint8))
    return image.convert("RGB")


def load_processor(name: str | None, size: int) -> Any:
    """The image processor of a pretrained model; ViT's own for `size` pixels where there is none."""
    if name is not None:
        try:
            return AutoImageProcessor.from_pretrained(name, backend="pil")
        except OSError:
            print(f"{name} has no preprocessor_config.json: ImageNet's mean and deviation are used.")
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=deviation)


def load_model(args: ModelArguments, classes: list[str], size: int) -> Any:
    """The pretrained model with a new head, or a ViT with random weights for images of `size` pixels."""
    labels: dict[str, Any] = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    if args.model_name_or_path is not None:
        return AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, **labels, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=size,
        patch_size=max(1, size // 7 if size > 8 else size // 4),
        **labels,
    )
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    return ViTForImageClassification(config)


def train(
    method: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    cuttlefish_args: CuttlefishArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Train and evaluate once; returns what was measured."""
    splits = load_splits(data_args)
    first = splits["train"][0]["image"]
    if model_args.model_name_or_path is not None:
        size = AutoConfig.from_pretrained(model_args.model_name_or_path).image_size
    else:
        size = min(first.shape if isinstance(first, np.ndarray) else first.size)
    processor = load_processor(model_args.model_name_or_path, size)
    brightest = int(np.max(splits["train"][:256]["image"])) if isinstance(first, np.ndarray) else 255

    def to_pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [to_picture(image, brightest) for image in rows["image"]]
        return {**processor(pictures, return_tensors="pt"), "labels": rows["labels"]}

    encoded = splits.with_transform(to_pixels)
    callbacks = cuttlefish_args.callbacks(method)  # the only difference from dense training
    compute_metrics = metrics(hub=data_args.dataset_name not in IMAGE_DATASETS)

    def new_trainer() -> Trainer:
        set_seed(training_args.seed)  # before the model: its weights, or those of its new head, are random
        return Trainer(
            model=load_model(model_args, splits["train"].features["labels"].names, size),
            args=training_args,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=processor,
            data_collator=DefaultDataCollator(),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
        )

    return train_and_measure(method, new_trainer, encoded["test"], data_args.dataset_name)


def main() -> None:
    """Run what the command line asks for."""
    parser = make_parser(__doc__, (ModelArguments, DataArguments, CuttlefishArguments, TrainingArguments), DEFAULTS)
    model_args, data_args, cuttlefish_args, training_args = parser.parse_args_into_dataclasses()
    check_arguments(parser, model_args.method, training_args)
    if model_args.config_overrides and model_args.model_name_or_path:
        parser.error("--config_overrides shapes a model with random weights: leave out --model_name_or_path")

    def run(method: str, args: TrainingArguments) -> dict[str, Any]:
        return train(method, model_args, data_args, cuttlefish_args, args)

    run_methods(model_args.method, training_args, run)


if __name__ == "__main__":
    main()
