"""Does a factorized decoder generate faster, and does it pay as the draft of its own dense model (assisted decoding)?

    python -m benchmarks.generation DENSE FACTORIZED --out benchmarks/results/generation_cpu.json

Greedy, batch 1, on prompts about everyday things. The three ways take turns, prompt by prompt. Seconds are those of the process
on one thread, so that other programs on the machine count little. A draft's tokens are accepted where the dense model would
have said the same, so that the text is the dense model's; the share is (tokens - dense forwards) / draft forwards.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_cuttlefish
from hf_cuttlefish.layers.low_rank import low_rank_layers
from hf_cuttlefish.layers.sizes import count_parameters

from ..files import write_json

PROMPTS = (
    "The best way to make bread at home is",
    "Once upon a time there was a fisherman who",
    "Water boils at a lower temperature on a mountain because",
    "My plan for the weekend is simple:",
)
WAYS = ("dense", "factorized", "assisted")


class Forwards:
    """Counts a model's forwards."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_hook(self._note)

    def _note(self, *args: Any) -> None:
        self.count += 1


def measure(dense: Any, small: Any, tokenizer: Any, tokens: int, drafted: int) -> dict[str, Any]:
    """Seconds, tokens and forwards of each way, summed over the prompts. drafted: tokens that a draft says at a time."""
    seen = {"dense": Forwards(dense), "draft": Forwards(small)}
    found: dict[str, dict[str, float]] = {way: {"seconds": 0.0, "tokens": 0, "dense": 0, "draft": 0} for way in WAYS}
    same = True
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        said = {}
        for way in WAYS:
            options = {"assistant_model": small} if way == "assisted" else {}
            before = {name: forwards.count for name, forwards in seen.items()}
            started = time.process_time()
            model = small if way == "factorized" else dense
            out = model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, **options)
            found[way]["seconds"] += time.process_time() - started
            found[way]["tokens"] += out.shape[1] - inputs["input_ids"].shape[1]
            for name, forwards in seen.items():
                found[way][name] += forwards.count - before[name]
            said[way] = out
        same &= torch.equal(said["dense"], said["assisted"])
    assisted = found["assisted"]
    return {
        "ways": found,
        "drafted_at_a_time": drafted,
        "accepted": (assisted["tokens"] - assisted["dense"]) / max(1, assisted["draft"]),
        "assisted_text_is_dense_text": same,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("factorized", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--drafted", type=int, default=3, help="tokens that the draft says at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    dense, small = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (arguments.dense, arguments.factorized)
    )
    for model in (dense, small):
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    small.generation_config.num_assistant_tokens = arguments.drafted
    small.generation_config.num_assistant_tokens_schedule = "constant"
    small.generation_config.assistant_confidence_threshold = 0
    dense.generate(**tokenizer(PROMPTS[0], return_tensors="pt"), max_new_tokens=2, assistant_model=small)  # warm
    record = {
        "parameters": {"dense": count_parameters(dense), "factorized": count_parameters(small)},
        "layers_factorized": len(low_rank_layers(small)),
        "threads": 1,
        **measure(dense, small, tokenizer, arguments.tokens, arguments.drafted),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_cuttlefish": hf_cuttlefish.__version__,
        },
    }
    write_json(arguments.out, record)
    for way, numbers in record["ways"].items():
        print(f"{way}: {numbers['tokens'] / numbers['seconds']:.2f} tokens a second ({numbers})")
    print(f"accepted {record['accepted']:.0%}; the same text: {record['assisted_text_is_dense_text']}")


if __name__ == "__main__":
    main()
