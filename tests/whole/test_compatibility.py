"""A dozen classes of different families through the checks of benchmarks/compatibility, found there by themselves.

All of them: `python -m benchmarks.compatibility`; the last full run is docs/compatibility.md.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from benchmarks.compatibility import __main__ as matrix
from benchmarks.compatibility import checks, outcomes, pages, tiny
from benchmarks.compatibility.classes import model_classes
from hf_cuttlefish import factorize
from hf_cuttlefish.decide import vocabulary as vocabulary_file
from hf_cuttlefish.decide.stored import lost_when_saved
from hf_cuttlefish.decide.targets import find_targets

CLASSES = model_classes()

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
    "MaskFormerForInstanceSegmentation",
]
"""Encoders, decoders, both, state spaces, experts, audio, vision, images with text, layers in plain lists; not those of tiny_models."""

KINDS = {
    "GPT2LMHeadModel": ({"Conv1D"}, {"tables": 1, "tied": 1, "untied": 0, "trained": 1}),
    "LlamaForCausalLM": ({"Linear"}, {"tables": 1, "tied": 0, "untied": 1, "trained": 2}),
    "GptOssForCausalLM": ({"Linear", "Experts"}, {"tables": 1, "tied": 0, "untied": 1, "trained": 2}),
    "RegNetForImageClassification": ({"Conv2d", "Conv2d, grouped"}, "finds no table of tokens"),
    "MobileNetV2Model": ({"Conv2d"}, "finds no table of tokens"),
    "Gemma4Model": ({"Linear"}, "Gemma4Model.forward reads language_model.embed_tokens.weight"),
}
"""Class -> words of its layers' kinds, and what embeddings=True takes, or why it takes nothing."""


def test_the_classes_come_from_the_auto_mappings():
    assert len(CLASSES) > 1500
    assert CLASSES["BertForMaskedLM"] == ("bert", "AutoModelForMaskedLM")
    assert CLASSES["ViTForImageClassification"][1] == "AutoModelForImageClassification"
    assert set(PASSING) <= set(CLASSES)


@pytest.mark.parametrize("name", PASSING)
def test_a_class_passes_every_step(name):
    result = checks.check(name, *CLASSES[name])
    assert result["status"] == outcomes.PASSES, result["reason"]
    assert result["layers"] > 0 and result["trained"] > 0 and result["parameters"] < tiny.MOST_PARAMETERS


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_layer_and_the_vocabulary_pass_and_are_told_apart(name):
    kinds, vocabulary = KINDS[name]
    result = checks.check(name, *CLASSES[name])
    assert result["status"] == outcomes.PASSES, result["reason"]
    assert set(result["kinds"]) == kinds and sum(result["kinds"].values()) == result["layers"]
    if isinstance(vocabulary, dict):
        assert result["vocabulary"] == vocabulary
    else:
        assert vocabulary in result["vocabulary"]


def test_the_check_finds_what_is_wrong_with_a_vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary_file, "_who_reads", lambda model, name: "")
    result = checks.check("Gemma4Model", *CLASSES["Gemma4Model"])
    assert result["status"] == outcomes.FAILS and result["reason"].startswith("vocabulary: RuntimeError")


def test_a_model_whose_init_weights_fills_every_bias_is_loaded():
    result = checks.check("OneFormerModel", *CLASSES["OneFormerModel"])
    assert result["status"] == outcomes.NOT_RUN, result[
        "reason"
    ]  # saved, loaded and merged; no inputs for it are known


def test_a_model_without_such_layers_is_refused_with_a_reason():
    result = checks.check("SqueezeBertModel", *CLASSES["SqueezeBertModel"])
    assert result["status"] == outcomes.REFUSED and "finds no nn.Linear" in result["reason"]


def test_the_check_finds_what_is_wrong(monkeypatch):
    """A merge that forgets, or a plan that changes: the matrix must not pass whatever happens."""
    monkeypatch.setattr(checks, "merge", lambda model: model)
    result = checks.check("BertModel", *CLASSES["BertModel"])
    assert result["status"] == outcomes.FAILS and result["reason"] == "merge: something stays factorized"


@pytest.mark.parametrize(("name", "layer"), [("Kimi_K25Model", "attn.q_proj"), ("Inkling2Model", "sconv.weight_proj")])
def test_layers_that_are_stored_in_another_layout_stay_dense(name, layer):
    """Their factors would not survive save_pretrained, which is too late to find out; naming them is an error at once."""
    model = tiny.build_tiny(getattr(hf, name), CLASSES[name][0])[0]
    layers = [n for n, m in model.named_modules() if n.endswith(layer) and isinstance(m, torch.nn.Linear)]
    assert layers and lost_when_saved(model, layers) == layers
    assert find_targets(model) and not set(layers) & set(find_targets(model))
    with pytest.raises(ValueError, match="would be lost by save_pretrained"):
        factorize(model, {layers[0]: 2})


def test_a_run_goes_on_with_what_is_missing_or_stale():
    """What a record of an older transformers says is no news, but only --stale runs it again."""
    three = dict(list(CLASSES.items())[:3])
    results = matrix.Results(Path("nowhere"), three)
    names, new = list(three), {"status": outcomes.PASSES, "transformers": hf.__version__}
    results.known = {names[0]: new, names[1]: {**new, "transformers": "5.0.0"}}
    assert list(matrix.choose(matrix.parse([]), results)) == [names[2]]
    assert set(matrix.choose(matrix.parse(["--stale"]), results)) == set(names[1:])


def test_the_document_is_what_the_results_say():
    data = json.loads(pages.RESULTS.read_text("utf-8"))
    assert pages.DOCS.read_text("utf-8") == pages.write_docs(data["results"], data["versions"], data["classes"])
