"""Steps before a recording run the code that is recorded: masks are made in the same way. What needs a GPU is in tests/whole/test_cuda_graphs.py."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    masking_utils,
)
from transformers.utils import import_utils

from hf_cuttlefish import CuttlefishCallback, GraphedStep
from hf_cuttlefish.patch.capture import steady_masks
from hf_cuttlefish.trainer.graphs import check

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_compiled_model_is_not_compiled_anew_when_it_is_recorded(
    kind: str, by_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention mask is the difference: out of a recording transformers drops one that masks nothing."""
    torch.compiler.reset()
    ids = torch.randint(5, 50, (2, 8))
    if kind == "bert":
        model: Any = BertModel(BertConfig(**SIZES))
        layers, batch = model.encoder.layer, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))
        layers, batch = model.model.layers, {"input_ids": ids, "use_cache": False}
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    for part in layers if by_blocks else [model]:
        part.compile(backend=backend)
    for _ in range(2):
        with steady_masks(kind == "bert", False):
            model(**batch)
    before = len(compiled)
    assert before
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with steady_masks(kind == "bert", False):
        model(**batch)
    assert len(compiled) == before
    torch.compiler.reset()


def test_transformers_is_as_it_was_afterwards() -> None:
    names = ((import_utils, "is_cuda_stream_capturing"), (masking_utils, "find_packed_sequence_indices"))
    before = [getattr(place, name) for place, name in names]
    with pytest.raises(RuntimeError), steady_masks(True, False):
        assert import_utils.is_tracing()
        raise RuntimeError
    assert [getattr(place, name) for place, name in names] == before


def test_packed_sequences_are_still_seen_where_positions_are_given() -> None:
    with steady_masks(True, True):
        found = masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1]]))
    assert found is not None and found.tolist() == [[0, 0, 1, 1]]


def test_a_model_that_is_not_on_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="one CUDA device, and this one is on cpu"):
        GraphedStep(nn.Linear(2, 2), lambda batch: batch)


def test_a_trainer_without_a_gpu_is_refused_before_its_first_step(tmp_path: Any) -> None:
    model, callback = BertForSequenceClassification(BertConfig(**SIZES)), CuttlefishCallback(cuda_graphs=True)
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[])
    trainer = Trainer(model, args, train_dataset=[{"input_ids": [1, 2], "labels": 0}], callbacks=[callback])
    with pytest.raises(ValueError, match="cuda_graphs=True needs a CUDA device, and this Trainer is on cpu"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_that_one_process_of_a_launcher_wraps_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """One process under torchrun: DDP is there, and its work in Python would not be repeated."""
    trainer = Trainer(nn.Linear(2, 2), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    check(trainer)
    trainer.model_wrapped = torch.compile(trainer.model, backend="eager")
    check(trainer)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            trainer.model_wrapped = nn.parallel.DistributedDataParallel(trainer.model)
        finally:
            dist.destroy_process_group()
    with pytest.raises(ValueError, match="does not go with DistributedDataParallel, which wraps the model here"):
        check(trainer)


def test_the_setting_is_kept_in_a_copy_and_in_what_is_saved() -> None:
    callback = CuttlefishCallback(cuda_graphs=True)
    assert CuttlefishCallback(**callback.state()["args"]).cuda_graphs
    assert copy.deepcopy(callback).cuda_graphs
    assert "cuda_graphs" not in CuttlefishCallback().state()["args"]
    assert CuttlefishCallback(**CuttlefishCallback(cuda_graphs=False).state()["args"]).cuda_graphs is False
    with pytest.raises(TypeError, match="cuda_graphs must be True, False or None, got 'yes'"):
        CuttlefishCallback(cuda_graphs="yes")  # type: ignore[arg-type]
