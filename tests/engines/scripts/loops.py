"""Hand-written loops under plain DDP, run by torchrun and, for comparison, in one ordinary process.

    torchrun --nproc_per_node 2 loops.py results.json SCENARIO [SCENARIO ...]

Rank 0 writes {scenario: {...}}; floats, lists and strings only. In one process the same global batches are used whole.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from accelerate.utils import compile_regions
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

from ending import leave
from hf_cuttlefish import Cuttlefish, CuttlefishConfig, LowRankLinear
from hf_cuttlefish.engines import ddp as ddp_engine
from hf_cuttlefish.engines.ddp import RebuildDDP
from hf_cuttlefish.patch.edits import Edit

STEPS, SWITCH, GLOBAL_BATCH, LENGTH, CLASSES = 10, 5, 12, 8, 3


def tiny_bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    options = {
        **{
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        **{"max_position_embeddings": 16, "num_labels": CLASSES},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes},
    }
    model = BertForSequenceClassification(BertConfig(**options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batches(seed: int = 7) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(STEPS):
        ids = torch.randint(3, 40, (GLOBAL_BATCH, LENGTH), generator=g)
        mask = (torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (GLOBAL_BATCH, 1), generator=g)).long()
        result.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids[:, 0] % CLASSES})
    return result


def config(**changes: Any) -> CuttlefishConfig:
    given = {"switch_step": SWITCH, "statistics_steps": 3, "rank_multiple": 2, "target_ratio": 0.5, "on_error": "raise"}
    return CuttlefishConfig(**{**given, **changes})


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def mine(batch: dict[str, torch.Tensor], part: int = 0, parts: int = 1) -> dict[str, torch.Tensor]:
    """This process's rows of micro-batch `part` of `parts` of a global batch."""
    rows = slice(rank() * parts + part, None, size() * parts)
    return {k: v[rows] for k, v in batch.items()}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by dense names, factors multiplied out: the sign of a singular vector is free."""
    result = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            result[f"{name}.weight"] = module.product()
        elif not any(name.endswith(f".{part}") for part in ("down", "up")):
            result |= {f"{name}.{k}": p.detach().clone() for k, p in module.named_parameters(recurse=False)}
    return result


def settings(ddp: DistributedDataParallel) -> dict[str, str]:
    """What can be read off a DDP about how it was built."""
    plain = (bool, int, float, str, type(None), list, tuple, set)
    per_run = {"_has_rebuilt_buckets", "_lazy_init_ran", "_static_graph_delay_allreduce_enqueued"}
    found = {k: repr(v) for k, v in vars(ddp).items() if isinstance(v, plain) and k not in per_run}
    found.pop("_module_parameters")
    found["hooks"] = repr(
        [len(v) for k, v in sorted(vars(ddp).items()) if k.endswith("hooks") and k != "_accum_grad_hooks"]
    )
    found["logged"] = repr({k: v for k, v in ddp._get_ddp_logging_data().items() if k in LOGGED})
    return found


LOGGED = (
    "world_size", "rank", "broadcast_buffers", "bucket_cap_bytes", "find_unused_parameters", "gradient_as_bucket_view",
    "backend_name", "static_graph", "comm_hook", "device_ids", "output_device",
)  # fmt: skip


def train(
    ddp_options: dict[str, Any] | None = None,
    *,
    accumulate: int = 1,
    prepare: Any = None,
    wrapped: bool = True,
    autocast: bool = False,
    hook: Any = None,
    compiled: Any = None,
    checkpointing: bool = False,
    settings_of_run: CuttlefishConfig | None = None,
    optimizer_class: Any = torch.optim.AdamW,
) -> dict[str, Any]:
    """One run; DDP where there is more than one process. Gives what tests compare."""
    torch.manual_seed(1 + rank())  # nothing may depend on it
    model = tiny_bert()
    if prepare is not None:
        prepare(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = optimizer_class(model.parameters(), lr=1e-2, eps=1e-3)
    runner: nn.Module = model
    if size() > 1:
        runner = DistributedDataParallel(model, **(ddp_options or {}))
        calls = []
        runner.register_forward_pre_hook(lambda *_: calls.append(1))
        if hook is not None:
            hook(runner)
    ddp = runner
    if compiled is not None:
        blocks = compiled.get("blocks")
        runner = compile_regions(runner, backend="eager") if blocks else torch.compile(runner, backend="eager")
    before = settings(ddp) if size() > 1 else {}
    cuttlefish = Cuttlefish(runner if wrapped else model, optimizer, settings_of_run or config(), total_steps=STEPS)
    losses, gradients, switched, graphs = [], {}, None, []
    model.train()
    for step, batch in enumerate(batches(), 1):
        total = torch.zeros(())
        for part in range(accumulate):
            quiet = runner.no_sync() if size() > 1 and part < accumulate - 1 else contextlib.nullcontext()
            with quiet, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = runner(**mine(batch, part, accumulate))
                loss = output.loss / accumulate
                loss.backward()
            total += loss.detach().float()
        if size() > 1:
            dist.all_reduce(total)
        losses.append(float(total) / size())
        if step == SWITCH + 1:
            gradients = {
                n: p.grad.clone()
                for n, p in model.named_parameters()
                if p.grad is not None and "down" not in n and "up." not in n
            }
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] if compiled is not None else 0)
        if cuttlefish.step():
            switched = step
            assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == len(cuttlefish.plan) > 0
    cuttlefish.end()
    result: dict[str, Any] = {
        "ddp": size() > 1 and isinstance(ddp, DistributedDataParallel),
        "size": size(),
        "losses": losses,
        "switched": switched,
        "plan": dict(cuttlefish.plan or {}),
        "history": cuttlefish.history,
        "reason": cuttlefish.reason,
        "dtype": str(output.logits.dtype),
        "graphs": graphs,
        "held": sum(p.numel() for g in optimizer.param_groups for p in g["params"])
        == sum(p.numel() for p in model.parameters()),
        "_weights": weights(model),
        "_gradients": gradients,
        "seconds": cuttlefish.report.seconds if cuttlefish.report else {},
    }
    if size() > 1:
        after = settings(ddp)
        result["changed"] = {
            k: [before.get(k), after.get(k)] for k in {**before, **after} if before.get(k) != after.get(k)
        }
        result["calls"] = len(calls)
        result["hook_calls"] = list(HOOK_CALLS)
        result["unequal"] = unequal(model)
        result["unequal_state"] = unequal_state(model, optimizer)
    return result


def unequal(model: nn.Module) -> list[str]:
    """Names of parameters that are not the same bits on all processes, by comparing them whole."""
    names = []
    for name, p in model.named_parameters():
        everywhere = [torch.empty_like(p) for _ in range(size())]
        dist.all_gather(everywhere, p.detach())
        if not all(torch.equal(p, q) for q in everywhere):
            names.append(name)
    return names


def unequal_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    names = []
    for name, p in model.named_parameters():
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            value = torch.as_tensor(value, dtype=torch.float32)
            everywhere = [torch.empty_like(value) for _ in range(size())]
            dist.all_gather(everywhere, value)
            if not all(torch.equal(value, q) for q in everywhere):
                names.append(f"{name}.{key}")
    return names


HOOK_CALLS: list[int] = []


def counting(state, bucket):  # DDP reads annotations, and these would be strings
    """An ordinary mean of gradients that notes how many numbers it was given."""
    state.append(bucket.buffer().numel())
    return default_hooks.allreduce_hook(None, bucket)


def power_sgd(ddp: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def freeze(model: nn.Module) -> None:
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)


def unused(model: nn.Module) -> None:
    """A layer that no forward uses."""
    model.register_module("spare", nn.Linear(4, 4))


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bare model given": {"wrapped": False},
    "find_unused_parameters": {"ddp_options": {"find_unused_parameters": True}, "prepare": unused},
    "static_graph": {"ddp_options": {"static_graph": True}},
    "gradient_as_bucket_view": {"ddp_options": {"gradient_as_bucket_view": True}},
    "many buckets": {"ddp_options": {"bucket_cap_mb": 0.01, "find_unused_parameters": True}},
    "list of buckets": {"ddp_options": {"bucket_cap_mb_list": [0.02, 0.01]}},
    "other options": {
        "ddp_options": {"broadcast_buffers": False, "dim": 1, "batched_grad_copy": True, "check_reduction": True}
    },
    "skip unused": {
        "ddp_options": {"find_unused_parameters": True, "skip_all_reduce_unused_params": True},
        "prepare": unused,
    },
    "own group": {"ddp_options": {"process_group": "new"}},
    "no_sync": {"accumulate": 3},
    "no_sync, bucket view": {"accumulate": 2, "ddp_options": {"gradient_as_bucket_view": True}},
    "no_sync, find unused": {"accumulate": 2, "ddp_options": {"find_unused_parameters": True}},
    "checkpointing": {"checkpointing": True},
    "checkpointing, static graph": {"checkpointing": True, "ddp_options": {"static_graph": True}},
    "autocast": {"autocast": True},
    "frozen layers": {"prepare": freeze},
    "ranks by singular values": {"settings_of_run": config(rank_rule="energy", target_ratio=None)},
    "ranks by shape": {"settings_of_run": config(rank_rule="ratio", target_ratio=None)},
    "switch found": {
        "settings_of_run": config(switch_step=None, check_steps=1, earliest_switch=0.5, latest_switch=0.9)
    },
    "fp16 comm hook": {"hook": lambda ddp: ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)},
    "own comm hook": {"hook": lambda ddp: ddp.register_comm_hook(HOOK_CALLS, counting)},
    "builtin comm hook": {"hook": lambda ddp: ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)},
    "PowerSGD": {"hook": power_sgd},
    "compiled": {"compiled": {"blocks": False}},
    # What is compared has no blocks that are compiled, where "auto" would leave each layer its own rank.
    "compiled by blocks": {"compiled": {"blocks": True}, "settings_of_run": config(even_ranks=False)},
    "compiled by blocks, bare model given": {
        "compiled": {"blocks": True},
        "wrapped": False,
        "settings_of_run": config(even_ranks=False),
    },
}


def largest(a, b):
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def run(name: str) -> dict[str, Any]:
    options = dict(SCENARIOS[name])
    if (options.get("ddp_options") or {}).get("process_group") == "new" and size() > 1:
        options["ddp_options"] = {"process_group": dist.new_group()}
    if options.get("compiled"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    return train(**options)


# --- faults: each gives "ok" or says what went wrong, on every process ---


def expect(error: type[BaseException], *words: str, call: Any) -> str:
    try:
        call()
    except error as caught:
        return "ok" if all(w in str(caught) for w in words) else f"the message lacks {words}: {caught}"
    except BaseException as caught:
        return f"{type(caught).__name__}: {caught}"
    return "nothing was raised"


def ddp_of(model: nn.Module, **options: Any) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    return DistributedDataParallel(model, **options), torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def other_config() -> str:
    ddp, optimizer = ddp_of(tiny_bert())
    return expect(
        ValueError, "disagree on config", "rank_multiple", "on process",
        call=lambda: Cuttlefish(ddp, optimizer, config(rank_multiple=2 + rank()), total_steps=STEPS),
    )  # fmt: skip


def other_steps() -> str:
    ddp, optimizer = ddp_of(tiny_bert())
    return expect(
        ValueError,
        "disagree on total_steps",
        call=lambda: Cuttlefish(ddp, optimizer, config(), total_steps=STEPS + rank()),
    )


def other_model() -> str:
    """Before DDP is made (which looks at shapes itself)."""
    model = tiny_bert(intermediate_size=64 + 32 * rank())
    optimizer = torch.optim.AdamW(model.parameters())
    return expect(
        ValueError, "disagree on model", "intermediate.dense.weight",
        call=lambda: Cuttlefish(model, optimizer, config(), total_steps=STEPS),
    )  # fmt: skip


def other_targets() -> str:
    """Only on process 1 the pattern matches nothing: the others hear of it."""
    ddp, optimizer = ddp_of(tiny_bert())
    pattern = ["query"] if rank() == 0 else ["no_such_layer"]
    words = ("process 1 failed", "no_such_layer") if rank() == 0 else ("no_such_layer",)
    error = RuntimeError if rank() == 0 else ValueError
    return expect(
        error, *words, call=lambda: Cuttlefish(ddp, optimizer, config(target_modules=pattern), total_steps=STEPS)
    )


def other_values() -> str:
    """DDP does not synchronize what it is told not to."""
    ddp, optimizer = ddp_of(tiny_bert(seed=rank()), init_sync=False)
    return expect(
        RuntimeError, "different parameters at the start",
        call=lambda: Cuttlefish(ddp, optimizer, config(), total_steps=STEPS),
    )  # fmt: skip


def no_ddp() -> str:
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    holder = nn.ModuleDict({"exchanges_gradients_itself": model})
    cuttlefish = Cuttlefish(model, optimizer, config(), total_steps=STEPS)
    verdict = expect(RuntimeError, "no DistributedDataParallel", "ModuleDict", call=cuttlefish.step)
    del holder
    return verdict


def prepared_later() -> str:
    """Cuttlefish first, DDP afterwards."""
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    cuttlefish = Cuttlefish(model, optimizer, config(), total_steps=STEPS)
    ddp = DistributedDataParallel(model)
    losses = steps(ddp, optimizer, cuttlefish)
    return "ok" if cuttlefish.switch_step == SWITCH and not unequal(model) and len(losses) == STEPS else "no switch"


def loaded_into_ddp() -> str:
    """A hand-written loop resumes into a model that DDP has wrapped already: factors first, then dense again."""
    from hf_cuttlefish import factorize, follow_checkpoints

    low_rank = tiny_bert(seed=3)
    factorize(low_rank, {"bert.encoder.layer.0.intermediate.dense": 4, "bert.encoder.layer.1.output.dense": 6})
    model = tiny_bert()
    ddp, optimizer = ddp_of(model, find_unused_parameters=True)
    follow_checkpoints(model, optimizer)
    for source, layers in ((low_rank, 2), (tiny_bert(seed=4), 0)):
        model.load_state_dict(source.state_dict())
        if sum(isinstance(m, LowRankLinear) for m in model.modules()) != layers:
            return "the structure did not follow"
        for batch in batches()[:3]:
            ddp(**mine(batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if unequal(model):
            return f"unequal with {layers} factorized layers: {unequal(model)}"
    return "ok"


def steps(ddp: nn.Module, optimizer: torch.optim.Optimizer, cuttlefish: Cuttlefish) -> list[float]:
    losses = []
    for batch in batches():
        loss = ddp(**mine(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        cuttlefish.step()
    return losses


def failing(where: str, culprit: int, on_error: str) -> str:
    """One process raises during the switch: all stop at the same point, or all go on full rank, equal and in step."""
    from hf_cuttlefish import switch
    from hf_cuttlefish.patch import modules, structure
    from hf_cuttlefish.patch.optimizer import CheckParameters

    places = {
        "choose": (switch, "plan_ranks"),
        "prepare": (modules, "SwapParameters"),
        "commit": (CheckParameters, "apply"),
        "config": (structure, "write_structure"),
        "DDP": (RebuildDDP, "apply"),
    }
    module, name = places[where]
    model = tiny_bert()
    ddp, opt = ddp_of(model, find_unused_parameters=True)
    cuttlefish = Cuttlefish(ddp, opt, config(on_error=on_error), total_steps=STEPS)
    real = getattr(module, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError(f"{where} is broken")

    reference = tiny_bert()
    other, other_opt = ddp_of(reference, find_unused_parameters=True)
    expected = []
    for batch in batches():
        loss = other(**mine(batch)).loss
        loss.backward()
        other_opt.step()
        other_opt.zero_grad()
        expected.append(float(loss.detach()))
    if rank() == culprit:
        setattr(module, name, broken)
    try:
        if on_error == "raise":
            words = (f"{where} is broken",)
            return expect(
                ZeroDivisionError if rank() == culprit else RuntimeError,
                *words,
                call=lambda: steps(ddp, opt, cuttlefish),
            )
        losses = steps(ddp, opt, cuttlefish)
    finally:
        setattr(module, name, real)
    if cuttlefish.switch_step is not None or "is broken" not in str(cuttlefish.reason):
        return f"switched or no reason: {cuttlefish.switch_step} {cuttlefish.reason}"
    if any(isinstance(m, LowRankLinear) for m in model.modules()) or unequal(model):
        return f"not as before, or unequal: {unequal(model)}"
    worst = max((p - q).abs().max().item() for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    return "ok" if losses == expected and worst == 0 else f"other training: {worst} {losses} {expected}"


def desync_is_noticed() -> str:
    """A switch that leaves DDP alone, which is what is to be feared, ends with an error one step later."""

    class NotRebuilt(Edit):
        def __init__(self, ddp: Any) -> None: ...

    model = tiny_bert()
    ddp, optimizer = ddp_of(model, find_unused_parameters=True)
    cuttlefish = Cuttlefish(ddp, optimizer, config(), total_steps=STEPS)
    ddp_engine.RebuildDDP = NotRebuilt
    try:
        verdict = expect(
            RuntimeError,
            "different parameters after the switch at step 5",
            call=lambda: steps(ddp, optimizer, cuttlefish),
        )
    finally:
        ddp_engine.RebuildDDP = RebuildDDP
    return verdict if cuttlefish.global_step == SWITCH + 1 else f"noticed at step {cuttlefish.global_step}"


def desync_before_is_noticed() -> str:
    model = tiny_bert()
    ddp, optimizer = ddp_of(model)
    cuttlefish = Cuttlefish(
        ddp, optimizer, config(statistics_steps=0, rank_rule="energy", target_ratio=None), total_steps=STEPS
    )
    if rank() == 1:
        model.classifier.bias.data[0] += 1e-6
    return expect(RuntimeError, "before the switch", "classifier.bias", call=lambda: steps(ddp, optimizer, cuttlefish))


def join() -> str:
    model = tiny_bert()
    ddp, optimizer = ddp_of(model)
    cuttlefish = Cuttlefish(ddp, optimizer, config(), total_steps=STEPS)

    def uneven() -> None:
        from torch.distributed.algorithms.join import Join

        with Join([ddp]):
            steps(ddp, optimizer, cuttlefish)

    return expect(RuntimeError, "even_batches=True", call=uneven)


def factorize_alone() -> str:
    from hf_cuttlefish import factorize

    model = tiny_bert()
    ddp, optimizer = ddp_of(model)
    plan = {"bert.encoder.layer.0.intermediate.dense": 4}
    verdict = expect(ValueError, "DDP is around", call=lambda: factorize(model, plan, optimizer))
    if verdict == "ok":
        verdict = expect(ValueError, "wrapped by DDP", call=lambda: factorize(ddp, plan, optimizer))
    return verdict


def refused_options() -> str:
    from torch.nn.parallel.distributed import _MixedPrecision

    verdicts = []
    model = tiny_bert()
    delayed = [(n, p) for n, p in model.named_parameters() if "classifier" in n]
    hooked = model.bert.pooler.dense.weight
    ddp, optimizer = ddp_of(model, delay_all_reduce_named_params=delayed, param_to_hook_all_reduce=hooked)
    verdicts.append(
        expect(ValueError, "delay_all_reduce", call=lambda: Cuttlefish(ddp, optimizer, config(), total_steps=9))
    )
    model = tiny_bert()
    model._ddp_params_and_buffers_to_ignore = ["bert.encoder.layer.0.intermediate.dense.weight"]
    ignoring, optimizer = ddp_of(model)
    verdicts.append(
        expect(ValueError, "told to ignore", call=lambda: Cuttlefish(ignoring, optimizer, config(), total_steps=9))
    )
    model = tiny_bert()
    mixed, optimizer = ddp_of(model, mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    verdicts.append(
        expect(ValueError, "mixed_precision", call=lambda: Cuttlefish(mixed, optimizer, config(), total_steps=9))
    )
    model = tiny_bert()
    first, optimizer = ddp_of(model)
    second = DistributedDataParallel(model)
    verdicts.append(
        expect(
            ValueError, "2 DistributedDataParallel", call=lambda: Cuttlefish(model, optimizer, config(), total_steps=9)
        )
    )
    del first, second
    return "ok" if all(v == "ok" for v in verdicts) else repr(verdicts)


def refused_engines() -> str:
    """FSDP1 (in a loop of our own) and nn.DataParallel in one of several processes, by wrapper and by the model inside."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    verdicts = []

    def refused(model: nn.Module, words: str) -> None:
        optimizer = torch.optim.AdamW(model.parameters())
        verdicts.append(expect(ValueError, words, call=lambda: Cuttlefish(model, optimizer, config(), total_steps=9)))

    inner = tiny_bert()
    whole = FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu"))
    refused(whole, "FSDP1")
    refused(inner, "FSDP1")
    replicated = tiny_bert()
    parallel = nn.DataParallel(replicated)
    refused(parallel, "nn.DataParallel")
    refused(replicated, "nn.DataParallel")
    return "ok" if all(v == "ok" for v in verdicts) else repr(verdicts)


