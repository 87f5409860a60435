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

MEANINGS = {
    PASSES: "all of the above",
    REFUSED: "nothing to factorize: an error before anything is changed",
    FAILS: "ours is at fault",
    UPSTREAM: "the dense model changes its outputs after loading, or in a second run",
    NOT_RUN: "factorized, saved and loaded, but no generic batch fits its forward",
    NOT_BUILT: "needs weights or packages from elsewhere",
}
TITLES = {REFUSED: "Refused", FAILS: "Fails", UPSTREAM: "Dense fails too"}


def write_docs(results: list[dict[str, Any]], versions: dict[str, str], classes: int) -> str:
    """docs/compatibility.md from the results alone."""
    by_status = Counter(r["status"] for r in results)
    tested = [r for r in results if r["status"] in (PASSES, REFUSED, FAILS, UPSTREAM)]
    able = len(tested) - by_status[REFUSED]
    part = "" if len(results) == classes else f", drawn at random from {classes:,},"
    lines = [
        "# Compatibility",
        "",
        f"{by_status[PASSES]:,} of the {able:,} model classes of transformers that can be factorized pass "
        f"({by_status[PASSES] / max(able, 1):.1%}).",
        "",
        f"Tested: {len(results):,} classes{part} of {len({r['model_type'] for r in results})} model types, tiny, with random weights, in "
        f"fp32 on a CPU ({', '.join(f'{k} {v}' for k, v in versions.items())}{older(results, versions)}). Each is factorized, run "
        "forward and backward, saved, loaded and merged; outputs have to agree. Then the tables that `embeddings=True` takes, alone "
        "and in a new model. `python -m benchmarks.compatibility` writes this page, and every class into "
        "`benchmarks/results/compatibility.json`.",
        "",
        markdown_table(
            ("result", "classes", ""),
            [(TITLES.get(s, s.capitalize()).lower(), by_status[s], means) for s, means in MEANINGS.items()],
        ),
    ]
    lines += ["", "## Kinds of layers", "", kinds_table(results), "", vocabulary_line(results)]
    for status, title in TITLES.items():
        if groups := by_reason([r for r in results if r["status"] == status]):
            lines += ["", f"## {title}", "", reasons_table(groups)]
    lines += ["", "## Not run", "", "Some or all classes of:", "", model_types(results, NOT_RUN)]
    lines += ["", "## Passes", "", model_types(results, PASSES)]
    return "\n".join(lines) + "\n"


def older(results: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """How many classes were last run with an older transformers; "" for none."""
    count = sum(r.get("transformers") != versions["transformers"] for r in results)
    return f"; {count:,} of them with an older version, without `embeddings=True`" if count else ""


def kinds_table(results: list[dict[str, Any]]) -> str:
    """Each kind of layer: classes that have it and pass, of those that have it; the vocabulary, tied and untied, with them."""
    found: dict[str, list[bool]] = {}
    for r in results:
        table = r.get("vocabulary")
        words = list(r.get("kinds", {}))
        if isinstance(table, dict):
            words.append(
                "Embedding, tied"
                if table["tied"]
                else "Embedding, with an output layer of its own"
                if table["untied"]
                else "Embedding"
            )
        for word in words if r["status"] in (PASSES, FAILS, UPSTREAM) else ():
            found.setdefault(word, []).append(r["status"] == PASSES)
    return markdown_table(
        ("layers", "classes", "pass"), [(word, len(passed), sum(passed)) for word, passed in sorted(found.items())]
    )


def vocabulary_line(results: list[dict[str, Any]]) -> str:
    """What `embeddings=True` says where it takes nothing."""
    said = [
        r["vocabulary"].removesuffix(". Leave embeddings out") for r in results if isinstance(r.get("vocabulary"), str)
    ]
    refused = Counter(text.split(": ", 2)[2] for text in said if "cannot factorize" in text)
    reasons = "; ".join(f"{why} ({count})" for why, count in refused.most_common())
    none = len(said) - refused.total()
    return f"`embeddings=True` finds no table of tokens in {none:,} classes, and refuses {refused.total()}: {reasons}."


def by_reason(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Model types by what was said of their classes."""
    groups: dict[str, list[str]] = {}
    for r in results:
        reason = re.sub(rf"\b{re.escape(r['class'])}\b", "the model", r.get("control") or r["reason"])
        groups.setdefault(generic(reason), []).append(r["model_type"])
    return {reason: sorted(set(types)) for reason, types in groups.items()}


def reasons_table(groups: dict[str, list[str]]) -> str:
    """The reasons that most types share first."""
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return markdown_table(
        ("why", "some or all classes of"), [(reason.replace("|", "/"), ", ".join(names)) for reason, names in ordered]
    )


def model_types(results: list[dict[str, Any]], status: str) -> str:
    """The model types that have classes of one status."""
    return ", ".join(sorted({r["model_type"] for r in results if r["status"] == status})) + "."


def generic(reason: str) -> str:
    """A reason without the numbers that differ from class to class."""
    return re.sub(r"(?<![A-Za-z])\d+\.?\d*(e[-+]?\d+)?", "N", reason)[:200]
