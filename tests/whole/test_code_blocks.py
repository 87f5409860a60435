"""Every block of Python in the README and the pages runs, on a tiny model; commands of the command line parse."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Trainer, TrainingArguments

import hf_cuttlefish
from hf_cuttlefish.cli.parser import make_parser
from tiny_models import BY_NAME
from tiny_trainer import Rows, tiny_bert

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "bert-base-uncased": "needs the hub",
    "from trl": "needs TRL",
    "AutoModelForX": "a sketch of several processes",
    "...,": "arguments of a larger call",
    "reduce-overhead": "CUDA graphs need a GPU",
    "cuda_graphs": "CUDA graphs need a GPU",
    "GraphedStep": "CUDA graphs need a GPU",
}
"""What a block holds that cannot run here -> why; it is compiled all the same."""


def blocks(kind):
    found = []
    for page in PAGES:
        for i, text in enumerate(re.findall(rf"```{kind}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)):
            found.append(pytest.param(text, id=f"{page.relative_to(ROOT).as_posix()}-{i}"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A factorized model in `my-model`, `out/final` and `folder`, and a tokenizer beside it."""
    root = tmp_path_factory.mktemp("blocks")
    model = tiny_bert()
    hf_cuttlefish.factorize(model, hf_cuttlefish.estimate_ranks(model))
    for name in ("my-model", "out/final", "folder"):
        model.save_pretrained(root / name)
    return root


def namespace(folder):
    """What the pages take as given."""
    model = tiny_bert()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = [Rows()[i] for i in range(64)]
    collate = torch.utils.data.default_collate
    loader = torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=collate)
    args = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=12, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    given = {
        name: getattr(hf, name) for name in ("AutoModelForSequenceClassification", "AutoModelForCausalLM", "Trainer")
    }
    return {
        **given, **{name: getattr(hf_cuttlefish, name) for name in hf_cuttlefish.__all__}, "torch": torch,
        "hf_cuttlefish": hf_cuttlefish, "model": model, "optimizer": optimizer, "loader": loader, "epochs": 2, "args": args,
        "accelerator": accelerator, "loss": torch.tensor(1.0), "step": 1,
        "peft": pytest.importorskip("peft"), "cuttlefish": hf_cuttlefish.Cuttlefish(model, optimizer, total_steps=16),
        "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "train": Rows(), "folder": str(folder / "folder"),
        "trainer": Trainer(model, args, train_dataset=Rows(), callbacks=[hf_cuttlefish.CuttlefishCallback()]),
        "batch": next(iter(loader)), "config": BY_NAME["llama"].build().config, "dense_folder": str(folder / "dense"),
        "data": Dataset.from_dict({"text": ["good", "good " * 300], "label": [0, 1]}),
        "tokenizer": hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"),
    }  # fmt: skip


@pytest.mark.parametrize("text", blocks("python"))
def test_a_block_of_python_runs(text, folder, monkeypatch):
    if "\n    if cuttlefish.step():   " in text:  # the inside of a loop, and what follows in another run
        text = text.replace("\n...\n", "\nwhile True:\n")
    code = compile(text, "<block>", "exec")
    why = next((why for mark, why in NOT_RUN.items() if mark in text), None)
    if why:
        pytest.skip(why)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    given = namespace(folder)
    if "peft." in text:  # adapters come after the switch
        given["cuttlefish"].close()
        hf_cuttlefish.factorize(given["model"], hf_cuttlefish.estimate_ranks(given["model"]))
    exec(code, given)


def test_the_recipe_for_gpus_gives_every_row_one_length(folder):
    """The collator that stood there padded, and cut nothing: one long row was an error."""
    (text,) = [p.values[0] for p in blocks("python") if "padding=" in p.values[0]]
    given = namespace(folder)
    exec(text, given)
    assert {len(row) for row in given["data"]["input_ids"]} == {128}


def test_a_loop_with_a_schedule_hands_it_over():
    """Without it the learning rate stays as it is at the switch, which Trainer's runs and our measurements do not."""
    loops = [p.values[0] for p in blocks("python") if "scheduler.step()" in p.values[0]]
    assert loops and all("scheduler=scheduler" in text for text in loops)


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_of_ours_parse(text):
    parser = make_parser()
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("hf-cuttlefish "):
            parser.parse_args(shlex.split(line, comments=True)[1:])
    scripts = re.findall(r"(?:python|pytest) ((?:examples|tests|benchmarks|notebooks)/[\w/.]+)", text)
    assert not [name for name in scripts if not os.path.exists(ROOT / name)]
