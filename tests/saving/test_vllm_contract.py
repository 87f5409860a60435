"""What vLLM's Transformers backend asks of a folder and of its model, piece by piece and in numbers; no vLLM server runs here."""

import copy
import json
import re
import threading

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_cuttlefish import factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.saving import modeling_low_rank as standalone

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.arange(3, 11)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A factorized Llama with two heads of keys and values, as it is saved."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=99))
    factorize(model, dict.fromkeys(find_targets(model), 6))
    path = tmp_path_factory.mktemp("low") / "llama"
    model.save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    """As vLLM makes it: the class that auto_map names, from the config; then the weights by name."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(standalone, config["auto_map"]["AutoModel"].rpartition(".")[2])
    assert cls.is_backend_compatible() and cls._supports_attention_backend
    made = cls._from_config(hf.AutoConfig.from_pretrained(folder)).eval()
    assert type(made).is_backend_compatible() and isinstance(made, hf.LlamaModel)
    tensors = {k.removeprefix("model."): v for k, v in load_file(folder / "model.safetensors").items()}
    del tensors["lm_head.weight"]
    assert tensors.keys() == dict(made.named_parameters()).keys()
    made.load_state_dict(tensors)
    return made


def test_the_base_model_answers_as_the_package_s_does(model, folder):
    ours = hf.AutoModel.from_pretrained(folder).eval()
    torch.testing.assert_close(model(IDS).last_hidden_state, ours(IDS).last_hidden_state)


def test_each_layer_calls_the_attention_that_is_put_in_its_place(model):
    """vLLM's attention comes by name, and finds its caches in a keyword that the model has to hand on."""
    seen, expected = [], model(IDS)[0]

    def attention(module, query, key, value, mask, attention_instances=None, **kwargs):
        seen.append(attention_instances[module.layer_idx])
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("of_a_server", attention)
    model.set_attn_implementation("of_a_server")
    instances = {0: "first", 1: "second"}
    embedded = model.get_input_embeddings()(IDS)
    options = {"position_ids": torch.arange(8)[None], "use_cache": False, "return_dict": False}
    found = model(inputs_embeds=embedded, attention_instances=instances, **options)[0]
    assert seen == ["first", "second"]
    torch.testing.assert_close(found[:, :1], expected[:, :1])  # without a mask all but the first see what follows


class Summed(nn.Module):
    """A row-wise part: what all ranks have is added up, as an all-reduce does."""

    def __init__(self, part: nn.Module, rank: int, shared: list, barrier: threading.Barrier) -> None:
        super().__init__()
        self.part, self.rank, self.shared, self.barrier = part, rank, shared, barrier

    def forward(self, x):
        self.shared[self.rank] = self.part(x)
        self.barrier.wait()
        total = torch.stack(self.shared).sum(0)
        self.barrier.wait()
        return total


def divided(model, plan, ranks):
    """One model a rank, its linear layers cut by the first rule that matches, and how often each style was used."""
    models, used, barrier = [copy.deepcopy(model) for _ in range(ranks)], {}, threading.Barrier(ranks, timeout=60)
    for name in [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        style = next((style for rule, style in plan.items() if re.match(rule.replace("*", r"\d+"), name)), "replicate")
        used[style] = used.get(style, 0) + 1
        shared = [None] * ranks
        for rank, one in enumerate(models):
            layer = one.get_submodule(name)
            if style != "replicate":
                layer.weight = nn.Parameter(layer.weight.chunk(ranks, dim=0 if style == "colwise" else 1)[rank].clone())
            if style == "rowwise":
                one.set_submodule(name, Summed(layer, rank, shared, barrier))
    return models, used


@pytest.mark.parametrize("of", ["model", "config"])
def test_the_tensor_parallel_plan_divides_the_factors_and_leaves_the_answer(model, of):
    plan = dict(model._tp_plan if of == "model" else model.config.base_model_tp_plan)
    expected = model(IDS)[0].detach()
    models, used = divided(model, plan, 2)
    # Of each block q, k, v, gate and up: `up` by outputs; o and down_proj: `down` by inputs; the other factor is whole.
    assert used == {"colwise": 2 * 5, "rowwise": 2 * 2, "replicate": 2 * 7}
    found = [None, None]

    def run(rank):
        with torch.no_grad():
            found[rank] = models[rank](IDS)[0]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
