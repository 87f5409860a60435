"""Write what the launches read, so that a machine needs neither hub nor the packages that carry data.

    python -m benchmarks.two_gpus.prepare runs/two-gpus-data

MiniLM in eight bits with its tokenizer, TREC questions as csv, film dialogs as text and as chats: 22 MiB.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import bundled_data

from ..accuracy.packed import unpack
from ..accuracy.prepare import pack_model

DIALOG_CHARACTERS = 1_500_000
CHATS = {"train": 6_000, "validation": 400, "test": 400}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    source = bundled_data.minilm_folder()
    pack_model(AutoModel.from_pretrained(source, dtype=torch.float32), folder / "minilm")
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copy(source / name, folder / "minilm")
    (folder / "trec").mkdir(parents=True, exist_ok=True)
    for split, rows in bundled_data.TEXT_DATASETS["trec"]().items():
        classes = rows.features["label"].names
        with open(folder / "trec" / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([row["text"], classes[row["label"]]] for row in rows)
    dialogs = bundled_data.DIALOG_DATASETS["movie_dialogs"]()
    texts = "\n".join(t.replace("\n", " ") for t in dialogs["train"]["text"])
    (folder / "dialogs.txt").write_text(texts[:DIALOG_CHARACTERS], "utf-8")
    (folder / "chats").mkdir(exist_ok=True)
    for split, rows in CHATS.items():
        lines = [json.dumps(_chat(text)) for text in dialogs[split]["text"][:rows]]
        (folder / "chats" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def _chat(text: str) -> dict[str, list[dict[str, str]]]:
    asked, _, answered = text.partition("\n")
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def ready(folder: Path) -> Path:
    """The data folder with MiniLM's weights unpacked. Raises FileNotFoundError where there are none."""
    if not (folder / "minilm" / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no minilm: run `python -m benchmarks.two_gpus.prepare {folder}`")
    unpack(folder / "minilm")
    return folder


if __name__ == "__main__":
    main()
