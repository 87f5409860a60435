"""Write checkpoints of a run under each engine, from which later versions have to go on: write.py OUT [ENGINE ...].

Those here were written at commit 2f1fbe4, before the package was parted into packages, by its hf_cuttlefish and the scripts of
its tests, by

    git worktree add before 2f1fbe4
    cp tests/engines/scripts/contract.py before/tests/distributed_scripts/
    PYTHONPATH=before:before/tests/distributed_scripts:before/tests python tests/data/checkpoints/write.py tests/data/checkpoints

Each archive holds a checkpoint of the full-rank phase, with statistics, and one of the low-rank phase. Numbers of the random
generators and training arguments are left out: nothing in these runs is random, and arguments are no business of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import contract

LEFT_OUT = ("rng_state", "training_args", "tokenizer", "README")


def main() -> None:
    """In this process; each engine of several processes in a torchrun that calls `write`."""
    out, engines = Path(sys.argv[1]), sys.argv[2:] or list(contract.PROCESSES)
    expected_file = out / "expected.json"
    for engine in engines:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if engine != "DeepSpeed":
                environment["ACCELERATE_USE_CPU"] = "true"
            command = [sys.executable, __file__, "--write", engine, name]
            if contract.PROCESSES[engine] > 1:
                start = [
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc_per_node={contract.PROCESSES[engine]}",
                ]
                command[1:1] = start
            subprocess.run(command, env=environment, check=True)
            result = json.loads((folder / "result.json").read_text())
            with tarfile.open(out / f"{engine.replace(' ', '_')}.tar.xz", "w:xz") as archive:
                for step in sorted(set(result.pop("steps"))):
                    archive.add(folder / "run" / f"checkpoint-{step}", f"checkpoint-{step}", filter=kept)
        expected = json.loads(expected_file.read_text()) if expected_file.exists() else {}
        expected[engine] = result
        expected_file.write_text(json.dumps(expected, indent=1) + "\n")


def kept(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return None if Path(info.name).name.startswith(LEFT_OUT) else info


def write(engine: str, folder: Path) -> None:
    if contract.PROCESSES[engine] > 1:
        contract.begin(engine)
    result = contract.run(engine, folder / "run", save_strategy="steps", save_steps=1)
    steps = [contract.BEFORE, contract.SWITCH if engine in contract.BY_RESTART else contract.AFTER]
    if contract.rank() == 0:
        result = {key: result[key] for key in ("losses", "plan", "switched")} | {"steps": steps}
        (folder / "result.json").write_text(json.dumps(result))
    contract.barrier()


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
