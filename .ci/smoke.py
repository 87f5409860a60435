"""What a user of the published package does first, on a tiny model: train, look, load with the package and without it."""

import json
import pathlib
import subprocess
import sys

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_cuttlefish

WORDS = "abcdefgh"
CONFIG = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
WITHOUT = """
import sys


class Hidden:  # as if the package were not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_cuttlefish":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Hidden())
import torch, transformers

model = transformers.AutoModelForSequenceClassification.from_pretrained("out", trust_remote_code=True).eval()
with torch.no_grad():
    print(model(input_ids=torch.tensor([[3, 4, 5]])).logits.tolist())
"""


def command(*arguments: str) -> str:
    """What `hf-cuttlefish` prints; it must end well."""
    done = subprocess.run(["hf-cuttlefish", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def main() -> None:
    """Raises AssertionError where anything is not as it should be."""
    assert "site-packages" in hf_cuttlefish.__file__, hf_cuttlefish.__file__
    assert command("--version").strip().endswith(hf_cuttlefish.__version__)
    # A tiny model with a tokenizer, and a table to learn.
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**CONFIG, num_labels=2))
    model.save_pretrained("model")
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained("model")
    rows = [f"{WORDS[i % 8]} {WORDS[(i + 3) % 8]},{'early' if i % 8 < 4 else 'late'}" for i in range(160)]
    pathlib.Path("train.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    # Train, then look at what came out.
    options = ("--epochs", "4", "--batch-size", "8", "--max-length", "8", "--learning-rate", "2e-3", "--cpu", "--json")
    (result,) = json.loads(command("train", "--data", "train.csv", "--model", "model", "--out", "out", *options))
    assert result["switch_step"] and result["parameters"] < result["parameters_before"], result
    assert "<svg" in pathlib.Path("out/report.html").read_text()
    assert json.loads(command("inspect", "out", "--json"))["parameters"] == result["parameters"]
    # The folder with the package and without it, and as a dense checkpoint.
    ids = torch.tensor([[3, 4, 5]])
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
    alone = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert torch.allclose(torch.tensor(json.loads(alone.stdout.splitlines()[-1])), expected, atol=1e-5)
    command("merge", "out", "dense")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("dense").eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    print(
        f"hf-cuttlefish {hf_cuttlefish.__version__} works: {result['parameters']:,} of {result['parameters_before']:,} parameters"
    )


if __name__ == "__main__":
    main()
