"""Folders that disagree with themselves, ordinary use of a loaded model, checkpoints that choose the structure."""

import copy
import gc
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_cuttlefish import LowRankLinear, factorize, follow_checkpoints, merge
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers import low_rank as low_rank_file
from hf_cuttlefish.saving.loading import CuttlefishLoader, CuttlefishStructure, names_in, register
from tiny_models import BERT, BY_NAME, aligned, assert_close, assert_same, outputs, text

QUERY = "bert.encoder.layer.0.attention.self.query"
RANK = 4
Auto = hf.AutoModelForSequenceClassification
STRUCTURE = "quantization_config"


def make_bert(seed: int = 0, rank: int | None = RANK) -> hf.PreTrainedModel:
    model = BY_NAME["bert"].build(seed)
    if rank is not None:
        factorize(model, dict.fromkeys(find_targets(model), rank))
    return model


def count(model: nn.Module) -> int:
    return sum(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original")
    make_bert().save_pretrained(path)
    return path


@pytest.fixture
def rewrite(original, tmp_path) -> Callable[..., Path]:
    """Copies the folder with a change of config.json or of the tensors."""

    def change(config: Callable[[dict], Any] | None = None, tensors: Callable[[dict], Any] | None = None) -> Path:
        settings = json.loads((original / "config.json").read_text())
        weights = load_file(original / "model.safetensors")
        for part, function in ((settings, config), (weights, tensors)):
            if function is not None:
                function(part)
        (tmp_path / "config.json").write_text(json.dumps(settings))
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return change


# --- a folder whose config.json and tensors disagree ---


def ranks(**changes: Any) -> Callable[[dict], None]:
    return lambda config: config[STRUCTURE]["ranks"].update({QUERY: changes["to"]})


def to_dense(weights: dict[str, torch.Tensor]) -> None:
    for key in [key for key in weights if key.endswith(".down.weight")]:
        name = key.removesuffix(".down.weight")
        weights[f"{name}.weight"] = weights.pop(f"{name}.up.weight") @ weights.pop(key)
        weights[f"{name}.bias"] = weights.pop(f"{name}.up.bias")


def swap_factors(weights: dict[str, torch.Tensor]) -> None:
    down, up = f"{QUERY}.down.weight", f"{QUERY}.up.weight"
    weights[down], weights[up] = weights[up], weights[down]


DISAGREEMENTS: dict[str, tuple[dict[str, Callable[[dict], Any]], str]] = {
    "another rank": (
        {"config": ranks(to=3)},
        r"query has rank 3, and the weights hold rank 4: config.json and the tensors",
    ),
    "a huge rank": ({"config": ranks(to=10**12)}, "query has rank 1000000000000, and the weights hold rank 4"),
    "rank 0": ({"config": ranks(to=0)}, f"rank of '{QUERY}' is 0: it must be a whole number of at least 1"),
    "a negative rank": ({"config": ranks(to=-4)}, "is -4: it must be a whole number"),
    "a float": ({"config": ranks(to=4.0)}, "is 4.0: it must be a whole number"),
    "a bool": ({"config": ranks(to=True)}, "is True: it must be a whole number"),
    "a word": ({"config": ranks(to="4")}, "is '4': it must be a whole number"),
    "one layer is not named": (
        {"config": lambda c: c[STRUCTURE]["ranks"].pop(QUERY)},
        r"query \(rank 4\), and config.json does not say",
    ),
    "no ranks": ({"config": lambda c: c[STRUCTURE].pop("ranks")}, r"needs ranks \{module name: rank\}, got None"),
    "empty ranks": ({"config": lambda c: c[STRUCTURE].update(ranks={})}, "needs ranks"),
    "ranks in a list": ({"config": lambda c: c[STRUCTURE].update(ranks=[4])}, "needs ranks"),
    "other layers": (
        {"config": lambda c: c[STRUCTURE].update(ranks={"h.0.attn.c_attn": 4})},
        "names 1 factorized layers, such as 'h.0.attn.c_attn', and .* has none of them",
    ),
    "a norm": ({"config": lambda c: c[STRUCTURE].update(ranks={"bert.embeddings.LayerNorm": 4})}, "has none of them"),
    "newer": (
        {"config": lambda c: c[STRUCTURE].update(version=3)},
        r"has version 3, and this hf_cuttlefish reads up to 2: upgrade with `pip install -U hf-cuttlefish`",
    ),
    "a version that is none": (
        {"config": lambda c: c[STRUCTURE].update(version="1")},
        "has version '1', not a whole number",
    ),
    "unknown fields": ({"config": lambda c: c[STRUCTURE].update(bits=4)}, r"unknown fields \['bits'\]"),
    "one factor is missing": (
        {"tensors": lambda w: w.pop(f"{QUERY}.up.weight")},
        "query is factorized at rank 4, but the weights hold no .*query.up.weight",
    ),
    "all factors are missing": ({"tensors": to_dense}, r"is factorized at rank 4, but the weights hold no .*\.weight"),
    "factors exchanged": ({"tensors": swap_factors}, r"has rank 4, and the weights hold rank 32"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
@pytest.mark.parametrize("auto", [Auto, hf.AutoModel], ids=["head", "base"])
@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore_mismatched_sizes"])
def test_a_folder_that_disagrees_with_itself_is_an_error(rewrite, case, auto, ignore):
    """Also with ignore_mismatched_sizes, given for a new head: it must not let random factors through."""
    changes, message = DISAGREEMENTS[case]
    with pytest.raises(ValueError, match=message):
        auto.from_pretrained(rewrite(**changes), ignore_mismatched_sizes=ignore)


def test_a_huge_rank_is_refused_before_anything_is_allocated(rewrite):
    """Where no safetensors header speaks against it, the layer's own size does."""
    path = rewrite(config=ranks(to=10**12))
    weights = load_file(path / "model.safetensors")
    config = hf.AutoConfig.from_pretrained(path)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"the rank of .*query is 1000000000000: .*min\(32, 32\)"):
        hf.BertForSequenceClassification.from_pretrained(None, config=config, state_dict=weights)
    assert time.perf_counter() - started < 5


def test_names_under_the_legacy_names_of_a_file_are_checked_too(tmp_path):
    """ViT saves other names than its modules have."""
    model = BY_NAME["vit"].build()
    factorize(model, dict.fromkeys(find_targets(model), 4))
    model.save_pretrained(tmp_path)
    assert not set(load_file(tmp_path / "model.safetensors")) <= set(model.state_dict())
    settings = json.loads((tmp_path / "config.json").read_text())
    settings[STRUCTURE]["ranks"]["vit.layers.1.mlp.fc1"] = 6
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for auto in (hf.AutoModelForImageClassification, hf.AutoModel):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc1 has rank 6, and the weights hold rank 4"):
            auto.from_pretrained(tmp_path)


def test_without_the_note_nothing_loads_and_without_its_mark_transformers_reports_the_tensors(rewrite):
    """What transformers advises, to delete the note, is refused. A folder from before: dense; load_state_dict follows."""
    path = rewrite(config=lambda config: config.pop(STRUCTURE))
    with pytest.raises(ValueError, match=r"made low rank by hf_cuttlefish[\s\S]*does not help"):
        Auto.from_pretrained(path)
    path = rewrite(config=lambda config: [config.pop(key) for key in (STRUCTURE, "transformers_weights", "auto_map")])
    model, info = Auto.from_pretrained(path, output_loading_info=True)
    assert count(model) == 0 and f"{QUERY}.weight" in info["missing_keys"]
    assert {f"{QUERY}.down.weight", f"{QUERY}.up.weight"} <= set(info["unexpected_keys"])
    follow_checkpoints(model)
    model.load_state_dict(load_file(path / "model.safetensors"))
    assert_same(outputs(aligned(model), text()), outputs(make_bert(), text()))
    assert model.config.quantization_config["ranks"] == make_bert().config.quantization_config["ranks"]


def test_without_the_import_the_model_is_refused_by_name(original, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "cuttlefish")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "cuttlefish")
    with pytest.raises(ValueError, match="import hf_cuttlefish"):
        Auto.from_pretrained(original)
    register()
    assert AUTO_QUANTIZER_MAPPING["cuttlefish"] is CuttlefishLoader
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["cuttlefish"] is CuttlefishStructure
    register()  # again, without harm
    assert count(Auto.from_pretrained(original)) == 12


def test_a_fresh_process_needs_nothing_but_the_import(original):
    code = (
        "import sys, torch, hf_cuttlefish; from transformers import AutoModelForSequenceClassification as A;"
        "m = A.from_pretrained(sys.argv[1]).eval(); torch.set_num_threads(1);"
        "print(float(m(input_ids=torch.arange(3, 10)[None]).logits.detach().double().sum()))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(original)], capture_output=True, text=True, check=True)
    with torch.no_grad():
        expected = make_bert()(input_ids=torch.arange(3, 10)[None]).logits.double().sum()
    assert float(result.stdout.split()[-1]) == pytest.approx(float(expected), abs=1e-5)


# --- an ordinary model ---


def test_a_trainer_trains_and_saves_what_was_loaded(original, tmp_path):
    model = Auto.from_pretrained(original)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": text()["input_ids"][i % 2], "labels": i % 2} for i in range(8)]
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    hf.Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.endswith((".down.weight", ".up.weight"))} <= changed
    again = Auto.from_pretrained(tmp_path / "checkpoint-3")
    assert_same(outputs(aligned(again), text()), outputs(aligned(model.eval()), text()))


def test_it_converts_copies_and_moves_as_any_other(original):
    model = aligned(Auto.from_pretrained(original))
    expected = outputs(model, text())
    assert_close(outputs(copy.deepcopy(model).double(), text()), [t.double() for t in expected], 1e-4)
    assert_same(outputs(copy.deepcopy(model).double().float(), text()), expected)
    assert {p.dtype for p in copy.deepcopy(model).half().parameters()} == {torch.float16}
    assert {p.device.type for p in copy.deepcopy(model).to("meta").parameters()} == {"meta"}
    assert_same(outputs(aligned(Auto.from_pretrained(original, device_map="cpu")), text()), expected)
    eager = Auto.from_pretrained(original, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert_close(outputs(eager, text()), expected)


def test_loading_multiplies_nothing_out(tmp_path, monkeypatch):
    """ModernBERT's initialization reaches for `Wo.weight` of every block, also of a loaded one."""
    model = BY_NAME["modernbert"].build()
    factorize(model, dict.fromkeys(find_targets(model), 4))
    model.save_pretrained(tmp_path)
    calls = []
    monkeypatch.setattr(low_rank_file, "_multiply", lambda *a: calls.append(a))
    assert count(Auto.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)) == 8 and not calls


def test_layers_may_be_left_on_disk(original, tmp_path):
    """Their factors are on the meta device after loading, and not missing."""
    places = dict.fromkeys(["bert.embeddings", "bert.encoder.layer.0", "bert.pooler", "classifier"], "cpu")
    model = Auto.from_pretrained(
        original, device_map={**places, "bert.encoder.layer.1": "disk"}, offload_folder=str(tmp_path / "offloaded")
    )
    assert count(model) == 12 and model.bert.encoder.layer[1].output.dense.down.weight.is_meta
    assert_same(outputs(model, text()), outputs(aligned(Auto.from_pretrained(original)), text()))
    model.save_pretrained(tmp_path / "again")
    left, right = load_file(original / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_a_loaded_model_generates_the_same_text(name, tmp_path):
    model = BY_NAME[name].build()
    factorize(model, dict.fromkeys(find_targets(model), 4))
    model.save_pretrained(tmp_path)
    loaded = aligned(type(model).from_pretrained(tmp_path))
    ids = text()["input_ids"]
    expected, actual = (m.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False) for m in (model, loaded))
    assert torch.equal(expected, actual) and actual.shape[1] >= 6


def test_layers_can_be_factorized_one_after_another_and_by_hand_even_a_head(tmp_path):
    model = BY_NAME["llama"].build()
    plans = [{"model.layers.0.mlp.up_proj": 4}, {"model.layers.1.mlp.up_proj": 6}, {"lm_head": 8}]
    for i, plan in enumerate(plans):
        factorize(model, plan)
        assert model.config.quantization_config["ranks"] == {k: v for p in plans[: i + 1] for k, v in p.items()}
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.rank == 8 and count(loaded) == 3
    batch = BY_NAME["llama"].inputs()
    assert_same(outputs(aligned(loaded), batch), outputs(model, batch))
    assert count(hf.AutoModel.from_pretrained(tmp_path)) == 2  # has no such head


def test_config_alone_gives_a_dense_model_that_is_not_saved_as_a_factorized_one(original, tmp_path):
    """The note travels with the config; a model built from it is dense until weights say otherwise."""
    model = Auto.from_config(hf.AutoConfig.from_pretrained(original))
    assert count(model) == 0
    follow_checkpoints(model)
    assert not hasattr(model.config, STRUCTURE)
    model.save_pretrained(tmp_path)
    assert_same(outputs(aligned(Auto.from_pretrained(tmp_path)), text()), outputs(aligned(model.eval()), text()))


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_models_inside_a_model_carry_their_own_note(name, tmp_path):
    """T5's encoder and CLIP's text model have configs of their own and are saved alone."""
    model = BY_NAME[name].build()
    plan = dict.fromkeys(find_targets(model), 4)
    for step in ("factorized", "loaded", "merged"):
        if step == "factorized":
            factorize(model, plan)
        elif step == "loaded":
            model.save_pretrained(tmp_path)
            model = type(model).from_pretrained(tmp_path)
        else:
            merge(model)
        inside = {"t5": ["encoder", "decoder"], "clip": ["text_model", "vision_model"]}[name]
        for part in inside:
            noted = getattr(model.get_submodule(part).config, STRUCTURE, {"ranks": {}})["ranks"]
            own = {n.removeprefix(part + "."): r for n, r in plan.items() if n.startswith(part)}
            assert noted == ({} if step == "merged" else own)
    if name == "clip":
        factorize(model, plan)
        model.text_model.save_pretrained(tmp_path / "alone")
        alone = hf.AutoModel.from_pretrained(tmp_path / "alone")
        assert type(alone) is hf.CLIPTextModel and count(alone) == 12
        batch = {"input_ids": text()["input_ids"]}
        assert_same(outputs(aligned(alone), batch), outputs(model.text_model, batch))


def test_names_are_found_with_the_prefix_stripped_or_added():
    model = make_bert(rank=None)
    base, name = model.bert, QUERY.removeprefix("bert.")
    assert names_in(model, {QUERY: 3, "cls.dense": 4, "classifier": 2}) == {QUERY: 3, "classifier": 2}
    assert names_in(model, {name: 3}) == {QUERY: 3}
    assert names_in(base, {QUERY: 3, name.replace("0", "1", 1): 2}) == {name: 3, name.replace("0", "1", 1): 2}


# --- load_state_dict: the structure follows the weights ---


def follower(seed: int = 9, rank: int | None = None) -> hf.PreTrainedModel:
    model = make_bert(seed, rank)
    follow_checkpoints(model)
    return model


def test_it_goes_both_ways_and_between_ranks():
    model, low, dense = follower(), make_bert(1), make_bert(2, rank=None)
    for target in (low, dense, make_bert(3, rank=8), low, low, dense):
        model.load_state_dict(target.state_dict())
        assert count(model) == count(target)
        assert_same(outputs(model, text()), outputs(target, text()))
        assert getattr(model.config, STRUCTURE, None) == getattr(target.config, STRUCTURE, None)


def test_layers_that_stay_dense_stay():
    model, target = follower(), make_bert(1, rank=None)
    factorize(target, {QUERY: 2})
    model.load_state_dict(target.state_dict())
    assert count(model) == 1 and model.get_submodule(QUERY).rank == 2
    assert_same(outputs(model, text()), outputs(target, text()))


def test_the_callers_weights_are_left_alone():
    weights = make_bert(1).state_dict()
    before = dict(weights)
    follower().load_state_dict(weights)
    assert weights.keys() == before.keys() and all(weights[key] is before[key] for key in before)


@pytest.mark.parametrize("rank", [None, 8], ids=["dense", "another rank"])
def test_an_optimizer_that_exists_follows(rank):
    """Given to the Trainer by the user, before the checkpoint is loaded."""
    model = follower(rank=rank)
    optimizer = torch.optim.AdamW(
        [{"params": list(model.bert.parameters())}, {"params": list(model.classifier.parameters())}]
    )
    follow_checkpoints(model, optimizer)
    model(**text()).loss.backward()
    optimizer.step()
    norm = model.bert.embeddings.LayerNorm.weight
    kept = optimizer.state[norm]
    model.load_state_dict(make_bert(1).state_dict())
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held == [[id(p) for p in model.bert.parameters()], [id(p) for p in model.classifier.parameters()]]
    assert optimizer.state[norm] is kept and {id(p) for p in optimizer.state} <= {i for group in held for i in group}
    model.zero_grad()
    model(**text()).loss.backward()
    before = model.get_submodule(QUERY).down.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.get_submodule(QUERY).down.weight, before)


