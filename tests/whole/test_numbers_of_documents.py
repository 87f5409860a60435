"""The numbers that the README shows are those of the records."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.accuracy.explored_tables import explored_table
from benchmarks.accuracy.language_tables import chats_table
from benchmarks.accuracy.rates_page import rates_page
from benchmarks.accuracy.rates_tables import SIXTH, THIRD, mean_of
from benchmarks.eight_bits.tables import eight_bits_table
from benchmarks.end_to_end.phases import per_step
from benchmarks.two_gpus.tables import launches_table, scaling_table
from hf_cuttlefish.decide.tables import short_count

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text("utf-8")
LOSSES = {"before": 0.1, "after": 0.2}


def cells(beginning: str) -> list[str]:
    """The cells of the README's table row that begins so."""
    row = next(line for line in README.splitlines() if line.startswith(f"| {beginning}"))
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


def test_the_demo_is_the_recorded_one():
    dense, ours = json.loads((RESULTS / "demo_cpu.json").read_text("utf-8"))["runs"]
    assert cells("MiniLM on TREC") == [f"{r['test_accuracy']:.1%}" for r in (dense, ours)]
    share = ours["encoder_parameters"] / dense["encoder_parameters"]
    blocks = [f"{r['encoder_parameters'] / 1e6:.1f}M" for r in (dense, ours)]
    assert cells("parameters of its blocks") == [blocks[0], f"{blocks[1]} ({share:.0%})"]
    share = ours["saved_bytes"] / dense["saved_bytes"]
    assert cells("saved folder") == [
        f"{dense['saved_bytes'] / 1e6:.1f} MB",
        f"{ours['saved_bytes'] / 1e6:.1f} MB ({share:.0%})",
    ]
    assert cells("training on 2 CPU cores") == [f"{r['train_seconds']:.0f} s" for r in (dense, ours)]
    for number in (
        f"{ours['test_accuracy']:.2%}",
        f"{ours['total_parameters']:,}",
        f"{ours['switch_step']} of {ours['train_steps']}",
    ):
        assert number in README


def test_the_line_of_the_log_is_that_of_the_demo():
    """It stood there from a run of an older default."""
    dense, ours = json.loads((RESULTS / "demo_cpu.json").read_text("utf-8"))["runs"]
    counts = {}
    for part in ("total", "encoder"):
        before, after = (r[f"{part}_parameters"] for r in (dense, ours))
        counts[part] = f"{short_count(before)} -> {short_count(after)}", f"({after / before:.0%})"
    line = (
        f"Cuttlefish factorized {len(ours['ranks'])} of 36 target layers at step {ours['switch_step']}: {counts['total'][0]} "
        f"parameters {counts['total'][1]}, encoder {' '.join(counts['encoder'])} (stable ranks have converged)"
    )
    assert line in (ROOT / "docs" / "getting-started.md").read_text("utf-8")


def lines(path: str) -> list[dict]:
    """The records of a file that has one a line."""
    return [json.loads(line) for line in (RESULTS / path).read_text("utf-8").splitlines()]


def test_the_convolutional_network_is_the_recorded_one():
    runs = [r for r in lines("convolutions_h100.jsonl") if (r["task"], r["network"]) == ("fashion", "vgg")]
    means = []
    for method in ("dense", "ours"):
        found = [r for r in runs if r["method"] == method]
        assert len(found) == 3
        means.append(f"{statistics.mean(r['accuracy'] for r in found):.1f}%")
    assert cells("VGG on Fashion-MNIST from random weights, 30% kept") == means
    kept = [r["parameters"] / r["parameters_before"] for r in runs if r["method"] == "ours"]
    assert f"{statistics.mean(kept):.0%}" == "30%"


def test_the_language_model_is_the_recorded_one():
    runs = [r for r in lines("accuracy/language_h100.jsonl") if "dialogs" in r["dataset"]]
    runs = [r for r in runs if r["task"]["learning_rate"] == 5e-5]
    dense = [r for r in runs if r["method"] == "dense"]
    ours = [r for r in runs if r["method"] == "cuttlefish" and round(r["kept"], 1) == 0.8]
    perplexities = [f"{math.exp(r['test_split']['loss']):.1f}" for r in (*dense, *ours)]
    assert cells("Gemma 3 270M on film dialogs, 80% kept") == perplexities


