"""Where: patterns, what is never taken, and the errors of patterns that miss."""

import copy
import functools

import pytest
import torch
import transformers as hf
from accelerate import hooks
from torch import nn
from torch.nn.utils import parametrizations, prune

from hf_cuttlefish import CuttlefishConfig, LowRankLinear, estimate_ranks, factorize
from hf_cuttlefish.decide.targets import find_targets, matches, skipped_parameters
from hf_cuttlefish.layers.dense import said_of_more
from tiny_models import BY_NAME, LLAMA, LM


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(size, 2 * size), nn.Linear(2 * size, size), nn.LayerNorm(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.second(self.first(x).relu()))


class Plain(nn.Module):
    """Not a PreTrainedModel: stem, two blocks, head."""

    def __init__(self, blocks: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = blocks if blocks is not None else nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)


def names(model: nn.Module, **config: object) -> list[str]:
    return list(find_targets(model, CuttlefishConfig(**config)))


@pytest.fixture(scope="module")
def bert():
    return BY_NAME["bert"].build()


def layers(*endings: str, count: int = 2) -> list[str]:
    return [f"bert.encoder.layer.{i}.{ending}" for i in range(count) for ending in endings]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"target_modules": ["query", "value"]}, layers("attention.self.query", "attention.self.value")),
        ({"target_modules": ["output.dense"]}, layers("attention.output.dense", "output.dense")),
        ({"target_modules": ["layer.1.output.dense"]}, ["bert.encoder.layer.1.output.dense"]),
        ({"target_modules": ["bert.encoder.layer.0.intermediate.dense"]}, ["bert.encoder.layer.0.intermediate.dense"]),
        (
            {"target_modules": r".*\.layer\.0\..*(query|key)"},
            layers("attention.self.query", "attention.self.key", count=1),
        ),
        ({"exclude_modules": ["dense", "key"]}, layers("attention.self.query", "attention.self.value")),
        (
            {"exclude_modules": r".*\.layer\.1\..*|.*dense"},
            layers(*(f"attention.self.{p}" for p in ("query", "key", "value")), count=1),
        ),
        ({"target_modules": ["query", "key"], "exclude_modules": ["key"]}, layers("attention.self.query")),
        ({"target_modules": ["pooler.dense"]}, ["bert.pooler.dense"]),
        ({"target_modules": ["query"], "exclude_modules": ["classifier", "LayerNorm"]}, layers("attention.self.query")),
    ],
)
def test_patterns(bert, choice, expected):
    assert names(bert, **choice) == expected


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ({"target_modules": ["qurey"]}, ["target_modules 'qurey' matches no module", "close names", "query"]),
        ({"target_modules": ["uery"]}, ["matches no module", "query"]),  # an ending of the name, not of a word
        ({"target_modules": ["query", "intermediate.dens"]}, ["'intermediate.dens'", "intermediate.dense"]),
        ({"target_modules": r"encoder\.layer\.0\.attention\.self\.query"}, ["matches no module", "query"]),
        ({"exclude_modules": ["keys"]}, ["exclude_modules 'keys' matches no module", "key"]),
        ({"exclude_modules": r".*"}, ["exclude_modules='.*' leaves no target layer"]),
        ({"rank_pattern": {"quary": 4}}, ["rank_pattern 'quary' matches none of the target layers", "query"]),
        ({"target_modules": ["key"], "rank_pattern": {"query": 4}}, ["rank_pattern 'query' matches none"]),
        ({"target_modules": ["LayerNorm"]}, ["cannot be factorized", "LayerNorm (LayerNorm)"]),
        ({"target_modules": ["word_embeddings"]}, ["cannot be factorized", "(Embedding)"]),
        ({"target_modules": ["classifier"]}, ["cannot be factorized", "classifier (Linear)", "heads"]),
        ({"target_modules": r".*\.encoder"}, ["cannot be factorized", "bert.encoder (BertEncoder)"]),
    ],
)
def test_a_pattern_that_misses_is_an_error_that_helps(bert, choice, parts):
    with pytest.raises(ValueError) as error:
        names(bert, **choice)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("gpt2", "lm_head"),
        ("bert-masked-lm", "decoder"),
        ("llama", "lm_head"),
        ("opt", "embed_tokens"),
        ("t5", "shared"),
    ],
)
def test_heads_and_embeddings_are_never_taken(family, pattern):
    """Output embeddings, tied (GPT-2, BERT, T5, OPT) or not (Llama)."""
    with pytest.raises(ValueError, match="cannot be factorized"):
        names(BY_NAME[family].build(), target_modules=[pattern])


