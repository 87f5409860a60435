"""One run of the Trainer, dense or with the callback, timed step by step."""

from __future__ import annotations

import cProfile
import itertools
import os
import pstats
import tempfile
import time
from typing import Any

import torch
import transformers
from torch._dynamo.utils import calculate_time_spent
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig
from hf_cuttlefish.measure.pace import Moment
from hf_cuttlefish.trainer.graphs import GraphedTrainer

from .bare import bare
from .cases import CASES, Case, Rows, cut_to_longest
from .phases import SETTLE, split

METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "cuttlefish": {},
    "speed": {"objective": "speed"},
    "statistics on the CPU": {"statistics_memory": 0.0},
}
"""Method -> settings of CuttlefishConfig beside the size."""
UNWAITED: dict[str, Any] = {"logging_nan_inf_filter": False, "accelerator_config": {"non_blocking": True}}
"""The recipe of docs/fast-on-a-gpu.md: Trainer waits for the device neither to read the loss nor to send a batch."""
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "eager-no-graphs": {},
    "compiled": {"torch_compile": True, **UNWAITED},
    "graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead", **UNWAITED},
    "max-autotune": {"torch_compile": True, "torch_compile_mode": "max-autotune", **UNWAITED},
    "max-autotune-no-cudagraphs": {
        "torch_compile": True,
        "torch_compile_mode": "max-autotune-no-cudagraphs",
        **UNWAITED,
    },
    "graphs-waiting": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    "blocks-graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead", **UNWAITED},
    "step-graph": {**UNWAITED},
    "blocks-step-graph": {"torch_compile": True, **UNWAITED},
}
STEP_GRAPHS = ("step-graph", "blocks-step-graph")
"""Modes in which forward, backward and clipping are one CUDA graph, as cuda_graphs=True makes it. In "eager" the callback decides by
itself, for the steps after the switch; in all others it is told not to."""


BY_BLOCKS = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
"""Accelerate's word for compiling each repeated block once, and not the model as one."""


