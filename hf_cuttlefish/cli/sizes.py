"""Compare sizes: `inspect --ratios`, with a table, a plot and a page."""

from __future__ import annotations

import argparse
import json

from ..config import CuttlefishConfig
from ..decide.targets import find_targets
from ..layers.low_rank import low_rank_layers
from ..measure.gathering import gather_statistics
from ..report.plotting import plot_sizes
from ..report.sizes import size_curve
from ..report.story import sizes_page
from .data import make_batches, read_rows
from .files import load_model
from .talking import bar

HELD_OUT = 4
"""One row in so many is held out: the factors are made with the others, and every size is measured on it."""
LEAST_ROWS = 8


def compare_sizes(options: argparse.Namespace, config: CuttlefishConfig) -> None:
    """What each size saves, and what it costs on rows held out.

    Raises:
        ValueError: options that belong to a single size; a factorized model; too few rows; as `size_curve`.
    """
    for name in ("ratio", "rule", "save_plan", "plot_spectra"):
        if getattr(options, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is of one size, and --ratios compares several: leave one of them out"
            )
    if options.plot and not options.data:
        raise ValueError("--plot with --ratios draws what was measured: give --data")
    rows = read_rows(options)
    if rows is not None and len(rows) < LEAST_ROWS:
        raise ValueError(
            f"{options.data} holds {len(rows)} rows: give at least {LEAST_ROWS}, a quarter of which is held out"
        )
    model = load_model(options.model, options.device)
    if low_rank_layers(model):
        raise ValueError(
            f"{options.model} is factorized already: compare the sizes of the dense model (merge it, or train anew)"
        )
    statistics, held_out = None, []
    if rows is not None:
        held_out = make_batches(model, options, rows[::HELD_OUT])
        seen = make_batches(model, options, [row for i, row in enumerate(rows) if i % HELD_OUT])
        statistics = gather_statistics(
            model, seen, find_targets(model, config), config.statistics_tokens, bar("batches")
        )
    curve = size_curve(
        model, options.ratios, config, statistics=statistics, held_out=held_out, progress=bar("layers and batches")
    )
    name = "/".join(options.model.rstrip("/").split("/")[-2:])
    if options.plot:
        plot_sizes(curve, options.plot, f"What each size of {name} costs")
    if options.html:
        sizes_page(curve, options.html, name=name)
    print(json.dumps({"model": options.model, **curve.to_dict()}, indent=2) if options.json else curve.table())
