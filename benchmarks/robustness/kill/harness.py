"""The harness: chains of faults, each one run from its start to its end."""

from __future__ import annotations

import platform
import random
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from hf_cuttlefish.saving.checkpoints import last_whole_checkpoint

from .faults import DISK, PLACES, SIGNALS, Fault
from .jobs import JOBS
from .runs import Run, count, run


class Harness:
    """Chains of faults, each chain one run from its start to its end; keeps the record."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        self.typical: dict[str, Run] = {}
        self.sizes: dict[str, list[int]] = {}
        self.expected: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self.chains = self.processes_started = 0
        self.lost: list[str] = []

    def prepare(self, name: str) -> None:
        """The uninterrupted run, twice: it must be a function of its seed, or nothing could be compared."""
        ends = []
        for _ in range(2):
            folder = self._folder()
            self.typical[name] = run(name, folder)
            if self.typical[name].end != "done":
                raise RuntimeError(
                    f"the job {name!r} fails undisturbed:\n{(folder.parent / 'log.txt').read_text()[-3000:]}"
                )
            self.sizes[name] = [p.stat().st_size for p in Path(str(get_last_checkpoint(str(folder)))).iterdir()]
            ends.append(torch.load(folder.parent / "end.pt", weights_only=False))
            shutil.rmtree(folder.parent)
        if found := differences(*ends):
            raise RuntimeError(f"two runs of the job {name!r} differ without any fault: {found[:5]}")
        if ends[0]["switch_step"] is None:
            raise RuntimeError(f"the job {name!r} does not switch, and would test nothing")
        self.expected[name] = ends[0]

    def chain(self, name: str, faults: list[Fault]) -> None:
        """One run, disturbed by the faults one after another, resumed after each, and compared at its end."""
        folder = self._folder()
        resume, hit = None, []
        end = None
        for fault in [*faults, None]:
            self.processes_started += JOBS[name][0]
            end = run(name, folder, resume, fault, self.typical[name])
            if end.end in ("done", "hung") or fault is None:
                break
            if folder.exists():
                folder.chmod(0o755)  # there is room again
            fault.job, (fault.hit, fault.step) = name, _where(end)
            fault.error = next((e.removeprefix("error ") for _, e in end.events if e.startswith("error ")), "")
            fault.error = fault.error.replace(str(self.work), "")
            newest = get_last_checkpoint(str(folder)) if folder.exists() else None
            resume = last_whole_checkpoint(folder, JOBS[name][0])
            fault.newest_is_whole = newest == resume
            if not fault.newest_is_whole:
                fault.trainers_choice = self._trainers_own(name, folder, newest)
            hit.append(fault)
        problem = self._compare(name, folder, end.end if end else "")
        for fault in hit:
            fault.survived = problem is None
        self.faults += hit
        self.chains += bool(hit)
        if problem is not None:
            self.lost.append(f"{name}, {[asdict(f) for f in hit]}: {problem}")
            print(f"LOST: {self.lost[-1]}", flush=True)
        shutil.rmtree(folder.parent)

    def _compare(self, name: str, folder: Path, end: str) -> str | None:
        if end != "done":
            return f"the last run ended with {end!r}: {(folder.parent / 'log.txt').read_text()[-2000:]}"
        found = differences(torch.load(folder.parent / "end.pt", weights_only=False), self.expected[name])
        return f"{len(found)} differences, such as {found[:5]}" if found else None

    def _trainers_own(self, name: str, folder: Path, newest: str | None) -> str:
        """What comes of the newest folder, which is not whole, if it is resumed from all the same."""
        copy = self._folder()
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        end = run(name, copy, True if name != "example" else str(copy / Path(str(newest)).name)).end
        if end == "done":
            found = differences(torch.load(copy.parent / "end.pt", weights_only=False), self.expected[name])
            end = "went on, other bits" if found else "went on, same bits"
        shutil.rmtree(copy.parent)
        return {"failed": "refused"}.get(end, end)

    def _folder(self) -> Path:
        """A new folder `cuttlefish` for checkpoints (the name is the example's) in one that holds the log and the end."""
        folder = Path(tempfile.mkdtemp(dir=self.work)) / "cuttlefish"
        folder.mkdir()
        folder.parent.chmod(0o755)  # what is not to be written is `folder` alone
        return folder

    def draw(self, name: str, disk: bool) -> Fault:
        """A fault at random; a third of the kills aimed at a save and a third at the switch."""
        r = self.random
        events = self.typical[name].events
        saves = count(events, "in a save")
        if disk:
            # The place where a file is cut is drawn within a file that is drawn first, so that small ones are hit too.
            return Fault(
                r.choice(DISK), "in a save", r.randint(1, saves), limit=r.randrange(r.choice(self.sizes[name]))
            )
        place = r.choice(PLACES)
        nth = r.randint(1, saves) if place == "in a save" else 1
        processes = JOBS[name][0]
        victim = r.randint(0, processes) if processes > 1 else 0  # `processes` stands for all of them
        return Fault(r.choice(SIGNALS), place, nth, r.random(), victim)

    def record(self) -> dict[str, Any]:
        """The table and all that it comes from."""
        groups: dict[tuple[str, str, str], list[Fault]] = {}
        for fault in self.faults:
            groups.setdefault((fault.job, fault.kind, fault.hit), []).append(fault)
        table = [
            {
                "job": job,
                "fault": kind,
                "hit": hit,
                "tried": len(group),
                "survived": sum(bool(f.survived) for f in group),
            }
            for (job, kind, hit), group in sorted(groups.items())
        ]
        choices = [f.trainers_choice for f in self.faults if not f.newest_is_whole]
        return {
            "faults_tried": len(self.faults),
            "kills": sum(f.kind in SIGNALS for f in self.faults),
            "disk_faults": sum(f.kind in DISK for f in self.faults),
            "runs": self.chains,
            "survived": sum(bool(f.survived) for f in self.faults),
            "lost": sum(not f.survived for f in self.faults),
            "newest_folder_not_whole": len(choices),
            "trainers_own_choice_then": {c: choices.count(c) for c in sorted(set(choices))},
            "problems": self.lost,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "table": table,
            "faults": [asdict(f) for f in self.faults],
        }


def _where(end: Run) -> tuple[str, int]:
    """What was going on at the end of a disturbed run, and after which step."""
    inside, step = "start", 0
    for _, event in end.events:
        word, _, number = event.partition(" ")
        inside = {"save": "save", "switch": "switch"}.get(word, inside if word in ("start", "error") else "training")
        if word == "step":
            step = int(number)
    return inside, step


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what is not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in {**a, **b} for d in differences(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [name.removeprefix(".")]
