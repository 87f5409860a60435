"""Cut Gemma 3 270M after training, as a run for `benchmarks.eight_bits`: dense/model, cuttlefish/model, and texts to score.

    python -m benchmarks.eight_bits.prepare runs/benchmark-data/gemma --out runs/gemma --ratio 0.9

The folder is what `benchmarks.accuracy.prepare --gemma FILE` writes: the model with the tokens that occur, and two texts in
pieces. Statistics come from training pieces; nothing is trained afterwards, so that a CPU can do it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

from hf_cuttlefish import CuttlefishConfig, estimate_ranks, factorize
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.measure.gathering import gather_statistics

from ..accuracy.packed import unpack
from .scores import PIECES


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with gemma_270m and TEXT.npz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", choices=("dialogs", "snippets"), default="dialogs")
    parser.add_argument("--ratio", type=float, default=0.9, help="share of the blocks' parameters to keep")
    parser.add_argument("--pieces", type=int, default=32, help="training pieces of 256 tokens for statistics")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prepare(options.data, options.out, options.text, options.ratio, options.pieces)


def prepare(data: Path, out: Path, text: str, ratio: float, pieces: int) -> None:
    """Write the run. Raises FileNotFoundError where the data folder is not what it should be."""
    with np.load(data / f"{text}.npz") as stored:
        train, test = stored["train_pieces"][:pieces], stored["test_pieces"]
    unpack(data / "gemma_270m")
    model = transformers.AutoModelForCausalLM.from_pretrained(data / "gemma_270m", dtype=torch.float32)
    model.save_pretrained(out / "dense" / "model")
    np.savez_compressed(out / PIECES, pieces=test)
    rows = torch.from_numpy(train.astype(np.int64)).split(4)
    batches = [{"input_ids": some, "labels": some} for some in rows]
    config = CuttlefishConfig(target_ratio=ratio)
    statistics = gather_statistics(model, batches, find_targets(model, config))
    print(factorize(model, estimate_ranks(model, config, statistics=statistics), statistics=statistics))
    model.save_pretrained(out / "cuttlefish" / "model")


if __name__ == "__main__":
    main()
