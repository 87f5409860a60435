"""The report of a folder of runs. Everything in it can be computed again from the JSON files alone."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from .plots import plot_calibration, plot_sizes, plot_switch
from .records import base_of, measured, paired, unique
from .tables import ablation_table, calibration_table, conditions, methods_table, summary_table, switch_table


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
    dense = {base_of(r): r for r in records if r["method"] == "dense"}
    parts = ["# Benchmark report", conditions(records)]
    if len(unique(r["dataset"] for r in groups["table"])) > 1:
        parts += ["## All data sets: test accuracy against full rank", summary_table(groups["table"], dense)]
    for group in ("table", "scratch"):
        for dataset in unique(r["dataset"] for r in groups[group]):
            chosen = [r for r in groups[group] if r["dataset"] == dataset]
            parts += [
                f"## {dataset}: all methods ({chosen[0]['task']['epochs']} epochs)",
                methods_table(chosen, dense),
            ]
            plot_sizes(chosen, folder / f"{dataset}-sizes.png")
            parts.append(f"![accuracy by size]({dataset}-sizes.png)")
    calibrated = [
        r for r in records if measured(r) is not None and r["method_notes"].get("predicted_loss_increase") is not None
    ]
    if groups["calibration"]:
        chosen = [r for r in groups["calibration"] if r["method"] == "cuttlefish"]
        parts += ["## Size, bound and loss", calibration_table(chosen, dense)]
    if calibrated:
        plot_calibration(calibrated, folder / "calibration.png")
        parts.append("![predicted and measured increase of the loss](calibration.png)")
    if groups["switch"]:
        chosen = [r for r in groups["switch"] if "switch" in r["options"]]
        if any(paired(r, dense, "accuracy") is not None for r in chosen):
            parts += ["## When to switch", switch_table(chosen, dense)]
            plot_switch(chosen, dense, folder / "switch.png")
            parts.append("![accuracy by time of the switch](switch.png)")
    if groups["ablation"]:
        parts += ["## Metric, ranks, optimizer state", ablation_table(groups["ablation"], dense)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{len(records)} records -> {folder / 'report.md'}")
