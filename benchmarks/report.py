"""Tables and plots out of the JSON files of runs. Everything shown can be computed again from those files alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Record = dict[str, Any]

LABELS = {
    "dense": "full rank",
    "cuttlefish": "Cuttlefish (ours)",
    "paper": "paper's rule",
    "paper_at_budget": "paper's stable ranks, scaled",
    "reference_bert": "reference code's BERT recipe",
    "pufferfish": "Pufferfish (fixed ratio)",
    "sifd": "spectral init + Frobenius decay",
    "svd_after": "SVD after 2/3",
    "whitened_after": "whitened SVD after 2/3",
    "lora": "LoRA (merged size)",
}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999", "#D55E00", "#F0E442")
"""Okabe and Ito's, which colour-blind readers tell apart; markers differ as well."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
YOUNG = 0.2
"""Share of the run before which a switch counts as early in the calibration."""
FELL = 3e-4
"""Measured increases of the loss below this (it may also fall) are drawn at the lower edge of the calibration."""


def write_report(folder: Path) -> None:
    """Write report.md and the plots into the folder.

    Raises:
        FileNotFoundError: the folder holds no records.
    """
    records = [json.loads(path.read_text("utf-8")) for path in sorted(folder.rglob("*-seed*.json"))]
    # Many records may be kept in one file, a line each.
    records += [
        json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
    ]
    if not records:
        raise FileNotFoundError(f"{folder} holds no records of runs (*-seed*.json or *.jsonl)")
    groups = defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    dense = {_base(r): r for r in records if r["method"] == "dense"}
    parts = ["# Benchmark report", _conditions(records)]
    if len(_unique(r["dataset"] for r in groups["table"])) > 1:
        parts += ["## All data sets: test accuracy against full rank", _summary_table(groups["table"], dense)]
    for group in ("table", "scratch"):
        for dataset in _unique(r["dataset"] for r in groups[group]):
            chosen = [r for r in groups[group] if r["dataset"] == dataset]
            parts += [
                f"## {dataset}: all methods ({chosen[0]['task']['epochs']} epochs)",
                _methods_table(chosen, dense),
            ]
            _plot_sizes(chosen, folder / f"{dataset}-sizes.png")
            parts.append(f"![accuracy by size]({dataset}-sizes.png)")
    calibrated = [
        r for r in records if _measured(r) is not None and r["method_notes"].get("predicted_loss_increase") is not None
    ]
    if groups["calibration"]:
        chosen = [r for r in groups["calibration"] if r["method"] == "cuttlefish"]
        parts += ["## Size, bound and loss", _calibration_table(chosen, dense)]
    if calibrated:
        _plot_calibration(calibrated, folder / "calibration.png")
        parts.append("![predicted and measured increase of the loss](calibration.png)")
    if groups["switch"]:
        chosen = [r for r in groups["switch"] if "switch" in r["options"]]
        if any(_paired(r, dense, "accuracy") is not None for r in chosen):
            parts += ["## When to switch", _switch_table(chosen, dense)]
            _plot_switch(chosen, dense, folder / "switch.png")
            parts.append("![accuracy by time of the switch](switch.png)")
    if groups["ablation"]:
        parts += ["## Metric, ranks, optimizer state", _ablation_table(groups["ablation"], dense)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{len(records)} records -> {folder / 'report.md'}")


# ----------------------------------------------------------------------------------------------------- numbers


def score(record: Record, key: str = "accuracy") -> float:
    """Accuracy in percent (or the loss) on the test split, or on the validation split if that is all it may see."""
    value = (record["test_split"] or record["validation"])[key]
    return 100 * value if key == "accuracy" else value


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (nan for one value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _base(record: Record) -> tuple[Any, ...]:
    """What a run and the full-rank run that it is compared with have in common."""
    return record["dataset"], record["seed"], record["test"]


def _paired(record: Record, dense: dict[Any, Record], key: str) -> float | None:
    """Difference from the full-rank run of the same data and seed."""
    base = dense.get(_base(record))
    return None if base is None else score(record, key) - score(base, key)


def _measured(record: Record) -> tuple[float, float] | None:
    """Increase of the loss at the switch, on the training split and on the validation split."""
    around = record["around_switch"]
    if not around["before"] or not around["after"]:
        return None
    train, validation = (around["after"][s]["loss"] - around["before"][s]["loss"] for s in ("train", "validation"))
    return train, validation


def _show(values: Iterable[float | None], digits: int = 1, sign: bool = False) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    mean, error = mean_and_error(known)
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _conditions(records: Sequence[Record]) -> str:
    def seen(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(v) for v in values}))

    versions = records[0]["versions"]
    unstable = [r for r in records if not r["train_loss"]["finite"]]
    lines = [
        f"{len(records)} runs on {seen(r['device'] for r in records)}, processes at a time: "
        f"{seen(r['workers'] or 1 for r in records)}; "
        + ", ".join(f"{k} {seen(r['versions'][k] for r in records)}" for k in versions)
        + ".",
        "Accuracies are means over seeds ± the standard error of the mean; 'kept' is the share of the target layers' "
        "weight parameters. Times per step were taken while processes shared the device: a rough hint, no measurement.",
    ]
    if unstable:
        lines.append(f"The loss was not finite in {len(unstable)} runs.")
    return "\n".join(lines)