def test_the_steps_on_a_cpu_are_the_recorded_ones():
    rows = [
        r for r in json.loads((RESULTS / "speed_cpu.json").read_text("utf-8"))["steps"] if r["model"] == "bert-base"
    ]

    def relative(mode: str, batch: int) -> str:
        found = {
            r["ratio"]: r["ms"]
            for r in rows
            if r["mode"] == mode and r["batch"] == batch and r["variant"] in ("dense", "pairs")
        }
        return f"{found[0.25] / found[None]:.2f}"

    # A quarter of the full rank is more than a quarter of the weights, which is what the README calls kept.
    size = {r["variant"]: r["parameters"] for r in rows if r["mode"] == "eager" and r["ratio"] in (None, 0.25)}
    kept = 1 - (size["dense"] - size["pairs"]) / (12 * 12 * 768**2)
    assert cells(f"BERT-base, {kept:.0%} kept, 2 CPU threads")[1] == relative("eager", 16)
    assert {relative("infer", batch) for batch in (1, 64)} == {cells("the same model, time of inference")[1]}


def test_the_steps_on_a_gpu_are_the_recorded_ones():
    runs = json.loads((RESULTS / "end_to_end_default_h100.json").read_text("utf-8"))
    seconds = {
        (r["mode"], r["method"]): r["seconds"] for r in runs if (r["case"], r["call"]) == ("bert-base", "a new machine")
    }
    dense, ours, graphed = (
        seconds[way] for way in (("eager", "dense"), ("step-graph", "cuttlefish"), ("step-graph", "dense"))
    )
    page = " ".join((ROOT / "docs" / "fast-on-a-gpu.md").read_text("utf-8").split())
    assert (
        f"take {dense:.1f} s dense as usual, {ours:.1f} s with Cuttlefish and this setting, {graphed:.1f} s dense"
        in page
    )


def test_runs_without_a_setting_are_the_recorded_ones():
    runs = json.loads((RESULTS / "end_to_end_default_h100.json").read_text("utf-8"))
    text = " ".join(README.split())

    def seconds(call: str, method: str, case: str = "bert-base", eager: bool = True) -> list[float]:
        found = [r for r in runs if (r["case"], r["call"], r["method"]) == (case, call, method)]
        return sorted(r["seconds"] for r in found if r["mode"].startswith("eager") is eager)

    warm, cold = "after a warm-up", "a new machine"
    (ours,), dense = seconds(warm, "cuttlefish"), seconds(warm, "dense")
    first = seconds(cold, "dense")[0], seconds(cold, "cuttlefish")[0]
    shown = [f"{dense[0]:.1f} s ({first[0]:.1f} s)", f"{ours:.1f} s ({first[1]:.1f} s)"]
    assert cells("BERT-base, a quarter kept, H100") == shown
    ((graphed,), (graphed_dense,)) = (seconds(cold, method, eager=False) for method in ("cuttlefish", "dense"))
    assert f"then ours takes {graphed:.1f} s, and dense would take {graphed_dense:.1f} s" in text
    less = f"{1 - ours / dense[0]:.0%}"[:-1], f"{1 - ours / dense[-1]:.0%}"
    assert f"300 steps took {less[0]} to {less[1]} less than dense on a warm machine." in text
    (alone,) = seconds("another new machine, dense not run", "cuttlefish")
    assert (
        f"they took {first[1]:.1f} s after a dense run of {first[0]:.1f} s, and {alone:.1f} s as the first run" in text
    )
    page = (ROOT / "CHANGELOG.md").read_text("utf-8")
    (questions,), (other,) = (seconds(warm, method, "bert-base-questions") for method in ("cuttlefish", "dense"))
    assert f"{ours:.1f} s, dense {dense[0]:.1f} s (" in page and f"{questions:.1f} and {other:.1f} s" in page


def test_steps_that_are_one_graph_are_the_recorded_ones():
    runs = json.loads((RESULTS / "end_to_end_large_step_graph_h100.json").read_text("utf-8"))
    of = {(r["case"], r["method"]): r for r in runs if r["mode"] == "blocks-step-graph"}
    shares = {
        case: f"{per_step(of[case, 'cuttlefish'], 'after') / per_step(of[case, 'dense'], 'before'):.2f}"
        for case in ("bert-base", "bert-large", "vit-large")
    }
    device = of["bert-base", "cuttlefish"]["gpu_ms"] / of["bert-base", "dense"]["gpu_ms"]
    speed = (ROOT / "docs" / "speed.md").read_text("utf-8")
    for name, case in (("ViT-large shapes, 64 images", "vit-large"), ("BERT-large shapes, 64 x 128", "bert-large")):
        assert f"a CUDA graph a step, `Trainer` | {name} | {shares[case]} |" in speed
    assert f"BERT-base, 32 x 128 | {shares['bert-base']}; the device alone {device:.2f} |" in speed
    text = " ".join(README.split())
    assert f"its step takes {shares['bert-base']} of a dense one" in text
    assert f"BERT-large's {shares['bert-large']}." in text


