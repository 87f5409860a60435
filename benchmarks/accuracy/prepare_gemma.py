"""The part gemma/ of the data folder: two texts in pieces, and Gemma 3 270M with the tokens that occur in them.

Film dialogs, exchange by exchange; and sentences from reviews and editorials, one below the other. A piece begins with <bos>.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import bundled_data

from .packed import pack
from .pieces import cut_to_pieces

SPLITS = ("train", "validation", "test")
MOST = (1920, 160, 400)
"""Pieces of each split."""
LEAD = 4
"""<pad>, <eos>, <bos> and <unk> keep their numbers."""
TEXTS: dict[str, Callable[[], dict[str, list[str]]]] = {
    "dialogs": lambda: _texts(bundled_data.movie_dialogs(), "\n\n"),
    "snippets": lambda: _texts(bundled_data.snippets(), "\n"),
}


def prepare_gemma(folder: Path, gguf: Path) -> None:
    """Write the pieces and the model, its weights in eight bits. gguf: the file that holds model and tokenizer.

    Raises:
        ValueError: more tokens than 16 bits can number.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    pieces = {
        name: {
            split: cut_to_pieces(tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id)[:most]
            for (split, texts), most in zip(read().items(), MOST, strict=True)
        }
        for name, read in TEXTS.items()
    }
    used = [part.flatten() for splits in pieces.values() for part in splits.values()]
    kept, numbers = np.unique(np.concatenate([np.arange(LEAD), *used]), return_inverse=True)
    if len(kept) > 2**16:
        raise ValueError(f"{len(kept)} tokens occur in the texts, and 16 bits can number 65,536")
    folder.mkdir(parents=True, exist_ok=True)
    start = LEAD
    for name, splits in pieces.items():
        arrays = {}
        for split, part in splits.items():
            arrays[f"{split}_pieces"] = numbers[start : start + part.size].reshape(part.shape).astype(np.uint16)
            start += part.size
        np.savez_compressed(folder / f"{name}.npz", classes=np.arange(len(kept)), **arrays)
        print(name, *(f"{split} {len(part)}" for split, part in splits.items()))

    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    write_model(model, kept, folder / "gemma_270m")
    print(f"{len(kept)} of {len(tokenizer)} tokens kept")


def write_model(model: torch.nn.Module, kept: np.ndarray, folder: Path) -> None:
    """Pack a model with tied embeddings, its vocabulary cut to `kept`, for from_pretrained."""
    tensors = dict(model.named_parameters())
    words = next(name for name, p in tensors.items() if p is model.get_input_embeddings().weight)
    tensors[words] = tensors[words][torch.from_numpy(kept)]
    folder.mkdir(parents=True, exist_ok=True)
    pack({name: p.detach().contiguous() for name, p in tensors.items()}, folder)
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # the weights were read as floating-point numbers
    type(model.config)(**{**config, "vocab_size": len(kept), "architectures": [type(model).__name__]}).save_pretrained(
        folder
    )


def _texts(splits: dict, end: str) -> dict[str, list[str]]:
    return {split: [text + end for text in splits[split]["text"]] for split in SPLITS}
