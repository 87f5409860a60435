"""Folders with stacks of experts load without the package, by the file that lies in them, and are saved from there again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from hf_cuttlefish import factorize
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.saving.doors import STACKS_TEXT, STANDALONE_FILE, STANDALONE_TEXT
from launch import PLAIN
from tiny_experts import build, stacks, tokens
from tiny_models import aligned

NAMES = ("mixtral", "gpt-oss", "llama4", "jetmoe")

CHILD = """
import json, pathlib, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_cuttlefish":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch, transformers as hf
from safetensors.torch import load_file
torch.set_num_threads(1)
hf.utils.logging.disable_progress_bar()
root, found = pathlib.Path(sys.argv[1]), {}
for name in sys.argv[2:]:
    wanted = load_file(root / f"{name}.tensors")
    def answers(folder):
        model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, experts_implementation="eager")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        low = [n for n, m in model.named_modules() if type(m).__name__ in ("LowRankStack", "LowRankLinear")]
        with torch.no_grad():
            return model, low, torch.equal(model(input_ids=wanted["input_ids"]).logits, wanted["logits"])
    model, low, same = answers(root / name)
    model.save_pretrained(root / f"{name}-again")
    again, _, same_again = answers(root / f"{name}-again")
    found[name] = {"low": low, "same": same, "same again": same_again}
broken = json.loads((root / "mixtral" / "config.json").read_text())
broken["quantization_config"]["ranks"] = {"model.layers.0.mlp.experts.gate_up_proj": 1000}
(root / "broken").mkdir()
for file in (root / "mixtral").iterdir():
    (root / "broken" / file.name).write_bytes(file.read_bytes())
(root / "broken" / "config.json").write_text(json.dumps(broken))
try:
    hf.AutoModelForCausalLM.from_pretrained(root / "broken", trust_remote_code=True)
except ValueError as error:
    found["broken"] = str(error)
(root / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    layers = {}
    for name in NAMES:
        model = build(name)
        linear = ["model.layers.0.self_attn.o_proj"] if name == "mixtral" else []
        factorize(model, dict.fromkeys([*stacks(model), *linear], 4))
        layers[name] = list(low_rank_layers(model))
        model.save_pretrained(root / name)
        ids = tokens()["input_ids"]
        with torch.no_grad():
            save_file({"input_ids": ids, "logits": model(input_ids=ids).logits}, root / f"{name}.tensors")
    environment = {**PLAIN, "HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(root), *NAMES],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads((root / "found.json").read_text()), layers


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_loads_without_the_package(found, name):
    root, answers, layers = found
    assert set(answers[name]["low"]) == set(layers[name]) and answers[name]["same"] and answers[name]["same again"]
    assert (root / name / STANDALONE_FILE).read_text() == STACKS_TEXT
    assert (root / f"{name}-again" / STANDALONE_FILE).read_text() == STACKS_TEXT
    assert os.listdir(root / f"{name}-again")


def test_what_was_saved_there_loads_with_the_package(found):
    root, _, _ = found
    from transformers import AutoModelForCausalLM

    one, two = (
        aligned(AutoModelForCausalLM.from_pretrained(root / name, experts_implementation="eager"))
        for name in ("mixtral", "mixtral-again")
    )
    assert torch.equal(one(**tokens()).logits, two(**tokens()).logits) and len(low_rank_layers(two)) == 5


def test_a_rank_that_no_expert_can_have_is_refused(found):
    assert "a rank of experts is 1000: it must be a whole number from 1 to 32" in found[1]["broken"]


def test_folders_without_experts_have_the_short_text(tmp_path):
    model = build("mixtral")
    factorize(model, {"model.layers.0.self_attn.o_proj": 4})
    model.save_pretrained(tmp_path)
    assert (tmp_path / STANDALONE_FILE).read_text() == STANDALONE_TEXT != STACKS_TEXT
