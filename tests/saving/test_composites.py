"""Models made of factorized parts: saved, loaded, merged."""

import pytest
import torch
import transformers as hf
from torch import nn

from hf_cuttlefish import LowRankLinear, factorize, merge, save_merged
from tiny_models import BY_NAME

TEXT = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"vocab_size": 99, "max_position_embeddings": 32},
}
IDS = torch.arange(3, 11)[None]


def low(model: nn.Module) -> int:
    return sum(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.fixture
def halves(tmp_path):
    """A dense and a factorized BERT of the same sizes, in folders."""
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**TEXT))
    model.save_pretrained(tmp_path / "dense")
    factorize(model, {n: 6 for n, m in model.named_modules() if type(m) is nn.Linear and "encoder.layer" in n})
    model.save_pretrained(tmp_path / "low")
    return tmp_path


@pytest.mark.parametrize(
    ("encoder", "decoder", "layers"), [("low", "dense", 12), ("dense", "low", 12), ("low", "low", 24)]
)
def test_encoder_and_decoder(halves, encoder, decoder, layers):
    made = hf.EncoderDecoderModel.from_encoder_decoder_pretrained(halves / encoder, halves / decoder).eval()
    assert low(made) == layers
    made.save_pretrained(halves / "both")
    loaded = hf.EncoderDecoderModel.from_pretrained(halves / "both").eval()
    assert low(loaded) == layers and (low(loaded.encoder), low(loaded.decoder)) == (
        12 * (encoder == "low"),
        12 * (decoder == "low"),
    )
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    expected = made(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)
    save_merged(loaded, halves / "merged")
    dense = hf.EncoderDecoderModel.from_pretrained(halves / "merged").eval()
    assert low(dense) == 0
    torch.testing.assert_close(dense(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    merge(loaded)
    loaded.save_pretrained(halves / "again")
    assert low(hf.EncoderDecoderModel.from_pretrained(halves / "again")) == 0


def test_two_encoders(halves):
    vit = BY_NAME["vit"].build().base_model
    vit.save_pretrained(halves / "vit")
    load = hf.VisionTextDualEncoderModel
    made = load.from_vision_text_pretrained(str(halves / "vit"), str(halves / "low")).eval()
    made.save_pretrained(halves / "both")
    loaded = load.from_pretrained(halves / "both").eval()
    assert low(made) == low(loaded) == low(loaded.text_model) == 12
    torch.testing.assert_close(loaded.get_text_features(IDS)[0], made.get_text_features(IDS)[0], rtol=0, atol=0)


def test_a_part_is_taken_out(halves):
    """A model out of a composite is saved as what it is, and so is a dense one made from a factorized one's config."""
    made = hf.EncoderDecoderModel.from_encoder_decoder_pretrained(halves / "low", halves / "dense")
    made.encoder.save_pretrained(halves / "encoder")
    assert low(hf.AutoModel.from_pretrained(halves / "encoder")) == 12
    made.decoder.save_pretrained(halves / "decoder")
    assert low(hf.AutoModelForCausalLM.from_pretrained(halves / "decoder")) == 0
    hf.BertModel(made.encoder.config).save_pretrained(halves / "fresh")
    assert low(hf.AutoModel.from_pretrained(halves / "fresh")) == 0
