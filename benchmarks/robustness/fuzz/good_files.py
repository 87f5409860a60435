"""The good files, as the package and the Trainer write them, and the small models that they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig, estimate_ranks, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.saving.checkpoints import STATISTICS_FILE

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TINY |= {"max_position_embeddings": 16, "num_labels": 3}

IDS = torch.arange(12).reshape(2, 6) + 3
PLAN = CuttlefishConfig(rank_rule="ratio", rank_multiple=4)
RUN: dict[str, Any] = {"switch_step": 5, "statistics_steps": 4, "check_steps": 1, "on_error": "raise"}
STATE = "state.json"


def tiny() -> hf.PreTrainedModel:
    """A dense BERT, always the same."""
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**TINY)).eval()


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 1},
    ),
    "convolutions in groups": (
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "groups_width": 4, "num_channels": 1},
    ),
    "Conv1D": (
        "GPT2ForSequenceClassification",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "pad_token_id": 0},
    ),
    "experts": (
        "MixtralForCausalLM",
        {**TINY, "num_local_experts": 3, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2},
    ),
    "experts, transposed with biases": (
        "GptOssForCausalLM",
        {**TINY, "num_local_experts": 3, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2},
    ),
    "embeddings": ("BertForMaskedLM", TINY),
    "embeddings, not tied": ("LlamaForCausalLM", {**TINY, "num_key_value_heads": 2}),
}
"""Kind of layer -> class and config of a model that has it."""


def other(name: str) -> hf.PreTrainedModel:
    """A dense model with layers of that kind, always the same."""
    cls, config = getattr(hf, OTHERS[name][0]), OTHERS[name][1]
    torch.manual_seed(0)
    return cls(cls.config_class(**config)).eval()


def settings_of(name: str, **others: Any) -> CuttlefishConfig:
    """A config for a model with layers of that kind."""
    return CuttlefishConfig(embeddings=name.startswith("embeddings"), **others)


def inputs_of(model: hf.PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch with labels."""
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    classes = type(model).__name__.endswith("SequenceClassification")
    return {"input_ids": IDS, "labels": torch.tensor([0, 1]) if classes else IDS}


def train(model: Any, optimizer: torch.optim.Optimizer, cuttlefish: Cuttlefish, steps: int) -> None:
    """Some steps of a run on that batch."""
    batch = inputs_of(model)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()


def save_runs(folder: Path, name: str) -> None:
    """Two moments of a run of eight steps, before and after the switch: the state, the statistics and the model."""
    model = other(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cuttlefish = Cuttlefish(model, optimizer, settings_of(name, **RUN), total_steps=8)
    for moment in ("before", "after"):
        train(model, optimizer, cuttlefish, 3)
        model.save_pretrained(folder / f"{name}, {moment}")
        (folder / f"{name}, {moment}" / STATE).write_text(json.dumps(cuttlefish.state_dict()))
        if statistics := cuttlefish.statistics_state():
            save_file(statistics, folder / f"{name}, {moment}" / STATISTICS_FILE)
    cuttlefish.close()


def prepare(folder: Path) -> None:
    """The good files, as the package and the Trainer write them."""
    model = tiny()
    factorize(model, dict.fromkeys(find_targets(model), 4))
    model.save_pretrained(folder / "model")
    model.save_pretrained(folder / "sharded", max_shard_size=20_000)
    (folder / "plan.json").write_text(estimate_ranks(tiny(), PLAN).to_json())
    config = CuttlefishConfig(
        target_modules=["query", "value", "dense"], exclude_modules=["key"], rank_pattern={".*query": 4}
    )
    (folder / "config.json").write_text(config.to_json())
    for name in OTHERS:
        model = other(name)
        targets = list(find_targets(model, settings_of(name)))
        plan = estimate_ranks(model, settings_of(name, rank_rule="ratio", rank_multiple=2))
        (folder / f"{name}.json").write_text(plan.to_json())
        config = settings_of(name, rank_pattern={targets[0]: 2}, exclude_modules=[targets[-1]])
        (folder / f"{name}, config.json").write_text(config.to_json())
        factorize(model, dict.fromkeys(targets, 2))
        model.save_pretrained(folder / name)
        save_runs(folder, name)
    trainer = new_trainer(folder / "run")
    trainer.train()
    for name, step in (("before", 3), ("after", 6)):
        (folder / "run" / f"checkpoint-{step}").rename(folder / name)
    shutil.rmtree(folder / "run")


class Rows(torch.utils.data.Dataset):
    """Eight rows of the same tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[index % 2], "labels": torch.tensor(index % 3)}


def new_trainer(folder: Path, restore: bool = False, model: Any = None) -> hf.Trainer:
    """A real Trainer of eight steps that saves at 3 and 6."""
    args = hf.TrainingArguments(
        str(folder), max_steps=8, save_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_steps=100, restore_callback_states_from_checkpoint=restore, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = hf.Trainer(
        model or tiny(), args, train_dataset=Rows(), callbacks=[CuttlefishCallback(CuttlefishConfig(**RUN))]
    )
    trainer.remove_callback(hf.PrinterCallback)
    return trainer


def check_structure(model: nn.Module) -> None:
    """What has loaded must be whole: no value forgotten, ranks within the layers, the note in the config true."""
    pairs = low_rank_layers(model)
    for name, layer in pairs.items():
        if not 1 <= layer.rank <= min(layer.in_features, layer.out_features):
            raise WrongLoadError(f"{name} has rank {layer.rank}")
    if any(p.is_meta or p.numel() > 10**6 for p in model.parameters()):
        raise WrongLoadError("a parameter without values, or a giant one")
    note = getattr(model.config, "quantization_config", None)
    if bool(pairs) != (note is not None) or (note and note["ranks"] != {n: m.rank for n, m in pairs.items()}):
        raise WrongLoadError("the note in the config does not say what the model is")


class WrongLoadError(Exception):
    """Something has loaded that is not what the files say."""
