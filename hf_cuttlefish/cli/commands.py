"""The commands: inspect, factorize, merge, plot, env; `train`, `bench` and `export` have files of their own."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import CuttlefishConfig
from ..decide.plan import RankPlan
from ..decide.ranks import estimate_ranks
from ..layers.low_rank import low_rank_layers
from ..patch.structure import QUANT_METHOD
from ..report.drawing import check_matplotlib, figure_path
from ..report.inspection import NOW, inspect_model, present_plan
from ..report.model_card import write_model_card
from ..report.plotting import plot_loss, plot_ranks, plot_spectra, plot_stable_ranks
from ..saving.companions import copy_companions, remember
from ..saving.merged import save_merged
from ..switch import factorize as factorize_model
from .bench import bench
from .data import read_rows
from .data import statistics as statistics_of
from .export import export
from .files import (
    cuttlefish_states,
    load_config,
    load_model,
    output,
    read_plan,
    read_run,
)
from .sizes import compare_sizes
from .talking import bar, warn
from .train import train

__all__ = ["bench", "env", "export", "factorize", "inspect", "merge", "plot", "train"]

PACKAGES = (
    *("hf-cuttlefish", "torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "numpy"),
    *("datasets", "evaluate", "peft", "matplotlib", "deepspeed", "bitsandbytes", "torchao", "trl"),
)


VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE", "ACCELERATE_USE_FSDP")
"""What a bug report should say besides the packages' versions."""


def inspect(options: argparse.Namespace) -> None:
    """The layers of a model, their stable ranks, and the plan that they would get."""
    if options.plot or options.plot_spectra:
        check_matplotlib()
    if options.ratios:
        return compare_sizes(options, _config(options))
    if options.html:
        raise ValueError("--html is a page of sizes: give --ratios, as in --ratios 0.5 0.33 0.25")
    config = _config(options, target_ratio=options.ratio)
    model = load_model(options.model, options.device)
    statistics = None
    if options.data and low_rank_layers(model):
        warn(f"{options.data} is not used: {options.model} is factorized already, and is shown as it is")
    else:
        statistics = statistics_of(model, options, config)
    found = inspect_model(model, config, statistics=statistics, progress=bar("layers"))
    wanted = options.rule or "loss"
    rule = wanted if wanted in found.plans else next(iter(found.plans))
    if rule == NOW and (options.plot_spectra or options.save_plan):
        raise ValueError(f"{options.model} is factorized already: there is nothing to plan, and no spectrum to draw")
    plan = found.plans[rule]
    if options.save_plan:
        plan.to_json(options.save_plan)
    if options.plot:
        plot_ranks(plan, options.plot)
    if options.plot_spectra:
        spectra = {
            name: s.singular_values if s.loss_spectrum is None else s.loss_spectrum for name, s in found.spectra.items()
        }
        title = "Spectra of the weights" if statistics is None else "Spectra in the metric of the loss"
        plot_spectra(
            {name: values.tolist() for name, values in spectra.items() if values is not None},
            plan,
            options.plot_spectra,
            title,
        )
    if options.json:
        print(json.dumps({"model": options.model, "statistics": statistics is not None, **found.to_dict()}, indent=2))
    else:
        print(found.table(rule))
        if rule != NOW and statistics is None:
            print("note: no --data, so rule 'loss' stands for the same share of the parameters in each layer")


def factorize(options: argparse.Namespace) -> None:
    """A dense folder becomes a factorized one."""
    rule = options.rule or "loss"
    config = _config(options, rank_rule=rule, target_ratio=options.ratio)
    plan: Any = None if options.plan is None else read_plan(options.plan)
    with output(options) as folder:
        rows = read_rows(options)
        model = load_model(options.model, options.device)
        statistics = statistics_of(model, options, config, rows, list(plan) if plan is not None else None)
        if plan is None:
            plan = estimate_ranks(model, config, statistics=statistics)
        report = factorize_model(model, plan, statistics=statistics)
        remember(model, report=report)
        model.save_pretrained(folder)
        copy_companions(options.model, folder, fetch=True)
        write_model_card(folder, model)
    if options.json:
        print(json.dumps({"model": options.model, "statistics": statistics is not None, **report.to_dict()}, indent=2))
        return
    print(report)
    if statistics is None:
        print(
            "note: no --data, so the factors are those of the plain SVD, which lose far more than factors made with data"
        )
    print(f"saved in {options.out}; load it after `import hf_cuttlefish`")


def merge(options: argparse.Namespace) -> None:
    """A factorized folder becomes a dense one."""
    config = load_config(options.model)
    note = getattr(config, "quantization_config", None)
    if not isinstance(note, dict) or note.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{options.model} is no factorized model: its config.json names no low-rank layers")
    with output(options) as folder:
        model = load_model(options.model, "cpu")
        plan = present_plan(model)
        save_merged(model, folder)
        copy_companions(options.model, folder, fetch=True)
    after, before = plan.parameters()
    print(
        f"merged {len(plan)} layers, {before:,} -> {after:,} parameters; saved in {options.out}, which loads without us"
    )


def plot(options: argparse.Namespace) -> None:
    """A figure from what a run has saved."""
    state, source = read_run(Path(options.run_dir))
    run = next(iter(cuttlefish_states(state)), None)
    if run is None and options.what != "loss":
        raise ValueError(f"{source} holds no history of stable ranks: the run had no CuttlefishCallback")
    step = None if run is None else run["switch_step"]
    if options.what == "loss":
        plot_loss(state.get("log_history") or [], step, options.out)
    elif options.what == "ranks":
        if not run or not run["plan"]:
            raise ValueError(f"{source} holds no rank plan: there was no switch up to step {state['global_step']}")
        plot_ranks(RankPlan.from_dict(run["plan"]), options.out)
    elif run:
        ranks = run["history"]["ranks"]
        history = [
            {"step": step, "layer": name, "stable_rank": values[i]}
            for i, step in enumerate(run["history"]["steps"])
            for name, values in ranks.items()
        ]
        plot_stable_ranks(history, step, options.out)
    print(f"{figure_path(options.out)}: from {source}")


def env(options: argparse.Namespace) -> None:
    """Versions and settings, for a report of a bug."""
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = __version__ if package == "hf-cuttlefish" else None
    facts["cpu"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    facts["cuda"] = torch.version.cuda
    facts["devices"] = [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ] or ["mps" if torch.backends.mps.is_available() else "cpu"]
    facts |= {name: os.environ.get(name) for name in VARIABLES}
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        shown = "; ".join(value) if isinstance(value, list) else value if value is not None else "-"
        print(f"{name:<22}{shown}")


def _config(options: argparse.Namespace, **settings: Any) -> CuttlefishConfig:
    """The config that the options on targets and ranks make."""
    if options.target_modules:
        settings["target_modules"] = options.target_modules
    if options.exclude_modules:
        settings["exclude_modules"] = options.exclude_modules
    return CuttlefishConfig(rank_multiple=options.rank_multiple, embeddings=options.embeddings, **settings)
