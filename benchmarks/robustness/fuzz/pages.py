"""The table of spoiled files in docs/robustness.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...markdown import markdown_table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "robustness.md"
BEGIN, END = "<!-- spoiled: written by benchmarks/robustness/fuzz/pages.py -->\n", "<!-- end of spoiled -->"

WHAT = {
    "structure": "`config.json` of a folder",
    "header": "`model.safetensors`, the index of shards",
    "plan": "a plan, carried out",
    "kinds": "plan, config, folder and run of convolutions (in groups too), Conv1D, experts (in both layouts), vocabularies (tied or not)",
    "config": "a `CuttlefishConfig`",
    "state": "a run's state and statistics, which goes on to its end",
    "resume": "a checkpoint that a Trainer resumes",
}
"""Door -> the files that are spoiled before they are read by it."""


def page_of(record: dict[str, Any], page: str) -> str:
    """The page with the record's table between its marks."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    line = f"`{record['command']}`: {record['mutations']:,} spoiled files, {len(record['findings'])} findings ({versions})."
    if mended := record.get("mended"):
        line += f" {len(mended)} were found, mended, and run again."
    rows = [
        (WHAT[kind], *(counts[outcome] for outcome in ("refused", "loaded", "not ours", "finding")))
        for kind, counts in record["counts"].items()
    ]
    table = markdown_table(("spoiled", "refused by an error", "loaded rightly", "no longer ours", "findings"), rows)
    return f"{before}{BEGIN}{line}\n\n{table}\n{END}{after}"


def write_docs(record: dict[str, Any]) -> None:
    """Put the table into docs/robustness.md."""
    PAGE.write_text(page_of(record, PAGE.read_text("utf-8")), "utf-8")