def _method_key(record: Record) -> tuple[str, float]:
    return record["method"], record["budget"] or 0.0


# ------------------------------------------------------------------------------------------------------ tables


def _methods_table(records: list[Record], dense: dict[Any, Record]) -> str:
    def row(members: list[Record]) -> list[str]:
        first = members[0]
        steps = [r["seconds_per_step"] for r in members]
        speeds = [s["before"] / s["after"] if s["before"] and s["after"] else None for s in steps]
        return [
            LABELS.get(first["method"], first["method"]),
            f"{first['budget']:.3f}" if first["budget"] else "",
            _show([sum(r["kept"] for r in members) / len(members)], 3),
            f"{sum(r['parameters']['after']['model'] for r in members) / len(members) / 1e6:.2f}M",
            _show(score(r) for r in members),
            _show((_paired(r, dense, "accuracy") for r in members), sign=True),
            _show(
                [
                    100 * r["around_switch"]["after"]["validation"]["accuracy"] if r["around_switch"]["after"] else None
                    for r in members
                ]
            ),
            _show([r["switch_share"] for r in members if r["switch_share"] is not None][:1], 2),
            _show(speeds, 2),
            str(len(members)),
        ]

    header = (
        "method",
        "budget",
        "kept",
        "model",
        "accuracy",
        "against full rank",
        "right after the switch (validation)",
    )
    groups = _grouped(records, _method_key)
    order = sorted(groups, key=lambda key: (-key[1] if key[1] else -2.0, list(LABELS).index(key[0])))
    return _table((*header, "switch at", "speed-up of a step", "seeds"), (row(groups[key]) for key in order))


def _summary_table(records: list[Record], dense: dict[Any, Record]) -> str:
    """Mean difference from full rank over data sets, each data set counting the same, and its error over seeds."""
    budgets = sorted({r["budget"] for r in records if r["budget"]}, reverse=True)

    def cell(members: list[Record]) -> str:
        sets = _grouped(members, lambda r: r["dataset"])
        pairs = [
            mean_and_error([d for r in m if (d := _paired(r, dense, "accuracy")) is not None]) for m in sets.values()
        ]
        if not pairs:
            return ""
        mean = sum(value for value, _ in pairs) / len(pairs)
        error = math.sqrt(sum(e * e for _, e in pairs if not math.isnan(e))) / len(pairs)
        runs = "-".join(str(n) for n in sorted({len(m) for m in sets.values()}))
        return f"{mean:+.2f} ± {error:.2f} (n {runs})"

    rows = []
    for method in LABELS:
        groups = _grouped((r for r in records if r["method"] == method), lambda r: r["budget"] or 0.0)
        if method == "dense" or not groups:
            continue
        free = (
            f"{cell(groups[0.0])} at {_show([sum(r['kept'] for r in groups[0.0]) / len(groups[0.0])], 2)}"
            if 0.0 in groups
            else ""
        )
        rows.append([LABELS[method], *(cell(groups[b]) if b in groups else "" for b in budgets), free])
    own = any(row[-1] for row in rows)
    header = ("method", *(f"{b:.3f} kept" for b in budgets), *(["at its own size"] if own else []))
    return _table(header, rows if own else [row[:-1] for row in rows])


