"""Recipes: which small number stands for a number of a default config, by the name of its field."""

from __future__ import annotations

import re
from collections.abc import Callable

HIDDEN, MIDDLE, HEADS, VOCABULARY = 32, 64, 4, 200

Rule = tuple[str, Callable[[int], int]]

SMALL: list[Rule] = [
    (r"vocab_size|vocab_size_or_config_json_file|.*_vocab_size", lambda v: min(v, VOCABULARY)),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|.*_key_value_heads", lambda v: 2 if v > 1 else 1),
    (r"(.*_)?(num_)?(attention_)?(n_)?heads?|n_head|num_attention_heads.*", lambda v: min(v, HEADS)),
    (r"(.*_)?(head_dim|d_kv|dim_head|attention_head_size|kv_channels)", lambda v: min(v, HIDDEN // HEADS)),
    (
        r"(.*_)?(num_|n_)?((hidden|encoder|decoder|residual|resnet|transformer|text|vision|conv_layer)_)?(layers?|blocks?|depth)"
        r"|(.*_)?num_hidden_layers|(.*_)?depths|n_layer|num_(encoder|decoder)_.*layers|encode_layers|(.*)num_hidden_groups",
        lambda v: min(v, 2),
    ),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|mlp_dim|feed_?forward_(size|dim)|hidden_dim|n_inner|inner_dim|d_inner"
        r"|ffn_hidden_size|feedforward_channels|ffn_size|mlp_hidden_dim|linear_size)",
        lambda v: min(v, MIDDLE),
    ),
    (r"(num_|n_|.*_num_)(local_|routed_|)experts|moe_num_experts", lambda v: min(v, 4)),
    (r"(num_|n_)?experts_per_tok|moe_topk|moe_k|top_?k|num_selected_experts|moe_top_k", lambda v: min(v, 2)),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_sizes|embed_dims?|projection_dim|dim|model_dim|encoder_dim"
        r"|hidden_channels|embedding_dim|hidden_size_per_layer_input|output_hidden_size|out_hidden_size|proj_dim"
        r"|attention_dim|emb_dim|out_features|fusion_hidden_size|decoder_dim|encoder_hidden_dim|embedding_size)",
        lambda v: min(v, HIDDEN),
    ),
    (r"(q|kv)_lora_rank|.*_lora_dim|qk_(nope|rope)_head_dim", lambda v: min(v, 8)),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions", lambda v: max(min(v, 512), 64)),
    (r"num_queries|num_query_tokens", lambda v: min(v, 12)),
    (r"groups_width", lambda v: min(v, HIDDEN // 4)),
    (r"conv_dim|conv_dims", lambda v: min(v, 16)),
]

WIDTHS = re.compile(
    r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_sizes|dims?|intermediate_size|ffn_dim|d_ff|head_dim|d_kv"
    r"|.*_dim|.*_dims|.*_channels|channels|.*hidden.*size.*|.*embedding_size|.*_hidden)"
)

COUNTS = re.compile(SMALL[4][0])


def small(name: str, value: int) -> int:
    """Fixed small sizes by the field's name."""
    for pattern, rule in SMALL:
        if re.fullmatch(pattern, name):
            return rule(value)
    return value


def divided(name: str, value: int) -> int:
    """Every width through 16, so that what divides what stays as it is; few layers."""
    if re.fullmatch(r"(.*_)?vocab_size", name) or COUNTS.fullmatch(name):
        return small(name, value)
    if WIDTHS.fullmatch(name) and value % 16 == 0 and value >= 128:
        return value // 16
    return value


def halved(name: str, value: int) -> int:
    """Heads and widths through 4; few layers."""
    if re.fullmatch(r"(.*_)?vocab_size", name) or COUNTS.fullmatch(name):
        return small(name, value)
    width = WIDTHS.fullmatch(name) and not re.fullmatch(r"(.*_)?head_dim", name)
    heads = re.fullmatch(r"(.*_)?(num_)?(attention_|key_value_)?heads?", name)
    return value // 4 if (width or heads) and value % 4 == 0 and (value >= 64 or heads) else value


def short(name: str, value: int) -> int:
    """Nothing but few layers and few tokens."""
    return small(name, value) if re.fullmatch(r"(.*_)?vocab_size", name) or COUNTS.fullmatch(name) else value


def untouched(name: str, value: int) -> int:
    """The default config as it is."""
    return value


RECIPES: dict[str, Callable[[str, int], int]] = {f.__name__: f for f in (small, divided, halved, short, untouched)}