@pytest.mark.parametrize("getter", ["get_output_embeddings", "get_input_embeddings"])
def test_a_module_that_says_it_is_an_embedding_is_never_taken(getter):
    """Also a linear one, untied and in a model without a base model inside."""
    model = Plain()
    assert names(model, target_modules=["head", "stem"]) == ["stem", "head"]
    setattr(model, getter, lambda: model.head)
    assert names(model, target_modules=["first", "stem"]) == ["stem", "blocks.0.first", "blocks.1.first"]
    with pytest.raises(ValueError, match="cannot be factorized, such as head"):
        names(model, target_modules=["head"])


class ReadsTable(nn.Module):
    """As Gemma 4 takes the row of its padding: the weight itself, not what the table gives."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.tokens_of_types = nn.Embedding(50, 8), nn.Embedding(50, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) - self.tokens.weight[0]


class ReadsNothing(ReadsTable):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(self.tokens.weight.device)
        return (self.tokens(ids) - self.tokens_of_types.weight[0]).to(self.tokens.weight.dtype)


def test_a_table_whose_weight_a_forward_reads_is_refused_by_name():
    """Its rows would be narrower, or, at full rank, other numbers without an error."""
    config = CuttlefishConfig(embeddings=True)
    with pytest.raises(ValueError, match=r"cannot factorize tokens: ReadsTable.forward reads tokens.weight"):
        find_targets(ReadsTable(), config)
    assert "tokens" in find_targets(ReadsNothing(), config)
    head = hf.MobileBertForMaskedLM(
        hf.MobileBertConfig(**LLAMA, embedding_size=16)
    )  # multiplies by the output tied to it
    with pytest.raises(ValueError, match=r"MobileBertLMPredictionHead.forward reads cls.predictions.decoder.weight"):
        find_targets(head, config)


def test_weights_that_are_declared_tied_are_never_taken_even_while_they_are_apart(bert):
    """As after loading to several devices, before tie_weights."""
    model = copy.deepcopy(bert)
    keys = [f"bert.encoder.layer.{i}.attention.self.query.weight" for i in range(2)]
    model.all_tied_weights_keys = {keys[0]: keys[1]}
    assert names(model) == [name for name in names(bert) if name + ".weight" not in keys]


def test_an_ending_that_also_a_head_has_spares_the_head():
    """RoBERTa's head has a layer called `dense`, too."""
    model = BY_NAME["roberta"].build()
    assert type(model.classifier.dense) is nn.Linear
    found = names(model, target_modules=["dense"])
    assert len(found) == 6 and all(name.startswith("roberta.encoder.layer.") for name in found)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("query", "encoder.layer.0.attention.self.query", True),
        ("self.query", "encoder.layer.0.attention.self.query", True),
        ("uery", "encoder.layer.0.attention.self.query", False),
        ("query", "query", True),
        (r"layer\.\d\..*(query|key)", "encoder.layer.1.attention.self.key", True),
        (r"layer\.0", "encoder.layer.0.attention", False),
        ("query", "encoder.query.down", False),
    ],
)
def test_rank_pattern_follows_the_rule_of_peft(pattern, name, expected):
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    "blocks",
    [nn.ModuleList([Block(), Block()]), nn.Sequential(Block(), Block()), nn.Sequential(Block(), nn.Dropout(), Block())],
    ids=["ModuleList", "Sequential", "Sequential with others"],
)
def test_blocks_of_any_model_are_found_by_structure(blocks):
    model = Plain(blocks)
    assert {name.split(".")[0] for name in names(model)} == {"blocks"}
    assert [name.rpartition(".")[2] for name in names(model)] == ["first", "second"] * 2


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)),
        Plain(nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 5)])),
        Plain(nn.Sequential(Block(), nn.ReLU())),
        nn.Linear(4, 4),
    ],
    ids=["bare layers", "list of heads", "one block", "one layer"],
)
def test_no_repeated_block_is_said(model):
    with pytest.raises(ValueError, match=r"finds no nn\.Linear, Conv1D.* inside a repeated block.*target_modules="):
        find_targets(model)
    with pytest.raises(ValueError, match=r"'all-linear' finds no nn\.Linear or Conv1D inside a repeated block"):
        find_targets(model, CuttlefishConfig(target_modules="all-linear"))