def _calibration_table(records: list[Record], dense: dict[Any, Record]) -> str:
    def row(members: list[Record]) -> list[str]:
        first = members[0]
        notes = [r["method_notes"] for r in members]
        measured = [_measured(r) for r in members]
        size = f"budget {first['budget']:.3f}" if first["budget"] else _options(first) or "default"
        relative = [
            n["predicted_loss_increase"] / n["window_loss"] if _known(n, "window_loss") else None for n in notes
        ]
        of_curvature = [
            n["predicted_loss_increase"] / n["curvature"] if _known(n, "curvature") else None for n in notes
        ]
        return [
            first["dataset"],
            size,
            _show((r["kept"] for r in members), 3),
            _show((n.get("predicted_loss_increase") for n in notes), 4),
            _show((m[0] for m in measured if m), 4),
            _show((m[1] for m in measured if m), 4),
            _show(relative, 4),
            _show(of_curvature, 5),
            _show((r["switch_share"] for r in members), 2),
            _show((_paired(r, dense, "accuracy") for r in members), sign=True),
            _show((_paired(r, dense, "loss") for r in members), 3, sign=True),
        ]

    header = (
        "data",
        "size",
        "kept",
        "predicted",
        "measured, train",
        "measured, validation",
        "predicted / training loss",
    )
    header = (*header, "predicted / curvature", "switch at", "accuracy at the end", "loss at the end")
    groups = _grouped(records, lambda r: (r["dataset"], r["budget"] or 0.0, _options(r)))
    return _table(header, (row(groups[key]) for key in sorted(groups, key=lambda k: (k[0], -k[1], k[2]))))


def _switch_table(records: list[Record], dense: dict[Any, Record]) -> str:
    groups = _grouped(records, lambda r: (r["budget"], r["options"]["switch"]))
    shares = sorted({share for _, share in groups})

    def cell(budget: float, at: float, key: str, digits: int, dataset: str | None = None) -> str:
        members = [r for r in groups.get((budget, at), []) if dataset in (None, r["dataset"])]
        return _show((_paired(r, dense, key) for r in members), digits, sign=True)

    rows = []
    for budget in sorted({budget for budget, _ in groups}, reverse=True):
        rows.append([f"{budget:.3f}", "all", "accuracy", *(cell(budget, at, "accuracy", 1) for at in shares)])
        rows.append([f"{budget:.3f}", "all", "loss", *(cell(budget, at, "loss", 3) for at in shares)])
        for dataset in _unique(r["dataset"] for r in records):
            rows.append(
                [f"{budget:.3f}", dataset, "accuracy", *(cell(budget, at, "accuracy", 1, dataset) for at in shares)]
            )
    return "Differences from full rank, by the share of the run at which the switch came.\n\n" + _table(
        ("budget", "data", "", *(f"{at:.0%}" for at in shares)), rows
    )


def _ablation_table(records: list[Record], dense: dict[Any, Record]) -> str:
    def key(r: Record) -> tuple[Any, ...]:
        return (-r["budget"], *(r["options"][k] for k in ("metric", "ranks", "state")))

    datasets = _unique(r["dataset"] for r in records)

    def row(members: list[Record]) -> list[str]:
        first = members[0]
        after = [r["around_switch"]["after"]["validation"]["accuracy"] for r in members if r["around_switch"]["after"]]
        return [
            f"{first['budget']:.3f}",
            *(first["options"][k] for k in ("metric", "ranks", "state")),
            _show([100 * sum(after) / len(after)]) if after else "",
            _show((_paired(r, dense, "accuracy") for r in members), sign=True),
            _show((_paired(r, dense, "loss") for r in members), 3, sign=True),
            *(
                _show((_paired(r, dense, "accuracy") for r in members if r["dataset"] == d), sign=True)
                for d in datasets
            ),
        ]

    order = {"weight": 0, "input": 1, "loss": 2, "uniform": 0, "energy": 1, "global": 2, "carry": 0, "reset": 1}
    groups = _grouped(records, key)
    ordered = sorted(groups, key=lambda k: (k[0], *(order[part] for part in k[1:])))
    header = ("budget", "metric", "ranks", "state", "right after the switch", "accuracy against full rank")
    return _table((*header, "loss against full rank", *datasets), (row(groups[k]) for k in ordered))


def _latest_switch_table(records: list[Record]) -> str:
    """Validation split, by how late the switch was allowed to come."""

    def latest(r: Record) -> float:
        return r["options"].get("latest_switch", 0.4)

    def row(members: list[Record]) -> list[str]:
        shares = sorted(r["switch_share"] for r in members)
        return [
            f"{latest(members[0]):g}",
            f"{shares[0]:.0%} to {shares[-1]:.0%}" if shares[0] < shares[-1] else f"{shares[0]:.0%}",
            _show(100 * r["validation"]["accuracy"] for r in members),
            _show((r["validation"]["loss"] for r in members), 3),
            str(len(members)),
        ]

    groups = _grouped(records, latest)
    header = ("latest_switch", "switched at", "accuracy", "loss", "seeds")
    return _table(header, (row(groups[key]) for key in sorted(groups)))


