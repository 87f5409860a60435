"""In the place of a recording, where there is no GPU: a step that is called again and writes the gradients where a graph writes them."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig
from hf_cuttlefish.patch import graphed_step
from hf_cuttlefish.patch.capture import NotCapturedError
from hf_cuttlefish.trainer import by_itself
from hf_cuttlefish.trainer import graphs as trainer_graphs

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


class Replayed:
    """In the place of a CUDA graph. Calling the function has written `parameters`' gradients, which stay its own memory."""

    count = 0
    every: ClassVar[weakref.WeakSet[Replayed]] = weakref.WeakSet()

    def __init__(self, function: Any, parameters: list[nn.Parameter]) -> None:
        self.function, self.parameters = function, parameters
        self.result = function()
        self.gradients = [p.grad for p in parameters]
        # A graph writes to memory, whatever has become of the tensor that was there.
        self.memory = [None if g is None else g.detach() for g in self.gradients]
        Replayed.every.add(self)

    def replay(self) -> None:
        Replayed.count += 1
        held = [p.grad for p in self.parameters]
        for other in Replayed.every:  # their memory is shared
            for gradient in other.memory:
                if gradient is not None:
                    gradient.fill_(float("nan"))
        for parameter in self.parameters:
            parameter.grad = None
        for mine, new in zip(self.result, self.function(), strict=True) if isinstance(self.result, tuple) else [
            (self.result, self.function())
        ]:  # fmt: skip
            if mine is not None:
                mine.copy_(new)
        for parameter, mine, before in zip(self.parameters, self.memory, held, strict=True):
            if mine is not None:
                mine.copy_(parameter.grad)
            parameter.grad = before

    def reset(self) -> None:
        Replayed.every.discard(self)


@pytest.fixture(autouse=True)
def recording(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let GraphedStep run without CUDA; `fails` makes recordings fail."""
    choice = SimpleNamespace(fails=None, records=False)

    def capture(function: Any, stream: Any, pool: Any) -> Any:
        if choice.fails is not None:
            raise NotCapturedError(**choice.fails)
        alive = [o for o in gc.get_objects() if issubclass(type(o), nn.Parameter) and o.requires_grad]
        choice.records = True
        try:
            with torch.random.fork_rng(devices=[]):
                graph = Replayed(function, [p for p in alive if p.grad is None])
        finally:
            choice.records = False
        return graph, graph.result

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graphed_step, "capture", capture)
    monkeypatch.setattr(graphed_step, "only_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: choice.records)
    Replayed.count = 0
    return choice


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 50, (8,), generator=torch.Generator().manual_seed(at))
        return {"input_ids": ids, "labels": ids[0] % 2}


def trainer_of(
    folder: Path, kind: type[Trainer] = Trainer, graphed: bool | None = True, also: Any = (), **settings: Any
) -> Trainer:
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**sizes, problem_type="single_label_classification"))
    config = CuttlefishConfig(switch_step=10, statistics_steps=3, target_ratio=0.5, rank_multiple=1, on_error="raise")
    how = {
        "max_steps": 24,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
    } | settings
    args = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, **({"save_strategy": "no"} | how))
    callbacks = [CuttlefishCallback(config, cuda_graphs=graphed), *also]
    return kind(model, args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)


def logged(trainer: Trainer) -> list[tuple[float, ...]]:
    trainer.train()
    names = ("loss", "grad_norm", "learning_rate")
    return [tuple(float(r[n]) for n in names if n in r) for r in trainer.state.log_history if "loss" in r]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_graphs, "check", lambda trainer: None)
    monkeypatch.setattr(by_itself, "has_compiled", lambda: False)  # other tests of this process compile
