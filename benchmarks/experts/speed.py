"""Time training steps of a mixture of experts with grouped products: dense and pairs in turn, in one run."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_cuttlefish import __version__, factorize
from hf_cuttlefish.decide.plan import break_even_rank
from hf_cuttlefish.layers.experts import ExpertStack
from hf_cuttlefish.layers.kinds import find_layers, kind_of

from ..files import write_json
from ..markdown import markdown_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes; the defaults are those of a part of Qwen3-30B-A3B."""
    for name, value in (
        *(("hidden", 2048), ("middle", 768), ("experts", 64), ("top", 8), ("layers", 4)),
        *(("rows", 8), ("length", 1024), ("rounds", 20), ("warmup", 3)),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25], help="of the experts' parameters kept")
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--compiled", action="store_true", help="compile each model (grouped_mm only)")


def run(arguments: argparse.Namespace) -> None:
    """Time all forms in turn, and write medians, minima and shares of the dense step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_cuttlefish": __version__,
        },
        "sizes": {k: v for k, v in vars(arguments).items() if isinstance(v, (int, list)) and k != "run"},
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "forms": [],
    }
    for implementation in arguments.implementations:
        forms = [_Form(arguments, share, implementation, device) for share in (None, *arguments.shares)]
        for form in forms:
            for _ in range(arguments.warmup):
                form.step()
        for _ in range(arguments.rounds):
            for form in forms:
                form.times.append(form.step())
        dense = statistics.median(forms[0].times)
        for form in forms:
            median = statistics.median(form.times)
            record["forms"].append(
                {
                    **{"implementation": implementation, "share": form.share, "ranks": form.ranks},
                    **{"median_seconds": median, "least_seconds": min(form.times), "of_dense": median / dense},
                    "peak_bytes": form.peak,
                }
            )
            print(
                f"{implementation:12} {form.share or 'dense'!s:6} {median * 1e3:8.1f} ms  {median / dense:.2f} of dense"
            )
        del forms, form
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write_json(arguments.out, record)


def table(record: dict[str, Any]) -> str:
    """A step, dense and with pairs, by implementation."""
    rows = []
    for form in record["forms"]:
        name = "dense" if form["share"] is None else f"experts at {form['share']:g}"
        rows.append(
            [form["implementation"], name, f"{1000 * form['median_seconds']:.0f} ms", f"{form['of_dense']:.2f}"]
        )
    return markdown_table(["experts run by", "", "a step", "of dense"], rows)


class _Form:
    """One model with its optimizer and batch."""

    def __init__(
        self, sizes: argparse.Namespace, share: float | None, implementation: str, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            **{"vocab_size": 1024, "hidden_size": sizes.hidden, "moe_intermediate_size": sizes.middle},
            **{"num_hidden_layers": sizes.layers, "num_experts": sizes.experts, "num_experts_per_tok": sizes.top},
            **{"num_attention_heads": sizes.hidden // 64, "num_key_value_heads": max(1, sizes.hidden // 512)},
            **{"head_dim": 64, "intermediate_size": sizes.middle, "max_position_embeddings": sizes.length},
        )
        model = Qwen3MoeForCausalLM._from_config(config, experts_implementation=implementation)
        model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).train()
        self.share, self.ranks, self.times, self.peak = share, {}, [], 0
        if share is not None:
            self.ranks = _cut(model, share)
        self.model = torch.compile(model) if sizes.compiled and implementation == "grouped_mm" else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
        self.ids = torch.randint(0, 1024, (sizes.rows, sizes.length), device=device)
        self.device = device

    def step(self) -> float:
        """Seconds of a forward, a backward and a step of the optimizer."""
        self._wait()
        started = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.memory_allocated())
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _cut(model: torch.nn.Module, share: float) -> dict[str, int]:
    """Ready-made factors at random: what is timed does not depend on their values."""
    stacks = {name: kind_of(layer) for name, layer in find_layers(model) if isinstance(layer, ExpertStack)}
    ranks: dict[str, int] = {}
    for name, kind in stacks.items():
        m, n = kind.size
        ranks[name] = max(8, int(share * (break_even_rank(n, m) + 1)) // 8 * 8)
    factorize(model, ranks, factors=_Random(stacks, ranks))  # type: ignore[arg-type]
    return {name.rpartition(".")[2]: rank for name, rank in ranks.items()}


class _Random(dict[str, Any]):
    """Factors of a size, made when they are asked for."""

    def __init__(self, stacks: dict[str, Any], ranks: dict[str, int]) -> None:
        super().__init__(dict.fromkeys(stacks))
        self._stacks, self._ranks = stacks, ranks

    def __getitem__(self, name: str) -> Any:
        from hf_cuttlefish.maths.factors import Factors

        kind, rank = self._stacks[name], self._ranks[name]
        (m, n), count, like = kind.size, kind.count, kind.weight
        down = torch.randn(count, rank, n, device=like.device, dtype=like.dtype) / n**0.5
        return Factors(down, torch.randn(count, m, rank, device=like.device, dtype=like.dtype) / m**0.5)
