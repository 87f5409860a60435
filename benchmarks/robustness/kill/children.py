"""The process that is disturbed: it tells of its steps, saves and switch, and keeps what it ends on."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_cuttlefish import Cuttlefish, CuttlefishCallback

from .faults import DISK, Fault

NOBODY = 65534
"""A user without rights."""

LIMIT = 120
"""Seconds after which a run counts as hung."""


def child(job: Callable[[Path, Any], None], folder: Path, resume: Any, writer: int | None, fault: Fault | None) -> None:
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

    for holder, name, method in (
        (Trainer, "train", observed_train),
        (Trainer, "_save_checkpoint", observed_save),
        (Cuttlefish, "step", observed_step),
        (Cuttlefish, "_try_switch", observed_switch),
    ):
        setattr(holder, name, method)
    return trainers


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