def test_following_keeps_no_optimizer_alive():
    model = follower()
    optimizer = torch.optim.AdamW(model.parameters())
    follow_checkpoints(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model.load_state_dict(make_bert(1).state_dict())
    assert count(model) == 12


@pytest.mark.parametrize("wrap", ["inside a module", "compiled", "copied", "twice"])
def test_it_follows_wherever_the_model_is(wrap):
    model, target = follower(), make_bert(1)
    follow_checkpoints(model)
    if wrap == "copied":
        outer: Any = copy.deepcopy(model)
        inner, weights = outer, target.state_dict()
    elif wrap == "inside a module":
        outer = nn.ModuleDict({"model": model, "other": nn.Linear(2, 2)})
        inner = model
        weights = {f"model.{key}": value for key, value in target.state_dict().items()}
        weights |= {f"other.{key}": value for key, value in outer["other"].state_dict().items()}
    elif wrap == "compiled":
        outer = torch.compile(model, backend="eager")
        inner, weights = model, {f"_orig_mod.{key}": value for key, value in target.state_dict().items()}
    else:
        outer, inner, weights = model, model, target.state_dict()
    outer.load_state_dict(weights)
    assert count(inner) == 12
    assert_same(outputs(inner, text()), outputs(target, text()))
    assert count(model) == (0 if wrap == "copied" else 12)


def test_a_shared_layer_may_come_under_both_names():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Sequential(self.a)

    model, low = Twice(), Twice()
    factorize(low, {"a": 3})
    follow_checkpoints(model)
    assert {"a.down.weight", "b.0.down.weight"} <= set(low.state_dict())
    model.load_state_dict(low.state_dict())
    assert model.a is model.b[0] and model.a.rank == 3
    torch.testing.assert_close(model.a.weight + 0, low.a.weight + 0)
    model.load_state_dict(Twice().state_dict())
    assert model.a is model.b[0] and type(model.a) is nn.Linear


def test_a_factor_that_never_comes_shows_as_nan():
    """A shard may hold one of two factors, so half a pair cannot be refused; it must not become a random one."""
    model, weights = follower(), make_bert(1).state_dict()
    del weights[f"{QUERY}.up.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*query\.up\.weight"):
        model.load_state_dict(weights)
    model = follower()
    model.load_state_dict(weights, strict=False)
    assert model.get_submodule(QUERY).up.weight.isnan().all()


BAD_TENSORS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "ranks of the factors differ": (
        lambda w: w.update({f"{QUERY}.up.weight": torch.zeros(32, 5)}),
        r"weights of .*query do not fit together: .*\(32, 5\)",
    ),
    "dense and factors": (
        lambda w: w.update({f"{QUERY}.weight": torch.zeros(32, 32)}),
        "weights of .*query do not fit together",
    ),
    "another input size": (
        lambda w: w.update({f"{QUERY}.down.weight": torch.zeros(4, 31)}),
        r"query.down.weight has the shape \(4, 31\), and this model needs \(4, 32\); nothing is loaded",
    ),
    "another output size": (
        lambda w: w.update({f"{QUERY}.up.weight": torch.zeros(33, 4)}),
        r"query.up.weight has the shape \(33, 4\)",
    ),
    "rank above": (
        lambda w: w.update({f"{QUERY}.down.weight": torch.zeros(40, 32), f"{QUERY}.up.weight": torch.zeros(32, 40)}),
        r"the rank of .*query is 40",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_touched(case):
    change, message = BAD_TENSORS[case]
    model, weights = follower(), dict(make_bert(1).state_dict())
    change(weights)
    before, expected = {n: id(m) for n, m in model.named_modules()}, outputs(model, text())
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(weights)
    assert before == {n: id(m) for n, m in model.named_modules()} and not hasattr(model.config, STRUCTURE)
    assert_same(outputs(model, text()), expected)


def test_dense_tensors_of_another_size_are_refused_too():
    model, weights = follower(rank=4), dict(make_bert(1, rank=None).state_dict())
    weights[f"{QUERY}.weight"] = torch.zeros(32, 31)
    with pytest.raises(ValueError, match=r"query.weight has the shape \(32, 31\), and this model needs \(32, 32\)"):
        model.load_state_dict(weights)
    assert count(model) == 12


def test_experts_split_over_files_are_said(caplog, tmp_path):
    """One expert of a stack is in another shard: it cannot be put together, and a warning says so."""
    family = BY_NAME["mixtral"]
    family.build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    model = family.build(seed=3)
    follow_checkpoints(model)
    del weights["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    with caplog.at_level("WARNING", logger="hf_cuttlefish"):
        model.load_state_dict(weights, strict=False)
    messages = [r.getMessage() for r in caplog.records if "not loaded" in r.getMessage()]
    assert len(messages) == 1 and "model.layers.0.block_sparse_moe.experts" in messages[0]


def test_peft_adapts_the_factors(original, tmp_path):
    peft = pytest.importorskip("peft")
    model = Auto.from_pretrained(original)
    expected = outputs(aligned(model), text())
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query.down", "query.up"], init_lora_weights=False)
    )
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 4
    adapted.eval()
    different = outputs(adapted, text())
    assert float((different[1] - expected[1]).abs().max()) > 1e-3
    merged = adapted.merge_and_unload()
    assert count(merged) == 12
    assert_close(outputs(merged, text()), different)
    merged.save_pretrained(tmp_path)
    assert_same(outputs(aligned(Auto.from_pretrained(tmp_path)), text()), outputs(aligned(merged), text()))


def test_the_structure_is_json_and_holds_nothing_but_names_and_ranks(original):
    structure = json.loads((original / "config.json").read_text())[STRUCTURE]
    assert structure == {
        "quant_method": "cuttlefish",
        "version": 1,
        "ranks": dict.fromkeys(find_targets(make_bert(rank=None)), 4),
    }
    assert CuttlefishStructure(**structure).to_dict() == structure
    files = ["README.md", "config.json", "model.safetensors", "modeling_low_rank.py"]
    assert sorted(p.name for p in original.iterdir()) == files
    tensors = load_file(original / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in make_bert().parameters())
    assert BERT["hidden_size"] == 32 and tensors[f"{QUERY}.down.weight"].shape == (4, 32)


def test_older_transformers_name_no_model_when_they_ask_for_conversions(monkeypatch):
    """transformers 5.16, the oldest that is declared (.ci/oldest runs on it)."""
    monkeypatch.setattr(HfQuantizer, "update_weight_conversions", lambda self, conversions: conversions)
    loader = CuttlefishLoader(CuttlefishStructure({QUERY: RANK}))
    assert loader.update_weight_conversions([]) == []
