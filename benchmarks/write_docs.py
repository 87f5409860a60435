"""Write docs/results-records.md, docs/results-rates.md, plots and the tables of the README, docs/results.md, docs/speed-tables.md, docs/fast-on-a-gpu.md and docs/language-models.md from benchmarks/results: `python -m benchmarks.write_docs`.

The tables are made from the JSON records alone, so they can't drift from them.
"""

from __future__ import annotations

import json
from pathlib import Path

from hf_cuttlefish.decide.rules import DEFAULT_RATIO

from .accuracy.embeddings_tables import vocabulary_table
from .accuracy.even_tables import even_table
from .accuracy.explored_tables import (
    accuracies_by_scale,
    after_switch_table,
    explored_table,
    floor_of_small,
    latest_switch,
    range_of_changes,
)
from .accuracy.language_tables import chats_table, default_table, perplexity_table, repair_table
from .accuracy.plots import plot_calibration, plot_sizes, plot_switch
from .accuracy.rates_page import rates_page
from .accuracy.records import Record, base_of, measured, score, show
from .accuracy.tables import ablation_table, calibration_ratios, conditions, summary_table, switch_table
from .convolutions.tables import gpu_table, in_turn_table, norms_table
from .convolutions.tables import table as convolutions_table
from .eight_bits.tables import eight_bits_table
from .end_to_end.tables import (
    computed_table,
    gain_table,
    host_parts_table,
    large_table,
    runs_table,
    shares_table,
    trial_table,
    unasked_table,
)
from .experts.speed import table as steps_of_experts
from .speed.tables import tables as speed_tables
from .steps.host import host_table
from .steps.tables import ratios_table, steps_table
from .two_gpus.tables import launches_table, llama_table, scaling_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
SPEED = {"speed": "speed_cpu.json", "GPU": "speed_h100.json"}
"""What stands in docs/speed-tables.md between which marks, and the records it is made of."""
IMAGES = ROOT / "docs" / "images"
HEAD = """# Results, the records

`python -m benchmarks.write_docs` writes this page from `benchmarks/results/accuracy`.

> These runs have the former defaults. Size 0.40, the learning rate unchanged (times 1.5 below a quarter), statistics from 4% of the
> run, gradient damping 0.03. Today's defaults: [results by model and rate](results-rates.md).
"""

SETS = {
    "trec": "TREC",
    "movie_snippets": "Movie snippets",
    "reuters_r8": "Reuters R8",
    "fashion_mnist_vit": "Fashion-MNIST, ViT-S",
}
"""Data sets of the main table and their headings."""

SCRATCH = """No pretrained weights (`--suite scratch`). The controls switch where their recipes do.

| | model | run | test rows | on |
|---|---|---|---|---|
| digits | ViT of 4 x 96, 8 x 8 pixels | 40 epochs, 800 steps | 360 (one is 0.28 points) | CPU, one thread, fp32 |
| Fashion-MNIST | ViT of 6 x 192, 12,000 rows | 12 epochs, 564 steps of 256 | 10,000 | H100, bf16 |"""

CALIBRATION = """Measured over predicted increase of the loss: median, validation split, by the time of the switch. The prediction
ranks cuts of one model; its scale is off. Every run of `choose_h100` is in the
[plot](how-it-works.md#ranks)."""

