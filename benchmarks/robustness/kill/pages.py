"""The table of docs/robustness.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...markdown import markdown_table
from .jobs import JOBS


def write_docs(record: dict[str, Any]) -> None:
    """Put the table into docs/robustness.md, between its marks: a row for each fault, and what it hit."""
    rows = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for fault in record["faults"]:
        groups.setdefault((fault["kind"], fault["hit"]), []).append(fault)
    for (kind, hit), group in [*sorted(groups.items()), (("all", ""), record["faults"])]:
        survived = sum(bool(f["survived"]) for f in group)
        rows.append((kind, hit, len(group), survived, len(group) - survived))
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
    table = markdown_table(("fault", "hit", "tried", "survived", "lost"), rows)
    page.write_text(f"{before}{begin}{' '.join(lines)}\n\n{table}\n{end}{after}", encoding="utf-8")
