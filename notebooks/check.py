"""Check that executed notebooks are whole: every cell ran, none failed, and each gave the kinds of output that it should.

    python notebooks/check.py                          # the committed notebooks alone
    python notebooks/check.py runs/notebooks           # and those executed into a folder, against them
    python notebooks/check.py runs/notebooks --keep    # and put these, cleaned, in their place

What the outputs must say is asserted in the notebooks themselves, in their last cells; here it is seen that they came so far.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_BYTES = 300_000
MACHINE_PATH = re.compile(r"(?:^|[\s\"'(=])/(?:home|root|tmp|work|Users|usr|opt|mnt)/")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

Notebook = dict[str, Any]


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    """The cells that can be executed."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(value: str | list[str]) -> str:
    """Text that a notebook may hold as one string or as lines."""
    return value if isinstance(value, str) else "".join(value)


def kinds(cell: dict[str, Any]) -> set[str]:
    """What a cell gave: `stdout`, and the richest type of each display. Standard error is noise and does not count."""
    found = set()
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found |= {output["name"]} - {"stderr"}
        elif output["output_type"] != "error":
            found.add("image/png" if "image/png" in output["data"] else "text/plain")
    return found


def problems_of_run(notebook: Notebook, committed: Notebook | None = None) -> list[str]:
    """What is wrong with an execution: errors, cells that did not run in order, outputs that the committed one has."""
    cells = code_cells(notebook)
    found = []
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("the cells were not executed one after the other, once each: restart the kernel and run all")
    for number, cell in enumerate(cells, start=1):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"code cell {number} failed: {output['ename']}: {output['evalue']}")
    if not any("assert " in text(cell["source"]) for cell in cells):
        found.append("no cell asserts anything about the outputs")
    if committed is not None:
        expected = code_cells(committed)
        if [text(cell["source"]) for cell in cells] != [text(cell["source"]) for cell in expected]:
            return [*found, "its cells are not those of the committed notebook: execute it again"]
        for number, (cell, model) in enumerate(zip(cells, expected, strict=True), start=1):
            if missing := kinds(model) - kinds(cell):
                found.append(f"code cell {number} gave no {' and no '.join(sorted(missing))}, the committed one did")
    return found


def problems_of_file(path: Path, notebook: Notebook) -> list[str]:
    """What should not be committed: machine paths, noise, metadata, size."""
    found = []
    if path.stat().st_size > MOST_BYTES:
        found.append(f"{path.stat().st_size:,} bytes, more than {MOST_BYTES:,}: draw smaller pictures")
    if notebook != cleaned(notebook):
        found.append("it holds standard error, or metadata of a machine: put it in place with --keep")
    for number, cell in enumerate(notebook["cells"], start=1):
        for output in cell.get("outputs", []):
            shown = text(output["text"]) if "text" in output else text(output.get("data", {}).get("text/plain", ""))
            if MACHINE_PATH.search(shown):
                found.append(f"cell {number} shows a path of this machine: {shown.strip()[:80]!r}")
    return found


def cleaned(notebook: Notebook) -> Notebook:
    """The notebook without standard error and metadata, and with the pieces of what a cell printed put together."""
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        kept: dict[str, Any] = {"cell_type": cell["cell_type"], "id": f"cell-{number}", "metadata": {}}
        kept["source"] = text(cell["source"]).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            kept |= {"execution_count": cell["execution_count"], "outputs": _cleaned_outputs(cell["outputs"])}
        cells.append(kept)
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def _cleaned_outputs(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stderr":
                continue
            printed = text(output["text"])
            if kept and kept[-1].get("name") == "stdout":
                printed = text(kept.pop()["text"]) + printed
            # Processes of a notebook end each print with an empty one.
            printed = re.sub(r"\n\n+", "\n", printed)
            kept.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
        elif output["output_type"] == "error":
            kept.append(output)
        else:
            data = {kind: value for kind, value in output["data"].items() if kind in ("image/png", "text/plain")}
            data = {kind: text(value).rstrip("\n").splitlines(keepends=True) for kind, value in data.items()}
            slim = {"data": data, "metadata": {}, "output_type": output["output_type"]}
            if output["output_type"] == "execute_result":
                slim["execution_count"] = output["execution_count"]
            kept.append(slim)
    return kept


def read(path: Path) -> Notebook:
    """The notebook's JSON."""
    return json.loads(path.read_text("utf-8"))


def main() -> None:
    """Command line; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executed", type=Path, nargs="?", help="folder with executed copies; none: the committed alone")
    parser.add_argument("--keep", action="store_true", help="put the executed copies in place of the committed ones")
    arguments = parser.parse_args()
    if arguments.keep and arguments.executed is None:
        parser.error("--keep needs the folder with the executed copies")
    failed = False
    for path in sorted(HERE.glob("*.ipynb")):
        found = []
        if arguments.executed is not None:
            fresh = arguments.executed / path.name
            if not fresh.is_file():
                found = [f"it was not executed: there is no {fresh}"]
            else:
                found = problems_of_run(read(fresh), None if arguments.keep else read(path))
                if arguments.keep and not found:
                    path.write_text(json.dumps(cleaned(read(fresh)), indent=1) + "\n", encoding="utf-8")
        if not found:
            committed = read(path)
            found = problems_of_run(committed) + problems_of_file(path, committed)
        failed |= bool(found)
        print(f"{path.name}: {'; '.join(found) if found else 'as it should be'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