def test_a_module_registered_twice_is_taken_once_under_its_first_name():
    model = Plain()
    model.blocks[1].first = model.blocks[0].first
    assert names(model) == ["blocks.0.first", "blocks.0.second", "blocks.1.second"]


def test_tied_weights_are_never_taken():
    model = Plain()
    model.blocks[1].first.weight = model.blocks[0].first.weight
    assert names(model) == ["blocks.0.second", "blocks.1.second"]
    with pytest.raises(ValueError, match="cannot be factorized"):
        names(model, target_modules=["first"])


def test_layers_that_share_a_bias_are_never_taken():
    """They were found at the switch alone, which then failed for all layers."""
    model = Plain()
    model.blocks[1].first.bias = model.blocks[0].first.bias
    assert names(model) == ["blocks.0.second", "blocks.1.second"]


@pytest.mark.parametrize("compute", [prune.identity, nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated.*")
def test_weights_computed_from_others_are_never_taken(compute):
    """Pruning and weight_norm: the weight is no parameter, and would be computed over the factors again."""
    model = Plain()
    compute(model.blocks[0].first, "weight")
    assert names(model) == ["blocks.0.second", "blocks.1.first", "blocks.1.second"]


def test_subclasses_stay_dense_and_are_named():
    model = hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="FalconLinear, which may compute something else"):
        find_targets(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantized_weights_are_an_error_that_names_the_layer(dtype):
    model = Plain()
    model.blocks[1].first.weight = nn.Parameter(model.blocks[1].first.weight.to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=r"blocks.1.first holds torch.\w+ weights.*quantized.*exclude"):
        find_targets(model)
    assert names(model, exclude_modules=["1.first"]) == ["blocks.0.first", "blocks.0.second", "blocks.1.second"]


def test_factorized_layers_are_no_targets_and_all_of_them_is_said():
    model = Plain()
    factorize(model, {"blocks.0.first": 2})
    assert names(model) == ["blocks.0.second", "blocks.1.first", "blocks.1.second"]
    with pytest.raises(ValueError, match=r"cannot be factorized.*already factorized"):
        names(model, target_modules=["down"])
    factorize(model, dict.fromkeys(names(model), 2))
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == 4
    with pytest.raises(ValueError, match="4 layers are already factorized"):
        find_targets(model)


def test_a_layer_with_one_output_is_left_out_but_can_be_named():
    """The gate of Qwen2-MoE's shared expert: no rank would make it smaller."""
    model = BY_NAME["qwen2-moe"].build()
    gates = [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)]
    assert not set(gates) & set(names(model))
    assert names(model, target_modules=["shared_expert_gate"]) == gates


def test_experts_are_told_by_name_and_size():
    config = hf.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)
    skipped = skipped_parameters(hf.MixtralForCausalLM(config))
    assert skipped == {
        f"model.layers.{i}.mlp.experts.{name}": size
        for i in range(2)
        for name, size in (("gate_up_proj", 3 * 2 * 64 * 32), ("down_proj", 3 * 32 * 64))
    }
    assert not skipped_parameters(BY_NAME["bert"].build())


def test_experts_are_taken_by_default_and_left_out_by_name():
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2))
    stacks = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
    linear = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    assert set(find_targets(model)) == {*stacks, *linear}
    assert names(model, target_modules="all-linear") == linear
    assert names(model, target_modules=["down_proj"]) == stacks[1::2]
    for experts in (["experts"], ["mlp.experts"], r".*\.experts", ["gate_up_proj", "down_proj"]):
        assert names(model, exclude_modules=experts) == linear
        assert names(model, target_modules=experts) == stacks
    assert set(names(model, rank_pattern={"experts.down_proj": 4})) == {*stacks, *linear}
    with pytest.raises(ValueError, match=r"must lie between 1 and min\(in_features, out_features\) = min\(64, 32\)"):
        find_targets(model, CuttlefishConfig(rank_pattern={"experts.down_proj": 40}))


@pytest.mark.parametrize("model", [None, "bert-base-cased", hf.BertConfig(**LM)], ids=["None", "a name", "a config"])
def test_no_model_is_a_type_error(model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        find_targets(model)


def test_nothing_is_changed(bert):
    before = {name: id(module) for name, module in bert.named_modules()}
    state = {name: value.clone() for name, value in bert.state_dict().items()}
    find_targets(bert)
    assert before == {name: id(module) for name, module in bert.named_modules()}
    assert all(torch.equal(state[name], value) for name, value in bert.state_dict().items())


class Numbered(nn.Module):
    """Blocks that are numbered by hand, as in timm's RegNet; stems and heads are numbered, too."""

    def __init__(self):
        super().__init__()
        self.stem1, self.stem2 = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)) for _ in range(2))
        self.b1, self.b2 = (nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 4)


