"""Tiny models with random weights, one of every family that is tested, built from configs: no hub, no tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

HIDDEN, MIDDLE, VOCABULARY, LENGTH, BATCH, LABELS = 32, 64, 99, 7, 2, 3
RANK = 4
"""Below break-even of every target in the table."""

Batch = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One line of the table.

    Attributes:
        name: of the test case. model: class with a head. auto: Auto class that gives it back. config: its arguments.
        inputs: makes a batch that has a loss.
        targets: what "all" takes, block numbers replaced by "*".
        dense: 3-D experts that stay dense and are said so, numbers replaced by "*".
        others: more classes that the saved folder must load with -> share of the factorized layers that they have.
    """

    name: str
    model: str
    auto: str
    config: dict[str, Any]
    inputs: Callable[[], Batch]
    targets: frozenset[str]
    others: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> hf.PreTrainedModel:
        """The model in eval mode with noise on every parameter, so that zero biases and idle blocks hide no fault."""
        torch.manual_seed(seed)
        cls = getattr(hf, self.model)
        model = cls(cls.config_class(**self.config))
        add_noise(model, seed)
        return model.eval()


def add_noise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def starred(names: Any) -> frozenset[str]:
    """Names with block numbers replaced by "*"."""
    return frozenset(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)


def outputs(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Every floating-point tensor that the model returns: loss, logits, embeddings."""
    with torch.no_grad():
        return list(_tensors(model(**batch)))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list, dict)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)


def aligned(model: nn.Module) -> nn.Module:
    """The model with its tensors moved to memory of their own.

    Loaded ones are mapped from the file at odd addresses, where a CPU kernel may round differently (DeBERTa: 1e-7).
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    """Bit for bit."""
    assert len(left) == len(right) > 0
    for x, y in zip(left, right, strict=True):
        assert torch.equal(x, y), f"they differ by {(x - y).abs().max():.3g}"


def assert_close(left: list[torch.Tensor], right: list[torch.Tensor], tolerance: float = 1e-3) -> None:
    """To the rounding of fp32, which the depth of a model multiplies."""
    assert len(left) == len(right) > 0
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * (1 + float(y.abs().max())))


def are_close(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-2, atol=1e-2) for x, y in zip(left, right, strict=True))


# --- batches ---


def tokens(seed: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(3))


def text() -> Batch:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": tokens(), "attention_mask": mask, "labels": torch.tensor([0, 1])}


def next_token() -> Batch:
    return {"input_ids": tokens(), "labels": tokens()}


def translation() -> Batch:
    return {"input_ids": tokens(), "labels": tokens(4)}


def image() -> Batch:
    return {"pixel_values": noise(3, 32, 32), "labels": torch.tensor([0, 1])}


def image_and_text() -> Batch:
    return {"pixel_values": noise(3, 32, 32), "input_ids": tokens(), "return_loss": True}


def speech() -> Batch:
    return {"input_features": noise(8, 40), "labels": tokens()}


def sound() -> Batch:
    return {"input_values": noise(400), "labels": torch.tensor([0, 1])}


# --- configs and layers that families share ---

LM = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
LM |= {
    "intermediate_size": MIDDLE,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT = {**LM, "num_labels": LABELS}
DEBERTA = {**BERT, "relative_attention": True, "max_relative_positions": 8, "pos_att_type": ["c2p", "p2c"]}
DEBERTA |= {"position_biased_input": False}
LLAMA = {**LM, "num_key_value_heads": 2, "head_dim": 8}
VIT = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": MIDDLE}
VIT |= {"image_size": 32, "patch_size": 8, "num_labels": LABELS}
T5 = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": MIDDLE, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0}
BART |= {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": MIDDLE,
    "decoder_ffn_dim": MIDDLE,
}
BART |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "num_labels": LABELS}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}


def under(prefix: str, *names: str) -> frozenset[str]:
    return frozenset(f"{prefix}.{name}" for name in names)


def projections(prefix: str, letters: str, form: str = "{}_proj") -> tuple[str, ...]:
    return tuple(f"{prefix}.{form.format(letter)}" for letter in letters.split())


MLP = ("mlp.fc1", "mlp.fc2")
BERT_OUTPUT = ("attention.output.dense", "intermediate.dense", "output.dense")
BERT_LAYER = ("attention.self.query", "attention.self.key", "attention.self.value", *BERT_OUTPUT)
VIT_LAYER = (*projections("attention", "q k v o"), *MLP)
CLIP_LAYER = (*projections("self_attn", "q k v out"), *MLP)
BART_LAYER = (*projections("self_attn", "q k v out"), "fc1", "fc2")
BART_DECODER = (*BART_LAYER, *projections("encoder_attn", "q k v out"))
LLAMA_LAYER = (*projections("self_attn", "q k v o"), *projections("mlp", "gate up down"))
T5_ATTENTION = projections("layer.*.SelfAttention", "q k v o", "{}")
T5_CROSS = projections("layer.*.EncDecAttention", "q k v o", "{}")
EXPERTS = under("model.layers.*.mlp.experts", "gate_up_proj", "down_proj")


