"""A dozen classes of different families through the checks of benchmarks/compatibility.py, found there by themselves.

All of them: `python benchmarks/compatibility.py`; the last full run is docs/compatibility.md.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compatibility as matrix  # noqa: E402

from hf_cuttlefish import factorize  # noqa: E402
from hf_cuttlefish.decide.targets import find_targets, lost_when_saved  # noqa: E402

CLASSES = matrix.model_classes()

PASSING = [
    "BloomForCausalLM",
    "MPNetForMaskedLM",
    "LayoutLMForTokenClassification",
    "LongT5ForConditionalGeneration",
    "MambaForCausalLM",
    "xLSTMModel",
    "DeepseekV3ForCausalLM",
    "Wav2Vec2ForCTC",
    "ASTForAudioClassification",
    "YolosForObjectDetection",
    "SamModel",
    "LlavaForConditionalGeneration",
]
"""Encoders, decoders, both, state spaces, experts, audio, vision and images with text; not those of tiny_models."""


def test_the_classes_come_from_the_auto_mappings():
    assert len(CLASSES) > 1500
    assert CLASSES["BertForMaskedLM"] == ("bert", "AutoModelForMaskedLM")
    assert CLASSES["ViTForImageClassification"][1] == "AutoModelForImageClassification"
    assert set(PASSING) <= set(CLASSES)


@pytest.mark.parametrize("name", PASSING)
def test_a_class_passes_every_step(name):
    result = matrix.check(name, *CLASSES[name])
    assert result["status"] == matrix.PASSES, result["reason"]
    assert result["layers"] > 0 and result["trained"] > 0 and result["parameters"] < matrix.MOST_PARAMETERS


def test_a_model_whose_init_weights_fills_every_bias_is_loaded():
    result = matrix.check("OneFormerModel", *CLASSES["OneFormerModel"])
    assert result["status"] == matrix.NOT_RUN, result["reason"]  # saved, loaded and merged; no inputs for it are known


def test_a_model_without_such_layers_is_refused_with_a_reason():
    result = matrix.check("ResNetForImageClassification", *CLASSES["ResNetForImageClassification"])
    assert result["status"] == matrix.REFUSED and "finds no nn.Linear" in result["reason"]


def test_the_check_finds_what_is_wrong(monkeypatch):
    """A merge that forgets, or a plan that changes: the matrix must not pass whatever happens."""
    monkeypatch.setattr(matrix, "merge", lambda model: model)
    result = matrix.check("BertModel", *CLASSES["BertModel"])
    assert result["status"] == matrix.FAILS and result["reason"] == "merge: something stays factorized"


@pytest.mark.parametrize(("name", "layer"), [("Kimi_K25Model", "attn.q_proj"), ("Inkling2Model", "sconv.weight_proj")])
def test_layers_that_are_stored_in_another_layout_stay_dense(name, layer):
    """Their factors would not survive save_pretrained, which is too late to find out; naming them is an error at once."""
    model = matrix.build_tiny(getattr(hf, name), CLASSES[name][0])[0]
    layers = [n for n, m in model.named_modules() if n.endswith(layer) and isinstance(m, torch.nn.Linear)]
    assert layers and lost_when_saved(model, layers) == layers
    assert find_targets(model) and not set(layers) & set(find_targets(model))
    with pytest.raises(ValueError, match="would be lost by save_pretrained"):
        factorize(model, {layers[0]: 2})


def test_the_document_is_what_the_results_say():
    data = json.loads(matrix.RESULTS.read_text("utf-8"))
    assert matrix.DOCS.read_text("utf-8") == matrix.write_docs(data["results"], data["versions"], data["classes"])
