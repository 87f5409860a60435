"""Quantize a dense model and its factorized sister in every way, and measure bytes, accuracy and time of each.

    for seed in 42 43 44; do
        python examples/text_classification.py --method both --seed $seed --output_dir runs/trec_$seed
    done
    python -m benchmarks.eight_bits --task trec --runs runs/trec_42 runs/trec_43 runs/trec_44 --out runs/eight_bits.json
    python -m benchmarks.eight_bits --task fashion_mnist --runs runs/fashion_42 --out runs/eight_bits.json   # adds to the file
    python examples/sft.py --method both --output_dir runs/sft
    python -m benchmarks.eight_bits --task dialogs --runs runs/sft --out runs/eight_bits.json
    python -m benchmarks.eight_bits.prepare runs/benchmark-data/gemma --out runs/gemma    # the data of benchmarks.accuracy
    python -m benchmarks.eight_bits --task gemma --runs runs/gemma --limit 24 --out runs/eight_bits.json

A run is what examples/*.py --method both has written: its folders dense/model and cuttlefish/model. Needs torchao and the extra onnx.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import hf_cuttlefish
from hf_cuttlefish.measure.serving import time_calls

from ..files import write_json
from .forms import SCHEMES, make_form
from .scores import TASKS

FOLDERS = {"dense": Path("dense/model"), "factors": Path("cuttlefish/model")}
BATCHES = (1, 32)


def main() -> None:
    """Measure the runs that are named; rows go to the file one run at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument(
        "--runs", nargs="+", type=Path, required=True, help="folders with dense/model and cuttlefish/model"
    )
    parser.add_argument("--schemes", nargs="+", choices=sorted(SCHEMES), default=sorted(SCHEMES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cuda measures the schemes of torch alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="score this many examples only, for a trial")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else {"rows": []}
    for run in options.runs:
        rows = measure(run, options)
        known = {(row["task"], row["run"], row["device"]) for row in rows}
        record["rows"] = [r for r in record["rows"] if (r["task"], r["run"], r["device"]) not in known] + rows
        write_json(options.out, record)


def measure(run: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All forms of one run. Times of dense and factors are taken in turn, scheme by scheme."""
    task, rows = TASKS[options.task], []
    data = task.load(run / FOLDERS["dense"], options.limit)
    for scheme in options.schemes:
        if options.device != "cpu" and scheme.startswith("onnx"):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            forms = {
                name: make_form(scheme, run / folder, task.auto, Path(scratch) / name, options.threads, options.device)
                for name, folder in FOLDERS.items()
            }
            times = {}
            for size in BATCHES:
                batch = {key: value.to(options.device) for key, value in task.batch(data, size).items()}
                calls = {name: (lambda form=form, batch=batch: form.run(batch)) for name, form in forms.items()}
                times[size] = time_calls(calls, options.rounds, torch.device(options.device))
            for name, form in forms.items():
                row = {
                    "task": options.task,
                    "run": run.name,
                    "form": name,
                    "scheme": scheme,
                    "bytes": form.bytes,
                    "score": task.score(data, form.run, options.device),
                    "metric": task.metric,
                    "ms": {str(size): times[size][name].median for size in BATCHES},
                    "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
                    **facts(options),
                }
                rows.append(row)
                print({key: row[key] for key in ("run", "form", "scheme", "bytes", "score", "ms")}, file=sys.stderr)
    return rows


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on; load: processes that wanted a core meanwhile, which is to be near the threads."""
    return {
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "version": hf_cuttlefish.__version__,
        "python": platform.python_version(),
        "limit": options.limit,
    }


if __name__ == "__main__":
    main()
