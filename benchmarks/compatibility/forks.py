"""All classes, each in a process of its own, with a limit of time and memory."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from .checks import check
from .outcomes import FAILS, shorten

SECONDS, MEMORY = 240, 5 * 2**30


def child(name: str, model_type: str, auto_name: str, connection: Any) -> None:
    """Runs in a fork of the parent, which has imported everything already."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        result = check(name, model_type, auto_name)
    except BaseException as error:
        result = {"class": name, "model_type": model_type, "auto": auto_name, "status": FAILS, "reason": shorten(error)}
    connection.send(result)
    connection.close()


def run_all(classes: dict[str, tuple[str, str]], workers: int, done: Callable[[dict[str, Any]], None]) -> None:
    """Each class in a process of its own, `workers` at a time; calls `done` with each result."""
    context = multiprocessing.get_context("fork")
    waiting = list(classes.items())
    running: list[tuple[Any, Any, float, tuple[str, tuple[str, str]]]] = []
    while waiting or running:
        while waiting and len(running) < workers:
            item = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(item[0], *item[1], theirs))
            process.start()
            theirs.close()
            running.append((process, ours, time.monotonic(), item))
        multiprocessing.connection.wait([entry[1] for entry in running], timeout=1.0)
        for entry in list(running):
            process, ours, started, (name, (model_type, auto_name)) = entry
            result: dict[str, Any] = {"class": name, "model_type": model_type, "auto": auto_name}
            late = time.monotonic() - started > SECONDS
            if ours.poll():
                try:
                    result = ours.recv()
                except EOFError:
                    process.join()
                    result |= {"status": FAILS, "reason": f"the process died with exit code {process.exitcode}"}
            elif late:
                process.kill()
                result |= {"status": FAILS, "reason": f"no end within {SECONDS} seconds"}
            else:
                continue
            process.join()
            ours.close()
            running.remove(entry)
            result["seconds"] = round(time.monotonic() - started, 1)
            done(result)
