"""Which runs answer which question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .run import Run

TEXT = ("trec", "movie_snippets", "reuters_r8")
BUDGETS = (1 / 2, 1 / 3, 1 / 5.6, 1 / 10)
"""Shares of the target layers' parameters that are kept; 1 / 5.6 is the paper's headline."""

SWITCH_SHARES = (0.02, 0.05, 0.10, 0.20, 0.33, 0.60)
LOSS_INCREASES = (0.003, 0.01, 0.03, 0.1)
ABLATION_AT = 0.2
RATES = (
    *(f"mpnet_trec_{rate}" for rate in ("2e-5", "5e-5", "1e-4")),
    *(f"mpnet_trec_{rate}_relearn" for rate in ("2e-5", "5e-5", "1e-4")),
    *(f"mpnet_{data}_{rate}" for data in ("movie_snippets", "reuters_r8") for rate in ("2e-5", "5e-5", "1e-4")),
    *(f"mpnet_{data}_5e-5_relearn" for data in ("movie_snippets", "reuters_r8")),
    *(f"{data}{rate}" for data in TEXT for rate in ("_3e-5", "")),
    "fashion_mnist_vit",
    "fashion_mnist_vit_2e-4",
)
BLOCKS_OF_72_PERCENT = 0.4
"""Of MiniLM's blocks: the file of the whole model is then 72% of the dense one."""
DEFAULT_BUDGET = 0.4
"""Size of the controls beside the default, which chooses its own between 0.3 and 0.8."""
SUITES: dict[str, dict[str, Any]] = {
    "choose": {
        "datasets": TEXT,
        "seeds": 2,
        "budgets": (1 / 3, 1 / 5.6),
        "help": "on the validation split only: calibration of the prediction, time of the switch, ablation",
    },
    "table": {
        "datasets": (*TEXT, "fashion_mnist_vit"),
        "seeds": 3,
        "budgets": BUDGETS,
        "help": "all methods at the same sizes, on the test split",
    },
    "rates": {
        "datasets": RATES,
        "seeds": 3,
        "budgets": (1 / 3, 1 / 5.6),
        "help": "the defaults over two text models, a ViT and several learning rates, against dense at the same rate",
    },
    "scratch": {
        "datasets": ("fashion_mnist_scratch", "digits_scratch"),
        "seeds": 3,
        "budgets": (1 / 5.6,),
        "help": "small ViTs from random weights",
    },
    "language": {
        "datasets": tuple(f"gemma_{data}_{rate}" for data in ("dialogs", "snippets") for rate in ("5e-5", "1e-4")),
        "seeds": 2,
        "budgets": (1 / 2, 0.7, 0.8, 0.9),
        "help": "a pretrained language model on two texts at two learning rates: perplexity by size, and a control",
    },
    "embeddings": {
        "datasets": tuple(f"{name}_whole" for name in TEXT),
        "seeds": 3,
        "budgets": (0.4, 0.3, 0.2),
        "help": "the vocabulary with the blocks, at the size that is measured and at three others, against the blocks alone",
    },
    "embeddings_short": {
        "datasets": ("movie_snippets_short", "reuters_r8_short"),
        "seeds": 3,
        "budgets": (0.4, 0.3),
        "help": "the same with fewer and shorter texts, for one core of a CPU",
    },
    "smoke": {
        "datasets": ("smoke_text", "smoke_pieces", "smoke_image"),
        "seeds": 1,
        "budgets": (1 / 3,),
        "help": "every method once, tiny random models and synthetic data; needs no data folder",
    },
}


def runs_of(suite: str, datasets: Sequence[str], seeds: Sequence[int], budgets: Sequence[float]) -> list[Run]:
    """All runs of a suite: seed by seed, so that a suite that is cut short is whole for the seeds it reached."""
    make = {
        "choose": _choose,
        "table": _table,
        "rates": _rates,
        "scratch": _scratch,
        "language": _language,
        "embeddings": _embeddings,
        "embeddings_short": _embeddings_short,
        "smoke": _smoke,
    }[suite]
    return [run for seed in seeds for dataset in datasets for run in make(dataset, seed, budgets)]


