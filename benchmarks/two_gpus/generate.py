"""Load the folder that a sharded run has saved, and generate: generate.py --folder OUT. Writes said.json there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_cuttlefish


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    saved = folder / "cuttlefish" / "model"
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    layers = [m for m in model.modules() if isinstance(m, hf_cuttlefish.LowRankLinear)]
    given = tokenizer("I don't know", return_tensors="pt", add_special_tokens=False).to(model.device)
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    said = {"low-rank layers": len(layers), "generated": tokenizer.decode(made[0])}
    (folder / "generated.json").write_text(json.dumps(said), "utf-8")
    print(json.dumps(said))


if __name__ == "__main__":
    main()
