"""Hand-written loops under fully_shard (FSDP2), run by torchrun and, for comparison, in one ordinary process.

    torchrun --nproc_per_node 2 fsdp2_loops.py FOLDER

Rank 0 writes FOLDER/sharded.json and sharded.pt; the same global batches are used whole in one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint import load as load_sharded
from torch.distributed.checkpoint import save as save_sharded
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishConfig, LowRankLinear
from loops import STEPS, SWITCH, batches, config, expect, mine, rank, size, tiny_bert, weights

WHOLE = StateDictOptions(full_state_dict=True)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model.bert.encoder.layer:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def reshard(model: nn.Module) -> None:
    """An evaluation leaves the outermost weights whole."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, cuttlefish: Cuttlefish, start: int, stop: int, parts: int = 1,
    runner: nn.Module | None = None, graphs: list[int] | None = None,
) -> list[float]:  # fmt: skip
    runner, losses = model if runner is None else runner, []
    for batch in batches()[start:stop]:
        total = torch.zeros(())
        for part in range(parts):
            if parts > 1 and size() > 1:
                model.set_requires_gradient_sync(part == parts - 1)
            loss = runner(**mine(batch, part, parts)).loss / parts
            loss.backward()
            total += loss.detach().float()
        if size() > 1:
            dist.all_reduce(total)
        losses.append(float(total) / size())
        optimizer.step()
        optimizer.zero_grad()
        cuttlefish.step()
        with torch.no_grad():
            model.eval()
            model(**mine(batch))
            model.train()
        if graphs is not None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return losses


def train(
    parts: int = 1,
    options: dict[str, Any] | None = None,
    settings: CuttlefishConfig | None = None,
    keep: Path | None = None,
    sgd: bool = False,
    compiled: str = "",
) -> dict[str, Any]:
    """compiled: "whole" or "blocks", where the model is sharded."""
    model, graphs = tiny_bert().train(), None
    if size() > 1:
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            graphs = []
        for block in model.bert.encoder.layer if compiled == "blocks" else ():
            block.compile(backend="eager")
        shard(model, **(options or {}))
    runner = torch.compile(model, backend="eager") if graphs is not None and compiled == "whole" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if sgd else optimizer_of(model)
    if compiled == "blocks" and graphs is None:
        settings = config(even_ranks=True)  # what "auto" does where blocks are compiled
    cuttlefish = Cuttlefish(runner, optimizer, settings or config(), total_steps=STEPS)
    losses = steps(model, optimizer, cuttlefish, 0, SWITCH + 2, parts, runner, graphs)
    if keep is not None and size() > 1:
        parts_of = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        save_sharded(parts_of, checkpoint_id=str(keep), no_dist=False)
    losses += steps(model, optimizer, cuttlefish, SWITCH + 2, STEPS, parts, runner, graphs)
    cuttlefish.end()
    return summary(model, optimizer, cuttlefish, losses) | {"graphs": graphs}


def summary(
    model: nn.Module, optimizer: torch.optim.Optimizer, cuttlefish: Cuttlefish, losses: list[float]
) -> dict[str, Any]:
    if size() > 1:
        reshard(model)
    pairs = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    whole = get_model_state_dict(model, options=WHOLE) if size() > 1 else model.state_dict()
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)["state"] if size() > 1 else {}
    plain = tiny_bert()
    if rank() == 0 and pairs:
        from hf_cuttlefish.patch.structure import restructure

        restructure(plain, {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)})
        plain.load_state_dict(whole)
    return {
        "size": size(),
        "losses": losses,
        "plan": dict(cuttlefish.plan or {}),
        "switched": cuttlefish.switch_step,
        "history": cuttlefish.history,
        "report": str(cuttlefish.report),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "held": held == {id(p) for p in model.parameters()},
        "numbers here": sum(p.to_local().numel() for p in model.parameters()) if size() > 1 else 0,
        "_weights": weights(plain),
        "_state": {f"{n}.{k}": torch.as_tensor(v) for n, s in state.items() for k, v in s.items()}
        if rank() == 0
        else {},
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Another model, factorized as the saved one before it is sharded, goes on from the sharded checkpoint."""
    from hf_cuttlefish.patch.structure import restructure

    model = tiny_bert()
    cuttlefish = Cuttlefish(shard(model), optimizer := optimizer_of(model), config(), total_steps=STEPS)
    losses = steps(model, optimizer, cuttlefish, 0, SWITCH + 2)
    run = cuttlefish.state_dict()
    again = tiny_bert(seed=5).train()
    restructure(again, dict(cuttlefish.plan))
    shard(again)
    optimizer = optimizer_of(again)
    state = dict(zip(("model", "optimizer"), get_state_dict(again, optimizer), strict=True))
    load_sharded(state, checkpoint_id=str(folder))
    set_state_dict(again, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    cuttlefish = Cuttlefish(again, optimizer, config(), total_steps=STEPS)
    cuttlefish.load_state_dict(run)
    losses += steps(again, optimizer, cuttlefish, SWITCH + 2, STEPS)
    return summary(again, optimizer, cuttlefish, losses)


# --- what must be refused, and what must be put back ---


def cuttlefish_of(model: nn.Module) -> Cuttlefish:
    return Cuttlefish(model, optimizer_of(model), config(), total_steps=STEPS)


def layer_itself() -> str:
    model = tiny_bert()
    fully_shard(model.bert.encoder.layer[0].intermediate.dense)
    return expect(ValueError, "intermediate.dense itself", "blocks", call=lambda: cuttlefish_of(shard(model)))


def part_of_the_processes() -> str:
    mesh = init_device_mesh("cpu", (size(), 1), mesh_dim_names=("a", "b"))["b"]
    return expect(ValueError, "a mesh of 1", call=lambda: cuttlefish_of(shard(tiny_bert(), mesh=mesh)))


def tensor_parallel(alone: bool = False) -> str:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, mesh = tiny_bert(), init_device_mesh("cpu", (size(), 1), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"bert.encoder.layer.0.intermediate.dense": ColwiseParallel()})
    if not alone:
        shard(model, mesh=mesh["data"])
    return expect(ValueError, "intermediate.dense", "tensor parallel", call=lambda: cuttlefish_of(model))


def not_on_all_of_it() -> str:
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = tiny_bert()
    weight = model.bert.pooler.dense.weight
    mesh = init_device_mesh("cpu", (size(),))
    model.bert.pooler.dense.weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()]))
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return expect(ValueError, "pooler.dense.weight", "tensor parallel", call=lambda: cuttlefish_of(model))


def other_dimension() -> str:
    from torch.distributed.tensor import Shard

    model = shard(
        tiny_bert(), shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % size() == 0 else Shard(0)
    )
    return expect(ValueError, "dimension 1", "exclude", call=lambda: cuttlefish_of(model))


def failing(where: str, culprit: int) -> str:
    """An error on one process in the middle of the switch leaves all of them dense, as before, and able to go on."""
    from hf_cuttlefish import switch
    from hf_cuttlefish.engines import fsdp2
    from hf_cuttlefish.patch import modules
    from hf_cuttlefish.patch.optimizer import SwapParameters

    model = shard(tiny_bert().train())
    optimizer = optimizer_of(model)
    cuttlefish = Cuttlefish(model, optimizer, config(on_error="continue"), total_steps=STEPS)
    steps(model, optimizer, cuttlefish, 0, SWITCH - 1)
    owner, name = {
        "spectra": (switch, "spectrum_of"), "optimizer": (modules, "SwapParameters"), "groups": (fsdp2.PlaceShards, "apply"),
        "commit": (SwapParameters, "apply"), "factors": (switch, "spectrum_of"),
    }[where]  # fmt: skip
    original = getattr(owner, name)

    calls: list[int] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if rank() == culprit and (where != "factors" or len(calls) > 13):  # 12 layers for the plan, then the factors
            if where == "groups":
                original(*args, **kwargs)
            raise OSError("injected")
        return original(*args, **kwargs)

    groups = [
        [id(e) for e in g.fsdp_params]
        for m in model.modules()
        if hasattr(m, "_get_fsdp_state")
        for g in fsdp2._groups(m)
    ]
    reshard(model)
    before = [id(p) for p in model.parameters()]
    held = [[id(p) for p in g["params"]] for g in optimizer.param_groups]

    try:
        setattr(owner, name, broken)
        batch = batches()[SWITCH - 1]
        model(**mine(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reshard(model)
        values = {n: p.to_local().clone() for n, p in model.named_parameters()}
        cuttlefish.step()
    finally:
        setattr(owner, name, original)
    reshard(model)
    after = [
        [id(e) for e in g.fsdp_params]
        for m in model.modules()
        if hasattr(m, "_get_fsdp_state")
        for g in fsdp2._groups(m)
    ]
    if cuttlefish.switch_step is not None or "injected" not in str(cuttlefish.reason):
        return f"it switched, or did not say why not: {cuttlefish.reason}"
    if after != groups or [id(p) for p in model.parameters()] != before:
        return "the groups or the parameters are not the same objects as before"
    if held != [[id(p) for p in g["params"]] for g in optimizer.param_groups]:
        return "the optimizer holds something else than before"
    if not all(torch.equal(values[n], p.to_local()) for n, p in model.named_parameters()):
        return "values have changed"
    reference = shard(tiny_bert().train())
    other = optimizer_of(reference)
    quiet = Cuttlefish(reference, other, config(switch_step=STEPS), total_steps=STEPS)
    steps(reference, other, quiet, 0, SWITCH)
    one = steps(model, optimizer, cuttlefish, SWITCH, STEPS - 1)
    two = steps(reference, other, quiet, SWITCH, STEPS - 1)
    return "ok" if one == two else f"training does not go on as without us: {one} {two}"


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"parts": 2},
    "SGD": {"sgd": True},
    "compiled": {"compiled": "whole"},
    "compiled by blocks": {"compiled": "blocks"},
    "kept whole after forward": {"options": {"reshard_after_forward": False}},
    "ranks by singular values": {"settings": config(rank_rule="energy", target_ratio=None)},
    "switch found": {"settings": config(switch_step=None, check_steps=1, earliest_switch=0.5, latest_switch=0.9)},
    "bf16 policy": {
        "options": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    },
}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    faults: dict[str, str] = {}
    if sys.argv[2:] == ["copies of shards"]:
        mesh = init_device_mesh("cpu", (2, size() // 2), mesh_dim_names=("copies", "shards"))
        results = {"copies of shards": train(options={"mesh": mesh})}
    else:
        saved = folder / "sharded_checkpoint"
        results = {
            name: train(**options, keep=saved if name == "plain" else None) for name, options in SCENARIOS.items()
        }
        results["resumed"] = resumed(saved)
        faults = {
            "fully_shard on the layer": layer_itself(),
            "mesh of a part": part_of_the_processes(),
            "tensor parallel": tensor_parallel(),
            "a DTensor besides": not_on_all_of_it(),
            "another dimension": other_dimension(),
            "spectra fails on 0": failing("spectra", 0),
            "factors fails on 0": failing("factors", 0),
            "tensor parallel alone": tensor_parallel(alone=True),
            "optimizer fails on 1": failing("optimizer", 1),
            "groups fails on 1": failing("groups", 1),
            "commit fails on 0": failing("commit", 0),
        }
    tensors = {name: {k: r.pop(k) for k in list(r) if k.startswith("_")} for name, r in results.items()}
    everywhere: list[Any] = [None] * size()
    dist.all_gather_object(everywhere, (results, faults))
    if rank() == 0:
        (folder / "sharded.json").write_text(json.dumps(everywhere), encoding="utf-8")
        torch.save(tensors, folder / "sharded.pt")


if __name__ == "__main__":
    main()
    leave()
