"""The command line: look at a model, factorize it, merge it, plot a run, and say what is installed.

Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted, 141 the reader of our output went away, 143
terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__
from .config import RANK_RULES, CuttlefishConfig
from .factorization import LayerMoments
from .inspection import NOW, inspect_model, present_plan
from .model_card import write_model_card
from .patching import QUANT_METHOD, factorize
from .plan import RankPlan
from .plotting import check_matplotlib, plot_loss, plot_ranks, plot_spectra, plot_stable_ranks
from .post_training import gather_statistics, read_texts, text_batches
from .ranks import estimate_ranks
from .saving import save_merged

COMPANIONS = [
    *(
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.tiktoken",
        "spiece.model",
    ),
    *("sentencepiece*.model", "chat_template*", "preprocessor_config.json", "processor_config.json"),
    *(
        "video_preprocessor_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ),
    *("1_Pooling/config.json", "2_Normalize/*", "LICENSE*"),
]
"""Files beside a model's weights that a folder needs to be used at once: tokenizer, processor, sentence-transformers."""

PACKAGES = (
    *("hf-cuttlefish", "torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "numpy"),
    *("datasets", "evaluate", "peft", "matplotlib", "deepspeed", "bitsandbytes", "torchao", "trl"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE", "ACCELERATE_USE_FSDP")
"""What a bug report should say besides the packages' versions."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    quiet = transformers.utils.logging
    quiet.set_verbosity_error()
    if not sys.stderr.isatty():
        quiet.disable_progress_bar()
    try:
        with _ends_tidily():
            options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            raise
        print(f"{parser.prog}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _ends_tidily() -> Iterator[None]:
    """SIGTERM ends the command like an exception, so that what was begun in OUT is taken away."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    except ValueError:  # not the main thread, in which signals arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------------------- commands


def _inspect(options: argparse.Namespace) -> None:
    if options.plot or options.plot_spectra:
        check_matplotlib()
    config = _config(options, target_ratio=options.ratio)
    model = _load_model(options.model, options.device)
    statistics = _statistics(model, options, config)
    found = inspect_model(model, config, statistics=statistics, progress=_bar("layers"))
    rule = options.rule if options.rule in found.plans else next(iter(found.plans))
    if rule == NOW and (options.plot_spectra or options.save_plan):
        raise ValueError(f"{options.model} is factorized already: there is nothing to plan, and no spectrum to draw")
    plan = found.plans[rule]
    if options.save_plan:
        plan.to_json(options.save_plan)
    if options.plot:
        plot_ranks(plan, options.plot)
    if options.plot_spectra:
        spectra = {
            name: s.singular_values if s.loss_spectrum is None else s.loss_spectrum for name, s in found.spectra.items()
        }
        title = "Spectra of the weights" if statistics is None else "Spectra in the metric of the loss"
        plot_spectra(
            {name: values.tolist() for name, values in spectra.items() if values is not None},
            plan,
            options.plot_spectra,
            title,
        )
    if options.json:
        print(json.dumps({"model": options.model, "statistics": statistics is not None, **found.to_dict()}, indent=2))
    else:
        print(found.table(rule))
        if rule != NOW and statistics is None:
            print("note: no --data, so rule 'loss' stands for the same share of the parameters in each layer")


def _factorize(options: argparse.Namespace) -> None:
    rule = options.rule or "loss"
    config = _config(options, rank_rule=rule, target_ratio=options.ratio)
    plan: Any = None if options.plan is None else _read_plan(options.plan)
    with _output(options) as folder:
        rows = _rows(options)
        model = _load_model(options.model, options.device)
        statistics = _statistics(model, options, config, rows, list(plan) if plan is not None else None)
        if plan is None:
            plan = estimate_ranks(model, config, statistics=statistics)
        report = factorize(model, plan, statistics=statistics)
        model.save_pretrained(folder)
        _copy_companions(options.model, folder)
        write_model_card(folder, model, report=report, base_model=None if _is_local(options.model) else options.model)
    if options.json:
        print(json.dumps({"model": options.model, "statistics": statistics is not None, **report.to_dict()}, indent=2))
        return
    print(report)
    if statistics is None:
        print(
            "note: no --data, so the factors are those of the plain SVD, which lose far more than factors made with data"
        )
    print(f"saved in {options.out}; load it after `import hf_cuttlefish`")


def _merge(options: argparse.Namespace) -> None:
    config = _load_config(options.model)
    note = getattr(config, "quantization_config", None)
    if not isinstance(note, dict) or note.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{options.model} is no factorized model: its config.json names no low-rank layers")
    with _output(options) as folder:
        model = _load_model(options.model, "cpu")
        plan = present_plan(model)
        save_merged(model, folder)
        _copy_companions(options.model, folder)
    after, before = plan.parameters()
    print(
        f"merged {len(plan)} layers, {before:,} -> {after:,} parameters; saved in {options.out}, which loads without us"
    )


def _plot(options: argparse.Namespace) -> None:
    state, source = _read_run(Path(options.run_dir))
    run = next(iter(_cuttlefish_states(state)), None)
    if run is None and options.what != "loss":
        raise ValueError(f"{source} holds no history of stable ranks: the run had no CuttlefishCallback")
    step = None if run is None else run["switch_step"]
    if options.what == "loss":
        plot_loss(state.get("log_history") or [], step, options.out)
    elif options.what == "ranks":
        if not run or not run["plan"]:
            raise ValueError(f"{source} holds no rank plan: there was no switch up to step {state['global_step']}")
        plot_ranks(RankPlan.from_dict(run["plan"]), options.out)
    elif run:
        ranks = run["history"]["ranks"]
        history = [
            {"step": step, "layer": name, "stable_rank": values[i]}
            for i, step in enumerate(run["history"]["steps"])
            for name, values in ranks.items()
        ]
        plot_stable_ranks(history, step, options.out)
    print(f"{options.out}: from {source}")


def _env(options: argparse.Namespace) -> None:
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = __version__ if package == "hf-cuttlefish" else None
    facts["cpu"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    facts["cuda"] = torch.version.cuda
    facts["devices"] = [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ] or ["mps" if torch.backends.mps.is_available() else "cpu"]
    facts |= {name: os.environ.get(name) for name in VARIABLES}
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        shown = "; ".join(value) if isinstance(value, list) else value if value is not None else "-"
        print(f"{name:<22}{shown}")


# ----------------------------------------------------------------------------------------------- in and out


def _load_config(name: str) -> Any:
    """The config of a local folder or a hub name.

    Raises:
        FileNotFoundError: no such folder, or no name that the cache or the hub has. ValueError: a folder that is no model.
    """
    if _is_local(name):
        folder = Path(name)
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: no such folder")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} is no model: it holds no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        if _is_local(name):
            raise
        offline = " and HF_HUB_OFFLINE is set" if transformers.utils.hub.is_offline_mode() else ""
        raise FileNotFoundError(
            f"{name} is no folder here, and no model of that name is in the cache or can be fetched from the hub{offline}"
        ) from error
    return config


def _load_model(name: str, device: str | None) -> Any:
    """The model in the class that its config names, on the device (None: a GPU if there is one).

    Raises: as `_load_config`; ValueError for a class that transformers does not have, or a device that is not there.
    """
    config = _load_config(name)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    cls = getattr(transformers, architecture, None) if architecture else transformers.AutoModel
    if cls is None:
        raise ValueError(f"{name} is a {architecture}, which is no class of transformers {transformers.__version__}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {_one_line(error)}") from error
    model, info = cls.from_pretrained(name, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        _warn(
            f"{name} holds no {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ": random numbers there"
        )
    return model.to(place).eval()


def _is_local(name: str) -> bool:
    """Whether a name means a folder: it is there, or could be no hub name (owner/name)."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


@contextlib.contextmanager
def _output(options: argparse.Namespace) -> Iterator[Path]:
    """A folder to write into, inside OUT; what is in it goes to OUT at the end, and nothing stays if there is an error.

    Raises:
        FileExistsError: OUT is not empty, and no --force. NotADirectoryError: it is a file. ValueError: it is the model
            itself. PermissionError or OSError: it cannot be written.
    """
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: give a folder")
    if out.is_dir():
        if os.path.isdir(options.model) and out.samefile(options.model):
            raise ValueError(f"{out} is the model itself: give another folder")
        if any(out.iterdir()) and not options.force:
            raise FileExistsError(f"{out} is not empty: give another folder, or --force to replace the model in it")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    except OSError as error:
        raise type(error)(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield partial
        for old in [
            *out.glob("model*.safetensors"),
            *out.glob("model*.safetensors.index.json"),
            *out.glob("pytorch_model*"),
        ]:
            old.unlink()
        for new in partial.iterdir():
            target = out / new.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(new, target)
        made = []
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            folder.rmdir()


def _companions(name: str) -> dict[str, Path]:
    """Tokenizer, processor and the like of a folder or hub name: path inside the folder -> file."""
    if os.path.isdir(name):
        source = Path(name)
    else:
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(name, allow_patterns=COMPANIONS))
    files = (file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file())
    return {str(file.relative_to(source)): file for file in files}


def _copy_companions(name: str, folder: Path) -> None:
    """Copy them; what has been written there already stays."""
    for path, file in _companions(name).items():
        target = folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _rows(options: argparse.Namespace) -> Any:
    if options.data is None:
        return None
    return read_texts(options.data, options.text_column, options.label_column, options.samples)


def _statistics(
    model: Any, options: argparse.Namespace, config: CuttlefishConfig, rows: Any = None, names: list[str] | None = None
) -> dict[str, LayerMoments] | None:
    """Statistics of the target layers (or the named ones) from the data; None without data."""
    if options.data is None:
        return None
    rows = rows or _rows(options)
    # AutoTokenizer makes an empty tokenizer, without a word, where there are no files.
    if not any(
        path.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for path in _companions(options.model)
    ):
        raise ValueError(
            f"{options.model} has no tokenizer, so --data of texts cannot be used; for images and the like see "
            "hf_cuttlefish.post_training.gather_statistics"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    batches = text_batches(model, tokenizer, rows, options.batch_size, options.max_length)
    if any(row.label is not None for row in rows) and "labels" not in batches[0]:
        _warn(f"the labels in {options.data} are not used: {type(model).__name__} has no use for them")
    if names:
        config = CuttlefishConfig(target_modules=names)
    return gather_statistics(model, batches, config, _bar("batches"))


def _config(options: argparse.Namespace, **settings: Any) -> CuttlefishConfig:
    """The config that the options on targets and ranks make."""
    if options.target_modules:
        settings["target_modules"] = options.target_modules
    if options.exclude_modules:
        settings["exclude_modules"] = options.exclude_modules
    return CuttlefishConfig(rank_multiple=options.rank_multiple, **settings)


def _read_plan(path: str) -> Any:
    """A plan as `RankPlan.to_json` writes it, or a plain {"module name": rank}."""
    text = Path(path).read_text("utf-8")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(data, dict) and "layers" not in data:
        return data
    try:
        return RankPlan.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_run(folder: Path) -> tuple[dict[str, Any], Path]:
    """The Trainer's state in a checkpoint, or in the newest checkpoint below a folder.

    Raises:
        FileNotFoundError: no such folder, or none of the Trainer's. ValueError: the file is damaged.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = [folder] if folder.is_file() else [folder / "trainer_state.json"]
    if not files[0].is_file():
        files = sorted(folder.rglob("checkpoint-*/trainer_state.json"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no trainer_state.json and no checkpoint-* with one: it is no run of a Trainer"
        )
    try:
        state = json.loads(files[-1].read_text("utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(f"{files[-1]} is no state of a Trainer: {error}") from error
    return state, files[-1]


def _cuttlefish_states(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What callbacks of ours (subclasses too) saved in the Trainer's state."""
    for entries in (state.get("stateful_callbacks") or {}).values():
        for entry in entries if isinstance(entries, list) else [entries]:
            saved = (entry.get("attributes") or {}).get("_saved") if isinstance(entry, dict) else None
            if isinstance(saved, dict) and "history" in saved and "switch_step" in saved:
                yield saved


# --------------------------------------------------------------------------------------------------- talking


def _bar(unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar on stderr, if that is a terminal."""
    # transformers' own bar, which `main` has switched off where stderr is no terminal
    return lambda items: transformers.utils.logging.tqdm(items, unit=f" {unit}", leave=False)


def _warn(message: str) -> None:
    print(f"hf-cuttlefish: warning: {message}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_share.__name__, _count.__name__ = "share (above 0, at most 1)", "whole number of at least 1"  # argparse shows these


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-cuttlefish",
        description="Cuttlefish (low-rank training without tuning) for models that lie in a folder or on the hub.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 reader of the output gone, 143 terminated.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    sub = command(
        "inspect", _inspect, "show each layer's stable rank, its rank under every rule, and what that would save"
    )
    _add_model(sub)
    sub.add_argument(
        "--ratio", type=_share, metavar="R", help="size for rule 'loss': share of these layers' parameters"
    )
    sub.add_argument(
        "--rule", choices=RANK_RULES, default="loss", help="rule of the size columns, the plots and the plan"
    )
    sub.add_argument("--json", action="store_true", help="print JSON: all numbers of all rules")
    sub.add_argument("--plot", metavar="FILE", help="draw the ranks as a map of layers by projections")
    sub.add_argument("--plot-spectra", metavar="FILE", help="draw the spectra, with the ranks marked")
    sub.add_argument("--save-plan", metavar="FILE", help="write the ranks as JSON, for factorize --plan")

    sub = command("factorize", _factorize, "make a trained model low rank, without training")
    _add_model(sub)
    sub.add_argument("out", metavar="OUT", help="folder to write")
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--ratio", type=_share, metavar="R", help="share of the target layers' parameters to keep")
    size.add_argument("--plan", metavar="FILE", help='ranks: what inspect --save-plan wrote, or {"module name": rank}')
    size.add_argument("--rule", choices=RANK_RULES, help="ranks by a rule of CuttlefishConfig.rank_rule")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_force(sub)

    sub = command("merge", _merge, "turn a factorized model into a dense one, which loads without this package")
    sub.add_argument("model", metavar="MODEL", help="folder or hub name of a factorized model")
    sub.add_argument("out", metavar="OUT", help="folder to write")
    _add_force(sub)

    sub = command("plot", _plot, "draw a run from the state that the Trainer saved in its checkpoints")
    sub.add_argument(
        "run_dir", metavar="RUN_DIR", help="a checkpoint, or a folder with checkpoints (the newest counts)"
    )
    sub.add_argument("out", metavar="OUT", help="file to write; its ending chooses the format (png, svg, pdf)")
    sub.add_argument(
        "--what",
        choices=("stable-ranks", "ranks", "loss"),
        default="stable-ranks",
        help="what to draw (default: %(default)s)",
    )

    sub = command("env", _env, "show versions and devices, for bug reports")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_model(sub: argparse.ArgumentParser) -> None:
    """The model, its target layers, and the data for statistics."""
    sub.add_argument("model", metavar="MODEL", help="folder or hub name")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    layers = sub.add_argument_group("layers")
    layers.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="endings of module names (default: all linear layers of the blocks)",
    )
    layers.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="endings of module names that stay dense")
    layers.add_argument(
        "--rank-multiple",
        type=_count,
        default=8,
        metavar="N",
        help="ranks are multiples of this (default: %(default)s)",
    )
    data = sub.add_argument_group("data", "With texts the ranks and the factors suit what flows through the layers.")
    data.add_argument("--data", metavar="FILE", help=".csv, .tsv, .jsonl or .json with columns, or lines of text")
    data.add_argument("--text-column", nargs="+", metavar="NAME", help="one column, or two for pairs (default: text)")
    data.add_argument(
        "--label-column",
        default="label",
        metavar="NAME",
        help="column of the classes, if there is one (default: %(default)s)",
    )
    data.add_argument(
        "--samples", type=_count, default=1024, metavar="N", help="rows to read at most (default: %(default)s)"
    )
    data.add_argument(
        "--batch-size", type=_count, default=32, metavar="N", help="rows in a batch (default: %(default)s)"
    )
    data.add_argument(
        "--max-length",
        type=_count,
        default=128,
        metavar="N",
        help="longer texts are cut to N tokens (default: %(default)s)",
    )


def _add_force(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--force", action="store_true", help="write into OUT even if it is not empty")


if __name__ == "__main__":
    sys.exit(main())
