"""A factorized folder in three places: with the package, with trust_remote_code and without it, and with neither."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from hf_cuttlefish import factorize
from hf_cuttlefish.saving import modeling_low_rank as standalone
from hf_cuttlefish.saving import standalone_layers
from hf_cuttlefish.saving.doors import STANDALONE_FILE, STANDALONE_TEXT

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 99, "max_position_embeddings": 32}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 99,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}
GEMMA = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TABLES = {
    "vocabulary": ["bert.embeddings.word_embeddings"],
    "vocabulary, three tables": ["shared"],
    "vocabulary, scaled": ["model.embed_tokens"],
}
GROUPED = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 8, "num_labels": 4}
MODELS = {
    "encoder": ("AutoModelForSequenceClassification", lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT))),
    "decoder": ("AutoModelForCausalLM", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))),
    "conv1d": ("AutoModelForCausalLM", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))),
    "vision": ("AutoModelForImageClassification", lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE))),
    "convolutions": (
        "AutoModelForImageClassification",
        lambda: hf.RegNetForImageClassification(hf.RegNetConfig(**GROUPED)),
    ),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5))),
    "vocabulary": ("AutoModelForMaskedLM", lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT))),
    "vocabulary, three tables": ("AutoModelForSeq2SeqLM", lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5))),
    "vocabulary, scaled": ("AutoModelForCausalLM", lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA))),
    "of parts": ("AutoModelForSeq2SeqLM", lambda: hf.EncoderDecoderModel(config=parts())),
    "dual encoder": ("AutoModel", lambda: hf.VisionTextDualEncoderModel(config=dual())),
}


def parts():
    decoder = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    both = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**TEXT), decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    return both


def dual():
    configs = hf.ViTConfig(**IMAGE), hf.BertConfig(**TEXT)
    return hf.VisionTextDualEncoderConfig.from_vision_text_configs(*configs, projection_dim=16)


def batch(name):
    ids = torch.arange(3, 11)[None]
    image = torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)
    return {
        "vision": {"pixel_values": image},
        "convolutions": {"pixel_values": image},
        "encoder-decoder": {"input_ids": ids, "decoder_input_ids": ids.clone()},
        "vocabulary, three tables": {"input_ids": ids, "decoder_input_ids": ids.clone()},
        "of parts": {"input_ids": ids, "decoder_input_ids": ids.clone()},
        "dual encoder": {"input_ids": ids, "pixel_values": image},
    }.get(name, {"input_ids": ids})


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One folder a model, with what it should answer; and some that were changed."""
    root = tmp_path_factory.mktemp("folders")
    for name, (auto, make) in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        kinds = [(n, type(m).__name__) for n, m in model.named_modules()]
        blocks = (".layer.", ".layers.", "h.", ".block.")
        layers = [
            n for n, kind in kinds if kind in ("Linear", "Conv1D", "Conv2d") and any(b in f".{n}" for b in blocks)
        ]
        layers += TABLES.get(name, [])
        factorize(model, dict.fromkeys(layers, 6))
        model.save_pretrained(root / name)
        with torch.no_grad():
            out = model(**batch(name))
        wanted = {"logits": out.logits if "logits" in out else out.logits_per_image, **batch(name)}
        save_file(wanted, root / name / "wanted.tensors")
        facts = {"auto": auto, "class": type(model).__name__, "layers": len(layers)}
        (root / name / "facts.json").write_text(json.dumps(facts))
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(root / "decoder")  # a pipeline asks for one
    for name in ("changed", "note deleted", "half", "other rank"):
        shutil.copytree(root / "encoder", root / name)
    with open(root / "changed" / STANDALONE_FILE, "a") as file:
        file.write("\nimport pathlib\npathlib.Path(__file__).with_name('ran').touch()\nprint('RAN')\n")
    config = json.loads((root / "encoder" / "config.json").read_text())
    del config["quantization_config"]
    (root / "note deleted" / "config.json").write_text(json.dumps(config))
    weights = load_file(root / "half" / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.up.weight"]
    save_file(weights, root / "half" / "model.safetensors", {"format": "pt"})
    config = json.loads((root / "encoder" / "config.json").read_text())
    config["quantization_config"]["ranks"]["bert.encoder.layer.1.output.dense"] = 5
    (root / "other rank" / "config.json").write_text(json.dumps(config))
    return root


CHILD = """
import copy, json, pathlib, pickle, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_cuttlefish":
            raise ModuleNotFoundError(name)
place, root, again = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
if place == "import":
    import hf_cuttlefish
else:
    sys.meta_path.insert(0, Hidden())
    try:
        import hf_cuttlefish
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("the package is here")
import torch, transformers as hf
from safetensors.torch import load_file
torch.set_num_threads(1)
hf.utils.logging.disable_progress_bar()
trust = {"trust_remote_code": True} if place == "trust" else {}
def low(model):
    names = [type(module).__name__ for module in model.modules()]
    return sum(name.startswith("LowRank") and name != "LowRankOutput" for name in names)
def resized(name):
    model = hf.AutoModelForMaskedLM.from_pretrained(root / name, **trust)
    model.resize_token_embeddings(107)
    return list(model(torch.arange(3, 9)[None]).logits.shape)
def answers(model, wanted):
    with torch.no_grad():
        out = model(**{k: v for k, v in wanted.items() if k != "logits"})
    return (out["logits" if "logits" in out else "logits_per_image"] - wanted["logits"]).abs().max().item()
def tried(work):
    try:
        return work()
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"}
def load(cls, name, full=False):
    def work():
        model = cls.from_pretrained(root / name, **trust)
        found = {"low": low(model), "class": type(model).__name__}
        if full:
            wanted = load_file(root / name / "wanted.tensors")
            found["off"] = answers(model, wanted)
            model.save_pretrained(again / name)
            found["again"] = answers(cls.from_pretrained(again / name, **trust), wanted)
            found["copied"] = answers(pickle.loads(pickle.dumps(copy.deepcopy(model))), wanted)
            found["files"] = sorted(path.name for path in (again / name).iterdir())
            own, new = (json.loads((f / name / "config.json").read_text()) for f in (root, again))
            found["same note"] = own["quantization_config"] == new["quantization_config"] and own["auto_map"] == new["auto_map"]
        return found
    return tried(work)
results = {}
for folder in sorted(root.iterdir()):
    facts = json.loads((folder / "facts.json").read_text())
    results[folder.name] = {"auto": load(getattr(hf, facts["auto"]), folder.name, full=(folder / "whole").exists())}
    if (folder / "whole").exists():
        results[folder.name]["concrete"] = load(getattr(hf, facts["class"]), folder.name)
results["resized"] = tried(lambda: resized("vocabulary"))
results["base"] = load(hf.AutoModel, "encoder")
results["parts"] = tried(lambda: {"low": low(hf.EncoderDecoderModel.from_encoder_decoder_pretrained(root / "encoder", root / "encoder"))})
results["pipeline"] = tried(lambda: {"low": low(hf.pipeline("feature-extraction", model=str(root / "decoder"), device="cpu", **trust).model)})
results["quantized"] = tried(lambda: {"low": low(hf.AutoModel.from_pretrained(root / "encoder", quantization_config=hf.QuantoConfig(), **trust))})
config = hf.AutoConfig.from_pretrained(root / "decoder", **trust)
results["vllm"] = {"quantized": getattr(config, "quantization_config", None) is not None, "first": list(getattr(config, "auto_map", ["", ""]))[:2]}
if place == "trust":
    with torch.device("meta"):
        model = hf.AutoModel.from_config(config, dtype=torch.bfloat16, **trust)
    keys = {key.removeprefix("model.") for key in load_file(root / "decoder" / "model.safetensors") if key != "lm_head.weight"}
    results["vllm"] |= {
        "low": low(model), "class": type(model).__name__, "backend": type(model).is_backend_compatible(),
        "plan": list((model._tp_plan or {}).items()), "config plan": list((model.config.base_model_tp_plan or {}).items()),
        "names": keys == set(model.state_dict()), "linears": [n for n, m in model.named_modules() if type(m) is torch.nn.Linear],
    }
    model = hf.AutoModelForCausalLM.from_pretrained(root / "decoder", **trust)
    results["generates"] = list(model.generate(torch.arange(3, 9)[None], max_new_tokens=3, min_new_tokens=3).shape)
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory) -> dict[str, dict]:
    for name in MODELS:
        (folders / name / "whole").touch()
    found = {}
    for place in ("import", "trust", "neither"):
        work = tmp_path_factory.mktemp(place)
        root = str(Path(__file__).parents[2]) if place == "import" else ""
        environment = {
            **os.environ,
            "PYTHONPATH": root,
            "HF_MODULES_CACHE": str(work / "modules"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-c", CHILD, place, str(folders), str(work / "again")]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        found[place] = json.loads(done.stdout.split("RESULTS")[1]) | {"out": done.stdout, "err": done.stderr}
    return found


@pytest.mark.parametrize("place", ["import", "trust"])
def test_a_vocabulary_is_resized(results, place):
    assert results[place]["resized"] == [1, 6, 107]


def refused(result) -> bool:
    """By words that name the package and what to do."""
    error = result.get("error", "")
    return all(
        words in error for words in ("made low rank by hf_cuttlefish", "pip install hf-cuttlefish", "trust_remote_code")
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", ["import", "trust"])
def test_it_loads_rightly_is_saved_again_and_loads_again(results, folders, place, name):
    found, facts = results[place][name]["auto"], json.loads((folders / name / "facts.json").read_text())
    assert found.get("error") is None and found["low"] == facts["layers"] > 5 and found["class"] == facts["class"]
    assert max(found["off"], found["again"], found["copied"]) < 1e-5
    assert {"config.json", "model.safetensors", STANDALONE_FILE} <= set(found["files"]) and found["same note"]


@pytest.mark.parametrize("name", MODELS)
def test_with_neither_it_is_refused_by_name(results, name):
    assert refused(results["neither"][name]["auto"]) and refused(results["neither"][name]["concrete"])
    assert refused(results["trust"][name]["concrete"])  # a class of transformers runs no code of a folder
    assert results["import"][name]["concrete"]["low"] > 5


def test_other_ways_in(results):
    for way, layers in (("base", 12), ("pipeline", 14)):
        assert results["import"][way] == results["trust"][way] and results["trust"][way]["low"] == layers
        assert refused(results["neither"][way])
    assert results["import"]["parts"] == {"low": 24} and refused(results["neither"]["parts"])
    assert refused(results["neither"]["note deleted"]["auto"]) and refused(results["import"]["note deleted"]["auto"])
    assert "names no low-rank layers" in results["trust"]["note deleted"]["auto"]["error"]


def test_the_command_line_exit_code_is_not_0(folders, tmp_path):
    code = (
        CHILD.split("import torch")[0]
        + f"import transformers as hf\nhf.AutoModel.from_pretrained({str(folders / 'encoder')!r})"
    )
    command = [sys.executable, "-c", code, "neither", str(folders), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install hf-cuttlefish" in done.stderr.splitlines()[-4]


def test_a_changed_file_runs_where_it_is_trusted_and_nowhere_else(results):
    assert (
        results["import"]["changed"]["auto"]["low"] == 12
        and "is not the text that hf_cuttlefish writes" in results["import"]["err"]
    )
    assert refused(results["neither"]["changed"]["auto"])
    assert ["RAN" in results[place]["out"] for place in ("import", "trust", "neither")] == [False, True, False]


def test_the_import_takes_precedence(folders):
    """Even with trust_remote_code=True the file of the folder is not run: the class is the package's."""
    model = hf.AutoModel.from_pretrained(folders / "changed", trust_remote_code=True)
    assert type(model.encoder.layer[0].output.dense).__module__ == "hf_cuttlefish.layers.low_rank"
    assert not list(folders.rglob("ran"))


def test_weights_that_do_not_fit_are_refused(results):
    for place in ("import", "trust"):
        for name in ("half", "other rank"):
            error = results[place][name]["auto"]["error"]
            assert "layer.1.output.dense" in error or "size" in error, error


def test_quantization_config_is_refused_with_a_remedy(results):
    assert "load it without quantization_config and quantize the model then" in results["import"]["quantized"]["error"]
    assert "quantize the model then" in results["trust"]["quantized"]["error"]


def test_the_contract_of_vllms_transformers_backend(results):
    """Piece by piece: vLLM itself is not installed. It reads the config, makes AutoModel from it, and loads by name."""
    found = results["trust"]["vllm"]
    assert not found["quantized"] and found["first"] == ["AutoConfig", "AutoModel"]
    assert found["low"] == 14 and found["class"] == "LlamaModel" and found["backend"] and found["names"]
    assert results["trust"]["generates"] == [1, 9]
    for plan in (found["plan"], found["config plan"]):  # vLLM takes the first rule that a name begins with
        styles = {name: next((s for rule, s in plan if re.match(rule, name)), "replicate") for name in found["linears"]}
        for name in found["linears"]:
            rowwise = name.split(".")[-2] in ("o_proj", "down_proj")
            wanted = {"down": "rowwise", "up": "replicate"} if rowwise else {"down": "replicate", "up": "colwise"}
            assert styles[name] == wanted[name.split(".")[-1]], name


def test_vllm_can_tell_blocks_apart_whose_low_rank_layers_differ():
    """It fuses q, k and v of all blocks of one class whose children have the same names as it would those of the first: a dense first
    block made it fuse the low-rank ones of the others (vLLM 0.33), and their weights had no place."""
    model = hf.LlamaModel(hf.LlamaConfig(**{**TEXT, "num_hidden_layers": 3}))
    before, ids = set(model.state_dict()), torch.arange(3, 9)[None]
    names = [("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj",)]
    for layer, low in zip(model.layers[1:], names, strict=True):
        for name in low:
            pair = standalone_layers.LowRankLinear(getattr(layer.self_attn, name), 4)
            vars(pair.down).pop("bias")  # as `_settled` does
            setattr(layer.self_attn, name, pair)
    keys, wanted = set(model.state_dict()), model(ids).last_hidden_state
    standalone._told_apart(model)
    children = [tuple(name for name, _ in layer.self_attn.named_children()) for layer in model.layers]
    assert len(set(children)) == 3 and children[0] == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert set(model.state_dict()) == keys != before and torch.equal(model(ids).last_hidden_state, wanted)


def test_a_folder_from_before_loads_and_is_saved_as_one_of_today(folders, tmp_path):
    shutil.copytree(folders / "of parts", tmp_path / "old")
    (tmp_path / "old" / STANDALONE_FILE).unlink()
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    for settings in (config, config["encoder"], config["decoder"]):
        for key in ("transformers_weights", "auto_map"):
            settings.pop(key, None)
    del config["quantization_config"]  # a model of parts had no note of its own
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "old").eval()
    wanted = load_file(folders / "of parts" / "wanted.tensors")
    logits = wanted.pop("logits")
    torch.testing.assert_close(model(**wanted).logits, logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / STANDALONE_FILE).read_text() == STANDALONE_TEXT
    new, today = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "new", folders / "of parts"))
    assert new["quantization_config"] == today["quantization_config"]


def test_a_dense_model_saved_over_it_takes_the_file_away(folders, tmp_path):
    shutil.copytree(folders / "encoder", tmp_path / "model")
    MODELS["encoder"][1]().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / STANDALONE_FILE).exists()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert not {"auto_map", "transformers_weights", "quantization_config"} & set(config)