EXPLORED = """Against the same runs without the change; three text sets and the ViT, records `explore_h100`, `fading_h100`, `features_h100`, `recovery_h100`, `floor_cpu`, `cap_cpu` and `nuclear_cpu`.
The first table is of the validation split alone; the others show the test split beside it. Code that was not kept is not in the repository.

| idea | outcome |
|---|---|
| divide the squares of an example's gradients by its gradient's norm | kept: the loss rises less at the switch |
| learning rate after the switch x 1.5 | kept below a quarter, where the alignment is not known |
| learning rate x 2 | not kept: no better than 1.5 |
| distill from the run's own dense model | not built: worse on TREC and Reuters R8, a third more time a step |
| match the hidden states of the run's own dense model (MPNet-base, below) | not built: gains on one text of two, none at 1/5.6 |
| learn from a finished dense model (MPNet-base, below) | not built: on the test split a gain on TREC and none on movie snippets; on validation the seeds disagree |
| no dropout after the switch; factors whose components Adam moves alike (MPNet-base and MiniLM, below) | not built: no gain that both splits show |
| two cuts, at 20% and 35% of the run | not built: no gain |
| fade out what the cut took, over 30% of the remaining steps | taken out: no gain |
| scale the rate of schedule-free optimizers too (MiniLM on TREC, 150 steps, one seed) | not kept: accuracy 71.8; 86.1 with the rate unchanged, dense 84.5 |
| wait for the stable ranks until 80% of the run (digits, 1/5.6, 3 seeds) | not kept: accuracy {later} at 40% |
| learning rate x 1.5 below a quarter where the alignment is known and low (MiniLM on TREC at 3e-4 and 6e-4, 1/5.6, 3 seeds, CPU, test split) | no longer: accuracy {floor} with the rate unchanged; validation alike |
| more than 3 times the rate where the alignment asks for it (MiniLM on TREC at 3e-5, 1/5.6, 3 seeds, CPU, validation and test) | not changed, for one model and a rate at which dense is not trained out: {cap} |
| nuclear-norm decay of the targets up to the switch, 0.3, 1 and 3 (digits from random weights, 1/5.6 and 1/8, 3 seeds) | not built: {nuclear} points on the test split |"""

FADING = "Fading, with today's defaults and MPNet-base among the models:"

FEATURES = """MPNet-base on TREC and movie snippets at 5e-5: after the switch each layer's output is also pulled to that of the dense model of just
before it (relative squared error, its weight falling to zero). Not built: a gain on movie snippets alone, none on TREC, for a forward of the dense model more in each step:"""
RECOVERY = """Cut to 1/5.6, MPNet-base fits its training rows less well than dense (TREC at 5e-5: loss 0.23 against 0.10). Three more ways to recover were
tried: MPNet-base on TREC and movie snippets at 5e-5, MiniLM on both at 1e-4. Two of them need a word:

- **One norm.** Adam moves each number by about the rate, so components of small norm change the product less. Scaled to one norm on one side they do not.
- **A finished dense model** teaches after the switch. These runs drew other dropout masks before it.

The runs without a change are older; some had a rate up to 1.5 times as high:"""

LOW_RANK_PHASE = """Against the same run with an unchanged low-rank phase, validation split. On the CPU all settings of a seed start from one snapshot
(`python -m benchmarks.accuracy.after_switch`). A rate times 1.5 gains at 1/5.6 on texts, and nothing at 1/3, on images or from
scratch. Frobenius decay, in place of weight decay, changes nothing, so it is off by default (`frobenius_decay`)."""

LIMITS = """## What these numbers are not

- Pretrained MiniLM (6 x 384), its vocabulary cut to the tokens that occur, and ViT-S/14 only.
- Two seeds for spectral init and plain SVD at 1/2 on the ViT. No control ran at 1/10.
- We switched at 30% of the run and took 1.5 times the rate below a quarter. The controls switch where their recipes do, at the dense rate.
- Our rows and the ViT's ran after the text controls, under another sharing of the GPU (CUDA MPS).
- The ViT (12,000 rows of 56 pixels, 3 epochs, rate 5e-5) is not trained out. LoRA, at five times the rate, ends 2.2 points above dense.
- The time of the switch, the ablation and the calibration were measured before examples were weighted.
"""


