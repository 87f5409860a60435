"""Hostile files: mutations of everything that the package reads, each in a process that is watched.

    python benchmarks/fuzz.py --mutations 10000      # about half an hour on one core; writes benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --mutations 300 --seed 7 --kinds plan config

A file is changed at the level of bytes, of JSON values and keys, and of safetensors headers, and is then read by the door that
a user takes: `from_pretrained`, `RankPlan.from_json`, a Trainer's resume. What may happen is a correct load or a clear
error. A finding is anything else: a death, a hang, an error that names nothing, memory beyond the files' own size, a file
opened outside the folder, a socket, a subprocess, pickle, or code from the folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from hf_cuttlefish import (
    Cuttlefish,
    CuttlefishCallback,
    CuttlefishConfig,
    LowRankLinear,
    RankPlan,
    estimate_ranks,
    factorize,
    follow_checkpoints,
)
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.saving.checkpoints import STATISTICS_FILE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
SECONDS = 20
"""A case that takes longer hangs; usual are a few hundredths."""
SPARE = 256 * 2**20
"""Bytes that a case may allocate; the files themselves hold 60 kB."""
ALL = "all"

CLEAR = (ValueError, TypeError, FileNotFoundError)
"""What our own code may raise, with a message; transformers, torch and safetensors raise what they like."""


# --- hostile values ---


def deep(levels: int) -> Any:
    """Lists inside lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Any] = [
    10**12, 2**63, 2**64, 10**400, -1, 0, -(10**12), 1, 2, 3, 4, 1e308, 1.5, 4.0, math.nan, math.inf, -math.inf, True, False,
    None, "", "4", "4.0", "rank", "../../etc/passwd", "__class__", "__import__('os').system('id')", "\u0000", "\ud800",
    "a" * 100_000, [], {}, [4], {"rank": 4}, [[]], deep(100), {"a": {"b": {"c": {}}}}, ["x"] * 1000,
]  # fmt: skip
NAMES = [
    "", ".", "..", "../../x", "/etc/passwd", "__class__", "__dict__.weight", "_modules", "_parameters", "forward", "training", "0",
    "encoder..layer", "bert", "bert.encoder", "bert.encoder.layer", "bert.encoder.layer.0", "a" * 10_000, ".".join("a" * 5_000),
    "bert.embeddings.word_embeddings", "classifier", "bert.pooler.dense", "bert.encoder.layer.99.output.dense", "\u0000", "*", "é",
    "bert.encoder.layer.0.output.LayerNorm", "bert.encoder.layer.-1.output.dense", "version", "quant_method", "ranks", "layers",
]  # fmt: skip
PATTERNS = [
    r"(a+)+$", r"(.*)*x", r"([a-z0-9.]+)+X", r"(\w|\w\w)+!", r"((.*)*)*y", r"(?:[a-z]*[a-z]*)*Z", "(" * 3000, "[" * 10, "a{99999999999999}",
    r"(?P<a>x)(?P=b)", r"\1", "(?<=a+)b", "a" * 100_000, "(?:" * 2000 + ")" * 2000, "((a{1,100}){1,100}){1,100}", r"(.*\.)?(.*)+query",
    "*", "", "query", ".*query", r"(?i)QUERY", "query|", "\u0000",
]  # fmt: skip


# --- mutations ---