def _choose(dataset: str, seed: int, budgets: Sequence[float]) -> list[Run]:
    common: dict[str, Any] = {"seed": seed, "test": False}
    runs = [Run(dataset, "dense", group="calibration", **common)]
    # Calibration: predicted against measured increase of the loss, and the sizes that a bound on it leads to.
    runs += [Run(dataset, "cuttlefish", budget, group="calibration", **common) for budget in (3 / 4, *BUDGETS)]
    runs += [
        Run(dataset, "cuttlefish", options={"max_loss_increase": bound}, group="calibration", **common)
        for bound in LOSS_INCREASES
    ]
    # When: the same ranks rule, switched at fixed shares of the run.
    runs += [
        Run(dataset, "cuttlefish", budget, options={"switch": share}, group="switch", **common)
        for budget in budgets
        for share in SWITCH_SHARES
    ]
    # What: metric x ranks, both with the optimizer's state carried over; the corners with it reset as well.
    for budget in budgets:
        for metric in ("weight", "input", "loss"):
            for ranks in ("uniform", "energy", "global"):
                corner = (metric, ranks) in (("weight", "uniform"), ("loss", "global"))
                for state in ("carry", "reset") if corner else ("carry",):
                    options = {"at": ABLATION_AT, "metric": metric, "ranks": ranks, "state": state}
                    runs.append(Run(dataset, "ablation", budget, options=options, group="ablation", **common))
    return runs


def _table(dataset: str, seed: int, budgets: Sequence[float]) -> list[Run]:
    runs = [
        Run(dataset, method, seed=seed, group="table")
        for method in ("dense", "cuttlefish", "paper", "reference_bert", "lora")
    ]
    methods = ("cuttlefish", "pufferfish", "paper_at_budget", "sifd", "svd_after", "whitened_after")
    return runs + [Run(dataset, method, budget, seed, group="table") for budget in budgets for method in methods]


def _rates(dataset: str, seed: int, budgets: Sequence[float]) -> list[Run]:
    runs = [Run(dataset, method, seed=seed, group="rates") for method in ("dense", "cuttlefish", "former")]
    runs += [Run(dataset, "cuttlefish", budget, seed, group="rates") for budget in budgets]
    runs += [Run(dataset, "former", min(budgets), seed, group="rates")]
    uniform = {"at": 0.3, "metric": "loss", "ranks": "uniform", "state": "carry"}
    runs.append(Run(dataset, "whitened_after", DEFAULT_BUDGET, seed, group="rates"))
    return [*runs, Run(dataset, "ablation", DEFAULT_BUDGET, seed, uniform, group="rates")]


def _scratch(dataset: str, seed: int, budgets: Sequence[float]) -> list[Run]:
    runs = [Run(dataset, method, seed=seed, group="scratch") for method in ("dense", "cuttlefish", "paper")]
    for budget in budgets:
        runs += [Run(dataset, method, budget, seed, group="scratch") for method in ("cuttlefish", "pufferfish", "sifd")]
    return runs


def _language(dataset: str, seed: int, budgets: Sequence[float]) -> list[Run]:
    runs = [Run(dataset, method, seed=seed, group="default") for method in ("dense", "cuttlefish")]
    runs += [Run(dataset, "cuttlefish", budget, seed, group="sizes") for budget in budgets]
    # Two epochs: `whitened_after`, which waits for whole ones, would come at their end.
    whitened = {"at": 2 / 3, "metric": "input", "ranks": "uniform", "state": "reset"}
    return [*runs, Run(dataset, "ablation", min(budgets), seed, whitened, group="sizes")]


def _embeddings(dataset: str, seed: int, budgets: Sequence[float]) -> list[Run]:
    runs = [Run(dataset, "dense", seed=seed, group="embeddings")]
    for budget in (None, BLOCKS_OF_72_PERCENT):
        runs.append(Run(dataset, "cuttlefish", budget, seed, group="embeddings"))
    for budget in (None, *budgets):
        runs.append(Run(dataset, "cuttlefish", budget, seed, {"embeddings": True}, group="embeddings"))
    return runs


def _embeddings_short(dataset: str, seed: int, budgets: Sequence[float]) -> list[Run]:
    runs = [Run(dataset, "dense", seed=seed, group="embeddings")]
    runs.append(Run(dataset, "cuttlefish", BLOCKS_OF_72_PERCENT, seed, group="embeddings"))
    return runs + [Run(dataset, "cuttlefish", b, seed, {"embeddings": True}, group="embeddings") for b in budgets]


def _smoke(dataset: str, seed: int, budgets: Sequence[float]) -> list[Run]:
    runs = _table(dataset, seed, budgets)
    for metric in ("weight", "input", "loss"):
        for ranks in ("uniform", "energy", "global"):
            options = {"at": ABLATION_AT, "metric": metric, "ranks": ranks, "state": "carry"}
            runs.append(Run(dataset, "ablation", budgets[0], seed, options, group="ablation"))
    runs.append(Run(dataset, "cuttlefish", budgets[0], seed, {"switch": 0.1}, group="switch"))
    return runs
