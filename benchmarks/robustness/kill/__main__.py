"""Kill anywhere: real runs are killed, resumed from the newest whole checkpoint, and must end on the bits of a run left alone.

    python -m benchmarks.robustness.kill --kills 200 --disk 40 --out benchmarks/results/kill.json   # nightly; half an hour on one core
    python -m benchmarks.robustness.kill --docs --out benchmarks/results/kill.json                  # its table into docs/robustness.md
    python -m benchmarks.robustness.kill --kills 10 --disk 4 --jobs "every step" --out runs/kill.json

Each job is a Trainer with CuttlefishCallback; `example` is examples/text_classification.py in a small form. A run is killed
up to three times: SIGKILL, SIGTERM or SIGINT from outside, at a random moment of the run, inside a save, or inside the
switch. Faults of the disk are real ones too: a limit on the size of files cuts a write short (as a full disk does), or the
output folder becomes read-only. Then `last_whole_checkpoint` says where to go on. Compared with the uninterrupted run, bit
for bit: weights, optimizer, scheduler, history, plan, step of the switch, and the logged losses.

Where the newest folder is not whole, the harness also tries what `resume_from_checkpoint=True` does with it.

Processes are forked from one that has imported everything, so that a run takes a second. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from ...files import write_json
from .faults import DISK
from .harness import Harness
from .jobs import JOBS, NIGHTLY, import_example
from .pages import write_docs


def main() -> int:
    """Command line; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--disk", type=int, default=0, help="faults of the disk besides")
    parser.add_argument("--jobs", nargs="+", default=NIGHTLY, choices=list(JOBS), help="in turn; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--docs", action="store_true", help="only write the table of --out into docs/robustness.md")
    arguments = parser.parse_args()
    if arguments.docs:
        write_docs(json.loads(arguments.out.read_text(encoding="utf-8")))
        return 0
    torch.set_num_threads(1)
    # tqdm's own lock is shared with the children, and who is killed with it in hand stops the rest.
    tqdm.set_lock(threading.RLock())
    transformers.utils.logging.set_verbosity_error()
    if "example" in arguments.jobs:
        import_example()  # once, before the forks
    with tempfile.TemporaryDirectory() as work:
        os.chmod(work, 0o755)
        harness = Harness(Path(work), arguments.seed)
        for name in dict.fromkeys(arguments.jobs):
            harness.prepare(name)
        started, turn = time.time(), 0
        for disk, wanted in ((False, arguments.kills), (True, arguments.disk)):
            while (left := wanted - sum((f.kind in DISK) == disk for f in harness.faults)) > 0:
                name = arguments.jobs[turn % len(arguments.jobs)]
                turn += 1
                count = min(left, harness.random.randint(1, 3))
                harness.chain(name, [harness.draw(name, disk) for _ in range(count)])
                print(
                    f"{time.time() - started:5.0f} s: {len(harness.faults)} faults, {len(harness.lost)} runs lost",
                    flush=True,
                )
                write_json(arguments.out, harness.record())
    record = harness.record()
    write_json(arguments.out, record)
    for row in record["table"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print({key: value for key, value in record.items() if key not in ("table", "faults")})
    return 1 if record["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
