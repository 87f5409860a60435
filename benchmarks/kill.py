"""Kill anywhere: real runs are killed, resumed from the newest whole checkpoint, and must end on the bits of a run left alone.

    python benchmarks/kill.py --kills 200 --disk 40 --out benchmarks/results/kill.json   # nightly; half an hour on one core
    python benchmarks/kill.py --docs --out benchmarks/results/kill.json                  # its table into docs/robustness.md
    python benchmarks/kill.py --kills 10 --disk 4 --jobs "every step" --out runs/kill.json

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
import faulthandler
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_cuttlefish import Cuttlefish, CuttlefishCallback, CuttlefishConfig
from hf_cuttlefish.saving.checkpoints import last_whole_checkpoint

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
DISK = ("file cut short", "read-only folder")
PLACES = ("anywhere", "in a save", "in the switch")
NOBODY = 65534
"""A user without rights."""
LIMIT = 120
"""Seconds after which a run counts as hung."""
GRACE = 15
"""Seconds that the other process may take to end once one has been killed; torchrun gives it less."""


# ---------------------------------------------------------------------------------------------------------------- jobs


class Rows(torch.utils.data.Dataset):
    """Sentences whose label is their first token modulo 3: 12 steps of 4 are one epoch, and of 2 x 4 two.

    A run that `max_steps` ends within an epoch would take a step too many when resumed from its last checkpoint: Trainer
    (transformers 5.23) looks at `max_steps` only after a step.
    """

    def __init__(self, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 50, (count, 10), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": int(self.ids[i, 0]) % 3}


def tiny(config: CuttlefishConfig, **arguments: Any) -> Callable[[Path, Any], None]:
    """A job that trains a random BERT of 2 x 32, with dropout, so that random states matter."""

    def job(folder: Path, resume: Any) -> None:
        options: dict[str, Any] = {
            "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 3, "logging_steps": 1,
            "save_strategy": "steps", "save_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
            "dataloader_pin_memory": False, "log_level": "error",
        }  # fmt: skip
        torch.manual_seed(0 if resume is None else 9)  # other weights: everything must come from the checkpoint
        model = BertForSequenceClassification(
            BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                       max_position_embeddings=16, num_labels=3)
        )  # fmt: skip
        Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(folder), **{**options, **arguments}),
            train_dataset=Rows(),
            callbacks=[CuttlefishCallback(config)],
        ).train(resume_from_checkpoint=resume)

    return job


def example(folder: Path, resume: Any) -> None:
    """The real example on the bundled model and data, with few rows."""
    import text_classification

    options = {
        "method": "cuttlefish", "max_train_samples": 96, "max_eval_samples": 16, "max_length": 16, "switch_step": 6,
        "per_device_train_batch_size": 8, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 2, "logging_steps": 1, "eval_strategy": "no", "do_eval": False, "target_ratio": 0.4,
        "output_dir": folder.parent, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    options |= {} if resume is None else {"resume_from_checkpoint": resume}
    sys.argv = [
        "text_classification.py",
        *(str(part) for name, value in options.items() for part in (f"--{name}", value)),
    ]
    text_classification.main()


FIXED = CuttlefishConfig(switch_step=6, statistics_steps=3, rank_multiple=4, target_ratio=0.4)
FOUND = CuttlefishConfig(statistics_steps=2, rank_multiple=4, target_ratio=0.4, stable_rank_tolerance=100.0)
JOBS: dict[str, tuple[int, Callable[[Path, Any], None]]] = {
    "every step": (1, tiny(FIXED)),
    "every 2 steps, one kept": (1, tiny(FOUND, save_steps=2, save_total_limit=1)),
    "two processes": (2, tiny(FIXED, save_total_limit=2, ddp_backend="gloo")),
    "example": (1, example),
}
"""Name -> (processes, what each of them runs in the folder, from a checkpoint)."""
NIGHTLY = ["every step", "every 2 steps, one kept", "two processes", "every step", "every 2 steps, one kept", "example"]
"""Whose turn it is; the example's checkpoints are 270 MB each."""


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Fault:
    """One disturbance: which, where, and what it hit."""

    kind: str
    place: str
    nth: int = 1
    share: float = 0.0
    victim: int = 0
    limit: int = 0
    job: str = ""
    hit: str = ""
    step: int = 0
    error: str = ""
    newest_is_whole: bool = True
    trainers_choice: str = ""
    survived: bool | None = None


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
            _child(job, folder, resume, writer if rank == 0 else None, fault)
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
                if kill and due is None and _count(events, kill.place) == kill.nth:
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


def _count(events: list[tuple[float, str]], place: str) -> int:
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


