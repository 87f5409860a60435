"""The models whose steps are timed: shapes, random weights, random inputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
LLAMA = {"num_key_value_heads": 8, "num_attention_heads": 32, "vocab_size": 32000, "use_cache": False}
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "tiny": (
        "bert",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        2,
        8,
    ),
    "bert-base-48": ("bert", {}, 32, 48),
    "bert-base": ("bert", {}, 32, 128),
    "bert-large": ("bert", LARGE | {"num_hidden_layers": 6}, 64, 128),
    "bert-large-24": ("bert", LARGE | {"num_hidden_layers": 24}, 64, 128),
    "vit-large": ("vit", LARGE | {"num_hidden_layers": 6}, 64, 0),
    "llama-1b": ("llama", LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}, 8, 1024),
    # Its vocabulary is so small that its blocks alone are timed.
    "llama-8b-blocks": (
        "llama",
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "vocab_size": 128},
        4,
        1024,
    ),
    "llama-8b": ("llama", LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2}, 4, 1024),
}
"""Case -> class, sizes, rows of a batch, tokens of a row."""


def build(kind: str, sizes: dict[str, Any]) -> Any:
    """A model with random weights."""
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    sizes = {"problem_type": "single_label_classification", **sizes}  # else step 2 is traced anew
    if kind == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**sizes))
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes))


def make_batch(kind: str, config: Any, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        pixels = torch.randn(rows, 3, config.image_size, config.image_size, generator=generator)
        return {"pixel_values": pixels.to(device), "labels": torch.zeros(rows, dtype=torch.long, device=device)}
    ids = torch.randint(5, config.vocab_size, (rows, length), generator=generator).to(device)
    if kind == "llama":
        return {"input_ids": ids, "labels": ids}
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.zeros(rows, dtype=torch.long, device=device),
    }