def low_rank_under_fsdp2() -> str:
    """What was switched elsewhere trains under an engine that cannot switch: as under DDP, and nothing is refused."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from hf_cuttlefish import factorize

    found = []
    for engine in ("DDP", "FSDP2"):
        model = tiny_bert()
        factorize(model, {f"bert.encoder.layer.{i}.intermediate.dense": 4 for i in range(2)})
        if engine == "DDP":
            runner: nn.Module = DistributedDataParallel(model)
        else:
            for block in model.bert.encoder.layer:
                fully_shard(block)
            runner = fully_shard(model)
            assert all(isinstance(p, DTensor) for p in model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        cuttlefish = Cuttlefish(runner, optimizer, config(), total_steps=STEPS)
        steps(runner, optimizer, cuttlefish)
        cuttlefish.end()
        full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        found.append([p.detach() for p in full])
    worst = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
    return "ok" if worst < 1e-5 else f"parameters differ by {worst}"


FAULTS: dict[str, Any] = {
    "refused engines": refused_engines,
    "low rank under FSDP2": low_rank_under_fsdp2,
    "other config": other_config,
    "other steps": other_steps,
    "other model": other_model,
    "other targets": other_targets,
    "other values": other_values,
    "no DDP": no_ddp,
    "prepared later": prepared_later,
    "loaded into DDP": loaded_into_ddp,
    "desync is noticed": desync_is_noticed,
    "desync before is noticed": desync_before_is_noticed,
    "join": join,
    "factorize alone": factorize_alone,
    "refused options": refused_options,
}
for _where, _culprit, _on_error in (
    ("choose", 0, "continue"), ("choose", 0, "raise"), ("prepare", 1, "continue"), ("prepare", 0, "raise"),
    ("commit", 1, "continue"), ("config", 0, "continue"), ("DDP", 1, "continue"), ("DDP", 1, "raise"),
):  # fmt: skip
    FAULTS[f"{_where} fails on {_culprit}, {_on_error}"] = lambda w=_where, c=_culprit, o=_on_error: failing(w, c, o)


def main() -> None:
    target, names = sys.argv[1], sys.argv[2:]
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for name in names or [*SCENARIOS, *FAULTS]:
        if name in FAULTS:
            verdict = FAULTS[name]()
            verdicts: list[Any] = [None] * size()
            dist.all_gather_object(verdicts, verdict)
            results[name] = verdicts
        else:
            result = run(name)
            tensors[name] = {k: result.pop(k) for k in list(result) if k.startswith("_")}
            results[name] = result
    if rank() == 0:
        with open(target, "w", encoding="utf-8") as file:
            json.dump(results, file)
        torch.save(tensors, f"{target}.pt")
    leave()


if __name__ == "__main__":
    main()
