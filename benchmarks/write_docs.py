"""Write docs/results-records.md, docs/results-rates.md, plots and the tables of the README, docs/results.md, docs/speed-tables.md, docs/fast-on-a-gpu.md and docs/language-models.md from benchmarks/results: `python -m benchmarks.write_docs`.

The tables are made from the JSON records alone, so they can't drift from them.
"""

from __future__ import annotations

import json
from pathlib import Path

from hf_cuttlefish.decide.rules import DEFAULT_RATIO

from .accuracy.embeddings_tables import vocabulary_table
from .accuracy.explored_tables import after_switch_table, explored_table, latest_switch_table
from .accuracy.language_tables import perplexity_table, repair_table
from .accuracy.plots import plot_calibration, plot_sizes, plot_switch
from .accuracy.rates_page import rates_page
from .accuracy.records import Record, base_of, measured
from .accuracy.tables import ablation_table, calibration_ratios, conditions, methods_table, summary_table, switch_table
from .convolutions.tables import table as convolutions_table
from .eight_bits.tables import eight_bits_table
from .speed.tables import tables as speed_tables
from .steps.tables import runs_table, steps_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
SPEED = {"speed": "speed_cpu.json", "GPU": "speed_h100.json"}
"""What stands in docs/speed-tables.md between which marks, and the records it is made of."""
IMAGES = ROOT / "docs" / "images"
HEAD = """# Results, the records

> These runs are of the former defaults: size 0.40, the learning rate left alone (times 1.5 below a quarter), statistics from 4% of the run, gradient
> damping 0.03. The defaults of today, on two text models, a ViT and several learning rates: [results by model and rate](results-rates.md).

Written by `python -m benchmarks.write_docs` from the records in `benchmarks/results/accuracy`; the answer is in [Results](results.md).
"""

SCRATCH = """No pretrained weights (`--suite scratch`). Digits: a ViT of 4 x 96 on scikit-learn's 8 x 8 digits, 40 epochs (800 steps), on one
CPU thread in fp32; the test split has 360 rows, so that one row is 0.28 points. Fashion-MNIST: a ViT of 6 x 192, 12 epochs on 12,000
of its training rows (564 steps of 256), 10,000 test rows, bf16 on an H100. The controls keep what their recipes say: Pufferfish's switch after one
epoch is 2.5% of the first run and 8% of the second."""

LATER = """All of our runs on digits switched at `latest_switch`, the stable ranks still moving. Allowed to wait until 80%, at a size of 1/5.6
(validation split, 171 rows):"""

CALIBRATION = """Median of the measured increase (validation split) over the predicted one, by the share of the run at which the switch
came; all records of `choose_h100` that have both. The [plot](how-it-works.md#ranks) shows every one of them."""

LOW_RANK_PHASE = """What a change of the low-rank phase makes of the same run, on the validation split: the learning rate after the switch times
a number (`learning_rate_scale`), or Frobenius decay, decoupled, in the place of the factors' weight decay of 0.01 (`trec`) or
0.05 (`digits_scratch`). On the CPU all settings of a seed go on from one snapshot (`python -m benchmarks.accuracy.after_switch`).

A learning rate times 1.5 gains accuracy at 1/5.6 on texts and nothing at 1/3, on images or from scratch; on the movie snippets the loss
rises with it. Together with the rows above, which add a size of 1/10, that makes it the default below a quarter of the
parameters (`learning_rate_scale=1` leaves the schedule alone). Frobenius decay changes nothing, not even at 10 to 100 times the
weight decay; the package does without it."""

EXPLORED = """Four ideas against the same runs without them, at the two small sizes (ViT: 1/3 and 1/5.6), records `explore_h100` (what was turned
down is not in the repository):

- *Examples weighted*: the squares of an example's gradients are divided by its gradient's norm ([how](how-it-works.md#loss-aware-factors)). The loss
  rises less at the switch, above all on Reuters R8, whose training loss is almost nothing by then, and no data set is worse off in the end. **Kept.**
- *Learning rate* after the switch times 1.5 or 2: more accuracy on texts, a wash on the ViT. **1.5 kept, below a quarter.**
- *Distillation* in the low-rank phase from the run's own model as it was before the switch (half of the loss, temperature 2): worse on
  TREC and Reuters R8, at a third more time a step. The snapshot has seen 30% of the run. **Not built.**
- *Two cuts*: to 1/3 at 20% of the run, moments gathered again on the factors, and cut to the size wanted at 35%. No gain. **Not built.**"""

FADING = """A fifth idea, with today's defaults and MPNet-base among the models, records `fading_h100`: what the cut took is still added to the
outputs after the switch, times a factor that falls to zero over 30% of the remaining steps. A shorter exploration had promised 0.3 points;
on whole runs (test split) nothing is left of it. **Taken out again.**"""