class Gentle(random.Random):
    """With this source nothing is changed: every door has to load its good files."""


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes: flip, set, delete, insert, cut off, repeat."""
    if isinstance(rng, Gentle):
        return data
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice(b'0123456789"{}[]:,.-eENtrue\\\x00\xff')
        elif kind == 2:
            del out[at : at + rng.choice((1, 1, 3, 20))]
        elif kind == 3:
            out[at:at] = rng.choice(
                (
                    b"9" * 15,
                    b"-",
                    b"NaN",
                    b"null",
                    b"[" * 2000,
                    b'{"a":' * 30_000,
                    b"\x00",
                    b'"',
                    b"1e999",
                    b"\xff\xfe",
                    b"{}",
                )
            )
        elif kind == 4:
            del out[at:]
        else:
            out[at:at] = out[at : at + rng.choice((2, 10, 100))]
    return bytes(out)


def mutate_json(value: Any, rng: random.Random, patterns: bool = False) -> Any:
    """One to three changes of values and keys, at any depth."""
    if isinstance(rng, Gentle):
        return value
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = [(root, 0)]
        stack = [root[0]]
        while stack:
            node = stack.pop()
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, inner in items:
                if len(places) < 3000:
                    places.append((node, key))
                    stack.append(inner)
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 3 or (kind <= 5 and not isinstance(holder, dict)):
            holder[key] = copy.deepcopy(rng.choice(VALUES + PATTERNS * patterns))
        elif kind == 4:
            holder[rng.choice(NAMES + PATTERNS * patterns)] = holder.pop(key)
        elif kind == 5:
            holder[rng.choice(NAMES + PATTERNS * patterns)] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 6 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 2, 1000))
        elif holder is not root:
            del holder[key]
    return root[0]


def dump(value: Any) -> bytes:
    """JSON, ASCII alone, with NaN and what else Python's json writes."""
    return json.dumps(value, ensure_ascii=True).encode()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header length, header or tensor bytes."""
    if isinstance(rng, Gentle):
        return data
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(5)
    if kind == 0:
        wrong = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1, 10**8 + 1))
        return struct.pack("<Q", wrong) + header + body
    if kind == 1:
        header = mutate_bytes(header, rng)
    elif kind == 2:
        return data[:8] + header + mutate_bytes(body, rng)
    else:
        fields = json.loads(header)
        name = rng.choice(list(fields))
        entry = fields[name]
        what = rng.randrange(6)
        if what == 0 and "shape" in entry:
            entry["shape"] = rng.choice(
                ([10**12], [10**6, 10**6], [-1, 4], [0], [], [2**63, 2], [4, 32, 1], [32, 4], [1.5], ["4"])
            )
        elif what == 1 and "shape" in entry:
            entry["data_offsets"] = rng.choice(([0, 10**12], [-8, 8], [8, 0], [0, 0], [0, 4], [2**64, 2**64], [0]))
        elif what == 2 and "shape" in entry:
            entry["dtype"] = rng.choice(("F64", "F16", "I64", "BOOL", "F8_E4M3", "U8", "X", "", None, 4))
        elif what == 3:
            del fields[name]
        elif what == 4:
            fields[rng.choice([*NAMES, *fields]) + rng.choice(("", ".weight", ".down.weight", ".up.weight"))] = (
                fields.pop(name)
            )
        else:
            fields = mutate_json(fields, rng)
        header = dump(fields)
    return struct.pack("<Q", len(header)) + header + body


# --- the doors: each takes a folder with good files and a random source, spoils one file, and reads it ---

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TINY |= {"max_position_embeddings": 16, "num_labels": 3}
IDS = torch.arange(12).reshape(2, 6) + 3


def tiny() -> hf.PreTrainedModel:
    """A dense BERT, always the same."""
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**TINY)).eval()


def prepare(folder: Path) -> None:
    """The good files, as the package and the Trainer write them."""
    model = tiny()
    factorize(model, dict.fromkeys(find_targets(model), 4))
    model.save_pretrained(folder / "model")
    model.save_pretrained(folder / "sharded", max_shard_size=20_000)
    (folder / "plan.json").write_text(estimate_ranks(tiny(), PLAN).to_json())
    config = CuttlefishConfig(
        target_modules=["query", "value", "dense"], exclude_modules=["key"], rank_pattern={".*query": 4}
    )
    (folder / "config.json").write_text(config.to_json())
    trainer = new_trainer(folder / "run")
    trainer.train()
    for name, step in (("before", 3), ("after", 6)):
        (folder / "run" / f"checkpoint-{step}").rename(folder / name)
    shutil.rmtree(folder / "run")


PLAN = CuttlefishConfig(rank_rule="ratio", rank_multiple=4)
RUN = CuttlefishConfig(switch_step=5, statistics_steps=4, check_steps=1, on_error="raise")


class Rows(torch.utils.data.Dataset):
    """Eight rows of the same tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[index % 2], "labels": torch.tensor(index % 3)}