def _after_switch_table(tuned: list[Record], branches: list[Record]) -> str:
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
            where = "H100, bf16", f"{base['switch_share']:.0%}"
            note((r["dataset"], r["budget"], setting, *where), r, base)
    unchanged = {"learning_rate_scale": 1.0, "frobenius_decay": None}
    bases = {identity(r, {}): r for r in branches if r["setting"] == unchanged}
    for r in branches:
        if r["setting"] == unchanged or (base := bases.get(identity(r, {}))) is None:
            continue
        scale, decay = r["setting"]["learning_rate_scale"], r["setting"]["frobenius_decay"]
        setting = f"learning rate x {scale:.3g}" if decay is None else f"Frobenius decay {decay:g}"
        note((r["dataset"], r["budget"], setting, "CPU, fp32", f"{r['switch_step'] / r['steps']:.0%}"), r, base)
    return _table(
        ("data", "budget", "low-rank phase", "on", "switch at", "accuracy, points", "loss", "seeds"),
        (
            (
                *(dataset, f"{budget:.3f}", setting, device, at),
                *(_show((a for a, _ in found), sign=True), _show((b for _, b in found), 3, sign=True), str(len(found))),
            )
            for (dataset, budget, setting, device, at), found in sorted(rows.items())
        ),
    )


TRIED = {
    '{"alpha": 1.0}': "examples weighted",
    '{"learning_rate_scale": 1.5}': "learning rate x 1.5",
    '{"learning_rate_scale": 2.0}': "learning rate x 2",
    '{"alpha": 1.0, "learning_rate_scale": 1.5}': "both: weighted, rate x 1.5",
    '{"distill": 0.5}': "distillation from the snapshot",
    '{"first": 0.3333333333333333, "second": 0.35, "switch": 0.2}': "two cuts: 1/3 at 20%, then at 35%",
}
"""Options of the records in explore_h100, and what they stand for."""


def _explored_table(records: list[Record]) -> str:
    """Differences on the validation split to the same run without the change, mean over seeds, by data set."""
    plain = {(*_base(r), r["budget"]): r for r in records if r["method"] == "explore" and not r["options"]}
    groups = _grouped(
        (r for r in records if r["options"]), lambda r: (-r["budget"], json.dumps(r["options"], sort_keys=True))
    )
    datasets = _unique(r["dataset"] for r in records)

    def cells(members: list[Record]) -> Iterable[str]:
        ends, after = [], []
        for dataset in datasets:
            pairs = [(r, plain[(*_base(r), r["budget"])]) for r in members if r["dataset"] == dataset]
            accuracy = [score(r) - score(base) for r, base in pairs]
            ends.append(accuracy)
            rises = [(_measured(r), _measured(base)) for r, base in pairs]
            after += [100 * (changed[1] / usual[1] - 1) for changed, usual in rises if changed and usual]
            yield _show(accuracy, sign=True)
        yield f"{sum(sum(v) / len(v) for v in ends if v) / sum(bool(v) for v in ends):+.2f}"
        yield f"{median(after):+.0f}%"
        yield "-".join(str(n) for n in sorted({len(v) for v in ends if v}))

    rows = [[f"{-key[0]:.3f}", TRIED[key[1]], *cells(groups[key])] for key in sorted(groups, key=lambda k: k[0])]
    header = ("budget", "change", *datasets, "mean over data sets", "rise of the loss at the switch (median)", "seeds")
    return _table(header, rows)


def _options(record: Record) -> str:
    return ", ".join(f"{k}={v}" for k, v in record["options"].items())


def _known(notes: Record, key: str) -> bool:
    return bool(notes.get(key)) and notes.get("predicted_loss_increase") is not None


# ------------------------------------------------------------------------------------------------------- plots