LIMITS = """## What these numbers are not

- Three seeds; two for spectral init and plain SVD at 1/2 on the ViT (the lent machine's time ran out). No control was run at 1/10.
- `Cuttlefish (ours)` switched at 30% of the run and has 1.5 times the learning rate after the switch below a quarter of the size; the controls switch
  where their recipes do, at the rate of the dense run. Our rows and those of the ViT were run after the text controls, with
  another sharing of the GPU between processes (CUDA MPS), on the same software.
- The ViT has 12,000 of Fashion-MNIST's rows, 56 pixels, 3 epochs and a learning rate of 5e-5, at which it is not trained out: LoRA, which
  has five times the rate here as it does everywhere, ends 2.2 points above dense. Controls of the ViT share that rate with us.
- The time of the switch, the ablation and the calibration were measured before examples were weighted.
- Pretrained MiniLM (6 x 384), its vocabulary cut to the tokens that occur, and ViT-S/14 only.
"""


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
    """The tables of docs/fast-on-a-gpu.md."""
    page, results = ROOT / "docs" / "fast-on-a-gpu.md", ROOT / "benchmarks" / "results"
    steps = json.loads((results / "steps_h100.json").read_text("utf-8"))["records"]
    for what, modes in (("graphs", ["graphs"]), ("eager", ["eager"]), ("inference", ["infer"])):
        fill(page, what, steps_table(steps, modes))
    fill(page, "runs", runs_table(json.loads((results / "end_to_end_h100.json").read_text("utf-8"))))


def main() -> None:
    """Write the pages of records, their plots, and the tables of the README, docs/results.md, docs/speed-tables.md and docs/fast-on-a-gpu.md."""
    table, choose = load("table_h100"), load("choose_h100")
    dense = {base_of(r): r for r in [*table, *choose] if r["method"] == "dense"}
    parts = [
        HEAD,
        conditions(table),
        "## All data sets: test accuracy against full rank, points",
        summary_table(table, dense),
    ]
    for dataset in ("trec", "movie_snippets", "reuters_r8", "fashion_mnist_vit"):
        chosen = [r for r in table if r["dataset"] == dataset]
        parts += [f"## {dataset}", methods_table(chosen, dense), f"![accuracy by size](images/accuracy_{dataset}.png)"]
        plot_sizes(chosen, IMAGES / f"accuracy_{dataset}.png")
    scratch = load("scratch_cpu")
    parts += ["## From random weights", SCRATCH]
    for what, records in (("Digits", scratch), ("Fashion-MNIST", load("scratch_h100"))):
        compared = [r for r in records if r["group"] == "scratch"]
        paired = {base_of(r): r for r in compared if r["method"] == "dense"}
        parts += [f"### {what}", methods_table(compared, paired)]
    later = [r for r in scratch if r["method"] == "cuttlefish" and r["budget"]]
    parts += [LATER, latest_switch_table(later)]
    switches = [r for r in choose if r["group"] == "switch"]
    plot_switch(switches, dense, IMAGES / "switch.png")
    parts += [
        "## When to switch (validation, one seed)",
        switch_table(switches, dense),
        "![accuracy by time of the switch](images/switch.png)",
    ]
    calibrated = [
        r for r in choose if measured(r) is not None and r["method_notes"].get("predicted_loss_increase") is not None
    ]
    plot_calibration(calibrated, IMAGES / "calibration.png")
    parts += ["## Predicted and measured loss", CALIBRATION, calibration_ratios(calibrated)]
    parts += ["## What was tried last, on the validation split", EXPLORED, explored_table(load("explore_h100"))]
    parts += [FADING, explored_table(load("fading_h100"))]
    parts += ["## The low-rank phase", LOW_RANK_PHASE, after_switch_table(load("tune_h100"), load("after_switch_cpu"))]
    ablation = [r for r in choose if r["group"] == "ablation"]
    parts += [
        "## Metric, ranks and optimizer state (validation, one seed, switch at 20%)",
        ablation_table(ablation, dense),
        LIMITS,
    ]
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        fill(page, "results", summary_table(with_default(table), dense))
    for what, name in SPEED.items():
        record = json.loads((ROOT / "benchmarks" / "results" / name).read_text("utf-8"))
        fill(ROOT / "docs" / "speed-tables.md", what, "\n".join(speed_tables(record)))
    write_gpu_page()
    vocabulary = vocabulary_table([*load("embeddings_h100"), *load("embeddings_cpu")])
    fill(ROOT / "docs" / "results.md", "vocabulary", vocabulary)
    for where in ("h100", "cpu"):
        records = (ROOT / "benchmarks" / "results" / f"convolutions_{where}.jsonl").read_text("utf-8").splitlines()
        text = "\n".join(convolutions_table([json.loads(line) for line in records]))
        fill(ROOT / "docs" / "convolutional-networks.md", f"runs on {where}", text)
    language = load("language_h100")
    fill(ROOT / "docs" / "language-models.md", "perplexities", perplexity_table(language))
    fill(ROOT / "docs" / "language-models.md", "repair", repair_table(language))
    record = json.loads((ROOT / "benchmarks" / "results" / "eight_bits.json").read_text("utf-8"))
    fill(ROOT / "docs" / "serving.md", "eight bits", eight_bits_table(record))
    (ROOT / "docs" / "results-rates.md").write_text(rates_page(load("rates_h100")), encoding="utf-8")
    (ROOT / "docs" / "results-records.md").write_text(
        "\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
