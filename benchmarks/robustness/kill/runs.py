"""Runs in processes of their own, watched and disturbed from outside."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .children import LIMIT, child
from .faults import SIGNALS, Fault
from .jobs import JOBS

GRACE = 15
"""Seconds that the other process may take to end once one has been killed; torchrun gives it less."""


@dataclass
class Run:
    """What is seen from outside: how it ended ("done", "killed", "failed", "hung"), and its events with their times."""

    end: str
    events: list[tuple[float, str]] = field(default_factory=list)

    def seconds(self, begin: str, end: str) -> float:
        """Mean time between an event of one kind and the next of the other."""
        spans, open_since = [], None
        for at, event in self.events:
            if event.startswith(begin):
                open_since = at
            elif event.startswith(end) and open_since is not None:
                spans.append(at - open_since)
        return sum(spans) / len(spans) if spans else 0.0


def run(name: str, folder: Path, resume: Any = None, fault: Fault | None = None, typical: Run | None = None) -> Run:
    """Run a job in processes of its own, disturbed by `fault`; `typical` says how long its parts take."""
    processes, job = JOBS[name]
    reader, writer = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
            if processes > 1:
                os.environ |= {k: str(v) for k, v in {**environment, "MASTER_PORT": port}.items()}
                os.environ["ACCELERATE_USE_CPU"] = "true"
            child(job, folder, resume, writer if rank == 0 else None, fault)
        children.append(pid)
    os.close(writer)
    return _watch(children, reader, fault, typical)


def _watch(children: list[int], reader: int, fault: Fault | None, typical: Run | None) -> Run:
    """Read the events, send the signal when its moment has come, and wait for the end."""
    events: list[tuple[float, str]] = []
    started, due, sent, rest = time.monotonic(), None, False, b""
    waiting, codes = set(children), []
    alone_since: float | None = None
    kill = fault if fault is not None and fault.kind in SIGNALS else None
    talking = True
    while waiting or talking:
        ready, _, _ = select.select([reader] if talking else [], [], [], 0.0005 if due and not sent else 0.02)
        if ready:
            data = os.read(reader, 65536)
            talking = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                events.append((time.monotonic() - started, line.decode()))
                if kill and due is None and count(events, kill.place) == kill.nth:
                    due = time.monotonic() + kill.share * _length(typical, kill.place)
        if kill and due is not None and not sent and time.monotonic() >= due:
            sent = True
            for pid in waiting & ({children[kill.victim]} if kill.victim < len(children) else set(children)):
                os.kill(pid, getattr(signal, kill.kind))
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.discard(pid)
                codes.append(status)
                alone_since = time.monotonic()
        if sent and waiting and alone_since is not None and time.monotonic() - alone_since > GRACE:
            for pid in waiting:  # as torchrun does; a process that looks for the dead one may wait for half an hour
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() - started > LIMIT:
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            os.close(reader)
            return Run("hung", events)
    os.close(reader)
    end = "done" if not any(codes) else "killed" if sent else "failed"
    return Run(end, events)


def count(events: list[tuple[float, str]], place: str) -> int:
    """How often a place has been reached."""
    word = {"anywhere": "start", "in a save": "save ", "in the switch": "switch "}[place]
    return sum(event.startswith(word) for _, event in events)


def _length(typical: Run | None, place: str) -> float:
    if typical is None:
        return 0.0
    begin, end = {
        "anywhere": ("start", "end"),
        "in a save": ("save ", "saved"),
        "in the switch": ("switch ", "switched"),
    }[place]
    return typical.seconds(begin, end)
