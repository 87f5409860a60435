"""Tables of what was tried beside the suites: later switches, other low-rank phases, ideas that were turned down."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Any

from ..markdown import markdown_table
from .records import Record, base_of, grouped, mean_and_error, measured, show


def latest_switch(records: list[Record]) -> str:
    """Accuracy on the validation split where the switch may come late, against where it may not."""
    groups = grouped(records, lambda r: r["options"].get("latest_switch", 0.4))
    early, late = (show(100 * r["validation"]["accuracy"] for r in groups[key]) for key in sorted(groups))
    return f"{late} against {early}"


def floor_of_small(records: list[Record]) -> str:
    """Test accuracy with 1.5 times the rate, against the rate unchanged."""
    groups = grouped(records, lambda r: "learning_rate_scale" in r["options"])
    raised, left = (show(100 * r["test_split"]["accuracy"] for r in groups[key]) for key in (False, True))
    return f"{raised} against {left}"


def accuracies_by_scale(records: list[Record]) -> str:
    """Validation and test accuracy of the default's rate, and of rates given by hand."""
    groups = grouped(records, lambda r: r["options"].get("learning_rate_scale", 0.0))
    told = []
    for scale, own in sorted(groups.items()):
        both = (show((100 * r[split]["accuracy"] for r in own), 1) for split in ("validation", "test_split"))
        told.append(f"{' and '.join(both)} {f'at {scale:g}' if scale else 'by default, 3 times'}")
    return ", ".join(told)


def range_of_changes(records: list[Record]) -> str:
    """Of the mean test accuracies with an option, against those without: the lowest and the highest difference."""
    runs = [r for r in records if r["budget"]]
    groups = grouped(runs, lambda r: (r["budget"], json.dumps(r["options"], sort_keys=True)))
    means = {key: mean_and_error([100 * r["test_split"]["accuracy"] for r in own])[0] for key, own in groups.items()}
    changes = [mean - means[budget, "{}"] for (budget, options), mean in means.items() if options != "{}"]
    return f"{min(changes):+.1f} to {max(changes):+.1f}"


def after_switch_table(tuned: list[Record], branches: list[Record]) -> str:
    """Differences on the validation split that a changed low-rank phase makes, run by run, to the same run without it."""
    rows: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)

    def note(key: tuple[Any, ...], record: Record, base: Record) -> None:
        a, b = record["validation"], base["validation"]
        rows[key].append((100 * (a["accuracy"] - b["accuracy"]), a["loss"] - b["loss"]))

    def identity(r: Record, options: dict[str, Any]) -> tuple[Any, ...]:
        return r["dataset"], r["budget"], r["seed"], json.dumps(options, sort_keys=True)

    plain = {identity(r, r["options"]): r for r in tuned}
    for r in tuned:
        others = {k: v for k, v in r["options"].items() if k != "lr_after"}
        if "lr_after" in r["options"] and (base := plain.get(identity(r, others))) is not None:
            setting = f"learning rate x {r['options']['lr_after']:g}"
            note((r["dataset"], r["budget"], setting, "H100, bf16"), r, base)
    unchanged = {"learning_rate_scale": 1.0, "frobenius_decay": None}
    bases = {identity(r, {}): r for r in branches if r["setting"] == unchanged}
    for r in branches:
        if r["setting"] == unchanged or (base := bases.get(identity(r, {}))) is None:
            continue
        scale, decay = r["setting"]["learning_rate_scale"], r["setting"]["frobenius_decay"]
        setting = f"learning rate x {scale:.3g}" if decay is None else f"Frobenius decay {decay:g}"
        note((r["dataset"], r["budget"], setting, "CPU, fp32"), r, base)
    return markdown_table(
        ("data", "kept", "low-rank phase", "on", "points", "loss", "seeds"),
        (
            (
                *(dataset, f"{budget:.2f}", setting, device),
                *(show((a for a, _ in found), sign=True), show((b for _, b in found), 3, sign=True), str(len(found))),
            )
            for (dataset, budget, setting, device), found in sorted(rows.items())
        ),
    )


TRIED = {
    '{"alpha": 1.0}': "examples weighted",
    '{"learning_rate_scale": 1.5}': "learning rate x 1.5",
    '{"learning_rate_scale": 2.0}': "learning rate x 2",
    '{"alpha": 1.0, "learning_rate_scale": 1.5}': "both: weighted, rate x 1.5",
    '{"distill": 0.5}': "distillation from the snapshot",
    '{"fade": 0.3}': "what the cut took fades",
    '{"feat": 1.0}': "hidden states of the dense snapshot, weight 1, over 30% of the rest",
    '{"feat": 5.0}': "hidden states, weight 5, over 30% of the rest",
    '{"feat": 5.0, "share": 1.0}': "hidden states, weight 5, over all of the rest",
    '{"first": 0.3333333333333333, "second": 0.35, "switch": 0.2}': "two cuts: 1/3 at 20%, then at 35%",
    '{"drop": 0}': "no dropout after the switch",
    '{"gauge": "up"}': "columns of `up` scaled to one norm, rows of `down` the other way",
    '{"gauge": "down"}': "rows of `down` scaled to one norm, columns of `up` the other way",
    '{"drop": 0, "gauge": "up"}': "no dropout, and columns of `up` of one norm",
    '{"teach": "logits"}': "logits of a finished dense model, half of the loss, temperature 2",
    '{"teach": "both"}': "logits and hidden states (weight 1) of a finished dense model",
}
"""Options of the records in explore_h100, fading_h100, features_h100 and recovery_h100, and what they stand for."""


def explored_table(records: list[Record]) -> str:
    """Differences to the same run without the change, mean over seeds and data sets; beside them the test split's, if it was seen."""
    plain = {(*base_of(r), r["budget"]): r for r in records if r["method"] == "explore" and not r["options"]}
    groups = grouped(
        (r for r in records if r["options"]), lambda r: (-r["budget"], json.dumps(r["options"], sort_keys=True))
    )
    splits = ["validation", *(["test_split"] if all(r["test_split"] for r in records) else [])]

    def cells(members: list[Record]) -> Iterable[str]:
        by_data: dict[str, list[tuple[Record, Record]]] = defaultdict(list)
        for r in members:
            by_data[r["dataset"]].append((r, plain[(*base_of(r), r["budget"])]))
        for split in splits:
            yield _points(by_data.values(), split)
        rises = [(measured(r), measured(base)) for pairs in by_data.values() for r, base in pairs]
        after = [100 * (changed[1] / usual[1] - 1) for changed, usual in rises if changed and usual]
        yield f"{round(median(after)):+d}%"  # an integer has no -0
        yield str(len(by_data))
        yield "-".join(map(str, sorted({len(pairs) for pairs in by_data.values()})))

    rows = [[f"{-key[0]:.2f}", TRIED[key[1]], *cells(groups[key])] for key in sorted(groups, key=lambda k: k[0])]
    points = ["points, validation", "points, test"][: len(splits)]
    header = ("kept", "change", *points, "rise of the loss at the switch (median)", "data sets", "seeds")
    return markdown_table(header, rows)


def _points(by_data: Iterable[list[tuple[Record, Record]]], split: str) -> str:
    """Mean over data sets of (changed - plain) in points, and its error."""
    ends = [mean_and_error([100 * (r[split]["accuracy"] - b[split]["accuracy"]) for r, b in own]) for own in by_data]
    error = math.sqrt(sum(e * e for _, e in ends)) / len(ends)
    return f"{sum(mean for mean, _ in ends) / len(ends):+.2f} ± {error:.2f}"
