"""Every family, tiny: what is selected, factorize, backward, save, load in every way, resume, merge."""

import copy
import functools
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.trainer_utils import load_sharded_checkpoint

from hf_cuttlefish import factorize, follow_checkpoints, merge
from hf_cuttlefish.decide.targets import find_targets, skipped_parameters
from hf_cuttlefish.layers.kinds import kind_of
from hf_cuttlefish.layers.low_rank import LowRankLayer
from tiny_models import BY_NAME, FAMILIES, RANK, Family, aligned, are_close, assert_close, assert_same, outputs, starred

NOT_PICKLED = {"wav2vec2"}
"""Models with a torch parametrization (weight_norm), which torch refuses to pickle."""

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def factorized(family: Family, rank: int = RANK, seed: int = 0) -> hf.PreTrainedModel:
    model = family.build(seed)
    factorize(model, dict.fromkeys(find_targets(model), rank))
    return model


@functools.cache
def saved(family_name: str, folder: Path) -> tuple[hf.PreTrainedModel, Path, list[torch.Tensor]]:
    """A factorized model (not to be changed), the folder that it was saved to, and what it returns."""
    family = BY_NAME[family_name]
    model = factorized(family)
    model.save_pretrained(folder / family_name)
    return model, folder / family_name, outputs(model, family.inputs())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def on_disk(family, folder):
    return saved(family.name, folder)