def _t5(*mlp: str) -> frozenset[str]:
    mlp = projections("layer.*.DenseReluDense", " ".join(mlp), "{}")
    return under("encoder.block.*", *T5_ATTENTION, *mlp) | under("decoder.block.*", *T5_ATTENTION, *T5_CROSS, *mlp)


TEXT, IMAGE, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForImageClassification", "AutoModelForCausalLM"
SEQ2SEQ = "AutoModelForSeq2SeqLM"

FAMILIES = [
    Family(
        "bert", "BertForSequenceClassification", TEXT, BERT, text, under("bert.encoder.layer.*", *BERT_LAYER),
        others={"AutoModelForTokenClassification": 1, "AutoModelForMaskedLM": 1},
    ),
    Family(
        "bert-masked-lm", "BertForMaskedLM", "AutoModelForMaskedLM", BERT, next_token,
        under("bert.encoder.layer.*", *BERT_LAYER), others={TEXT: 1},
    ),
    Family(
        "roberta", "RobertaForSequenceClassification", TEXT, {**BERT, "pad_token_id": 1}, text,
        under("roberta.encoder.layer.*", *BERT_LAYER),
    ),
    Family(
        "distilbert", "DistilBertForSequenceClassification", TEXT,
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": MIDDLE,
         "num_labels": LABELS, "max_position_embeddings": 40}, text,
        under(
            "distilbert.transformer.layer.*", *projections("attention", "q k v out", "{}_lin"), "ffn.lin1", "ffn.lin2"
        ),
    ),
    Family(
        "deberta", "DebertaForSequenceClassification", TEXT, DEBERTA, text,
        under(
            "deberta.encoder.layer.*", *projections("attention.self", "in_proj pos_proj pos_q_proj", "{}"), *BERT_OUTPUT
        ),
    ),
    Family(
        "deberta-v2", "DebertaV2ForSequenceClassification", TEXT, {**DEBERTA, "share_att_key": False}, text,
        under(
            "deberta.encoder.layer.*",
            *projections("attention.self", "query key value pos_key pos_query", "{}_proj"), *BERT_OUTPUT
        ),
    ),
    Family(
        "modernbert", "ModernBertForSequenceClassification", TEXT,
        {**BERT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4}, text,
        under("model.layers.*", "attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
    ),
    Family(
        "electra", "ElectraForSequenceClassification", TEXT, {**BERT, "embedding_size": 16}, text,
        under("electra.encoder.layer.*", *BERT_LAYER),
    ),
    Family(
        "albert", "AlbertForSequenceClassification", TEXT, {**BERT, "embedding_size": 16}, text,
        under(
            "albert.encoder.albert_layer_groups.*.albert_layers.*",
            *projections("attention", "query key value dense", "{}"), "ffn", "ffn_output"
        ),
    ),
    Family("vit", "ViTForImageClassification", IMAGE, VIT, image, under("vit.layers.*", *VIT_LAYER)),
    Family("deit", "DeiTForImageClassification", IMAGE, VIT, image, under("deit.layers.*", *VIT_LAYER)),
    Family(
        "beit", "BeitForImageClassification", IMAGE, {**VIT, "use_relative_position_bias": True}, image,
        under("beit.layers.*", *VIT_LAYER),
    ),
    Family(
        "dinov2", "Dinov2ForImageClassification", IMAGE, {**VIT, "mlp_ratio": 2}, image,
        under("dinov2.encoder.layer.*", *VIT_LAYER),
    ),
    Family(
        "swin", "SwinForImageClassification", IMAGE,
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "mlp_ratio": 2.0, "num_labels": LABELS}, image,
        under("swin.encoder.layers.*", *(f"blocks.*.{name}" for name in VIT_LAYER), "downsample.reduction"),
    ),
    Family(
        "clip", "CLIPModel", "AutoModelForZeroShotImageClassification",
        {"text_config": {**LM, "projection_dim": 16}, "vision_config": {**VIT, "projection_dim": 16},
         "projection_dim": 16},
        image_and_text,
        under("text_model.encoder.layers.*", *CLIP_LAYER) | under("vision_model.encoder.layers.*", *CLIP_LAYER),
        others={"CLIPTextModel": 0.5, "CLIPVisionModelWithProjection": 0.5, "CLIPForImageClassification": 0.5},
    ),
    Family(
        "t5", "T5ForConditionalGeneration", SEQ2SEQ, T5, translation, _t5("wi", "wo"),
        others={"T5EncoderModel": 12 / 32},
    ),
    Family(
        "t5-gated", "T5ForConditionalGeneration", SEQ2SEQ, {**T5, "feed_forward_proj": "gated-gelu"}, translation,
        _t5("wi_0", "wi_1", "wo"),
    ),
    Family(
        "bart", "BartForConditionalGeneration", SEQ2SEQ, BART, translation,
        under("model.encoder.layers.*", *BART_LAYER) | under("model.decoder.layers.*", *BART_DECODER), others={TEXT: 1},
    ),
    Family(
        "whisper", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq", WHISPER, speech,
        under("model.encoder.layers.*", *BART_LAYER) | under("model.decoder.layers.*", *BART_DECODER),
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", CAUSAL,
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}, next_token,
        under("transformer.h.*", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), others={TEXT: 1},
    ),
    Family(
        "opt", "OPTForCausalLM", CAUSAL, {**LM, "ffn_dim": MIDDLE, "word_embed_proj_dim": 16}, next_token,
        under("model.decoder.layers.*", *BART_LAYER),
    ),
    Family(
        "llama", "LlamaForCausalLM", CAUSAL, LLAMA, next_token, under("model.layers.*", *LLAMA_LAYER), others={TEXT: 1}
    ),
    Family("qwen2", "Qwen2ForCausalLM", CAUSAL, LLAMA, next_token, under("model.layers.*", *LLAMA_LAYER)),
    Family(
        "qwen3-tied", "Qwen3ForCausalLM", CAUSAL, {**LLAMA, "tie_word_embeddings": True}, next_token,
        under("model.layers.*", *LLAMA_LAYER),
    ),
    Family("gemma2", "Gemma2ForCausalLM", CAUSAL, LLAMA, next_token, under("model.layers.*", *LLAMA_LAYER)),
    Family(
        "phi3", "Phi3ForCausalLM", CAUSAL, LLAMA, next_token,
        under("model.layers.*", "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    Family(
        "gpt-neox", "GPTNeoXForCausalLM", CAUSAL, LM, next_token,
        under(
            "gpt_neox.layers.*", "attention.query_key_value", "attention.dense",
            "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
        ),
    ),
    Family(
        "mixtral", "MixtralForCausalLM", CAUSAL, {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        next_token, under("model.layers.*", *projections("self_attn", "q k v o")) | EXPERTS,
    ),
    Family(
        "qwen2-moe", "Qwen2MoeForCausalLM", CAUSAL,
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 24}, next_token,
        under(
            "model.layers.*", *projections("self_attn", "q k v o"), *projections("mlp.shared_expert", "gate up down")
        ) | EXPERTS,
    ),
    Family(
        "wav2vec2", "Wav2Vec2ForSequenceClassification", "AutoModelForAudioClassification",
        {**BERT, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "mask_time_prob": 0.0,
         "classifier_proj_size": 16}, sound,
        under(
            "wav2vec2.encoder.layers.*", *projections("attention", "q k v out"),
            "feed_forward.intermediate_dense", "feed_forward.output_dense",
        ),
    ),
    Family(
        "segformer", "SegformerForImageClassification", IMAGE,
        {"num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4],
         "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [4, 2], "decoder_hidden_size": 16, "mlp_ratios": [2, 2],
         "num_labels": LABELS}, image,
        under("segformer.stages.*.blocks.*", *VIT_LAYER, "attention.sequence_reduction.sequence_reduction")
        | {"segformer.stages.*.patch_embeddings.proj"},
    ),
    Family(
        "convnext", "ConvNextForImageClassification", IMAGE,
        {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": LABELS}, image,
        under("convnext.encoder.stages.*", "layers.*.pwconv1", "layers.*.pwconv2", "downsampling_layer.1"),
    ),
    Family(
        "resnet", "ResNetForImageClassification", IMAGE,
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic", "num_labels": LABELS}, image,
        under("resnet.encoder.stages.*.layers.*", "layer.*.convolution", "shortcut.convolution"),
    ),
    Family(
        "regnet", "RegNetForImageClassification", IMAGE,
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 8, "num_labels": LABELS}, image,
        under("regnet.encoder.stages.*.layers.*", "layer.*.convolution", "layer.*.attention.0", "layer.*.attention.2",
              "shortcut.convolution"),
    ),
    Family(
        "mobilenet_v1", "MobileNetV1ForImageClassification", IMAGE, {"depth_multiplier": 0.25, "num_labels": LABELS}, image,
        under("mobilenet_v1.layer.*", "convolution"),
    ),
    Family(
        "mobilenet_v2", "MobileNetV2ForImageClassification", IMAGE, {"depth_multiplier": 0.5, "num_labels": LABELS}, image,
        under("mobilenet_v2.layer.*", "expand_1x1.convolution", "reduce_1x1.convolution"),
    ),
]  # fmt: skip

BY_NAME = {family.name: family for family in FAMILIES}


def make_linear(kind: str = "Linear", n: int = 12, m: int = 20, bias: bool = True) -> nn.Module:
    layer: nn.Module = Conv1D(m, n) if kind == "Conv1D" else nn.Linear(n, m, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer
