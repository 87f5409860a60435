"""The command's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .. import __version__
from ..config import RANK_RULES


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


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


_share.__name__, _count.__name__ = "share (above 0, at most 1)", "whole number of at least 1"  # argparse shows these
_above_zero.__name__ = "number above 0"


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="hf-cuttlefish",
        description="Cuttlefish (low-rank training without tuning) for models that lie in a folder or on the hub.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 reader of the output gone, 143 terminated.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(command=name.replace("-", "_"))
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    _add_inspect(
        command("inspect", "show each layer's stable rank, its rank under every rule, and what that would save")
    )

    _add_train(command("train", "fine-tune a model on a file or a folder of images, and make it smaller on the way"))

    sub = command("factorize", "make a trained model low rank, without training")
    _add_model(sub)
    sub.add_argument("out", metavar="OUT", help="folder to write")
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--ratio", type=_share, metavar="R", help="share of the target layers' parameters to keep")
    size.add_argument("--plan", metavar="FILE", help='ranks: what inspect --save-plan wrote, or {"module name": rank}')
    size.add_argument("--rule", choices=RANK_RULES, help="ranks by a rule of CuttlefishConfig.rank_rule")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_force(sub)

    sub = command("merge", "turn a factorized model into a dense one, which loads without this package")
    sub.add_argument("model", metavar="MODEL", help="folder or hub name of a factorized model")
    sub.add_argument("out", metavar="OUT", help="folder to write")
    _add_force(sub)

    _add_serving(command)

    sub = command("plot", "draw a run from the state that the Trainer saved in its checkpoints")
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

    sub = command("env", "show versions and devices, for bug reports")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_inspect(sub: argparse.ArgumentParser) -> None:
    _add_model(sub)
    sub.add_argument(
        "--ratio", type=_share, metavar="R", help="size for rule 'loss': share of these layers' parameters"
    )
    sub.add_argument(
        "--rule", choices=RANK_RULES, help="rule of the size columns, the plots and the plan (default: loss)"
    )
    sub.add_argument(
        "--ratios",
        type=_share,
        nargs="+",
        metavar="R",
        help="compare these sizes instead: what each saves and, with --data, what it costs on rows held out",
    )
    sub.add_argument("--json", action="store_true", help="print JSON: all numbers of all rules, or of all sizes")
    sub.add_argument(
        "--plot", metavar="FILE", help="draw the ranks as a map of layers by projections; with --ratios the sizes"
    )
    sub.add_argument(
        "--html", metavar="FILE", help="with --ratios: write a page with the table, the curves and the ranks"
    )
    sub.add_argument("--plot-spectra", metavar="FILE", help="draw the spectra, with the ranks marked")
    sub.add_argument("--save-plan", metavar="FILE", help="write the ranks as JSON, for factorize --plan")


def _add_embeddings(group: argparse._ActionsContainer) -> None:
    group.add_argument("--embeddings", action="store_true", help="the table of tokens and its output layer, too")


def _add_model(sub: argparse.ArgumentParser) -> None:
    """The model, its target layers, and the data for statistics."""
    sub.add_argument("model", metavar="MODEL", help="folder or hub name")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    layers = sub.add_argument_group("layers")
    layers.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="endings of module names (default: all layers of the blocks that can be factorized)",
    )
    layers.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="endings of module names that stay dense")
    _add_embeddings(layers)
    layers.add_argument(
        "--rank-multiple",
        type=_count,
        metavar="N",
        help="ranks are multiples of this (default: 32 in a wide decoder, else 8)",
    )
    data = sub.add_argument_group("data", "With texts the ranks and the factors suit what flows through the layers.")
    data.add_argument(
        "--data", metavar="FILE", help=".csv, .tsv, .jsonl or .json with columns, lines of text, or a folder of images"
    )
    _add_columns(data, most=1024)


def _add_columns(data: argparse._ArgumentGroup, most: int | None) -> None:
    """How rows are read, and how many. most: rows by default."""
    data.add_argument("--text-column", nargs="+", metavar="NAME", help="one column, or two for pairs (default: text)")
    data.add_argument(
        "--label-column",
        default="label",
        metavar="NAME",
        help="column of the classes, if there is one (default: %(default)s)",
    )
    data.add_argument(
        "--samples",
        type=_count,
        default=most,
        metavar="N",
        help="rows to read at most (default: " + ("all)" if most is None else "%(default)s)"),
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


def _add_train(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", required=True, metavar="MODEL", help="folder or hub name of a pretrained model")
    sub.add_argument("--out", default="cuttlefish-model", metavar="OUT", help="folder to write (default: %(default)s)")
    data = sub.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help=".csv, .tsv, .jsonl or .json with a text and a label column, a folder with a folder of images for each class; for a "
        "language model lines of text, or .jsonl with messages",
    )
    data.add_argument("--eval-data", metavar="FILE", help="rows to evaluate on (default: a fifth of the data)")
    _add_columns(data, most=None)
    run = sub.add_argument_group("training")
    run.add_argument("--epochs", type=_above_zero, default=3.0, metavar="N", help="default: %(default)g")
    run.add_argument(
        "--learning-rate", type=_above_zero, metavar="R", help="default: by the model's size, 1e-4 to 2e-5"
    )
    run.add_argument("--seed", type=int, default=42, metavar="N", help="default: %(default)s")
    run.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    run.add_argument("--compare", action="store_true", help="train dense first, from the same seed, and compare")
    run.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in OUT")
    size = sub.add_mutually_exclusive_group()
    size.add_argument(
        "--ratio", type=_share, metavar="R", help="share of the target layers' parameters to keep (default: measured)"
    )
    size.add_argument(
        "--max-loss-increase", type=_above_zero, metavar="R", help="as small as the loss rises by at most this share"
    )
    _add_embeddings(sub)
    sub.add_argument("--json", action="store_true", help="print the results as JSON")
    _add_force(sub)


def _add_serving(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """What comes after training: export and bench."""
    sub = command("export", "write a model in the form that a server takes: dense, ONNX or GGUF")
    sub.add_argument("model", metavar="MODEL", help="folder or hub name")
    sub.add_argument("out", metavar="OUT", help="folder to write; with gguf a file that ends in .gguf")
    sub.add_argument("--format", choices=("dense", "onnx", "gguf"), required=True, help="what to write")
    sub.add_argument("--int8", action="store_true", help="onnx: matrices in eight bits")
    sub.add_argument("--outtype", choices=("f32", "f16", "bf16", "q8_0", "auto"), default="f16", help="gguf: numbers")
    sub.add_argument("--converter", metavar="PATH", help="gguf: a clone of llama.cpp, or its convert_hf_to_gguf.py")
    _add_force(sub)

    sub = command("bench", "time a model on this machine, beside its dense form or another model")
    sub.add_argument("model", metavar="MODEL", help="folder or hub name")
    sub.add_argument("--against", metavar="DENSE", help="folder or hub name (default: MODEL's own dense form)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    sub.add_argument(
        "--batch", type=_count, nargs="+", default=[1, 8], metavar="N", help="examples at once (default: 1 8)"
    )
    sub.add_argument("--length", type=_count, metavar="N", help="tokens of an example (default: 128)")
    sub.add_argument(
        "--backend",
        type=lambda text: text.split(","),
        default=["torch"],
        metavar="NAMES",
        help="some of torch,onnx,compile (default: torch)",
    )
    sub.add_argument("--rounds", type=_count, default=7, metavar="N", help="turns of each (default: %(default)s)")
    sub.add_argument("--threads", type=_count, metavar="N", help="threads on a CPU (default: all cores)")
    sub.add_argument("--json", action="store_true", help="print JSON")


def _add_force(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--force", action="store_true", help="write into OUT even if it is not empty")
