"""Tiny mixtures of experts with random weights: one of each way in which transformers' models hold and run their experts."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from hf_cuttlefish.layers.experts import ExpertStack
from hf_cuttlefish.layers.kinds import find_layers

BASE = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2},
}
MIDDLE = {"num_experts": 4, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2": ("Qwen2MoeForCausalLM", {**MIDDLE, "shared_expert_intermediate_size": 24}),
    "qwen3": ("Qwen3MoeForCausalLM", MIDDLE),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**ROUTED, **LATENT, "num_key_value_heads": 4, "n_shared_experts": 1}),
    "gpt-oss": ("GptOssForCausalLM", {"num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4}),
    "granite": ("GraniteMoeForCausalLM", {"num_local_experts": 4}),
    "ernie": ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
              "moe_layer_start_index": 0, "moe_num_shared_experts": 1}),
    "nemotron-h": ("NemotronHForCausalLM", {"n_routed_experts": 4, "moe_intermediate_size": 16,
                   "layers_block_type": ["moe", "attention", "moe"]}),
    "llama4": ("Llama4ForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
               "interleave_moe_layer_step": 1}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", {**ROUTED, **LATENT, "num_key_value_heads": 4, "n_shared_experts": 1,
                    "topk_method": "greedy", "routed_scaling_factor": 1.0}),
    "lfm2": ("Lfm2MoeForCausalLM", {**MIDDLE, "num_dense_layers": 0, "layer_types": ["full_attention", "conv"]}),
    "longcat": ("LongcatFlashForCausalLM", {**LATENT, "n_routed_experts": 4, "moe_topk": 2, "expert_ffn_hidden_size": 16,
                "ffn_hidden_size": 32, "zero_expert_num": 1, "num_layers": 2, "num_key_value_heads": 4}),
    "jetmoe": ("JetMoeForCausalLM", {"num_local_experts": 4, "kv_channels": 8}),
}  # fmt: skip
"""Name -> class, config. Gated and not, with biases, transposed (gpt-oss, Llama 4), with shared experts, with ones that do nothing (LongCat), all at once (Llama 4)."""

IMPLEMENTED = [name for name in MODELS if name not in ("llama4", "jetmoe", "longcat")]
"""Those that have batched_mm and grouped_mm besides their own loop."""


def build(name: str, seed: int = 0, **config: Any) -> hf.PreTrainedModel:
    """The model in eval mode, all parameters random, on its own loop over experts."""
    cls = getattr(hf, MODELS[name][0])
    torch.manual_seed(seed)
    made = cls.config_class(**{**BASE, **MODELS[name][1], **config})
    model = cls._from_config(made, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def tokens(seed: int = 1, rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """A batch with labels."""
    ids = torch.randint(3, BASE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Name -> dense stack."""
    return {name: layer for name, layer in find_layers(model) if isinstance(layer, ExpertStack)}
