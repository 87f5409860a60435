"""A dense folder out of a factorized model: nothing of ours in it, the same outputs, and the model as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from hf_cuttlefish import LowRankLinear, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.saving.merged import save_merged
from tiny_models import BY_NAME, RANK, aligned, assert_close, outputs

FRESH = """
import json, sys, torch, transformers
for folder, cls, batch in json.loads(sys.argv[1]):
    model = getattr(transformers, cls).from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(**{k: torch.tensor(v) for k, v in batch.items()}).logits
    print(json.dumps(out.tolist()))
assert not [m for m in sys.modules if m.startswith("hf_cuttlefish")]
"""


def factorized(name: str) -> hf.PreTrainedModel:
    model = BY_NAME[name].build()
    factorize(model, dict.fromkeys(find_targets(model), RANK))
    return model


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "clip", "llama", "deberta-v2"])
def test_outputs_are_equal_and_the_model_stays_factorized(name, tmp_path):
    family, model = BY_NAME[name], factorized(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = {key: id(parameter) for key, parameter in model.named_parameters()}
    note = dict(model.config.quantization_config)
    save_merged(model, tmp_path)
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == objects
    assert model.config.quantization_config == note
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for path in tmp_path.iterdir():
        assert b"cuttlefish" not in path.read_bytes() and b".down.weight" not in path.read_bytes()
    dense = aligned(type(model).from_pretrained(tmp_path).eval())
    assert not any(isinstance(m, LowRankLinear) for m in dense.modules())
    assert "quantization_config" not in dense.config.to_dict()
    assert_close(outputs(dense, family.inputs()), outputs(model, family.inputs()), 1e-4)


def test_a_process_without_us_loads_it(tmp_path):
    work = []
    for name in ("bert", "gpt2"):
        model = factorized(name)
        save_merged(model, tmp_path / name)
        batch = {"input_ids": torch.arange(3, 9)[None]}
        work.append((model, batch, [str(tmp_path / name), type(model).__name__, {"input_ids": [list(range(3, 9))]}]))
    command = [sys.executable, "-c", FRESH, json.dumps([arguments for *_, arguments in work])]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    for (model, batch, _), line in zip(work, run.stdout.splitlines(), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(json.loads(line)), model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_hooks_gradients_and_shards(tmp_path):
    model = factorized("bert")
    calls = []
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: calls.append(1))
    outputs(model, BY_NAME["bert"].inputs())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    save_merged(model, tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    query = "bert.encoder.layer.0.attention.self.query"
    saved = load_file(tmp_path / index["weight_map"][f"{query}.weight"])[f"{query}.weight"]
    torch.testing.assert_close(saved, model.get_submodule(query).product())
    assert calls == [1] and all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_half_precision_and_a_compiled_model(tmp_path):
    model = factorized("bert").to(torch.bfloat16)
    save_merged(torch.compile(model), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_merged(tmp_path):
    with pytest.raises(ValueError, match="no factorized layer to merge: use save_pretrained"):
        save_merged(BY_NAME["bert"].build(), tmp_path)
    with pytest.raises(TypeError, match="models of transformers, got Sequential"):
        save_merged(torch.nn.Sequential(LowRankLinear(4, 4, 2)), tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file: give a folder"):
        save_merged(factorized("bert"), file)
    model = factorized("bert")
    model.bert.encoder.layer[1].output.dense.to("meta")
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense is on the meta device"):
        save_merged(model, tmp_path / "out")
    assert file.read_text() == "mine" and [p.name for p in Path(tmp_path).iterdir()] == ["file"]


def test_peft_says_what_to_do(tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(factorized("bert"), LoraConfig(r=2, target_modules=["query.down", "query.up"]))
    with pytest.raises(TypeError, match="merge_and_unload"):
        save_merged(lora, tmp_path)
    save_merged(lora.merge_and_unload(), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
