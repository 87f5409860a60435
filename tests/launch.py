"""Start real processes on this machine: by torchrun (gloo, no GPU), or by hand where it would be in the way."""

import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent / "engines" / "scripts"
LIMIT = 300
"""Seconds that a launch may take on a busy machine; usual are 15 to 60."""

ABORTED = "exitcode  : -6 "
"""What torchrun says of a process that a library has aborted (SIGABRT); an exception of Python's ends with 1."""

_NOT_HANDED_ON = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
_PATHS = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
PLAIN = {k: v for k, v in os.environ.items() if k not in _NOT_HANDED_ON} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPATH": os.pathsep.join(_PATHS),
}
"""The environment of a process that may use what it finds."""
ON_CPU = {**PLAIN, "ACCELERATE_USE_CPU": "true"}


def launch(processes: int, script: str, *arguments: object, environment: Mapping[str, str] = ON_CPU) -> str:
    """Run a script of engines/scripts under torchrun until all processes have ended well; returns what they have printed.

    Gloo can hang on a busy machine (once in some hundred launches), or abort a process. Such a launch is ended, shown as a warning
    with the place of each thread, and run once more; what hangs or is aborted twice fails.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run += [str(SCRIPTS / script), *map(str, arguments)]
    empty = [a for a in arguments if isinstance(a, Path) and a.is_dir() and not any(a.iterdir())]
    code, printed, errors = _run(run, environment)
    if code is None or (code and ABORTED in errors):
        how = "hung" if code is None else "was aborted"
        warnings.warn(f"{script} {how}, and is run again:\n{errors[-20000:]}", stacklevel=2)
        for folder in empty:
            shutil.rmtree(folder)
            folder.mkdir()
        code, printed, errors = _run(run, environment)
    assert code == 0, printed[-2000:] + errors[-9000:]
    return printed


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int | None, str, str]:
    """How a command ended (None: not within the limit), its output and its errors."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            printed, errors = started.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            # With PYTHONFAULTHANDLER, who is aborted prints first where its threads stand.
            for child in psutil.Process(started.pid).children(recursive=True):
                child.send_signal(signal.SIGABRT)
            return None, *started.communicate(timeout=60)
    return started.returncode, printed, errors


def by_hand(
    script: str, *arguments: object, local_ranks: Sequence[int], port: int, environment: Mapping[str, str] = ON_CPU
) -> list[tuple[int, str]]:
    """Start one process for each local rank, without torchrun, which would end the survivors of one that dies.

    Returns how each has ended, and its errors.
    """
    shared = {"WORLD_SIZE": str(len(local_ranks)), "LOCAL_WORLD_SIZE": str(len(local_ranks))}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
            env={**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(local)},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank, local in enumerate(local_ranks)
    ]  # fmt: skip
    try:
        errors = [p.communicate(timeout=LIMIT)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]