RATIOS = """At other ranks, as shares of the full rank; the step as a share of the dense one beside it. Ranks of 0.5, 0.4, 0.25 and 0.125 keep 75, 60, 38
and 19% of the weights of a BERT's layers, 68, 54, 34 and 17% of the Llama's (`python -m benchmarks.steps --compile-first 8 --modes graphs
--variants dense "pairs 0.5" ... lora`, records `steps_ratios_h100`). "A graph a step" needs no compilation; there LoRA's kernels, unfused, cost it the gain. These are
other runs than those above, and BERT-base's times scatter with the host (1.42 there, 1.22 here):"""
LARGE_RUNS = """Models through `Trainer` with all their blocks, `target_ratio=0.25`, bf16, fused AdamW, no checkpointing, the Llama with a vocabulary of
8,192. "Compiling" is what the first 8 steps, and the first 8 after the switch, took beyond ordinary ones. "(cached)": the run found
there what the one beside it had compiled. "Trainer waits": without the two settings above (`python -m benchmarks.end_to_end`, records `end_to_end_large_*`).
BERT-large compiled as one model, without waiting, was timed by the host's clock, which ran ahead: its time before the switch is left out, and its
other medians scatter with the host. Its means, in the next table, do not:"""
GAIN = """The table shows what pairs add to that. Dense and Cuttlefish run in the same mode: `target_ratio=0.25`, one H100, bf16, through `Trainer` ([all
numbers](#a-whole-run)). "A graph a step" is `cuda_graphs=True`. "Ends first": a run of so many steps or more ends before the dense run. The last column is
the dense run's time / ours. The last two columns are computed from runs of 300 to 1,000 steps, everything counted. "Blocks as CUDA graphs" is [the compiler's way](#or-let-the-compiler-make-the-graphs):"""
SHARES = """Milliseconds a step: dense, Cuttlefish after the switch, and their ratio. "Without Trainer" is the same forward, backward, clipping and
optimizer in a bare loop. "The device alone" is what would be left if the host took no time:"""
LONGER_RUNS = """**Computed from these parts, not measured**: dense seconds / Cuttlefish's in longer runs (above 1: Cuttlefish ends first). Fixed
seconds and what measuring took, plus steps of each kind times what one took; the switch comes at the same share of the run. A row "eager / ..." counts for
Cuttlefish what graphs and compilation spare dense training as well; rows of one mode show what the pairs add. Eager dense runs are of the same call only
beside "a graph a step":"""
HOST_PARTS = """Milliseconds of the host. The device is waited for before each step, so that nothing within a step waits for it; in a run the
host is quicker where it never stops. "Trainer" is `model.train()` and the count of parameters for `total_flos`. With a graph a step "forward" is all that it
holds (records `end_to_end_large_*`, `end_to_end_host_h100`):"""
DEFAULT_RUNS = """BERT-base through `Trainer` with no setting but the size, eager, bf16, one H100. Each row is one call; its dense runs stand before and after ours.
"A new machine" reads kernels from its disk, each run those that none before it needed: ours took 4 s more than "after a warm-up" where dense ran
first, 9 s where ours did (records `end_to_end_default_h100`):"""
TRIALS = """What `objective="speed"` found on a GPU (record `end_to_end_large_speed_h100`):"""