def test_the_step_of_a_llama_is_the_recorded_one():
    runs = json.loads((RESULTS / "end_to_end_large_h100.json").read_text("utf-8"))
    of = {r["method"]: r for r in runs if (r["case"], r["mode"]) == ("llama-1b", "blocks-graphs")}
    found = [f"{ms:.1f} ms" for ms in (of["dense"]["ms_before"], of["cuttlefish"]["ms_after"])]
    assert cells("Llama-1B shapes, a quarter kept, H100") == found


def test_the_steps_as_graphs_are_the_recorded_ones():
    """Shares of a dense step that stand in the prose of the README, docs/speed.md and docs/fast-on-a-gpu.md."""
    runs = json.loads((RESULTS / "end_to_end_large_h100.json").read_text("utf-8"))
    base = {(r["mode"], r["method"]): r for r in runs if r["case"] == "bert-base" and not r["loader_workers"]}
    dense, ours = base["graphs", "dense"], base["graphs", "cuttlefish"]
    times = 1000 * per_step(dense, "before"), 1000 * per_step(ours, "after")
    share, device = times[1] / times[0], ours["gpu_ms"] / dense["gpu_ms"]
    pages = {name: (ROOT / "docs" / name).read_text("utf-8") for name in ("speed.md", "fast-on-a-gpu.md")}
    assert f"| BERT-base, 32 x 128 | mean {share:.2f}; the device alone {device:.2f} |" in pages["speed.md"]
    eager = base["eager", "dense"]["ms_before"] / times[0]
    told = f"a dense step is {eager:.1f} times as fast as eager; after the switch it takes {share:.1f} times that"
    assert told in " ".join(pages["fast-on-a-gpu.md"].split())
    steps = json.loads((RESULTS / "steps_ratios_h100.json").read_text("utf-8"))["records"]
    of = {(r["case"], r["variant"]): f"{r['of_dense']:.2f}" for r in steps if r["mode"] == "graphs"}
    large, llama = (
        [of[case, way] for way in ("pairs 0.5", "pairs 0.25", "pairs 0.125", "lora")]
        for case in ("bert-large", "llama-1b")
    )
    said = (
        f"{large[0]} (half of the full rank), {large[1]} (a quarter) and {large[2]} (an eighth) of dense, 4 blocks of"
    )
    assert (
        f"{said}\nLlama-1B {llama[0]}, {llama[1]} and {llama[2]}; LoRA {large[3]} and {llama[3]}" in pages["speed.md"]
    )


def test_what_a_model_of_base_size_loses_is_recorded():
    records = lines("accuracy/rates_h100.jsonl")
    sixth, third = (-mean_of(records, "MPNet-base, ordinary", way) for way in (SIXTH, THIRD))
    assert f"MPNet-base loses {sixth:.1f} points there, {third:.1f} at a third" in README


def test_the_page_of_rates_is_that_of_the_records():
    page = (ROOT / "docs" / "results-rates.md").read_text("utf-8")
    records, tenth = lines("accuracy/rates_h100.jsonl"), lines("accuracy/tenth_cpu.jsonl")
    assert page == rates_page(records, tenth), "run python -m benchmarks.write_docs"


def test_what_was_tried_is_shown_on_the_split_that_the_table_names():
    """The test split stood under a heading that said validation."""

    def records(validation, test):
        changed = {"validation": {"accuracy": validation}, "test_split": test and {"accuracy": test}}
        plain = {"validation": {"accuracy": 0.5}, "test_split": test and {"accuracy": 0.5}}
        loss = {name: {split: {"loss": value} for split in ("train", "validation")} for name, value in LOSSES.items()}
        same = {"dataset": "trec", "test": bool(test), "budget": 0.18, "method": "explore", "around_switch": loss}
        return [same | {"seed": s, "options": o} | e for s in (0, 1) for o, e in (({}, plain), ({"drop": 0}, changed))]

    seen = explored_table(records(0.6, 0.3)).splitlines()
    assert "| points, validation | points, test |" in seen[0] and "| +10.00 ± 0.00 | -20.00 ± 0.00 |" in seen[2]
    unseen = explored_table(records(0.6, None)).splitlines()
    assert "test" not in unseen[0] and "| +10.00 ± 0.00 |" in unseen[2]


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize(
    ("page", "record", "table"),
    [
        ("serving", "eight_bits", eight_bits_table),
        ("language-models", "sft_cpu", chats_table),
        ("engines/measured", "two_gpus_examples", launches_table),
        ("engines/measured", "two_gpus_examples", scaling_table),
    ],
)
def test_tables_are_those_of_the_records(page, record, table):
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    assert table(json.loads((RESULTS / f"{record}.json").read_text("utf-8"))) in text, (
        "run python -m benchmarks.write_docs"
    )
