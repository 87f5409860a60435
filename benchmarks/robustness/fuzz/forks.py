"""The cases, each in a process that a limit of memory and of time ends."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .doors import DOORS
from .good_files import prepare
from .mutations import Gentle
from .watch import Watch, judge

SECONDS = 20
"""A case that takes longer hangs; usual are a few hundredths."""

SPARE = 256 * 2**20
"""Bytes that a case may allocate; the files themselves hold 60 kB."""


def worker(good: Path, cases: list[tuple[str, int]], connection: Any) -> None:
    """Runs its cases one after the other, and says before each which one comes."""
    with tempfile.TemporaryDirectory(dir=good.parent) as work:
        folder = Path(work) / "files"
        watch = Watch(Path(work))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        status = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + SPARE, used + SPARE))
        for kind, seed in cases:
            connection.send((kind, seed, None, ""))
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
            outcome, detail = judge(DOORS[kind][1], folder, Gentle(seed) if seed < 0 else random.Random(seed), watch)
            if seed < 0 and outcome != "loaded":
                outcome, detail = "finding", f"the files as they were are not read: {detail}"
            connection.send((kind, seed, outcome, detail))
    connection.close()


def fuzz(
    mutations: int, seed: int, kinds: list[str], workers: int, batch: int = 100
) -> Iterator[tuple[str, int, str, str]]:
    """Yields (kind, seed of the case, outcome, detail); a negative seed changes nothing, and the files have to load."""
    shares = {kind: DOORS[kind][0] for kind in kinds}
    counts = {kind: max(1, round(mutations * share / sum(shares.values()))) for kind, share in shares.items()}
    cases = [(kind, -i) for kind in kinds for i in range(1, 5)]  # nothing changed
    cases += [(kind, seed * 1_000_000 + i) for kind, count in counts.items() for i in range(count)]
    batches = [cases[i : i + batch] for i in range(0, len(cases), batch)]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as root:
        good = Path(root) / "good"
        prepare(good)
        running: list[dict[str, Any]] = []
        while batches or running:
            while batches and len(running) < workers:
                ours, theirs = context.Pipe(duplex=False)
                todo = batches.pop(0)
                process = context.Process(target=worker, args=(good, todo, theirs))
                process.start()
                theirs.close()
                running.append(
                    {"process": process, "pipe": ours, "todo": list(todo), "since": time.monotonic(), "now": None}
                )
            multiprocessing.connection.wait([r["pipe"] for r in running], timeout=1)
            for r in list(running):
                ended = False
                try:
                    while r["pipe"].poll():
                        kind, case, outcome, detail = r["pipe"].recv()
                        r["since"] = time.monotonic()
                        if outcome is None:
                            r["now"] = (kind, case)
                        else:
                            r["now"] = None
                            r["todo"].remove((kind, case))
                            yield kind, case, outcome, detail
                except EOFError:
                    ended = True
                late = time.monotonic() - r["since"] > SECONDS + 20 * (r["now"] is None)
                if not ended and not late:
                    continue
                if late:
                    r["process"].kill()
                r["process"].join()
                if r["now"] is not None:
                    code = r["process"].exitcode
                    what = (
                        f"no end within {SECONDS} seconds"
                        if late
                        else f"died: {signal.strsignal(-code) if code and code < 0 else code}"
                    )
                    r["todo"].remove(r["now"])
                    yield (*r["now"], "finding", what)
                elif r["todo"]:
                    raise RuntimeError(f"a worker ended between two cases, {len(r['todo'])} of them left")
                if r["todo"]:
                    batches.append(r["todo"])
                r["pipe"].close()
                running.remove(r)
