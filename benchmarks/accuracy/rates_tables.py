"""The page on the defaults over models, data sets and learning rates: docs/results-rates.md, from the records of the suite "rates"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..markdown import markdown_table
from .records import Record, grouped, mean_and_error, show

MODELS = {"mpnet_base": "MPNet-base", "minilm": "MiniLM", "vit_s14": "ViT-S"}
DATA = {
    "trec": "TREC",
    "reuters_r8": "Reuters R8",
    "movie_snippets": "movie snippets",
    "fashion_mnist": "Fashion-MNIST",
}
DEFAULT, FORMER = ("cuttlefish", None), ("former", None)
SIXTH, FORMER_SIXTH, THIRD = ("cuttlefish", 0.18), ("former", 0.18), ("cuttlefish", 0.33)
SIX_TENTHS, EIGHT_TENTHS, TENTH = ("cuttlefish", 0.6), ("cuttlefish", 0.8), ("tenth", None)
TWO_FIFTHS, WHITENED, UNIFORM = ("cuttlefish", 0.4), ("whitened_after", 0.4), ("ablation", 0.4)
PUFFERFISH, PAPER = ("pufferfish", 0.4), ("paper_at_budget", 0.4)
LORA, DENSE = ("lora", None), ("dense", None)
CONTROLS = (UNIFORM, WHITENED, PUFFERFISH, PAPER)
"""What ours at 0.40 is compared with."""
NAMES = {
    DEFAULT: "default",
    FORMER: "former default (0.40)",
    SIXTH: "1/5.6",
    FORMER_SIXTH: "former, 1/5.6",
    THIRD: "1/3",
    TWO_FIFTHS: "0.40",
    SIX_TENTHS: "0.60",
    EIGHT_TENTHS: "0.80",
    TENTH: "bound of a tenth",
    WHITENED: "whitened SVD after 2/3 (0.40)",
    UNIFORM: "even ranks (0.40)",
    PUFFERFISH: "Pufferfish (0.40)",
    PAPER: "paper's stable ranks, scaled (0.40)",
    LORA: "LoRA, rank 16, 5 times the rate",
}
Way = tuple[str, float | None]
Cell = tuple[str, str, str, float]
ANEW = {"": "", "positions": ", positions shifted", "words": ", words shuffled"}
"""What has to be learnt anew, and how a table says it."""


def cell_of(record: Record) -> Cell:
    """Model, data set, what has to be learnt anew (a key of ANEW), and the learning rate."""
    task = record["task"]
    model = next(label for folder, label in MODELS.items() if str(task["model"]).endswith(folder))
    data = next(label for name, label in DATA.items() if name in task["file"])
    anew = "positions" if task["shift_positions"] else "words" if task.get("shuffled_words") else ""
    return model, data, anew, task["learning_rate"]


def way_of(record: Record) -> Way:
    """Method and size."""
    return record["method"], None if record["budget"] is None else round(record["budget"], 2)


class Differences:
    """Differences from the dense run of the same task and seed, in points of accuracy.

    Args:
        split: "test_split" or "validation".
    """

    def __init__(self, records: Sequence[Record], split: str) -> None:
        self.records, self.split = records, split
        self.cells = grouped(records, lambda r: (cell_of(r), way_of(r)))
        self._dense = {(cell_of(r), r["seed"]): self.accuracy(r) for r in records if r["method"] == "dense"}

    def accuracy(self, record: Record) -> float:
        """In percent."""
        return 100 * record[self.split]["accuracy"]

    def of(self, cell: Cell, way: Way) -> list[float]:
        """One number a seed."""
        members = self.cells.get((cell, way), [])
        return [self.accuracy(r) - self._dense[cell, r["seed"]] for r in members if (cell, r["seed"]) in self._dense]

    def mean_over(self, cells: Sequence[Cell], way: Way) -> str:
        """Each cell counts the same; the error is that over seeds. In brackets: how many cells were run, if not all."""
        known = [mean_and_error(found) for cell in cells if (found := self.of(cell, way))]
        if not known:
            return ""
        mean = sum(m for m, _ in known) / len(known)
        errors = [e for _, e in known if not math.isnan(e)]
        # A cell with one seed is taken to scatter as the others do.
        error = math.sqrt(sum(e * e for e in errors) / len(errors) / len(known)) if errors else math.nan
        text = f"{mean:+.2f}" + (f" ± {error:.2f}" if errors else "")
        return text + ("" if len(known) == len(cells) else f" ({len(known)} of {len(cells)})")


def cells_table(records: Sequence[Record], split: str, ways: Sequence[Way]) -> str:
    """A row for each model, data set, kind of run and learning rate; the number of seeds where it is not three."""
    found = Differences(records, split)
    rows = []
    for cell in sorted({cell_of(r) for r in records}, key=_order):
        if not any(found.of(cell, way) for way in ways):
            continue
        dense = found.cells.get((cell, ("dense", None)), [])
        row = [*_named(cell), show((found.accuracy(r) for r in dense), 1)]
        for way in ways:
            points = found.of(cell, way)
            text = show(points, 2, sign=True) + (f" (n {len(points)})" if len(points) in (1, 2) else "")
            kept = _mean([r["kept"] for r in found.cells.get((cell, way), [])])
            row.append(f"{text} at {kept}" if text and way in (DEFAULT, TENTH) else text)
        own = [r for way in (DEFAULT, TENTH) for r in found.cells.get((cell, way), [])]
        rows.append([*row, _mean([r["method_notes"].get("learning_rate_scale") for r in own])])
    header = ("model", "data", "rate", "dense", *(NAMES[w] for w in ways), "rate times")
    return markdown_table(header, rows)


def groups_of(records: Sequence[Record]) -> dict[str, list[Cell]]:
    """The cells that a mean is taken of."""
    cells = sorted({cell_of(r) for r in records}, key=_order)
    return {
        "MPNet-base, ordinary": [c for c in cells if c[0] == "MPNet-base" and not c[2]],
        "MPNet-base, much to relearn": [c for c in cells if c[0] == "MPNet-base" and c[2]],
        "MiniLM": [c for c in cells if c[0] == "MiniLM"],
        "ViT-S": [c for c in cells if c[0] == "ViT-S"],
        "MiniLM and ViT-S": [c for c in cells if c[0] != "MPNet-base"],
        "all": cells,
    }


def mean_of(records: Sequence[Record], group: str, way: Way) -> float:
    """Mean difference on the test split of one of `groups_of`, each cell counting the same; cells that were not run are left out."""
    found = Differences(records, "test_split")
    means = [mean_and_error(points)[0] for cell in groups_of(records)[group] if (points := found.of(cell, way))]
    return sum(means) / len(means)


def points_below(records: Sequence[Record], others: Sequence[Record]) -> str:
    """Runs of another device by learning rate, against the dense runs of `records`: "-2.7 ± 0.3 at 1e-4", ..."""
    found = Differences([*(r for r in records if r["method"] == "dense"), *others], "test_split")
    ways = {(cell_of(r), way_of(r)) for r in others}
    return ", ".join(f"{show(found.of(cell, way), 1, sign=True)} at {_rate(cell[3])}" for cell, way in sorted(ways))


def own_size(records: Sequence[Record], cells: Sequence[Cell], way: Way) -> str:
    """Mean share that a way without a size keeps, each cell counting the same."""
    found = Differences(records, "test_split")
    sizes = [[r["kept"] for r in found.cells.get((c, way), [])] for c in cells]
    return _mean([sum(s) / len(s) for s in sizes if s])


def groups_table(records: Sequence[Record]) -> str:
    """Means over data sets and rates: on the test split, and of the default on the validation split too."""
    test, validation = Differences(records, "test_split"), Differences(records, "validation")
    columns = [(test, DEFAULT), (validation, DEFAULT), (test, TENTH), (test, FORMER), (test, THIRD), (test, SIXTH)]
    rows = [
        [name, *(found.mean_over(m, way) for found, way in columns), own_size(records, m, DEFAULT), str(len(m))]
        for name, m in groups_of(records).items()
    ]
    names = [NAMES[way] + (", validation" if found is validation else "") for found, way in columns]
    return markdown_table(("", *names, "kept by the default", "data sets x rates"), rows)


def aims_table(records: Sequence[Record]) -> str:
    """What issue 16 asked for, and what came of it; test split."""
    found, groups = Differences(records, "test_split"), groups_of(records)
    ordinary, anew, small = (
        groups[n] for n in ("MPNet-base, ordinary", "MPNet-base, much to relearn", "MiniLM and ViT-S")
    )
    name, least = worst(records, DEFAULT, "MPNet")
    rows = [
        ["MPNet-base, ordinary: default", "-0.3", found.mean_over(ordinary, DEFAULT)],
        ["no data set and rate worse than", "-1.0", f"{least:+.2f} ({name})"],
        ["1/3", "-0.5", found.mean_over(ordinary, THIRD)],
        ["1/5.6", "-1.2", found.mean_over(ordinary, SIXTH)],
        ["MPNet-base, much to relearn: default", "-0.5", found.mean_over(anew, DEFAULT)],
        ["1/5.6", "-1.5", found.mean_over(anew, SIXTH)],
        ["MiniLM and ViT-S: default", "-0.14", found.mean_over(small, DEFAULT)],
        ["1/5.6", "-0.7", found.mean_over(small, SIXTH)],
        ["mean default size", "0.36", own_size(records, groups["all"], DEFAULT)],
    ]
    return markdown_table(("", "aim", "measured"), rows)


def best_rates_table(records: Sequence[Record], ways: Sequence[Way]) -> str:
    """Each way at the rate at which its mean accuracy on the validation split is highest; test accuracy."""
    rows = []
    for run in sorted({cell_of(r)[:3] for r in records}, key=lambda c: _order((*c, 0.0))):
        row = []
        for way in ways:
            best = at_best_rate(records, run, way)
            row.append("" if best is None else f"{show(best[1], 1)} ({_rate(best[0])})")
        if row[0] and any(row[1:]):
            rows.append([*_named((*run, 0.0))[:2], *row])
    names = [NAMES.get(way, "dense") for way in ways]
    return markdown_table(("model", "data", *names), rows)


def at_best_rate(records: Sequence[Record], run: tuple[str, str, str], way: Way) -> tuple[float, list[float]] | None:
    """The rate whose mean validation accuracy is highest, and the test accuracies there; None unless two rates were run.

    Args:
        run: model, data set, what has to be learnt anew.
    """
    cells: dict[float, list[Record]] = grouped(
        [r for r in records if cell_of(r)[:3] == run and way_of(r) == way], lambda r: r["task"]["learning_rate"]
    )
    if len(cells) < 2:
        return None
    best = max(cells, key=lambda rate: sum(r["validation"]["accuracy"] for r in cells[rate]) / len(cells[rate]))
    return best, [100 * r["test_split"]["accuracy"] for r in cells[best]]


def beaten_table(records: Sequence[Record]) -> str:
    """How often ours at 0.40 is above each control, by more than the errors of both means together."""
    found = Differences(records, "test_split")
    runs = sorted({cell_of(r)[:3] for r in records}, key=lambda c: _order((*c, 0.0)))
    rows = []
    for control in CONTROLS:
        cells = [c for c in sorted({cell_of(r) for r in records}) if found.of(c, control) and found.of(c, TWO_FIFTHS)]
        same = [(found.of(c, TWO_FIFTHS), found.of(c, control), " ".join(_named(c))) for c in cells]
        tuned = []
        for run in runs:
            ours, theirs = at_best_rate(records, run, TWO_FIFTHS), at_best_rate(records, run, control)
            if ours and theirs:
                tuned.append((ours[1], theirs[1], " ".join(_named((*run, 0.0))[:2])))
        rows.append([NAMES[control], *_won(same), *_won(tuned)])
    header = ("control", "same rate: above in", "but not in", "each at its best rate: above in", "but not in ")
    return markdown_table(header, rows)


def _won(pairs: Sequence[tuple[Sequence[float], Sequence[float], str]]) -> tuple[str, str]:
    """In how many pairs the first is above the second by more than their errors together; the names of the others."""
    if not pairs:
        return "not run", ""
    lost = [name for ours, theirs, name in pairs if not _is_above(ours, theirs)]
    return f"{len(pairs) - len(lost)} of {len(pairs)}", ", ".join(lost)


def _is_above(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    (a, error_a), (b, error_b) = mean_and_error(ours), mean_and_error(theirs)
    return a - b > math.hypot(error_a, error_b)


def worst(records: Sequence[Record], way: Way, where: str) -> tuple[str, float]:
    """Name and mean test difference of the ordinary runs that lose most, among the models whose name begins with `where`."""
    found = Differences(records, "test_split")
    cells = [c for c in {cell_of(r) for r in records} if c[0].startswith(where) and not c[2] and found.of(c, way)]
    means = {c: mean_and_error(found.of(c, way))[0] for c in cells}
    cell = min(means, key=lambda c: means[c])
    return " ".join(_named(cell)), means[cell]


def _named(cell: Cell) -> list[str]:
    model, data, anew, rate = cell
    return [model, f"{data}{ANEW[anew]}", _rate(rate)]


def _rate(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def _order(cell: Cell) -> tuple[Any, ...]:
    return list(MODELS.values()).index(cell[0]), cell[2] != "", list(DATA.values()).index(cell[1]), cell[2], cell[3]


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{sum(known) / len(known):.2f}" if known else ""
