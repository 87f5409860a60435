"""Hostile files: mutations of everything that the package reads, each in a process that is watched.

    python -m benchmarks.robustness.fuzz --mutations 10000      # about half an hour on one core; writes benchmarks/results/fuzz.json
    python -m benchmarks.robustness.fuzz --mutations 300 --seed 7 --kinds plan config

A file is changed at the level of bytes, of JSON values and keys, and of safetensors headers, and is then read by the door that
a user takes: `from_pretrained`, `RankPlan.from_json`, a Trainer's resume. What may happen is a correct load or a clear
error. A finding is anything else: a death, a hang, an error that names nothing, memory beyond the files' own size, a file
opened outside the folder, a socket, a subprocess, pickle, or code from the folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from ...files import write_json
from .doors import DOORS
from .forks import fuzz
from .pages import write_docs

RESULTS = Path(__file__).resolve().parents[2] / "results" / "fuzz.json"


def quiet() -> None:
    """No warnings, no bars, one thread."""
    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    """1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(DOORS), choices=list(DOORS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print what was refused, too")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/fuzz.json, for 10,000 mutations of all kinds"
    )
    options = parser.parse_args(arguments)
    quiet()
    started = time.monotonic()
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in options.kinds}
    errors: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    for kind, case, outcome, detail in fuzz(options.mutations, options.seed, options.kinds, options.workers):
        counts[kind]["unchanged" if case < 0 and outcome == "loaded" else outcome] += 1
        if outcome == "refused":
            errors[detail.partition(":")[0]] += 1
            if options.verbose:
                print(kind, case, detail, flush=True)
        elif outcome == "finding":
            findings.append({"kind": kind, "seed": case, "what": detail})
            print(kind, case, detail, flush=True)
    result = {
        "command": f"python -m benchmarks.robustness.fuzz --mutations {options.mutations} --seed {options.seed}",
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": hf.__version__},
        "mutations": sum(c.total() - c["unchanged"] for c in counts.values()),
        "seconds": round(time.monotonic() - started),
        "counts": {
            kind: {o: c[o] for o in ("unchanged", "loaded", "refused", "not ours", "finding")}
            for kind, c in counts.items()
        },
        "errors": dict(errors.most_common()),
        "findings": findings,
    }
    complete = options.mutations >= 10_000 and set(options.kinds) == set(DOORS)
    out = options.out or (RESULTS if complete else None)
    if out is not None:
        write_json(out, result)
    if out == RESULTS:
        write_docs(result)
    print(json.dumps({**result, "findings": len(findings)}, indent=1))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
