"""Every model class of transformers' auto mappings, tiny: factorize, forward, backward, save, load with AutoModel, merge.

    python -m benchmarks.compatibility                      # all of them; about an hour on 2 cores
    python -m benchmarks.compatibility --only falcon clip   # model types that contain one of these words
    python -m benchmarks.compatibility --write-docs         # docs/compatibility.md from the JSON file

Nothing is listed by hand: the classes come from the auto mappings, tiny configs from the names of the config's fields, and
inputs from the signature of `forward`. Each class runs in a process of its own, with a limit of time and memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from ..files import write_whole
from .checks import check
from .classes import model_classes
from .forks import run_all
from .outcomes import FAILS
from .pages import DOCS, RESULTS, write_docs


class Results:
    """The results by class: those of earlier runs, which are kept, and the new ones, written as they come."""

    def __init__(self, path: Path, classes: dict[str, tuple[str, str]]) -> None:
        self.path, self.classes = path, classes
        self.versions = {"torch": torch.__version__.split("+")[0], "transformers": hf.__version__}
        self.known: dict[str, dict[str, Any]] = {}
        self._saved = 0.0
        if path.exists():
            self.known = {r["class"]: r for r in json.loads(path.read_text("utf-8"))["results"]}

    def add(self, result: dict[str, Any]) -> None:
        """Tell of a result, and write all of them now and then."""
        self.known[result["class"]] = result | {"transformers": hf.__version__}
        print(f"{len(self.known)} {result['class']}: {result['status']} {result['reason'][:150]}", flush=True)
        if time.monotonic() - self._saved > 20:
            self.save()

    def save(self) -> None:
        """Write them in the order of the auto mappings, a line each."""
        self._saved = time.monotonic()
        order = {name: i for i, name in enumerate(self.classes)}
        ordered = sorted(self.known.values(), key=lambda r: order.get(r["class"], len(order)))
        text = ",\n".join(json.dumps(r) for r in ordered)
        head = f'"versions": {json.dumps(self.versions)}, "classes": {len(self.classes)}'
        write_whole(self.path, f'{{{head}, "results": [\n{text}\n]}}\n')


def choose(options: argparse.Namespace, results: Results) -> dict[str, tuple[str, str]]:
    """The classes that are asked for and not known yet, shuffled, so that a part of a run is a fair sample."""
    words = [w.lower() for w in options.only]
    classes, version = results.classes, results.versions["transformers"]
    known = {n: r for n, r in results.known.items() if not options.stale or r.get("transformers") == version}
    shuffled = random.Random(0).sample(list(classes.items()), len(classes))
    return {
        name: place
        for name, place in shuffled[:: 1 if options.again else options.every]
        if (not words or any(w in place[0].lower() or w in name.lower() for w in words))
        and (known[name]["status"] in options.again if name in known else not options.again)
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="model types or classes that contain one of these words")
    parser.add_argument("--every", type=int, default=1, help="every Nth class only")
    parser.add_argument("--again", nargs="+", default=[], help="run the classes with one of these statuses again")
    parser.add_argument("--stale", action="store_true", help="also the classes last run with another transformers")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write-docs", action="store_true", help="only write the document from the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """1 if a class fails."""
    options = parse(arguments)
    results = Results(options.out, model_classes())
    if not options.write_docs:
        warnings.simplefilter("ignore")
        hf.utils.logging.set_verbosity_error()
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        chosen = choose(options, results)
        # What is imported and cached here, forks have at once.
        check("LlamaForCausalLM", "llama", "AutoModelForCausalLM")
        run_all(chosen, options.workers, results.add)
        results.save()
    found = list(results.known.values())
    if options.out == RESULTS:
        DOCS.write_text(write_docs(found, results.versions, len(results.classes)), "utf-8")
    failed = [r["class"] for r in found if r["status"] == FAILS]
    print(Counter(r["status"] for r in found), "failed:", failed[:20])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
