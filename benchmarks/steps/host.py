"""What a step costs the host, by a proxy on the CPU: `python -m benchmarks.steps.host --out runs/host.json`.

A BERT-base's 12 blocks and 72 target layers at width 8, on 8 tokens: the arithmetic takes next to nothing, and what is left is
Python, dispatch and autograd. A GPU's launches cost more than these do, so beside the time stands how many there are. Each form's
step does what the Trainer's does (`train()`, bf16 autocast, clipping, fused AdamW), in turn with the others; what counts is the
ratio to the dense step that ran just before.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification

from hf_cuttlefish import Cuttlefish, CuttlefishConfig, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.patch.running import RunMultiplied

from ..markdown import markdown_table

FORMS = {
    "dense": "dense",
    "watched": "dense, Cuttlefish on",
    "gathering": "dense, a step that gathers statistics",
    "pairs": "pairs",
    "multiplied": "multiplied out, ranks differ",
    "even": "the same, one rank",
}
PARTS = ("train", "forward", "backward", "clip", "optimizer", "zero_grad", "cuttlefish")
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 50}
WARM = 6


class Host:
    """One model in one form, and how long each part of its steps took, ms.

    host = Host("multiplied"); host.step(); host.times[-1]["forward"]
    """

    def __init__(self, form: str, blocks: int = 12) -> None:
        torch.manual_seed(0)
        random.seed(0)
        config = BertConfig(num_hidden_layers=blocks, max_position_embeddings=16, **SIZES)  # type: ignore[arg-type]
        self.model = BertForSequenceClassification(config).train()
        if form in ("pairs", "multiplied", "even"):
            ranks = {name: 3 if form == "even" else random.choice([2, 3, 4]) for name in find_targets(self.model)}
            factorize(self.model, ranks)
        if form in ("multiplied", "even"):
            RunMultiplied(self.model).start()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.run: Cuttlefish | None = None
        if form in ("watched", "gathering"):
            settings = CuttlefishConfig(switch_step=10**6 if form == "watched" else 10**4, on_error="raise")
            self.run = Cuttlefish(self.model, self.optimizer, settings, total_steps=2 * 10**6)
            if form == "gathering":
                self.run.watch.start_gathering()
                assert self.run.watch.moments is not None
                self.run.watch.moments.together = True  # as on a GPU
        ids = torch.ones(2, 4, dtype=torch.long)
        self.batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.tensor([0, 1])}
        self.times: list[dict[str, float]] = []

    def step(self) -> None:
        """One step."""
        clock = [time.perf_counter()]

        def done() -> None:
            clock.append(time.perf_counter())

        self.model.train()
        done()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model(**self.batch).loss
        done()
        loss.backward()
        done()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        done()
        self.optimizer.step()
        done()
        self.model.zero_grad()
        done()
        if self.run is not None:
            self.run.step()
        done()
        times = {part: 1000 * (end - begin) for part, begin, end in zip(PARTS, clock, clock[1:], strict=False)}
        self.times.append({"all": 1000 * (clock[-1] - clock[0]), **times})


def compare(forms: list[str], rounds: int, steps: int = 4, blocks: int = 12) -> list[dict[str, Any]]:
    """One record a form: medians of a step and its parts in ms, and quartiles of the ratio to the dense steps of the same round."""
    hosts = {form: Host(form, blocks) for form in forms}
    for host in hosts.values():
        for _ in range(WARM):
            host.step()
        host.times.clear()
    for _ in range(rounds):
        for host in hosts.values():
            for _ in range(steps):
                host.step()
    by_round = {form: _rounds(host, steps) for form, host in hosts.items()}
    records = []
    for form, host in hosts.items():
        ratios = [own / dense for own, dense in zip(by_round[form], by_round[forms[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        record = {part: round(statistics.median(t[part] for t in host.times), 3) for part in ("all", *PARTS)}
        records.append(
            {"form": form, "of_dense": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], **record}
        )
    return records


def _rounds(host: Host, steps: int) -> list[float]:
    """The median step of each round."""
    every = [times["all"] for times in host.times]
    return [statistics.median(every[i : i + steps]) for i in range(0, len(every), steps)]


def host_table(records: list[dict[str, Any]]) -> str:
    """One row a form."""
    rows = []
    for r in records:
        ratio = (
            "1.00" if r["form"] == "dense" else f"{r['of_dense']:.2f} ({r['quartiles'][0]:.2f}-{r['quartiles'][1]:.2f})"
        )
        rest = r["clip"] + r["optimizer"] + r["zero_grad"] + r["train"]
        cells = [f"{value:.2f}" for value in (r["all"], r["forward"], r["backward"], rest, r["cuttlefish"])]
        rows.append([FORMS[r["form"]], ratio, *cells])
    return markdown_table(["layers", "/ dense", "ms", "forward", "backward", "clip, optimizer", "Cuttlefish"], rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/host.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.backends.mkldnn.flags(enabled=False):  # its products take ten times as long to begin
        records = compare(arguments.forms, arguments.rounds)
    print(host_table(records))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"versions": versions, "records": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