def _child(
    job: Callable[[Path, Any], None], folder: Path, resume: Any, writer: int | None, fault: Fault | None
) -> None:
    """In the forked process: never returns."""
    code = 1
    try:
        log = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(0.8 * LIMIT, file=log)  # of a run that hangs
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        trainers = _observe(writer, fault, folder)
        _tell(writer, "start")
        job(folder, resume)
        if int(os.environ.get("RANK", "0")) == 0:
            _save_end(trainers[-1], folder.parent / "end.pt")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        _tell(writer, "end")
        code = 0
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.seteuid(os.getuid())
        traceback.print_exc()
        _tell(writer, f"error {type(error).__name__}: {error}".replace("\n", " ")[:200])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(writer: int | None, event: str) -> None:
    if writer is not None:
        os.write(writer, f"{event}\n".encode())


def _observe(writer: int | None, fault: Fault | None, folder: Path) -> list[Trainer]:
    """Tell of steps, saves and the switch; bring a fault of the disk. Returns a list that the Trainer puts itself into."""
    trainers: list[Trainer] = []
    saves = [0]
    save, step, switch, train = Trainer._save_checkpoint, Cuttlefish.step, Cuttlefish._try_switch, Trainer.train

    def observed_save(self: Trainer, *args: Any, **kwargs: Any) -> None:
        saves[0] += 1
        if fault is not None and fault.kind in DISK and saves[0] == fault.nth:
            if fault.kind == "file cut short":
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault.limit, resource.RLIM_INFINITY))
            else:
                folder.chmod(0o555)
                if os.getuid() == 0:
                    os.seteuid(NOBODY)  # nothing is read-only for root
        _tell(writer, f"save {self.state.global_step}")
        save(self, *args, **kwargs)
        _tell(writer, f"saved {self.state.global_step}")

    def observed_step(self: Cuttlefish) -> bool:
        switched = step(self)
        _tell(writer, f"step {self.global_step}")
        return switched

    def observed_switch(self: Cuttlefish) -> bool:
        _tell(writer, f"switch {self.global_step}")
        switched = switch(self)
        _tell(writer, "switched")
        return switched

    def observed_train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        trainers.append(self)
        return train(self, *args, **kwargs)

    for holder, method in ((Trainer, observed_save), (Cuttlefish, observed_step), (Trainer, observed_train)):
        name = {"observed_save": "_save_checkpoint", "observed_step": "step", "observed_train": "train"}[
            method.__name__
        ]
        setattr(holder, name, method)
    Cuttlefish._try_switch = observed_switch  # type: ignore[method-assign]
    return trainers


# ----------------------------------------------------------------------------------------------------------- comparison


def _save_end(trainer: Any, path: Path) -> None:
    """All that must be the same at the end of a run."""
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CuttlefishCallback))
    report = None if callback.report is None else callback.report.to_dict()
    kept = ("step", "loss", "grad_norm", "learning_rate", "parameters", "switch_step")
    end = {
        "weights": dict(trainer.model.state_dict()),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "history": callback.history,
        "plan": None if callback.plan is None else callback.plan.to_dict(),
        "report": None if report is None else {k: v for k, v in report.items() if k != "seconds"},
        "switch_step": callback.switch_step,
        "log": [{k: row[k] for k in kept if k in row} for row in trainer.state.log_history if "loss" in row],
    }
    torch.save(end, path)


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


# -------------------------------------------------------------------------------------------------------------- harness


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
        saves = _count(events, "in a save")
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


def write_docs(record: dict[str, Any]) -> None:
    """Put the table into docs/robustness.md, between its marks: a row for each fault, and what it hit."""
    rows = ["| fault | hit | tried | survived | lost |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for fault in record["faults"]:
        groups.setdefault((fault["kind"], fault["hit"]), []).append(fault)
    for (kind, hit), group in [*sorted(groups.items()), (("all", ""), record["faults"])]:
        survived = sum(bool(f["survived"]) for f in group)
        rows.append(f"| {kind} | {hit} | {len(group)} | {survived} | {len(group) - survived} |")
    by_job = ", ".join(f"{job}: {sum(f['job'] == job for f in record['faults'])}" for job in JOBS)
    choice = ", ".join(f"{count} times: {what}" for what, count in record["trainers_own_choice_then"].items()) or "-"
    lines = [
        f"{record['runs']} runs, {record['kills']} kills and {record['disk_faults']} faults of the disk ({by_job}), on CPUs.",
        f"{record['newest_folder_not_whole']} times the newest folder was not whole; what came of resuming from it all the "
        f"same: {choice}.",
    ]
    page = Path(__file__).resolve().parents[1] / "docs" / "robustness.md"
    begin, end = "<!-- kills -->\n", "<!-- end of kills -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    table = "\n".join(rows)
    page.write_text(f"{before}{begin}{' '.join(lines)}\n\n{table}\n{end}{after}", encoding="utf-8")


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
    tqdm.set_lock(
        threading.RLock()
    )  # its own is shared with the children, and who is killed with it in hand stops the rest
    transformers.utils.logging.set_verbosity_error()
    if "example" in arguments.jobs:
        import text_classification  # noqa: F401 (imported once, before the forks)
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
                _write(arguments.out, harness.record())
    record = harness.record()
    _write(arguments.out, record)
    for row in record["table"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print({key: value for key, value in record.items() if key not in ("table", "faults")})
    return 1 if record["lost"] else 0


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