def _axes(width: float = 6.4, height: float = 4.4) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _plot_sizes(records: list[Record], path: Path) -> None:
    """Accuracy by the share of the target parameters kept, a line for each method."""
    figure, axes = _axes()
    methods = [m for m in LABELS if any(r["method"] == m for r in records)]
    others = [m for m in methods if m not in ("dense", "cuttlefish")]
    looks = {m: (COLOURS[i % 8], MARKERS[i % 8]) for i, m in enumerate(others)}
    looks |= {"dense": ("black", ""), "cuttlefish": ("black", "o")}
    for method in methods:
        groups = _grouped((r for r in records if r["method"] == method), _method_key)
        points = {
            key: (sum(r["kept"] for r in members) / len(members), *mean_and_error([score(r) for r in members]))
            for key, members in groups.items()
        }
        if method == "dense":
            axes.axhline(points[method, 0.0][1], color="black", linewidth=1, linestyle="--", label=LABELS[method])
            continue
        own = method == "cuttlefish"
        colour, usual = looks[method]
        style = {"color": colour, "linewidth": 2.4 if own else 1.2, "zorder": 3 if own else 2, "capsize": 2}
        free = points.pop((method, 0.0), None) if own else None
        for label, marker, line in ((LABELS[method], usual, sorted(points.values())), ("our default", "*", [free])):
            if not line or line[0] is None:
                continue
            xs, ys, errors = zip(*line, strict=True)
            errors = [0 if math.isnan(e) else e for e in errors]
            axes.errorbar(xs, ys, errors, marker=marker, markersize=12 if marker == "*" else 6, label=label, **style)
    axes.set_xscale("log")
    ticks = [0.1, 1 / 5.6, 1 / 3, 0.5, 1]
    axes.set_xticks(ticks, ["10%", "1/5.6", "1/3", "1/2", "1"])
    axes.minorticks_off()
    axes.set_xlabel("share of the target layers' parameters kept")
    axes.set_ylabel("accuracy, %")
    axes.set_title(records[0]["dataset"])
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _plot_calibration(records: list[Record], path: Path) -> None:
    """Predicted increase of the loss against the increase measured at the switch, on both splits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.6), sharex=True, sharey=True, layout="constrained")
    datasets = _unique(r["dataset"] for r in records)
    for i, (axes, split) in enumerate(zip(panels, ("training rows", "validation split"), strict=True)):
        for dataset, colour, marker in zip(datasets, COLOURS, MARKERS, strict=False):
            for r in (r for r in records if r["dataset"] == dataset):
                x, y = r["method_notes"]["predicted_loss_increase"], _measured(r)[i]  # type: ignore[index]
                fill = "none" if r["switch_share"] < YOUNG - 0.005 else colour
                shape = marker if y > FELL else "$\\downarrow$"
                axes.plot(x, max(y, FELL), linestyle="", marker=shape, color=colour, markerfacecolor=fill, alpha=0.8)
        ends = [min(r["method_notes"]["predicted_loss_increase"] for r in records), 0.2]
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=FELL * 0.8)
        axes.set_title(split)
        axes.set_xlabel("predicted increase of the loss")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("measured increase at the switch")
    keys = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=dataset)
        for dataset, colour, marker in zip(datasets, COLOURS, MARKERS, strict=False)
    ]
    early = f"hollow: switched before {YOUNG:.0%} of the run"
    keys += [
        Line2D([], [], linestyle="", marker="o", color="grey", markerfacecolor="none", label=early),
        Line2D([], [], linestyle="", marker="$\\downarrow$", color="grey", label=f"less than {FELL:g}, or it fell"),
        Line2D([], [], color="black", linewidth=1, label="measured = predicted"),
    ]
    figure.legend(handles=keys, fontsize=8, ncols=3, loc="outside lower center")
    _save(figure, path)


def _calibration_ratios(records: list[Record]) -> str:
    """Median of measured over predicted increase, by data set and by the share of the run at which the switch came."""
    shares = ((0.0, 0.15), (0.15, 0.25), (0.25, 1.0))

    def cell(dataset: str, low: float, high: float) -> str:
        chosen = [r for r in records if r["dataset"] == dataset and low <= r["switch_share"] < high]
        pairs = [(_measured(r)[1], r["method_notes"]["predicted_loss_increase"]) for r in chosen]  # type: ignore[index]
        return f"{median(measured / predicted for measured, predicted in pairs):.1f} (n {len(pairs)})" if pairs else ""

    rows = [[d, *(cell(d, *ends) for ends in shares)] for d in _unique(r["dataset"] for r in records)]
    return _table(("data", *(f"switch at {low:.0%} to {high:.0%}" for low, high in shares)), rows)


def _plot_switch(records: list[Record], dense: dict[Any, Record], path: Path) -> None:
    """Difference from full rank by the time of the switch."""
    figure, axes = _axes()
    budgets = sorted({r["budget"] for r in records}, reverse=True)
    for budget, colour, marker in zip(budgets, COLOURS, MARKERS, strict=False):
        groups = _grouped((r for r in records if r["budget"] == budget), lambda r: r["options"]["switch"])
        points = []
        for at in sorted(groups):
            values = [v for v in (_paired(r, dense, "accuracy") for r in groups[at]) if v is not None]
            if values:
                points.append((100 * at, *mean_and_error(values)))
        if points:
            xs, ys, errors = zip(*points, strict=True)
            errors = [0 if math.isnan(e) else e for e in errors]
            style = {"color": colour, "marker": marker, "capsize": 2, "label": f"{budget:.3f} kept"}
            axes.errorbar(xs, ys, errors, **style)
    axes.axhline(0, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel("switch, % of the run")
    axes.set_ylabel("accuracy against full rank, points")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)
