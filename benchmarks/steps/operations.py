"""How many operations of a step launch something, by form; counted on the CPU: `python -m benchmarks.steps.operations`.

Where the host sets the pace, a step takes about as long as it launches.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from hf_cuttlefish import factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.moments import MomentCollector
from hf_cuttlefish.patch.running import RunMultiplied

from ..markdown import markdown_table

VIEWS = (
    "view",
    "t",
    "transpose",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "as_strided",
    "permute",
    "alias",
)
PARTS = (
    "_unsafe_view",
    "split",
    "split_with_sizes",
    "unbind",
    "_reshape_alias",
    "narrow",
    "reshape",
    "set_",
    "lift_fresh",
)
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "device")
LAUNCH_NOTHING = frozenset(VIEWS + PARTS + EMPTY)
RANKS = {
    "ranks differ": lambda block, role: random.choice([8, 12, 16, 20, 24]),
    "three kinds of blocks": lambda block, role: (8, 16, 24)[block // 4],
    "one rank a place": lambda block, role: {"query": 8, "key": 12, "value": 24}.get(role, 16),
    "one rank": lambda block, role: 16,
}


class Count(TorchDispatchMode):
    """Counts them while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.split("::")[1] not in LAUNCH_NOTHING
        return func(*args, **(kwargs or {}))


def count(ranks: str | None, multiplied: bool = False) -> int:
    """Of a BERT of 12 blocks, bf16 autocast, forward, backward and fused AdamW. ranks: a key of `RANKS`, or None for dense."""
    torch.manual_seed(0)
    random.seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 100}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=12, **sizes)).train()
    if ranks is not None:
        parts = [(name, name.split(".")) for name in find_targets(model)]
        factorize(model, {name: RANKS[ranks](int(words[3]), words[-1]) for name, words in parts})
    if multiplied:
        RunMultiplied(model).start()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        step(model, optimizer)
    with Count() as found:
        step(model, optimizer)
    return found.count


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step, on two sentences."""
    backward(model, 2, 8)
    optimizer.step()
    optimizer.zero_grad()


def backward(model: nn.Module, rows: int, tokens: int) -> None:
    """Forward and backward, in bf16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, labels = torch.ones(rows, tokens, dtype=torch.long), torch.tensor([0] * rows)
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()


def count_gathering() -> int:
    """What a step that gathers statistics launches besides: a BERT-base, 32 x 128, in tensors that hold no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = BertForSequenceClassification(BertConfig()).train()
        collector = MomentCollector(model, find_targets(model))
        collector.together = True  # as on a GPU
        counts = []
        for gathers in (False, True):
            if gathers:
                collector.start()
            backward(model, 32, 128)
            collector.step()
            with Count() as found:
                backward(model, 32, 128)
                collector.step()
            counts.append(found.count)
        collector.stop()
    return counts[1] - counts[0]


def main() -> None:
    """Print a table."""
    dense = count(None)
    rows = [["dense", dense], ["dense, a gathering step", dense + count_gathering()], ["pairs", count("one rank")]]
    rows += [[f"multiplied out, {ranks}", count(ranks, True)] for ranks in RANKS]
    print(markdown_table(["layers", "launches"], rows))


if __name__ == "__main__":
    main()