class Clock(TrainerCallback):
    """When each step ended, whether the next one gathers, and what torch.compile had taken; ends the run at `limit`.

    Stands after the callback that is timed, so that its work at the end of a step is in that step.
    """

    def __init__(self, ours: CuttlefishCallback | None, limit: float | None) -> None:
        self.ours, self.limit = ours, limit
        self.began, self.moments, self.gathers = Moment(), list[Moment](), list[bool]()
        self.compile_seconds = [0.0, 0.0]
        """That torch.compile has taken by its own count, which begins anew where compiled code is dropped: in the first
        `SETTLE` steps, and later."""
        self._counted = calculate_time_spent()["total_wall_time"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.append(Moment())
        run = None if self.ours is None else self.ours.cuttlefish
        self.gathers.append(run is not None and run.watch.is_gathering)
        counted = calculate_time_spent()["total_wall_time"]
        new = counted - self._counted if counted >= self._counted else counted
        self.compile_seconds[len(self.moments) > SETTLE] += new
        self._counted = counted
        if self.limit is not None and self.moments[-1].host - self.began.host > self.limit:
            control.should_training_stop = True

    @property
    def ends(self) -> list[float]:
        """Seconds since the start at which each step ended: on a GPU on the device, which the host may be far ahead of."""
        return [self.began.seconds_to(moment) for moment in self.moments]


def run(
    case: str,
    mode: str,
    method: str,
    steps: int,
    ratio: float | None = 0.25,
    blocks: int | None = None,
    limit: float | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """One run; seconds of all of it and of its parts, and milliseconds of the steps before and after the switch (medians).

    Args:
        ratio: of the target weights that are kept; None: what the run measures. blocks: fewer than the model has.
        limit: seconds after which the run ends early; the record has the steps that were made.
        workers: processes of the loader; None: none, and 4 for images on a GPU.
    """
    model = CASES[case].cut(blocks)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    settings = METHODS[method]
    ours = None
    if settings is not None:
        config = CuttlefishConfig(target_ratio=ratio, on_error="raise", **settings)
        ours = CuttlefishCallback(config, cuda_graphs=None if mode == "eager" else mode in STEP_GRAPHS)
    clock = Clock(ours, limit)
    trainer = make_trainer(model, mode, steps, [*([] if ours is None else [ours]), clock], workers)
    graphs = GraphedTrainer(trainer) if mode in STEP_GRAPHS and ours is None else None
    clock.began = Moment()
    if graphs is not None:
        graphs.start()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - clock.began.host
    job = {"case": case, "mode": mode, "method": method, "ratio": ratio if ours is not None else None}
    job |= {"rows": model.rows, "length": model.length, "blocks": model.blocks, "of_blocks": model.of_blocks}
    job |= {"loader_workers": trainer.args.dataloader_num_workers}
    record = job | measured(clock, seconds, steps) | decided(ours) | where()
    if graphs is not None:
        graphs.stop()
    return record | (bare(trainer, mode in STEP_GRAPHS) if torch.cuda.is_available() and MODES[mode] else {})


def make_trainer(
    case: Case, mode: str, steps: int, callbacks: list[TrainerCallback], workers: int | None = None
) -> Trainer:
    """bf16 and fused AdamW on a GPU; elsewhere the paths alone are tried, and nothing is compiled but by dynamo."""
    on_gpu = torch.cuda.is_available()
    how = dict(MODES[mode])
    os.environ[BY_BLOCKS] = str(mode.startswith("blocks"))
    if workers is None:
        workers = 4 if on_gpu and case.kind == "vit" else 0  # a batch of images is 39 MB
    if how and not on_gpu:  # of a step's graph nothing can be tried there
        how = {"torch_compile": True, "torch_compile_backend": "eager"}
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=case.rows,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        learning_rate=5e-5,
        save_strategy="no",
        logging_steps=steps,
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_num_workers=workers,
        **how,
    )
    model = case.model(torch.device("cuda" if on_gpu else "cpu"))
    data = Rows(case, model.config, steps)
    collator = cut_to_longest if case.shortest else None
    return Trainer(model=model, args=settings, train_dataset=data, data_collator=collator, callbacks=callbacks)


def measured(clock: Clock, seconds: float, asked: int) -> dict[str, Any]:
    """What the clock has seen."""
    ours, ends = clock.ours, clock.ends
    gaps = [1000 * (b - a) for a, b in itertools.pairwise(ends)]
    switch_step = None if ours is None else ours.switch_step
    report = None if ours is None else ours.report
    # The first gap is the second step's. The step that holds the switch is not an ordinary one.
    last = len(gaps) if switch_step is None else max(0, switch_step - 2)
    plain = [gap for gap, was in zip(gaps[5:last], clock.gathers[5:last], strict=True) if not was]
    during = [gap for gap, was in zip(gaps[:last], clock.gathers[:last], strict=True) if was]
    took = report.seconds if report is not None else None
    after = gaps[switch_step + SETTLE - 1 :] if switch_step else []
    return {
        "steps": len(ends),
        "steps_asked": asked,
        "seconds": seconds,
        "phases": split(ends, clock.gathers, seconds, switch_step, (took or {}).get("total", 0.0)),
        "ms_before": middle(plain),
        "ms_gathering": middle(during[1:]),
        "gathering_steps": sum(clock.gathers[: len(gaps)]),
        "ms_after": middle(after),
        "compile_seconds": clock.compile_seconds,
        "slow_steps": slow(gaps),
        "switch_step": switch_step,
        "switch_seconds": took,
        "ms": " ".join(f"{gap:.1f}" for gap in gaps),
    }


def decided(ours: CuttlefishCallback | None) -> dict[str, Any]:
    """What the callback's run has decided, and why."""
    if ours is None or ours.cuttlefish is None:
        return {}
    report, plan = ours.report, ours.plan
    return {
        "statistics_needed": ours.cuttlefish.schedule.statistics_needed,
        "reason": ours.reason,
        "tried": ours.cuttlefish.phase.tried,
        "notes": [] if plan is None else plan.notes,
        "parameters": None if report is None else [report.parameters_before, report.parameters_after],
    }


def where() -> dict[str, Any]:
    """Memory, device and versions."""
    on_gpu = torch.cuda.is_available()
    return {
        "peak_memory": torch.cuda.max_memory_allocated() if on_gpu else None,
        "memory_at_end": torch.cuda.memory_reserved() if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def slow(gaps: list[float]) -> list[tuple[int, float]]:
    """Steps that took three times as long as the middle one, and more than 0.1 s: which, and milliseconds."""
    usual = middle(gaps) or 0.0
    return [(step, round(gap, 1)) for step, gap in enumerate(gaps, start=2) if gap > max(3 * usual, 100.0)]


def middle(values: list[float]) -> float | None:
    """The upper median; None of nothing."""
    return sorted(values)[len(values) // 2] if values else None


def profile_switch() -> None:
    """Print where the switch spends its time, by function; the device is waited for where the switch itself waits."""
    switch = Cuttlefish._switch

    def profiled(self: Any, *given: Any) -> Any:
        with cProfile.Profile() as profile:
            done = switch(self, *given)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return done

    Cuttlefish._switch = profiled  # type: ignore[method-assign]
