"""ZeroRedundancyOptimizer under DDP, run by torchrun, each time beside an ordinary optimizer on the same batches.

    torchrun --nproc_per_node 2 zero_redundancy_loops.py results.json [SCENARIO ...]

Rank 0 writes {scenario: [what each process found]}.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from ending import leave
from hf_cuttlefish import Cuttlefish, LowRankLinear, factorize, follow_checkpoints
from loops import STEPS, SWITCH, batches, config, expect, mine, rank, size, tiny_bert, unequal

ADAMW = {"optimizer_class": torch.optim.AdamW, "lr": 1e-2, "eps": 1e-3}
SGD = {"optimizer_class": torch.optim.SGD, "lr": 1e-2, "momentum": 0.9}


def groups_of(model: nn.Module, several: bool) -> list[Any]:
    """All parameters, or three groups: biases and norms without decay, embeddings with another rate."""
    if not several:
        return list(model.parameters())
    named = dict(model.named_parameters())
    embedded = [p for n, p in named.items() if "embeddings" in n and p.ndim > 1]
    flat = [p for p in named.values() if p.ndim == 1]
    others = [p for n, p in named.items() if "embeddings" not in n and p.ndim > 1]
    return [
        {"params": others, "weight_decay": 0.1},
        {"params": flat, "weight_decay": 0.0},
        {"params": embedded, "weight_decay": 0.05, "lr": 5e-3},
    ]


def made(model: nn.Module, redundant: bool, several: bool, view: bool, **options: Any) -> torch.optim.Optimizer:
    options = options or dict(ADAMW)
    if redundant:
        return ZeroRedundancyOptimizer(groups_of(model, several), parameters_as_bucket_view=view, **options)
    return options.pop("optimizer_class")(groups_of(model, several), **options)


def whole_state(optimizer: Any) -> dict[int, dict[str, Any]]:
    """State by position, on every process; the one of a ZeroRedundancyOptimizer is gathered by its own means."""
    if not isinstance(optimizer, ZeroRedundancyOptimizer):
        return copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.consolidate_state_dict(to=0)
    holder = [optimizer.state_dict()["state"] if rank() == 0 else None]
    dist.broadcast_object_list(holder)
    return copy.deepcopy(holder[0])  # on the CPU its tensors are those that are trained on


def train(
    redundant: bool,
    *,
    options: dict[str, Any] | None = None,
    several: bool = False,
    view: bool = False,
    wrapped: bool = False,
    scheduled: bool = False,
    changes: dict[str, Any] | None = None,
    switching: bool = True,
    last: int = STEPS,
) -> dict[str, Any]:
    model = tiny_bert()
    ddp = DistributedDataParallel(model)
    optimizer = made(model, redundant, several, view, **dict(options or {}))
    fired: list[int] = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    groups, dicts = optimizer.param_groups, list(optimizer.param_groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / (2 * STEPS)) if scheduled else None
    given: Any = optimizer
    if (
        wrapped
    ):  # placing it on the device reads its state, which ZeroRedundancyOptimizer does not give before it is gathered
        given = Accelerator(cpu=True).prepare_optimizer(optimizer, device_placement=False)
        assert isinstance(given, AcceleratedOptimizer)
    cuttlefish = None
    if switching:
        cuttlefish = Cuttlefish(ddp, given, config(**(changes or {})), total_steps=STEPS, scheduler=scheduler)
    run: dict[str, Any] = {"losses": [], "rates": [], "state": {}, "model": model, "optimizer": optimizer, "ddp": ddp}
    for step, batch in enumerate(batches()[:last], 1):
        run["rates"].append([g["lr"] for g in optimizer.param_groups])
        loss = ddp(**mine(batch)).loss
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        run["losses"].append(float(total) / size())
        given.step()
        if scheduler is not None:
            scheduler.step()
        given.zero_grad()
        if cuttlefish is not None:
            cuttlefish.step()
        if step == SWITCH:
            run["state"] = whole_state(optimizer)
    if cuttlefish is not None:
        cuttlefish.end()
        run["plan"], run["switched"] = dict(cuttlefish.plan or {}), cuttlefish.switch_step
        run["report"] = cuttlefish.report.optimizer if cuttlefish.report else ""
        run["reason"] = cuttlefish.reason
    same = groups is optimizer.param_groups and all(a is b for a, b in zip(groups, dicts, strict=True))
    run["kept"] = same and len(fired) == last
    run["unequal"] = unequal(model)
    return run


def numbers(state: dict[Any, dict[str, Any]]) -> int:
    return sum(v.numel() for own in state.values() for v in own.values() if isinstance(v, torch.Tensor) and v.ndim)


def farthest(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> float:
    """Largest difference between two states, relative to the largest number of each tensor; the same keys are asserted."""
    assert a.keys() == b.keys() and all(a[i].keys() == b[i].keys() for i in a)
    worst = 0.0
    for i, own in a.items():
        for key, value in own.items():
            x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (value, b[i][key]))
            assert x.shape == y.shape
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) if x.numel() else 0.0)
    return worst


def beside(**options: Any) -> dict[str, Any]:
    """ZeroRedundancyOptimizer against the ordinary optimizer: what tests compare."""
    run, plain = train(True, **options), train(False, **options)
    zero = run["optimizer"]
    owned = [p for group in zero.optim.param_groups for p in group["params"]]
    pairs = zip(run["model"].parameters(), plain["model"].parameters(), strict=True)
    return {
        "plan": [run["plan"], plain["plan"]],
        "switched": [run["switched"], plain["switched"]],
        "report": [run["report"], plain["report"]],
        "loss": max(abs(a - b) for a, b in zip(run["losses"], plain["losses"], strict=True)),
        "parameter": max((p - q).abs().max().item() for p, q in pairs),
        "state": farthest(run["state"], plain["state"]),
        "states": [len(run["state"]), sum(1 for _ in plain["model"].parameters())],
        "state at the end": farthest(whole_state(zero), whole_state(plain["optimizer"])),
        "rates": [run["rates"], plain["rates"]],
        "numbers here": [numbers(zero.optim.state), numbers(plain["optimizer"].state)],
        "strangers": len(zero.optim.state.keys() ^ set(owned)) + len(zero.state),
        "parameters here": [sum(p.numel() for p in owned), sum(p.numel() for p in run["model"].parameters())],
        "kept": run["kept"],
        "unequal": run["unequal"],
    }


def resumed() -> str:
    """A fresh optimizer around the factorized model, and one that was made before the weights were loaded: the same bits."""
    whole = train(True)
    until = train(True, last=SWITCH + 2)
    until["optimizer"].consolidate_state_dict(to=0)
    saved = [until["optimizer"].state_dict() if rank() == 0 else None]
    dist.broadcast_object_list(saved)
    for follows in (False, True):
        model = tiny_bert(seed=5)
        ddp = optimizer = None
        if follows:
            ddp = DistributedDataParallel(model)
            optimizer = made(model, True, False, False)
            follow_checkpoints(model, optimizer)
            optimizer.zero_grad()
            ddp(**mine(batches()[0])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            follow_checkpoints(model)
        model.load_state_dict(until["model"].state_dict())
        if optimizer is None or ddp is None:
            ddp, optimizer = DistributedDataParallel(model), made(model, True, False, False)
        optimizer.load_state_dict(copy.deepcopy(saved[0]))
        for batch in batches()[SWITCH + 2 :]:
            ddp(**mine(batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        worst = max(
            (p - q).abs().max().item() for p, q in zip(model.parameters(), whole["model"].parameters(), strict=True)
        )
        if worst or unequal(model) or farthest(whole_state(optimizer), whole_state(whole["optimizer"])):
            return f"follows {follows}: parameters differ by {worst}, unequal {unequal(model)}"
    return "ok"


def failing(where: str, culprit: int) -> str:
    """One process raises in the middle: everything is put back, and training goes on as without a switch, to the bit."""
    from hf_cuttlefish.engines import zero_redundancy
    from hf_cuttlefish.engines.ddp import RebuildDDP
    from hf_cuttlefish.patch.optimizer import CheckParameters

    module, name = {
        "prepare": (zero_redundancy, "state_of_factors"),
        "divide": (zero_redundancy, "_described"),
        "check": (CheckParameters, "apply"),
        "exchange": (zero_redundancy, "_bytes"),
        "DDP": (RebuildDDP, "apply"),
    }[where]

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError(f"{where} is broken")

    expected = train(True, several=True, view=True, switching=False)
    real = getattr(module, name)
    if rank() == culprit:
        setattr(module, name, broken)
    try:
        run = train(True, several=True, view=True, changes={"on_error": "continue"})
    finally:
        setattr(module, name, real)
    if run["switched"] is not None or "is broken" not in run["reason"]:
        return f"switched or no reason: {run['switched']} {run['reason']}"
    if any(isinstance(m, LowRankLinear) for m in run["model"].modules()) or run["unequal"] or not run["kept"]:
        return f"not as before, or unequal: {run['unequal']}"
    worst = max(
        (p - q).abs().max().item()
        for p, q in zip(run["model"].parameters(), expected["model"].parameters(), strict=True)
    )
    states = farthest(whole_state(run["optimizer"]), whole_state(expected["optimizer"]))
    same = run["losses"] == expected["losses"]
    return "ok" if worst == 0 == states and same else f"other training: {worst} {states} {run['losses']}"


def refused() -> str:
    """overlap_with_ddp, a group of its own, FSDP2, other parameters elsewhere, a state that cannot be sent, `factorize`."""

    class KeepsLists(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["list"] = [1]

    verdicts = []

    def cuttlefish_of(optimizer: Any, ddp: nn.Module) -> None:
        cuttlefish = Cuttlefish(ddp, optimizer, config(), total_steps=STEPS)
        for batch in batches():
            ddp(**mine(batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cuttlefish.step()

    ddp = DistributedDataParallel(tiny_bert())
    overlapping = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, overlap_with_ddp=True, lr=1e-3)
    verdicts.append(expect(ValueError, "overlap_with_ddp=True", call=lambda: cuttlefish_of(overlapping, ddp)))
    alone = [dist.new_group([i]) for i in range(size())][rank()]
    other = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, process_group=alone, lr=1e-3)
    verdicts.append(expect(ValueError, "same process_group", call=lambda: cuttlefish_of(other, ddp)))
    sharded = fully_shard(tiny_bert())
    zero = ZeroRedundancyOptimizer(sharded.parameters(), torch.optim.AdamW, lr=1e-3)
    verdicts.append(expect(ValueError, "steps whole parameters", call=lambda: cuttlefish_of(zero, sharded)))
    turned = list(ddp.parameters())[:: 1 - 2 * rank()]
    other = ZeroRedundancyOptimizer(turned, torch.optim.AdamW, lr=1e-3)
    now = config(switch_step=1, statistics_steps=0, rank_rule="ratio", target_ratio=None)
    cuttlefish = Cuttlefish(ddp, other, now, total_steps=STEPS)
    verdicts.append(expect(ValueError, "in different ways", call=cuttlefish.step))
    listed = ZeroRedundancyOptimizer(ddp.parameters(), KeepsLists, lr=1e-3)
    verdicts.append(
        expect((TypeError, RuntimeError), "keeps a list as its state", call=lambda: cuttlefish_of(listed, ddp))
    )
    model = tiny_bert()
    given = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    plan = {"bert.encoder.layer.0.intermediate.dense": 4}
    verdicts.append(expect(TypeError, "make it after factorize", call=lambda: factorize(model, plan, given)))
    return "ok" if all(v == "ok" for v in verdicts) else repr(verdicts)


COMPARISONS: dict[str, Any] = {
    "AdamW": lambda: beside(),
    "groups": lambda: beside(
        several=True,
        view=True,
        wrapped=True,
        scheduled=True,
        changes={"learning_rate_scale": 1.5, "switch": "in_place"},
    ),
    "SGD": lambda: beside(options=dict(SGD), several=True),
    "reset": lambda: beside(changes={"optimizer_state": "reset"}),
}
VERDICTS: dict[str, Any] = {
    "resumed": resumed,
    "refused": refused,
    **{
        f"{where} fails on {culprit}": (lambda w=where, c=culprit: failing(w, c))
        for where, culprit in (("prepare", 1), ("divide", 0), ("check", 1), ("exchange", 1), ("DDP", 0))
    },
}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    scenarios = {**COMPARISONS, **VERDICTS}
    results = {}
    for name in sys.argv[2:] or scenarios:
        everywhere: list[Any] = [None] * size()
        dist.all_gather_object(everywhere, scenarios[name]())
        results[name] = everywhere
    if rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(results, file)
    leave()


if __name__ == "__main__":
    main()
