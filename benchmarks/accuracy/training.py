"""One run: a task, a method, a budget, a seed; out comes a dictionary of everything that was measured."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import hf_cuttlefish
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.layers.sizes import block_containers, count_parameters

from .data import TASKS, Task, build, load
from .method import Method
from .methods import create
from .run import Run
from .splits import Split

RECORD_VERSION = 1
UNTIMED_STEPS = 3
"""First steps of each phase that are left out of the time per step."""


class Training:
    """A model, its optimizer and the place in the run that methods look at.

    Attributes:
        step: optimizer steps taken, the current one among them once it has been taken.
    """

    def __init__(self, task: Task, method: Method, model: nn.Module, rows: int, device: torch.device) -> None:
        self.task, self.method, self.device = task, method, device
        self.model = method.build(model.to(device)).train()
        self.epoch_steps = -(-rows // task.batch)
        self.total_steps = self.epoch_steps * task.epochs
        self.step = 0
        # As Trainer does: no weight decay on biases and norms. Factors under Frobenius decay have that instead.
        products = {id(p) for m in low_rank_layers(self.model).values() for p in (m.down.weight, m.up.weight)}
        decayed, others = [], []
        for parameter in (p for p in self.model.parameters() if p.requires_grad):
            plain = parameter.ndim >= 2 and not (id(parameter) in products and getattr(method, "decay", 0) > 0)
            (decayed if plain else others).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": task.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=task.learning_rate * method.rate,
            fused=True,
        )
        warmup = max(1, round(task.warmup * self.total_steps))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup if task.warmup else 1.0, 1 - step / self.total_steps),
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 on a GPU, fp32 on the CPU."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def train_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forward, backward and an optimizer step; returns the loss, still on the device."""
        with self.autocast():
            loss = self.model(**batch).loss
        loss.backward()
        self.method.before_step(self)
        # The parameters change at the switch, so the optimizer is asked for them.
        held = (p for group in self.optimizer.param_groups for p in group["params"])
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, split: Split, rows: int | None = None) -> dict[str, float]:
        """Accuracy and mean loss, over rows or next tokens, on (the first rows of) a split, without dropout."""
        self.model.eval()
        hits = torch.zeros((), device=self.device)
        loss = torch.zeros((), device=self.device)
        count = 0
        for batch in split.batches(rows):
            labels = batch.pop("labels")
            with self.autocast():
                logits = self.model(**batch).logits
            logits, labels = split.terms(logits, labels)
            hits += (logits.argmax(-1) == labels).sum()
            loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            count += len(labels)
        self.model.train()
        return {"accuracy": float(hits) / count, "loss": float(loss) / count}