def low_rank(model: nn.Module) -> dict[str, LowRankLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def dense_kinds(model: nn.Module) -> dict[str, type]:
    return {
        name: type(module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D, nn.Conv2d)
    }


@every_family
def test_all_takes_the_projections_of_the_blocks_and_nothing_else(family):
    model = family.build()
    targets = find_targets(model)
    assert starred(targets) == family.targets
    assert set(skipped_parameters(model)) <= set(targets)
    head = model.get_output_embeddings()
    assert head is None or not any(layer.weight is head.weight for layer in targets.values())
    base = getattr(model, model.base_model_prefix, None)
    if isinstance(base, nn.Module):  # AutoModel's class: the same layers without the prefix
        prefix = model.base_model_prefix + "."
        assert list(find_targets(base)) == [name.removeprefix(prefix) for name in targets]


@every_family
def test_full_rank_changes_nothing_and_low_rank_trains(family):
    model, batch = family.build(), family.inputs()
    dense, shapes = outputs(model, batch), {name: kind_of(m).size for name, m in find_targets(model).items()}
    counts = {name: kind_of(m).count for name, m in find_targets(model).items()}
    exact = copy.deepcopy(model)
    factorize(exact, {name: min(shape) for name, shape in shapes.items()})
    assert_close(dense, outputs(exact, batch))

    before = sum(p.numel() for p in model.parameters())
    report = factorize(model, dict.fromkeys(shapes, RANK))
    after = sum(p.numel() for p in model.parameters())
    assert before - after == sum(counts[name] * (m * n - RANK * (m + n)) for name, (m, n) in shapes.items())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    assert not report.skipped and "left dense" not in str(report)
    assert not are_close(dense, outputs(model, batch))  # the blocks matter, so the other comparisons can fail
    assert set(low_rank(model)) == set(shapes)

    model(**batch).loss.backward()
    for name, layer in low_rank(model).items():
        for factor in (layer.down.weight, layer.up.weight):
            assert factor.grad is not None and factor.grad.isfinite().all(), name
            assert factor.grad.abs().max() > 0, name


@every_family
def test_a_saved_folder_loads_with_its_own_class_bit_for_bit(family, on_disk):
    model, path, expected = on_disk
    loaded, info = getattr(hf, family.auto).from_pretrained(path, output_loading_info=True)
    assert type(loaded) is type(model) and not any(info.values())
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert {n: m.origin for n, m in low_rank(loaded).items()} == {n: m.origin for n, m in low_rank(model).items()}
    assert_same(outputs(aligned(loaded), family.inputs()), expected)
    for copied in (
        copy.deepcopy(loaded),
        *([pickle.loads(pickle.dumps(loaded))] if family.name not in NOT_PICKLED else []),
    ):
        assert_same(outputs(copied, family.inputs()), expected)
    # An ordinary model: nothing about it is quantized.
    assert not getattr(loaded, "is_quantized", False) and getattr(loaded, "hf_quantizer", None) is None
    assert not any(hasattr(m.config, "_is_quantized") for m in loaded.modules() if isinstance(m, hf.PreTrainedModel))
    assert not hasattr(loaded, "quantization_method")


@every_family
def test_a_loaded_model_saves_the_same_folder_again_also_in_shards(family, on_disk, tmp_path):
    _, path, expected = on_disk
    loaded = type(on_disk[0]).from_pretrained(path)
    loaded.save_pretrained(tmp_path / "again")
    left, right = load_file(path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    first, second = (json.loads((at / "config.json").read_text()) for at in (path, tmp_path / "again"))
    assert first["quantization_config"] == second["quantization_config"]
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="12KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same(outputs(aligned(type(loaded).from_pretrained(tmp_path / "shards")), family.inputs()), expected)


@every_family
def test_auto_model_and_other_heads_load_the_same_layers(family, on_disk, tmp_path):
    model, path, _ = on_disk
    layers = low_rank(model)
    bits = {layer.down.weight.detach().numpy().tobytes() for layer in layers.values()}

    def check(other: nn.Module, share: float) -> None:
        found = low_rank(other)
        assert len(found) == round(share * len(layers))
        assert {layer.down.weight.detach().numpy().tobytes() for layer in found.values()} <= bits

    base = hf.AutoModel.from_pretrained(path)
    check(base, 1)
    base.save_pretrained(tmp_path)  # and back: the prefix is added again
    check(getattr(hf, family.auto).from_pretrained(tmp_path), 1)
    for name, share in family.others.items():
        check(getattr(hf, name).from_pretrained(path), share)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(family, on_disk, dtype):
    """Loading casts as it does for the dense model: T5 keeps its `wo` in fp32 when the rest is fp16."""
    _, path, _ = on_disk
    loaded = type(on_disk[0]).from_pretrained(path, dtype=dtype)
    kept = [name for name, layer in low_rank(loaded).items() if layer.down.weight.dtype != dtype]
    assert kept == [
        name for name in low_rank(loaded) if name.endswith(".wo") and "t5" in family.name and dtype == torch.float16
    ]
    for layer in low_rank(loaded).values():
        assert layer.weight.dtype == layer.down.weight.dtype == layer.up.weight.dtype
    converted = type(on_disk[0]).from_pretrained(path).to(dtype)
    assert {layer.down.weight.dtype for layer in low_rank(converted).values()} == {dtype}


@every_family
def test_raw_weights_choose_the_structure(family, on_disk, tmp_path):
    """What a Trainer's resume does: load_state_dict of the file's tensors, under the legacy names that it has."""
    model, path, expected = on_disk
    factors, batch = load_file(path / "model.safetensors"), family.inputs()
    dense = family.build(seed=5)
    dense_expected = outputs(dense, batch)
    dense.save_pretrained(tmp_path)

    def load(target: hf.PreTrainedModel, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        result = target.load_state_dict(tensors, strict=False)
        tied = set(getattr(target, "all_tied_weights_keys", {}))
        assert set(result.missing_keys) <= tied and not result.unexpected_keys
        target.tie_weights()
        return outputs(aligned(target), batch)

    follower = family.build(seed=7)
    follow_checkpoints(follower)
    assert_same(load(follower, factors), expected)
    assert set(low_rank(follower)) == set(low_rank(model))
    assert follower.config.quantization_config == model.config.quantization_config
    assert_same(load(follower, load_file(tmp_path / "model.safetensors")), dense_expected)
    assert not low_rank(follower) and not hasattr(follower.config, "quantization_config")
    assert dense_kinds(follower) == dense_kinds(dense)
    other_rank = factorized(family, rank=2, seed=7)
    follow_checkpoints(other_rank)
    assert_same(load(other_rank, factors), expected)


@pytest.mark.parametrize("family", [BY_NAME[n] for n in ("bert", "vit", "gpt2", "llama")], ids=str)
@pytest.mark.parametrize("backwards", [False, True], ids=["", "backwards"])
def test_raw_shards_choose_the_structure(family, on_disk, tmp_path, backwards):
    """A Trainer loads shards in any order, one by one: a layer's factors and bias may lie in three of them."""
    model, _, expected = on_disk
    model.save_pretrained(tmp_path, max_shard_size=600)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(index[key] != index[key.replace(".down.", ".up.")] for key in index if key.endswith(".down.weight"))
    follower = family.build(seed=7)
    follow_checkpoints(follower)
    for file in sorted(set(index.values()), reverse=backwards):
        follower.load_state_dict(load_file(tmp_path / file), strict=False)
    follower.tie_weights()
    assert_same(outputs(aligned(follower), family.inputs()), expected)


def test_the_trainers_own_loader_of_shards(folder, tmp_path):
    model, _, expected = saved("vit", folder)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    follower = BY_NAME["vit"].build(seed=7)
    follow_checkpoints(follower)
    load_sharded_checkpoint(follower, tmp_path, strict=False)
    assert_same(outputs(aligned(follower), BY_NAME["vit"].inputs()), expected)


@every_family
def test_merge_gives_back_the_dense_model(family, on_disk, tmp_path, monkeypatch):
    model, path, expected = on_disk
    merged = type(model).from_pretrained(path)
    assert merge(merged) is merged
    assert dense_kinds(merged) == dense_kinds(family.build()) and not low_rank(merged)
    actual = outputs(merged, family.inputs())
    assert_close(actual, expected)
    merged.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "cuttlefish" not in text and "quantization" not in text
    assert not any(
        hasattr(m.config, "quantization_config") for m in merged.modules() if isinstance(m, hf.PreTrainedModel)
    )
    # It needs nothing of ours any more.
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "cuttlefish")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "cuttlefish")
    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(aligned(plain), family.inputs()), outputs(aligned(merged), family.inputs()))