def test_blocks_that_are_numbered_by_hand_are_blocks():
    assert list(find_targets(Numbered())) == ["b1.0", "b1.2", "b2.0", "b2.2"]


class Others(nn.Module):
    """Blocks with convolutions that are no kind of ours, and one whose weight is computed."""

    def __init__(self):
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(4, 4, 3), layer, nn.Conv2d(4, 4, 3))
            for layer in (nn.Conv1d(4, 4, 3), normed)
        )


def test_other_convolutions_stay_dense_and_the_plan_says_why():
    plan = estimate_ranks(Others(), CuttlefishConfig(rank_rule="ratio", rank_multiple=1))
    assert list(plan.decisions) == ["blocks.1.2"]  # the other one is the first layer that could be cut
    said = {note.partition(": ")[2]: note.partition(": ")[0] for note in plan.notes}
    assert said["the weight is computed from other parameters"] == "1 layers stay dense (blocks.1.1)"
    assert said["ConvTranspose2d is no kind of layer that can be factorized"] == "2 layers stay dense (blocks.0.0, ...)"
    assert said["Conv1d is no kind of layer that can be factorized"] == "1 layers stay dense (blocks.0.1)"
    with pytest.raises(
        ValueError, match=r"inside a repeated block of Sequential: 2 layers stay dense .* Conv1d is no kind"
    ):
        find_targets(nn.Sequential(*(nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU()) for _ in range(2))))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2))


def test_a_layer_that_somebody_has_put_more_on_stays_dense_and_the_plan_says_why():
    """A pair has no parameter, buffer, child or forward that was put on the dense layer: they were gone, or the next step failed."""
    model = Blocks()
    (scaled, watched), (adapted, patched) = model.blocks
    scaled.scale = nn.Parameter(torch.ones(16))
    watched.register_buffer("seen", torch.zeros(()))
    adapted.adapter = nn.PReLU()
    patched.forward = lambda x: 2 * nn.Linear.forward(patched, x)
    with pytest.raises(ValueError, match="inside a repeated block"):
        find_targets(model)
    del scaled.scale
    plan = estimate_ranks(model, CuttlefishConfig(rank_rule="ratio", rank_multiple=1))
    assert list(plan.decisions) == ["blocks.0.0"]
    said = {note.partition(": ")[2]: note.partition(": ")[0] for note in plan.notes}
    for name, why in (
        ("blocks.0.1", "somebody has put seen on it, which would be lost"),
        ("blocks.1.0", "somebody has put adapter on it, which would be lost"),
        ("blocks.1.1", "somebody has replaced its forward, which would be lost"),
    ):
        assert said[why] == f"1 layers stay dense ({name})"
        with pytest.raises(ValueError, match=f"{name} cannot be factorized: {why}"):
            factorize(model, {name: 4})


def test_hooks_of_accelerate_are_no_forward_of_somebodys():
    model = Blocks()
    layer = model.blocks[0][0]
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook())
    assert len(find_targets(model)) == 4
    hooks.remove_hook_from_module(layer)
    assert "forward" in vars(layer) and len(find_targets(model)) == 4


def test_a_layer_whose_own_forward_is_compiled_is_taken_and_one_with_another_compiled_forward_is_not():
    """torch.compile keeps a copy of the function, which was taken for somebody's own."""
    model = Blocks()
    own, other = model.blocks[0]
    own.forward = torch.compile(own.forward, backend="eager")
    other.forward = torch.compile(lambda x: 2 * nn.Linear.forward(other, x), backend="eager")
    wrapped = model.blocks[1][0]
    wrapped.forward = torch.compile(functools.wraps(wrapped.forward)(lambda x: 3 * x), backend="eager")
    assert said_of_more(own) == ""
    assert said_of_more(other) == said_of_more(wrapped) == "somebody has replaced its forward, which would be lost"
    assert "blocks.0.0" in find_targets(model) and "blocks.0.1" not in find_targets(model)


def test_a_compiled_wrapper_is_sent_to_the_model_inside(bert):
    wrapper = torch.compile(bert, backend="eager")
    with pytest.raises(ValueError, match=r"what torch.compile has made: pass the model that was compiled"):
        estimate_ranks(wrapper)
