"""The table of docs/robustness.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...markdown import markdown_table
from .jobs import JOBS


def write_docs(record: dict[str, Any]) -> None:
    """Put the table into docs/robustness.md, between its marks: a row for each fault, a column for each thing hit."""
    faults = record["faults"]
    hits = sorted({f["hit"] for f in faults})
    rows = []
    for kind in [*sorted({f["kind"] for f in faults}), "all"]:
        mine = [f for f in faults if kind in (f["kind"], "all")]
        rows.append((kind, *(survived([f for f in mine if f["hit"] == hit]) for hit in hits), survived(mine)))
    by_job = ", ".join(f"{job}: {sum(f['job'] == job for f in record['faults'])}" for job in JOBS)
    choice = ", ".join(f"{count} times: {what}" for what, count in record["trainers_own_choice_then"].items()) or "-"
    lines = [
        f"{record['runs']} runs, {record['kills']} kills and {record['disk_faults']} faults of the disk ({by_job}), on CPUs.",
        f"In {record['newest_folder_not_whole']} cases the newest folder was incomplete. Resuming from it anyway: {choice}.",
    ]
    page = Path(__file__).resolve().parents[3] / "docs" / "robustness.md"
    begin, end = "<!-- kills -->\n", "<!-- end of kills -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    table = markdown_table(("survived of tried", *hits, "all"), rows)
    page.write_text(f"{before}{begin}{' '.join(lines)}\n\n{table}\n{end}{after}", encoding="utf-8")


def survived(faults: list[dict[str, Any]]) -> str:
    """How many of how many."""
    return f"{sum(bool(f['survived']) for f in faults)}/{len(faults)}" if faults else "-"
