"""The models that are timed, with random weights; their inputs and optimizer."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf


def shape(kind: str, hidden: int, layers: int, heads: int, middle: int, **more: Any) -> dict[str, Any]:
    """A model's class, and its sizes under the names that configs have."""
    return {
        "kind": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": middle,
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "bert-base": {"kind": "bert"},
    "bert-large": shape("bert", 1024, 24, 16, 4096),
    "vit-base": {"kind": "vit"},
    "vit-large": shape("vit", 1024, 24, 16, 4096),
    "llama-1b": shape("llama", 2048, 16, 32, 8192, num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=True),
    "minilm": shape("bert", 384, 6, 12, 1536),
    "bert-tiny": shape("bert", 64, 2, 2, 256),
    "vit-tiny": shape("vit", 64, 2, 2, 256, image_size=32, patch_size=8),
    "llama-tiny": shape("llama", 64, 2, 4, 256, num_key_value_heads=2, vocab_size=512),
}
LENGTHS = {"llama-1b": 1024, "bert-tiny": 16, "llama-tiny": 16}
"""Tokens an example; 128 elsewhere."""


def build_model(name: str) -> Any:
    """A model of the table with random weights."""
    options = dict(MODELS[name])
    kind = options.pop("kind")
    if kind == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**options))
    if kind == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(**options))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**options))


def make_batch(name: str, config: Any, size: int, device: Any) -> dict[str, Any]:
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    if MODELS[name]["kind"] == "vit":
        pixels = torch.randn(size, 3, config.image_size, config.image_size, generator=generator)
        return {"pixel_values": pixels.to(device), "labels": torch.zeros(size, dtype=torch.long, device=device)}
    length = LENGTHS.get(name, 128)
    ids = torch.randint(5, config.vocab_size, (size, length), generator=generator).to(device)
    if MODELS[name]["kind"] == "llama":
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    return {"input_ids": ids, "labels": torch.zeros(size, dtype=torch.long, device=device)}


def make_optimizer(model: Any, device: Any) -> Any:
    """AdamW over what is trained, fused on a GPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True if device.type == "cuda" else None)
