"""docs/compatibility.md, from the results alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..markdown import markdown_table
from .outcomes import FAILS, NOT_BUILT, NOT_RUN, PASSES, REFUSED, UPSTREAM

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
DOCS = ROOT / "docs" / "compatibility.md"


def write_docs(results: list[dict[str, Any]], versions: dict[str, str], classes: int) -> str:
    """docs/compatibility.md from the results alone."""
    by_status = Counter(r["status"] for r in results)
    tested = [r for r in results if r["status"] in (PASSES, REFUSED, FAILS, UPSTREAM)]
    able = len(tested) - by_status[REFUSED]
    part = "" if len(results) == classes else f", drawn at random from {classes:,},"
    lines = [
        "# Compatibility",
        "",
        "Every model class of transformers' auto mappings, built tiny from its config with random weights, in fp32 on a CPU: the "
        "same plan twice from one seed, full rank equal to dense, factorize, forward, backward, save, AutoModel load with equal "
        "outputs, merge. Written by",
        "`python -m benchmarks.compatibility`; every class with its result is in "
        "`benchmarks/results/compatibility.json`.",
        "",
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}: {len(results):,} classes{part} of "
        f"{len({r['model_type'] for r in results})} model types. {len(tested)} build and run; {by_status[REFUSED]} of these have "
        f"nothing to factorize, and of the other {able}, {by_status[PASSES]} pass ({by_status[PASSES] / max(able, 1):.1%}).",
        "",
        counts_table(results),
        "",
        "*Refused*: nothing to factorize, said by an error before anything is changed. *Dense fails too*: the dense model, saved and "
        "loaded or run twice without us, does not give its own outputs back either. *Not run*: it builds, but none of our "
        "generic batches fits its forward; all steps but forward and backward pass. *Not built*: no tiny config works without "
        "weights or packages from elsewhere.",
    ]
    for status, title in ((REFUSED, "Refused"), (FAILS, "Fails"), (UPSTREAM, "Dense fails too"), (NOT_RUN, "Not run")):
        if groups := by_reason([r for r in results if r["status"] == status]):
            lines += ["", f"## {title}", "", named(groups) if status == NOT_RUN else reasons_table(groups)]
    lines += ["", "## Passes", ""]
    lines.append(", ".join(sorted({r["model_type"] for r in results if r["status"] == PASSES})) + ".")
    return "\n".join(lines) + "\n"


def counts_table(results: list[dict[str, Any]]) -> str:
    """How many classes of each auto class came to what."""
    rows = []
    for auto in [*dict.fromkeys(r["auto"] for r in results), "all"]:
        mine = [r for r in results if auto in (r["auto"], "all")]
        count = Counter(r["status"] for r in mine)
        rows.append([auto, len(mine), *(count[s] for s in (PASSES, REFUSED, FAILS, UPSTREAM, NOT_RUN, NOT_BUILT))])
    header = ("auto class", "classes", "pass", "refused", "fail", "dense fails too", "not run", "not built")
    return markdown_table(header, rows)


def by_reason(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of classes by what was said of them."""
    groups: dict[str, list[str]] = {}
    for r in results:
        reason = re.sub(rf"\b{re.escape(r['class'])}\b", "the model", r.get("control") or r["reason"])
        groups.setdefault(generic(reason), []).append(r["class"])
    return groups


def reasons_table(groups: dict[str, list[str]]) -> str:
    """The reasons that most classes share first."""
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return markdown_table(
        ("why", "classes"), [(reason.replace("|", "/"), ", ".join(names)) for reason, names in ordered]
    )


def named(groups: dict[str, list[str]]) -> str:
    """The classes alone."""
    return ", ".join(sorted(name for group in groups.values() for name in group)) + "."


def generic(reason: str) -> str:
    """A reason without the numbers that differ from class to class."""
    return re.sub(r"(?<![A-Za-z])\d+\.?\d*(e[-+]?\d+)?", "N", reason)[:200]