def new_trainer(folder: Path, restore: bool = False, model: Any = None) -> hf.Trainer:
    """A real Trainer of eight steps that saves at 3 and 6."""
    args = hf.TrainingArguments(
        str(folder), max_steps=8, save_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_steps=100, restore_callback_states_from_checkpoint=restore, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = hf.Trainer(model or tiny(), args, train_dataset=Rows(), callbacks=[CuttlefishCallback(RUN)])
    trainer.remove_callback(hf.PrinterCallback)
    return trainer


def check_structure(model: nn.Module) -> None:
    """What has loaded must be whole: no value forgotten, ranks within the layers, the note in the config true."""
    pairs = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    for name, layer in pairs.items():
        if not 1 <= layer.rank <= min(layer.in_features, layer.out_features):
            raise WrongLoadError(f"{name} has rank {layer.rank}")
    if any(p.is_meta or p.numel() > 10**6 for p in model.parameters()):
        raise WrongLoadError("a parameter without values, or a giant one")
    note = getattr(model.config, "quantization_config", None)
    if bool(pairs) != (note is not None) or (note and note["ranks"] != {n: m.rank for n, m in pairs.items()}):
        raise WrongLoadError("the note in the config does not say what the model is")


class NotAskedError(Exception):
    """The file no longer says that it is ours, so transformers loads a dense model, and warns of the weights that are left."""


class WrongLoadError(Exception):
    """Something has loaded that is not what the files say."""


def door_structure(folder: Path, rng: random.Random) -> None:
    """config.json of a factorized folder: the part that is ours, and the file cut off."""
    path = folder / "model" / "config.json"
    text = path.read_bytes()
    data = json.loads(text)
    if rng.random() < 0.5:
        data["quantization_config"] = mutate_json(data["quantization_config"], rng)
        path.write_bytes(dump(data))
    elif rng.random() < 0.9:
        ours = dump(data.pop("quantization_config"))
        rest = dump(data)[:-1]
        path.write_bytes(rest + b', "quantization_config": ' + mutate_bytes(ours, rng) + b"}")
    else:
        path.write_bytes(mutate_bytes(text[: rng.randrange(len(text))], rng) if not isinstance(rng, Gentle) else text)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    note = json.loads(path.read_bytes()).get("quantization_config")
    if not isinstance(note, dict) or note.get("quant_method") != "cuttlefish":
        raise NotAskedError(f"{note!r:.60}")
    check_structure(model)


def door_header(folder: Path, rng: random.Random) -> None:
    """model.safetensors of a factorized folder, and the index of shards."""
    if rng.random() < 0.2:
        path = folder / "sharded" / "model.safetensors.index.json"
        path.write_bytes(dump(mutate_json(json.loads(path.read_bytes()), rng)))
        check_structure(hf.AutoModelForSequenceClassification.from_pretrained(folder / "sharded"))
        return
    path = folder / "model" / "model.safetensors"
    path.write_bytes(mutate_header(path.read_bytes(), rng))
    if rng.random() < 0.5:
        check_structure(hf.AutoModelForSequenceClassification.from_pretrained(folder / "model"))
        return
    model = tiny()
    follow_checkpoints(model)
    model.load_state_dict(load_file(path), strict=False)
    check_structure(model)


def door_plan(folder: Path, rng: random.Random) -> None:
    """A plan file: read it, print it, carry it out."""
    path = folder / "plan.json"
    text = path.read_bytes()
    path.write_bytes(dump(mutate_json(json.loads(text), rng)) if rng.random() < 0.6 else mutate_bytes(text, rng))
    plan = RankPlan.from_json(path)
    plan.summary()
    if RankPlan.from_json(plan.to_json()) != plan and "NaN" not in plan.to_json():
        raise WrongLoadError("the plan does not come back")
    model = tiny()
    factorize(model, plan)
    check_structure(model)


def door_config(folder: Path, rng: random.Random) -> None:
    """A CuttlefishConfig as JSON, with patterns that explode: read it, choose layers and ranks by it."""
    path = folder / "config.json"
    text = path.read_bytes()
    if rng.random() < 0.7:
        path.write_bytes(dump(mutate_json(json.loads(text), rng, patterns=True)))
    else:
        path.write_bytes(mutate_bytes(text, rng))
    config = CuttlefishConfig.from_json(path.read_text("utf-8"))
    if CuttlefishConfig.from_json(config.to_json()) != config:
        raise WrongLoadError("the config does not come back")
    estimate_ranks(tiny(), config)


def door_state(folder: Path, rng: random.Random) -> None:
    """The state of a run in trainer_state.json: load it, and go on to the end of the run."""
    name = rng.choice(("before", "after"))
    path = folder / name / "trainer_state.json"
    full = json.loads(path.read_bytes())
    ours = full["stateful_callbacks"]["CuttlefishCallback"]["attributes"]["_saved"]
    saved, gap = full["stateful_callbacks"]["CuttlefishCallback"]["attributes"], "the state"
    saved["_saved"] = gap
    ours = dump(mutate_json(ours, rng))
    path.write_bytes(dump(full).replace(dump(gap), mutate_bytes(ours, rng) if rng.random() < 0.3 else ours))
    state = hf.TrainerState.load_from_json(str(path)).stateful_callbacks["CuttlefishCallback"]["attributes"]["_saved"]
    model = tiny()
    follow_checkpoints(model)
    model.load_state_dict(load_file(folder / name / "model.safetensors"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    statistics = None
    if (folder / name / STATISTICS_FILE).exists():
        statistics = load_file(folder / name / STATISTICS_FILE)
        if rng.random() < 0.3:
            spoiled = folder / "spoiled.safetensors"
            save_file(statistics, spoiled)
            spoiled.write_bytes(mutate_header(spoiled.read_bytes(), rng))
            statistics = load_file(spoiled)
    cuttlefish = Cuttlefish(model, optimizer, RUN, total_steps=8)
    try:
        cuttlefish.load_state_dict(state, statistics)
        for _ in range(8 - min(cuttlefish.global_step, 8)):
            model(IDS, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cuttlefish.step()
        cuttlefish.end()
        json.dumps(cuttlefish.state_dict())
        str(cuttlefish.report)
    finally:
        cuttlefish.close()
    check_structure(model)


def door_resume(folder: Path, rng: random.Random) -> None:
    """trainer_state.json, the structure and the statistics in a checkpoint that a real Trainer resumes."""
    name = rng.choice(("before", "after"))
    checkpoint = folder / name
    what = rng.randrange(4)
    statistics = checkpoint / STATISTICS_FILE
    if what == 0:
        path = checkpoint / "model.safetensors"
        path.write_bytes(mutate_header(path.read_bytes(), rng))
    elif what == 1 and statistics.exists():
        statistics.write_bytes(mutate_header(statistics.read_bytes(), rng))
    else:
        path = checkpoint / "trainer_state.json"
        data = json.loads(path.read_bytes())
        data["stateful_callbacks"]["CuttlefishCallback"] = mutate_json(
            data["stateful_callbacks"]["CuttlefishCallback"], rng, patterns=True
        )
        path.write_bytes(dump(data))
    model = tiny()
    trainer = new_trainer(folder / "resumed", restore=rng.random() < 0.5, model=model)
    trainer.args.save_strategy = "no"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    check_structure(model)


DOORS: dict[str, tuple[int, Callable[[Path, random.Random], None]]] = {
    "structure": (25, door_structure),
    "header": (25, door_header),
    "plan": (20, door_plan),
    "config": (15, door_config),
    "state": (12, door_state),
    "resume": (3, door_resume),
}
"""Name -> share of the mutations in percent, and the function."""


# --- the watch ---

FORBIDDEN = {
    *(
        "socket.connect",
        "socket.getaddrinfo",
        "socket.sendto",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
    ),
    *("pickle.find_class", "ctypes.dlopen", "os.fork", "shutil.rmtree"),
}


class Watch:
    """An audit hook: what a case opens, runs, imports and connects to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = str(folder), False, ""
        self.readable = tuple(
            {self.folder, sys.prefix, sys.base_prefix, str(ROOT), "/proc", "/sys", "/dev/null", "/usr", "/lib"}
        )
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            writes = isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if not path.startswith(self.folder if writes else self.readable):
                self.seen = self.seen or f"{'writes' if writes else 'reads'} {path}"
        elif event in ("exec", "compile") and str(getattr(arguments[0], "co_filename", "")).startswith(self.folder):
            self.seen = self.seen or f"runs code of {arguments[0].co_filename}"
        elif event in FORBIDDEN and not self._is_own_checkpoint(event):
            self.seen = self.seen or f"{event} {arguments!r:.100}"

    @staticmethod
    def _is_own_checkpoint(event: str) -> bool:
        """The Trainer keeps its optimizer and random state in torch's own files, which it reads without running code."""
        return event == "pickle.find_class" and any(
            "trainer" in frame.filename for frame in traceback.extract_stack(limit=40)
        )


def judge(
    door: Callable[[Path, random.Random], None], folder: Path, rng: random.Random, watch: Watch
) -> tuple[str, str]:
    """("loaded" | "refused" | "not ours" | "finding", detail) of one case."""
    watch.seen, watch.on = "", True
    try:
        door(folder, rng)
        outcome, detail = "loaded", ""
    except NotAskedError as error:
        outcome, detail = "not ours", str(error)
    except Exception as error:
        outcome, detail = "refused", describe(error)
        ours = is_ours(error)
        text = str(error)
        unclear = ours and not (isinstance(error, CLEAR) and raised_on_purpose(error))
        unclear = unclear or isinstance(error, (MemoryError, WrongLoadError)) or "can't allocate memory" in text
        if unclear or re.search(r"not enough memory|bad_alloc|internal assert", text, re.I):
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
            outcome, detail = "finding", f"{detail} ({' '.join(frames)})"
    finally:
        watch.on = False
    return ("finding", watch.seen) if watch.seen else (outcome, detail)


def is_ours(error: BaseException) -> bool:
    """Whether the last frame that raised it, standard library aside, is the package's."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    files = [f for f in files if "site-packages" in f or str(ROOT) in f]
    return bool(files) and str(ROOT / "hf_cuttlefish") in files[-1]


def raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` of the package made it, and not a value that something stumbled over."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT / "hf_cuttlefish") in f.filename]
    return bool(frames) and (frames[-1].line or "").startswith("raise ")


def describe(error: BaseException) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]!r}"


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


def quiet() -> None:
    """No warnings, no bars, one thread."""
    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    """1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(DOORS), choices=list(DOORS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print what was refused, too")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/fuzz.json, for 10,000 mutations of all kinds"
    )
    options = parser.parse_args(arguments)
    quiet()
    started = time.monotonic()
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in options.kinds}
    errors: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    for kind, case, outcome, detail in fuzz(options.mutations, options.seed, options.kinds, options.workers):
        counts[kind]["unchanged" if case < 0 and outcome == "loaded" else outcome] += 1
        if outcome == "refused":
            errors[detail.partition(":")[0]] += 1
            if options.verbose:
                print(kind, case, detail, flush=True)
        elif outcome == "finding":
            findings.append({"kind": kind, "seed": case, "what": detail})
            print(kind, case, detail, flush=True)
    result = {
        "command": f"python benchmarks/fuzz.py --mutations {options.mutations} --seed {options.seed}",
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": hf.__version__},
        "mutations": sum(c.total() - c["unchanged"] for c in counts.values()),
        "seconds": round(time.monotonic() - started),
        "counts": {
            kind: {o: c[o] for o in ("unchanged", "loaded", "refused", "not ours", "finding")}
            for kind, c in counts.items()
        },
        "errors": dict(errors.most_common()),
        "findings": findings,
    }
    complete = options.mutations >= 10_000 and set(options.kinds) == set(DOORS)
    out = options.out or (RESULTS if complete else None)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps({**result, "findings": len(findings)}, indent=1))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