class StepClock:
    """Seconds per training step of a phase; what is measured between `pause` and `resume` does not count."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps, self.seconds, self.warm = device, 0, 0.0, 0
        self._since: float | None = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self) -> None:
        """A step has been queued."""
        if self._since is not None:
            self.steps += 1
            return
        self.warm += 1
        if self.warm >= UNTIMED_STEPS:
            self._since = self._now()

    def pause(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            self.seconds += self._now() - self._since
        self._since = None

    @property
    def mean(self) -> float | None:
        """Seconds per step, or None where too few steps were taken."""
        return self.seconds / self.steps if self.steps else None


def execute(run: Run, folder: Path | None, device: torch.device, rows: int | None = None) -> dict[str, Any]:
    """Train once and measure. `rows` limits the rows of every split."""
    started = time.perf_counter()
    task = TASKS[run.dataset].limited(rows)
    splits, classes = load_once(task, folder, device)
    train = splits["train"]
    torch.manual_seed(run.seed)
    model = build(task, classes, folder)
    names = list(find_targets(model))
    sizes = {"before": _sizes(model, names)}
    method = create(run.method, run.budget, task.epochs, run.options)
    training = Training(task, method, model, len(train), device)
    training.method.start(training)

    seen = _train(training, splits, run.seed)
    sizes["after"] = _sizes(training.model, names) if run.method != "lora" else sizes["before"]
    wall = time.perf_counter() - started
    return {
        "version": RECORD_VERSION,
        **asdict(run),
        "task": asdict(task),
        "steps": training.total_steps,
        "epoch_steps": training.epoch_steps,
        "rows": {name: len(split) for name, split in splits.items()},
        "validation": training.evaluate(splits["validation"]),
        "test_split": training.evaluate(splits["test"]) if run.test else None,
        "train": training.evaluate(train, train.measured_rows),
        "switch_step": seen.switch_step,
        "switch_share": None if seen.switch_step is None else seen.switch_step / training.total_steps,
        "around_switch": seen.around,
        "parameters": sizes,
        "kept": sizes["after"]["targets"] / sizes["before"]["targets"],
        "trainable": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        "method_notes": method.notes,
        "train_loss": {
            "first": float(seen.curve[: training.epoch_steps].mean()),
            "last": float(seen.curve[-training.epoch_steps :].mean()),
            "finite": bool(torch.isfinite(seen.curve).all()),
        },
        "wall_seconds": wall,
        "seconds_per_step": {phase: clock.mean for phase, clock in seen.clocks.items()},
        **_machine(device),
    }


@dataclass
class Seen:
    """What a run shows from its first step to its last.

    Attributes:
        clocks: seconds per step, "before" and "after" the switch. curve: the loss of each step.
        around: what was measured just before and just after the switch.
    """

    clocks: dict[str, StepClock]
    around: dict[str, Any]
    switch_step: int | None
    curve: torch.Tensor


def _train(training: Training, splits: dict[str, Split], seed: int) -> Seen:
    """All steps, and a look at the model around its switch."""
    method, device = training.method, training.device
    clocks = {"before": StepClock(device), "after": StepClock(device)}
    around: dict[str, Any] = {"before": None, "after": None}
    switch_step: int | None = None
    if low_rank_layers(training.model):  # low rank from the start
        switch_step, around["after"] = 0, _measure(training, splits)
    losses: list[torch.Tensor] = []
    for batch in all_batches(splits["train"], training.task, seed):
        losses.append(training.train_step(batch))
        clock = clocks["before" if switch_step is None else "after"]
        clock.step()
        if method.due(training):
            clock.pause()
            around["before"] = _measure(training, splits)
        if method.after_step(training):
            clock.pause()
            switch_step, around["after"] = training.step, _measure(training, splits)
    for clock in clocks.values():
        clock.pause()
    if switch_step is None:
        around["before"] = None
    return Seen(clocks, around, switch_step, torch.stack(losses).float().cpu())


def _machine(device: torch.device) -> dict[str, Any]:
    """Where the run was."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "peak_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_cuttlefish": hf_cuttlefish.__version__,
        },
    }


_loaded: dict[tuple[Task, str], tuple[dict[str, Split], int]] = {}


def load_once(task: Task, folder: Path | None, device: torch.device) -> tuple[dict[str, Split], int]:
    """The task's data, kept on the device for the worker's next run of the same task."""
    data_key = (repr((task.file, task.rows, task.longest, task.measured, task.kind, task.image_size)), str(device))
    if data_key not in _loaded:
        _loaded.clear()
        _loaded[data_key] = load(task, folder, device)
    return _loaded[data_key]


def all_batches(train: Split, task: Task, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a run, epoch by epoch."""
    for epoch in range(task.epochs):
        yield from train.epoch(task.batch, 1000 * seed + epoch)


def _measure(training: Training, splits: dict[str, Split]) -> dict[str, dict[str, float]]:
    return {
        "train": training.evaluate(splits["train"], splits["train"].measured_rows),
        "validation": training.evaluate(splits["validation"]),
    }


def _sizes(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Parameters of the whole model, of the blocks' container and of the target layers' weights."""
    targets = 0
    for name in names:
        module = model.get_submodule(name)
        targets += sum(p.numel() for key, p in module.named_parameters() if not key.endswith("bias"))
    return {
        "model": count_parameters(model),
        "encoder": count_parameters(model, block_containers(model, dict.fromkeys(names))),
        "targets": targets,
    }