def test_conv1d_comes_back_transposed_also_where_it_is_square(folder):
    """GPT-2's c_proj is square: loaded as an nn.Linear it would be wrong in silence."""
    model, path, _ = saved("gpt2", folder)
    merged = merge(hf.GPT2LMHeadModel.from_pretrained(path))
    layer, dense = model.transformer.h[0].attn.c_proj, merged.transformer.h[0].attn.c_proj
    assert type(dense) is Conv1D and dense.weight.shape == (32, 32) and (dense.nf, dense.nx) == (32, 32)
    torch.testing.assert_close(dense.weight, (layer.up.weight @ layer.down.weight).T)
    c_fc = merged.transformer.h[0].mlp.c_fc
    assert c_fc.weight.shape == (32, 128) and (c_fc.nf, c_fc.nx) == (128, 32)


def test_shared_layers_are_factorized_once():
    """ALBERT runs one block several times: one layer, one pair, one entry in the config."""
    model = factorized(BY_NAME["albert"])
    assert len(low_rank(model)) == 6 == len(model.config.quantization_config["ranks"])
    assert model.config.num_hidden_layers == 2


def test_the_report_counts_the_encoder():
    model = BY_NAME["bert"].build()
    encoder = sum(p.numel() for p in model.bert.encoder.layer.parameters())
    report = factorize(model, dict.fromkeys(find_targets(model), RANK))
    assert report.encoder_parameters_before == encoder
    assert report.encoder_parameters_after == sum(p.numel() for p in model.bert.encoder.layer.parameters())
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert report.target_parameters_before == weights
    assert report.target_parameters_after == 2 * RANK * (4 * (32 + 32) + 2 * (32 + 64))
    assert math.isclose(sum(report.seconds.values()), report.seconds["factors"] + report.seconds["patch"])
