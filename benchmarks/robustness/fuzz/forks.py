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

Outcome = tuple[str, int, str, str]
"""(kind, seed of the case, outcome, detail)."""


def work(good: Path, cases: list[tuple[str, int]], connection: Any) -> None:
    """Runs its cases one after the other, and says before each which one comes."""
    with tempfile.TemporaryDirectory(dir=good.parent) as own:
        folder = Path(own) / "files"
        watch = Watch(Path(own))
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


class Worker:
    """A process with its share of the cases.

    Attributes:
        todo: cases that have no outcome yet. now: the one that is being read. since: when it was last heard of.
        ended: whether it has said all that it will say.
    """

    def __init__(self, context: Any, good: Path, cases: list[tuple[str, int]]) -> None:
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(good, cases, theirs))
        self.process.start()
        theirs.close()
        self.todo, self.since, self.ended = list(cases), time.monotonic(), False
        self.now: tuple[str, int] | None = None

    def outcomes(self) -> Iterator[Outcome]:
        """What it has found since it was last asked."""
        try:
            while self.pipe.poll():
                kind, case, outcome, detail = self.pipe.recv()
                self.since = time.monotonic()
                self.now = (kind, case) if outcome is None else None
                if outcome is not None:
                    self.todo.remove((kind, case))
                    yield kind, case, outcome, detail
        except EOFError:
            self.ended = True

    @property
    def late(self) -> bool:
        """Whether it hangs; between two cases it copies files, and may take longer."""
        return time.monotonic() - self.since > SECONDS + 20 * (self.now is None)

    def close(self) -> Iterator[Outcome]:
        """End it. The case in which it died or hung is a finding, and the ones after it are left to do."""
        late = self.late
        if late:
            self.process.kill()
        self.process.join()
        self.pipe.close()
        if self.now is not None:
            code = self.process.exitcode
            died = f"died: {signal.strsignal(-code) if code and code < 0 else code}"
            self.todo.remove(self.now)
            yield (*self.now, "finding", f"no end within {SECONDS} seconds" if late else died)
        elif self.todo:
            raise RuntimeError(f"a worker ended between two cases, {len(self.todo)} of them left")


def fuzz(mutations: int, seed: int, kinds: list[str], workers: int, batch: int = 100) -> Iterator[Outcome]:
    """The outcomes of all cases; a negative seed changes nothing, and the files have to load."""
    shares = {kind: DOORS[kind][0] for kind in kinds}
    counts = {kind: max(1, round(mutations * share / sum(shares.values()))) for kind, share in shares.items()}
    cases = [(kind, -i) for kind in kinds for i in range(1, 5)]  # nothing changed
    cases += [(kind, seed * 1_000_000 + i) for kind, count in counts.items() for i in range(count)]
    batches = [cases[i : i + batch] for i in range(0, len(cases), batch)]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as root:
        good = Path(root) / "good"
        prepare(good)
        running: list[Worker] = []
        while batches or running:
            while batches and len(running) < workers:
                running.append(Worker(context, good, batches.pop(0)))
            multiprocessing.connection.wait([worker.pipe for worker in running], timeout=1)
            for worker in list(running):
                yield from worker.outcomes()
                if not worker.ended and not worker.late:
                    continue
                yield from worker.close()
                if worker.todo:
                    batches.append(worker.todo)
                running.remove(worker)