def load(name: str) -> list[Record]:
    """The records of one file."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def with_default(table: list[Record]) -> list[Record]:
    """The rows that have a size, and ours with no setting under its own."""
    free = [{**r, "budget": DEFAULT_RATIO} for r in table if r["method"] == "cuttlefish" and not r["budget"]]
    return [r for r in table if r["budget"]] + free


def fill(path: Path, what: str, text: str) -> None:
    """Put text between the two marks of a document."""
    mark, end = f"<!-- {what}: written by benchmarks/write_docs.py -->\n", f"<!-- end of {what} -->"
    before, found, rest = path.read_text("utf-8").partition(mark)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{path.name} has lost the marks between which its {what} stand")
    path.write_text(f"{before}{mark}{text.rstrip()}\n{end}{after}", encoding="utf-8")


def write_gpu_page() -> None:
    """The tables of docs/fast-on-a-gpu.md; of what has no record there is nothing."""
    page, results = ROOT / "docs" / "fast-on-a-gpu.md", ROOT / "benchmarks" / "results"
    steps = json.loads((results / "steps_h100.json").read_text("utf-8"))["records"]
    for what, modes in (("graphs", ["graphs"]), ("eager", ["eager"]), ("inference", ["infer", "infer-graphs"])):
        fill(page, what, steps_table(steps, modes))
    fill(page, "host", host_table(json.loads((results / "host_cpu.json").read_text("utf-8"))["records"]))
    fill(page, "runs", runs_table(json.loads((results / "end_to_end_h100.json").read_text("utf-8"))))
    other = results / "steps_ratios_h100.json"
    ratios = json.loads(other.read_text("utf-8"))["records"] if other.exists() else []
    large = [r for path in sorted(results.glob("end_to_end_large_*.json")) for r in json.loads(path.read_text("utf-8"))]
    host = json.loads((results / "end_to_end_host_h100.json").read_text("utf-8"))
    for what, intro, text in (
        (
            "default runs",
            DEFAULT_RUNS,
            unasked_table(json.loads((results / "end_to_end_default_h100.json").read_text("utf-8"))),
        ),
        ("ratios", RATIOS, ratios_table(ratios)),
        ("gain", GAIN, gain_table(large)),
        ("large runs", LARGE_RUNS, large_table(large)),
        ("shares", SHARES, shares_table(large)),
        ("host's parts", HOST_PARTS, host_parts_table([*large, *host])),
        ("longer runs", LONGER_RUNS, computed_table(large)),
        ("trials", TRIALS, trial_table(large)),
    ):
        fill(page, what, f"{intro}\n\n{text}" if text else "")


def main() -> None:
    """Write the pages of records, their plots, and the tables of the README, docs/results.md, docs/speed-tables.md and docs/fast-on-a-gpu.md."""
    table, choose = load("table_h100"), load("choose_h100")
    dense = {base_of(r): r for r in [*table, *choose] if r["method"] == "dense"}
    parts = [
        HEAD,
        conditions(table),
        "Points of test accuracy against dense; three seeds unless (n) says otherwise. The mean over data sets is in [Results](results.md).",
    ]
    for dataset, name in SETS.items():
        chosen = [r for r in table if r["dataset"] == dataset]
        whole = show(score(r) for r in chosen if r["method"] == "dense")
        parts += [f"## {name}", f"Dense: {whole}%.", summary_table(chosen, dense)]
        parts.append(f"![accuracy by size](images/accuracy_{dataset}.png)")
        plot_sizes(chosen, IMAGES / f"accuracy_{dataset}.png")
    parts += ["## From random weights", SCRATCH]
    for what, records in (("Digits", load("scratch_cpu")), ("Fashion-MNIST", load("scratch_h100"))):
        compared = [r for r in records if r["group"] == "scratch"]
        paired = {base_of(r): r for r in compared if r["method"] == "dense"}
        whole = show(score(r) for r in compared if r["method"] == "dense")
        parts += [f"### {what}", f"Dense: {whole}%.", summary_table(compared, paired)]
    switches = [r for r in choose if r["group"] == "switch"]
    plot_switch(switches, dense, IMAGES / "switch.png")
    parts += [
        "## When to switch (validation, one seed, three text sets)",
        switch_table(switches, dense),
        "![accuracy by time of the switch](images/switch.png)",
    ]
    calibrated = [
        r for r in choose if measured(r) is not None and r["method_notes"].get("predicted_loss_increase") is not None
    ]
    plot_calibration(calibrated, IMAGES / "calibration.png")
    parts += ["## Predicted and measured loss", CALIBRATION, calibration_ratios(calibrated)]
    later = latest_switch([r for r in load("scratch_cpu") if r["method"] == "cuttlefish" and r["budget"]])
    parts += [
        "## What was tried last",
        EXPLORED.format(
            later=later,
            floor=floor_of_small(load("floor_cpu")),
            nuclear=range_of_changes(load("nuclear_cpu")),
            cap=accuracies_by_scale(load("cap_cpu")),
        ),
    ]
    parts += [explored_table(load("explore_h100"))]
    parts += [FADING, explored_table(load("fading_h100"))]
    parts += [FEATURES, explored_table(load("features_h100"))]
    parts += [RECOVERY, explored_table(load("recovery_h100"))]
    parts += ["## The low-rank phase", LOW_RANK_PHASE, after_switch_table(load("tune_h100"), load("after_switch_cpu"))]
    ablation = [r for r in choose if r["group"] == "ablation"]
    parts += [
        "## Metric, ranks and optimizer state (validation, one seed, three text sets, switch at 20%)",
        ablation_table(ablation, dense),
        LIMITS,
    ]
    fill(ROOT / "README.md", "results", summary_table(with_default(table), dense))
    fill(ROOT / "docs" / "results.md", "results", summary_table(table, dense))
    for what, name in SPEED.items():
        record = json.loads((ROOT / "benchmarks" / "results" / name).read_text("utf-8"))
        fill(ROOT / "docs" / "speed-tables.md", what, "\n".join(speed_tables(record)))
    write_gpu_page()
    record = json.loads((ROOT / "benchmarks" / "results" / "two_gpus_examples.json").read_text("utf-8"))
    page = ROOT / "docs" / "engines" / "measured.md"
    for what, make in (("examples", launches_table), ("scaling", scaling_table), ("llama", llama_table)):
        fill(page, what, make(record))
    vocabulary = vocabulary_table([*load("embeddings_h100"), *load("embeddings_cpu"), *load("embeddings_short_cpu")])
    fill(ROOT / "docs" / "results.md", "vocabulary", vocabulary)
    fill(ROOT / "docs" / "how-it-works.md", "even ranks", even_table(load("even_cpu")))
    for where in ("h100", "cpu"):
        records = (ROOT / "benchmarks" / "results" / f"convolutions_{where}.jsonl").read_text("utf-8").splitlines()
        text = convolutions_table([json.loads(line) for line in records])
        fill(ROOT / "docs" / "convolutional-networks.md", f"runs on {where}", text)
    for what, name, make in (
        ("in turn", "convolutions_speed_cpu", in_turn_table),
        ("on a GPU", "convolutions_speed_h100", gpu_table),
        ("norms", "norms_cpu", norms_table),
    ):
        record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))
        fill(ROOT / "docs" / "convolutional-networks.md", what, make(record["rows"]))
    for what, where in (("steps", "cpu"), ("steps on a GPU", "h100")):
        record = json.loads((ROOT / "benchmarks" / "results" / f"experts_speed_{where}.json").read_text("utf-8"))
        fill(ROOT / "docs" / "experts.md", what, steps_of_experts(record))
    language = load("language_h100")
    fill(ROOT / "docs" / "language-models.md", "default", default_table(load("language_default_h100"), language))
    fill(ROOT / "docs" / "language-models.md", "perplexities", perplexity_table(language))
    fill(ROOT / "docs" / "language-models.md", "repair", repair_table(language))
    record = json.loads((ROOT / "benchmarks" / "results" / "sft_cpu.json").read_text("utf-8"))
    fill(ROOT / "docs" / "language-models.md", "chats", chats_table(record))
    record = json.loads((ROOT / "benchmarks" / "results" / "eight_bits.json").read_text("utf-8"))
    fill(ROOT / "docs" / "serving.md", "eight bits", eight_bits_table(record))
    (ROOT / "docs" / "results-rates.md").write_text(rates_page(load("rates_h100"), load("tenth_cpu")), encoding="utf-8")
    (ROOT / "docs" / "results-records.md").write_text(
        "\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
