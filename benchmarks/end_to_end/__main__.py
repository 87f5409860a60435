"""End to end through Trainer: dense and Cuttlefish, eager and as CUDA graphs, everything counted.

    python -m benchmarks.end_to_end --cases bert-base --steps 300 --out runs/end_to_end.json

Each run has a process of its own and the device to itself; random weights, static shapes, bf16. What counts is the time of
`trainer.train()`: compilation, gathering, the switch and compiling anew are in it.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import logging
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, tuple[dict[str, int], int, int]] = {
    "bert-tiny": (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
        4,
        16,
    ),
    "bert-base": ({}, 32, 128),
    "bert-large": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        64,
        128,
    ),
}
"""Case -> changes of BertConfig, rows in a batch, tokens in a row."""
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(SHAPES), default=["bert-tiny"])
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=list(MODES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ratio", type=float, default=0.25, help="target_ratio of Cuttlefish")
    parser.add_argument("--out", type=Path, default=Path("runs/end_to_end.json"))
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds after which no run is begun")
    parser.add_argument("--profile", action="store_true", help="print where the switch spends its time")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("hf_cuttlefish").setLevel(logging.INFO)
        if arguments.profile:
            profile_switch()
        print("RECORD " + json.dumps(run(**json.loads(arguments.one))))
        return
    records, began = [], time.time()
    for case in arguments.cases:
        for mode in arguments.modes:
            for method in ("dense", "cuttlefish"):
                if time.time() - began > arguments.time_limit:
                    break
                job = {"case": case, "mode": mode, "method": method, "steps": arguments.steps, "ratio": arguments.ratio}
                records.append(_in_a_process(job, arguments.profile))
                print({k: v for k, v in records[-1].items() if k != "report"}, flush=True)
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def _in_a_process(job: dict[str, Any], profile: bool = False) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.end_to_end",
        "--one",
        json.dumps(job),
        *(["--profile"] if profile else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RECORD ")), None)
    if profile:
        print("\n".join(text for text in done.stdout.splitlines() if text and not text.startswith("RECORD ")))
    told = [text for text in done.stderr.splitlines() if text.startswith("Cuttlefish") and "a step takes" in text]
    if line is None:
        return {**job, "error": done.stderr[-1500:]}
    return {**json.loads(line.removeprefix("RECORD ")), "told": told}


def profile_switch() -> None:
    """Print where the switch spends its time, by function; the device is waited for where the switch itself waits."""
    from hf_cuttlefish import Cuttlefish

    switch = Cuttlefish._switch

    def profiled(self: Any, *given: Any) -> Any:
        with cProfile.Profile() as profile:
            done = switch(self, *given)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return done

    Cuttlefish._switch = profiled  # type: ignore[method-assign]


def run(case: str, mode: str, method: str, steps: int, ratio: float) -> dict[str, Any]:
    """One run; seconds of all of it, of the switch, and of the steps before and after (medians, as the loop sees them)."""
    import torch
    import transformers
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    from hf_cuttlefish import CuttlefishCallback, CuttlefishConfig

    changes, rows, length = SHAPES[case]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = BertForSequenceClassification(BertConfig(**changes))  # type: ignore[arg-type]
    ids = torch.randint(5, 30000, (rows * 8, length), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": int(i[0]) % 2} for i in ids]
    ends: list[float] = []
    gathered: list[bool] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            run = ours.cuttlefish
            gathered.append(run is not None and run.watch.is_gathering)

    on_gpu = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=rows,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        optim="adamw_torch_fused",
        learning_rate=5e-5,
        save_strategy="no",
        logging_steps=steps,
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        **MODES[mode],
    )
    ours = CuttlefishCallback(CuttlefishConfig(target_ratio=ratio, on_error="raise"))
    trainer = Trainer(
        model=model, args=settings, train_dataset=data, callbacks=[*([ours] if method != "dense" else []), Clock()]
    )
    began = time.perf_counter()
    trainer.train()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    gaps = [1000 * (b - a) for a, b in itertools.pairwise(ends)]
    at = ours.switch_step or len(gaps)
    plain = [gap for gap, was in zip(gaps[5:at], gathered[5:at], strict=False) if not was]
    during = [gap for gap, was in zip(gaps[:at], gathered[:at], strict=False) if was]
    report = ours.report
    return {
        "case": case,
        "mode": mode,
        "method": method,
        "steps": steps,
        "seconds": seconds,
        "ms_before": _middle(plain),
        "ms_gathering": _middle(during[1:]),
        "gathering_steps": len(during),
        "ms_after": _middle(gaps[-len(gaps) // 4 :]) if ours.switch_step else None,
        "seconds_to_first_step": ends[0] - began,
        "seconds_after_last_step": began + seconds - ends[-1],
        "slow_steps": _slow(gaps),
        "switch_step": ours.switch_step,
        "switch_seconds": report.seconds if report is not None else None,
        "tried": None if ours.cuttlefish is None else ours.cuttlefish.phase.tried,
        "parameters": None if report is None else [report.parameters_before, report.parameters_after],
        "peak_memory": torch.cuda.max_memory_allocated() if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _slow(gaps: list[float]) -> list[tuple[int, float]]:
    """Steps that took three times as long as the middle one, and more than 0.1 s: which, and milliseconds."""
    middle = _middle(gaps) or 0.0
    return [(step, round(gap, 1)) for step, gap in enumerate(gaps, start=2) if gap > max(3 * middle, 100.0)]


def _middle(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


if __name__ == "__main__":
    main()
