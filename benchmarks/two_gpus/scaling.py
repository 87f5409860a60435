"""A second GPU before the switch and after it: time of a step, bytes and time of the all-reduce. Run by torchrun.

    torchrun --nproc_per_node 2 benchmarks/two_gpus/scaling.py --folder OUT

BERT of random weights, DDP, bf16 autocast, eager, the same rows on each GPU; dense, and with 0.4 and 0.25 of the blocks kept. A slower
link is simulated: a communication hook that lets each bucket wait for as long as its bytes would take there, one after the other.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from begin import begin
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

from hf_cuttlefish import factorize

SHAPES = {
    "BERT-base 32 x 128": ((768, 12, 12), 32, 128),
    "BERT-large 64 x 128": ((1024, 24, 16), 64, 128),
}
QUICK = {"tiny 4 x 16": ((64, 2, 2), 4, 16)}
KEPT = (None, 0.4, 0.25)
LINKS = (10, 25, 100)
"""Gigabits a second."""


class Timed:
    """A model in training, and what its steps take."""

    def __init__(
        self, sizes: tuple[int, int, int], rows: int, length: int, kept: float | None, device: torch.device
    ) -> None:
        hidden, layers, heads = sizes
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=8192,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
        )
        model = BertForSequenceClassification(config).to(device)
        if kept is not None:
            factorize_cheaply(model, kept)
        self.device, self.model = device, model
        self.ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
        ids = torch.randint(5, 8000, (rows, length), generator=torch.Generator().manual_seed(dist.get_rank()))
        self.batch = {"input_ids": ids.to(device), "labels": torch.zeros(rows, dtype=torch.long, device=device)}

    def step(self, sync: bool = True) -> None:
        """One step; without `sync` gradients stay here."""
        with contextlib.nullcontext() if sync else self.ddp.no_sync():
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self.ddp(**self.batch).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, action: Callable[[], Any], times: int) -> float:
        """Of one, in the slowest process: the mean of so many, after some that do not count."""
        for _ in range(max(2, times // 4)):
            action()
        self._settle()
        started = time.perf_counter()
        for _ in range(times):
            action()
        self._settle()
        spent = torch.tensor((time.perf_counter() - started) / times, dtype=torch.float64, device=self.device)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        return float(spent)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def bytes(self) -> int:
        """Of the gradients."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def all_reduce(self, times: int) -> float:
        """Seconds for buffers of all gradients' size, 25 MiB each, one after the other."""
        buffers = [
            torch.zeros(min(left, 25 * 2**20) // 4, device=self.device) for left in range(self.bytes(), 0, -25 * 2**20)
        ]
        return self.seconds(lambda: [dist.all_reduce(buffer) for buffer in buffers], times)

    def slower(self, gigabits: float, times: int) -> float:
        """Seconds of a step over a link of so many gigabits a second, simulated: a second DDP around the same model."""
        wrapped = self.ddp
        self.ddp = DistributedDataParallel(
            self.model, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )
        self.ddp.register_comm_hook(Link(self.device, gigabits), through_link)
        try:
            return self.seconds(self.step, times)
        finally:
            self.ddp = wrapped

    def unequal(self) -> int:
        """How many parameters differ between the processes."""
        mine = [int(p.detach().view(torch.int32).long().sum()) for p in self.model.parameters()]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        return sum(any(a != b for b in sums) for a, *sums in zip(*everywhere, strict=True))


class Link:
    """A link of so many gigabits a second, over which buckets go one after the other."""

    def __init__(self, device: torch.device, gigabits: float) -> None:
        self.device, self.bytes_a_second = device, gigabits * 1e9 / 8
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.cycles = cycles_a_second() if device.type == "cuda" else 0.0

    def wait(self, size: int) -> None:
        """For as long as a ring's share of so many bytes takes."""
        n = dist.get_world_size()
        seconds = 2 * (n - 1) / n * size / self.bytes_a_second
        if self.stream is None:
            time.sleep(seconds)
            return
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int(seconds * self.cycles))
        here.wait_stream(self.stream)


def through_link(link: Link, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The ordinary all-reduce, and the time that the link would need."""
    buffer = bucket.buffer().div_(dist.get_world_size())
    future = dist.all_reduce(buffer, async_op=True).get_future()

    def then(done: torch.futures.Future[Any]) -> torch.Tensor:
        link.wait(buffer.numel() * buffer.element_size())
        return done.value()[0]

    return future.then(then)


through_link.__annotations__ = {
    "bucket": dist.GradBucket,
    "return": torch.futures.Future[torch.Tensor],
}  # DDP looks at them


def cycles_a_second() -> float:
    """Of torch.cuda._sleep, measured."""
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda._sleep(50_000_000)
    torch.cuda.synchronize()
    return 50_000_000 / (time.perf_counter() - started)


def factorize_cheaply(model: nn.Module, kept: float) -> None:
    """At one share of each rank, with factors of random numbers: only times are of interest."""
    from hf_cuttlefish.decide.targets import find_targets
    from hf_cuttlefish.maths.factors import Factors

    shapes = {name: layer.weight.shape for name, layer in find_targets(model).items()}
    plan = {name: max(8, round(kept * m * n / (m + n) / 8) * 8) for name, (m, n) in shapes.items()}
    factors = {
        name: Factors(
            torch.randn(rank, shapes[name][1]) / shapes[name][1] ** 0.5, torch.randn(shapes[name][0], rank) * 0.02
        )
        for name, rank in plan.items()
    }
    factorize(model, plan, factors=factors)


def measure(name: str, shape: Any, kept: float | None, device: torch.device, times: int) -> dict[str, Any]:
    """All that is measured of one model."""
    run = Timed(*shape, kept, device)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "gradient bytes": run.bytes(),
        "step": run.seconds(run.step, times),
    }
    if dist.get_world_size() > 1:
        found["unequal parameters"] = run.unequal()
        found["step without all-reduce"] = run.seconds(lambda: run.step(sync=False), times)
        found["all-reduce alone"] = run.all_reduce(times)
        run = Timed(*shape, kept, device)  # replicas that went ways of their own are of no use
        found["step over a simulated link, by Gbit/s"] = {str(g): run.slower(g, max(3, times // 5)) for g in LINKS}
    return found


def main() -> None:
    """Command line."""
    arguments, device = begin(__doc__)
    found: dict[str, Any] = {}
    for name, shape in (QUICK if arguments.quick else SHAPES).items():
        for k in KEPT:
            measured = measure(name, shape, k, device, 3 if arguments.quick else 20)
            found.setdefault(name, {})["dense" if k is None else f"{k} kept"] = measured
            if dist.get_rank() == 0:  # what there is so far, should the time be over
                arguments.folder.mkdir(parents=True, exist_ok=True)
                (arguments.folder / "said.json").write_text(json.dumps({"scaling": found}), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
