"""Export: the dense form of a model as a GGUF file, written by llama.cpp's own converter and read again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0", "auto")


def check_gguf() -> Any:
    """The package gguf. Raises ImportError, which names the extra, if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF needs gguf: pip install hf-cuttlefish[gguf]") from error
    return gguf


def find_converter(given: str | os.PathLike[str] | None = None) -> Path:
    """llama.cpp's convert_hf_to_gguf.py: as given (the script, or a clone that holds it), of $LLAMA_CPP, or on PATH.

    Raises FileNotFoundError, which says where to get it, if there is none.
    """
    for place in (given, os.environ.get("LLAMA_CPP")):
        if place:
            found = Path(place) / SCRIPT if Path(place).is_dir() else Path(place)
            if found.is_file():
                return found
            raise FileNotFoundError(
                f"{place} holds no {SCRIPT}: give that script of llama.cpp, or a clone of llama.cpp"
            )
    on_path = shutil.which(SCRIPT)
    if on_path is None:
        raise FileNotFoundError(
            f"GGUF files are written by llama.cpp's {SCRIPT}, and it is not on PATH: give --converter FOLDER, a clone of llama.cpp "
            "(it needs gguf, sentencepiece and protobuf: pip install hf-cuttlefish[gguf])"
        )
    return Path(on_path)


def export_gguf(
    folder: str | os.PathLike[str], file: str | os.PathLike[str], converter: Path, kind: str = "f16"
) -> tuple[str, int]:
    """Convert a dense folder (weights, config, tokenizer) and read what was written.

        export_gguf("dense", "model.gguf", find_converter("llama.cpp"))  # ("llama", 291)

    Args:
        folder: what `save_merged` wrote, with a tokenizer. file: written under another name first. kind: one of `TYPES`.

    Returns:
        the architecture that the file names, and its number of tensors.

    Raises:
        ImportError: the package gguf is missing. ValueError: the converter does not know the architecture or the tokenizer (its last
            line is shown), or the file lacks tensors; nothing stays then.
    """
    gguf = check_gguf()
    path = Path(file)
    partial = path.with_name(f".partial-{path.name}")
    command = [sys.executable, converter, folder, "--outfile", partial, "--outtype", kind]
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace")
        if done.returncode or not partial.is_file():
            raise ValueError(f"llama.cpp's converter cannot write this model: {_reason(done.stdout + done.stderr)}")
        try:
            read = gguf.GGUFReader(partial)
            architecture = str(bytes(read.fields["general.architecture"].parts[-1]), "utf-8")
            tensors = len(read.tensors)
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"what llama.cpp's converter wrote is no GGUF file: {error}") from error
        if not tensors:
            raise ValueError("what llama.cpp's converter wrote holds no tensor")
        del read  # it maps the file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return architecture, tensors


def _reason(text: str) -> str:
    """The converter's last line that says something; its error if there is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "Error: " in line or "not supported" in line]
    return (errors or lines or ["it said nothing"])[-1][:400]
