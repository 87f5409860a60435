"""Carry out runs, here or in worker processes that share the device."""

from __future__ import annotations

import gc
import logging
import os
import queue
import time
import traceback
from typing import Any

from ..files import write_json
from .run import Run
from .training import execute


def carry_out(runs: list[Run], settings: dict[str, Any]) -> tuple[int, int]:
    """Run what is missing, here or in worker processes; returns how many were done and how many failed."""
    done = failed = 0
    if settings["workers"] == 0:
        quieten()
        for run in runs:
            if settings["deadline"] and time.time() > settings["deadline"]:
                break
            good, line = attempt(run, settings)
            done, failed = done + good, failed + (not good)
            print(f"[{done + failed}/{len(runs)}] {line}", flush=True)
        return done, failed

    import multiprocessing

    # Inherited by the workers, which read it when they import torch: many processes, one thread each.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("spawn")
    tasks, lines = context.Queue(), context.Queue()
    for run in runs:
        tasks.put(run)
    workers = [context.Process(target=work, args=(tasks, lines, settings)) for _ in range(settings["workers"])]
    for worker in workers:
        tasks.put(None)  # one end mark for each
        worker.start()
    while True:
        alive = any(worker.is_alive() for worker in workers)
        try:
            good, line = lines.get(timeout=1)
        except queue.Empty:
            if not alive:
                break
            continue
        done, failed = done + good, failed + (not good)
        print(f"[{done + failed}/{len(runs)}] {line}", flush=True)
    tasks.cancel_join_thread()
    for worker in workers:
        worker.join()
    return done, failed


def work(tasks: Any, lines: Any, settings: dict[str, Any]) -> None:
    """A worker process: take runs until there are none, or until the time is over."""
    import torch

    torch.set_num_threads(1)
    quieten()
    while (run := tasks.get()) is not None:
        if settings["deadline"] and time.time() > settings["deadline"]:
            return
        lines.put(attempt(run, settings))


def attempt(run: Run, settings: dict[str, Any]) -> tuple[bool, str]:
    """Run and write the file; an error goes into a file of its own and does not end the benchmark."""
    import torch

    gc.collect()  # the last run's model and its hooks know each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    path = settings["out"] / f"{run.name}.json"
    failure = path.with_suffix(".error.txt")
    started = time.time()
    try:
        record = execute(run, settings["data"], torch.device(settings["device"]), settings["rows"])
    except Exception:
        failure.write_text(traceback.format_exc(), encoding="utf-8")
        return False, f"{run.name} FAILED: {traceback.format_exc().strip().splitlines()[-1]} (see {failure.name})"
    record["workers"] = settings["workers"]
    write_json(path, record)
    failure.unlink(missing_ok=True)
    found = record["validation"]
    told = f"validation {100 * found['accuracy']:.1f} (loss {found['loss']:.4f})"
    return True, f"{run.name}: {told}, kept {record['kept']:.3f}, {time.time() - started:.1f} s"


def default_device() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quieten() -> None:
    """Only errors of the libraries: hundreds of runs would each print a table."""
    for name in ("hf_cuttlefish", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
