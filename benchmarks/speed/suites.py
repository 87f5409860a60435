"""What is run: suites of waves of jobs, the most telling ones first."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

PLAIN_MODES = ("eager", "infer", "infer-graph")
COMPILED_MODES = ("compiled", "graphs")
Setting = tuple[str, int]
"""(mode, batch). Modes: eager, compiled, graphs (reduce-overhead), infer, infer-graph (one CUDA graph of the forward)."""

Row = tuple[str, ...] | dict[str, Any]
"""A row of a wave: ("model variant ratio", settings, ...), the ratio 1/4 if it is left out; or a job that is no step."""

INFER_CPU = "infer 1, infer 64"
INFER = "infer 1, infer 64, infer-graph 1, infer-graph 64"
AT_64 = "eager 64, compiled 64"
AT_32 = "eager 32, compiled 32"
AT_128 = "eager 128, compiled 128"
AT_4 = "eager 4, compiled 4"

GPU: list[list[Row]] = [
    [
        ("bert-large dense", AT_64, "graphs 64", INFER),
        ("bert-large pairs", AT_64, "graphs 64", INFER),
        ("bert-large shared", AT_64, "graphs 64"),
        ("bert-large pairs 1/8", AT_64),
        ("bert-large pairs 1/2", AT_64),
        ("bert-large mlp", AT_64),
        ("vit-base dense", AT_64, INFER),
        ("vit-base pairs", AT_64, INFER),
        ("vit-base shared", AT_64),
        ("bert-base sequential", "eager 32"),
        ("bert-base lora", AT_32),
        {"job": "layers"},
        {"job": "select", "model": "bert-base", "batch": 32},
        {"job": "select", "model": "bert-base", "batch": 128},
        {"job": "select", "model": "bert-large", "batch": 64},
        {"job": "switch", "model": "bert-base", "batch": 32},
        # bert-base sequential and lora are compared with the dense one of the same wave: timed here and in the next.
        ("bert-base dense", AT_32),
    ],
    [
        ("bert-base dense", "eager 8", AT_32, AT_128, "graphs 32", INFER),
        ("bert-base pairs", "eager 8", AT_32, AT_128, "graphs 32", INFER),
        ("bert-base shared", "eager 8", AT_32, AT_128, "graphs 32"),
        ("bert-base function", "eager 8", AT_32, "eager 128"),
        ("bert-base direct", "eager 8", AT_32),
        ("bert-base shared_plain", "eager 8", AT_32),
        ("bert-base mlp", "eager 8", AT_32, AT_128),
        ("bert-base pairs 1/8", AT_32),
        ("bert-base pairs 1/2", AT_32),
        ("vit-large dense", AT_64, "graphs 64", INFER),
        ("vit-large pairs", AT_64, "graphs 64", INFER),
        ("vit-large shared", AT_64),
        {"job": "tracking", "model": "bert-base"},
    ],
    [
        ("llama-1b dense", AT_4),
        ("llama-1b pairs", AT_4),
        ("llama-1b shared", AT_4),
        {"job": "tracking", "model": "bert-large"},
        {"job": "switch", "model": "bert-large", "batch": 64},
    ],
]

CPU: list[list[Row]] = [
    [
        ("bert-base dense", "eager 16", INFER_CPU),
        ("bert-base pairs", "eager 16", INFER_CPU),
        ("bert-base sequential", "eager 16"),
        ("bert-base lora", "eager 16"),
        ("bert-base pairs 1/2", "eager 16"),
        ("bert-base pairs 1/8", "eager 16"),
    ],
    [
        ("bert-base dense", "compiled 16"),
        ("bert-base pairs", "compiled 16"),
        ("bert-base shared", "compiled 16"),
    ],
    [
        {"job": "layers"},
        {"job": "tracking", "model": "bert-base"},
        {"job": "switch", "model": "bert-base", "batch": 16},
        {"job": "tracking", "model": "minilm"},
        {"job": "switch", "model": "minilm", "batch": 32},
        {"job": "select", "model": "minilm", "batch": 32},
    ],
    [
        ("minilm dense", "eager 32", INFER_CPU, "compiled 32"),
        ("minilm pairs", "eager 32", INFER_CPU, "compiled 32"),
        # Timed in training like the others: memory that training has used serves inference.
        ("minilm merged", "eager 32", INFER_CPU),
        ("minilm sequential", "eager 32"),
        ("minilm lora", "eager 32"),
        ("minilm shared", AT_32),
        ("minilm function", "eager 32"),
        ("minilm direct", "eager 32"),
        ("minilm pairs 1/2", "eager 32"),
        ("minilm pairs 1/8", "eager 32"),
    ],
]

SMOKE: list[list[Row]] = [
    [
        ("bert-tiny dense", "eager 2, compiled 2, infer 1"),
        ("bert-tiny pairs", "eager 2, compiled 2, infer 1"),
        ("bert-tiny direct", "eager 2"),
        ("bert-tiny function", "eager 2"),
        ("bert-tiny shared", "eager 2, compiled 2, infer 1"),
        ("bert-tiny shared_plain", "eager 2"),
        ("bert-tiny mlp", "eager 2, compiled 2, infer 1"),
        ("bert-tiny sequential", "eager 2"),
        ("bert-tiny lora", "eager 2"),
        ("bert-tiny merged", "infer 1"),
    ],
    [
        ("vit-tiny dense", "eager 2"),
        ("vit-tiny pairs", "eager 2"),
        ("vit-tiny shared", "eager 2"),
        ("vit-tiny function", "eager 2"),
        ("llama-tiny dense", "eager 2"),
        ("llama-tiny pairs", "eager 2"),
        ("llama-tiny shared", "eager 2"),
        ("llama-tiny function", "eager 2"),
    ],
    [
        {"job": "layers", "small": True},
        {"job": "tracking", "model": "bert-tiny"},
        {"job": "select", "model": "bert-tiny", "batch": 2},
        {"job": "switch", "model": "bert-tiny", "batch": 2},
    ],
]

SUITES = {"gpu": GPU, "cpu": CPU, "smoke": SMOKE}


def waves(suite: str) -> list[list[dict[str, Any]]]:
    """Jobs that are prepared together, wave by wave."""
    return [[other(**row) if isinstance(row, dict) else step(*row) for row in wave] for wave in SUITES[suite]]


def step(who: str, *settings: str) -> dict[str, Any]:
    """One process: a model, a way to run its layers, and the settings in which it is timed."""
    model, variant, *given = who.split()
    ratio = None if variant in ("dense", "lora") else float(Fraction(given[0] if given else "1/4"))
    name = f"{model} {variant}" + (f" {ratio:g}" if ratio else "")
    times = [(mode, int(batch)) for text in ", ".join(settings).split(", ") for mode, batch in [text.split()]]
    return {"name": name, "job": "step", "model": model, "variant": variant, "ratio": ratio, "settings": times}


def other(job: str, **options: Any) -> dict[str, Any]:
    """A process that measures something else by itself, after the steps of its wave."""
    return {"name": " ".join([job, *map(str, options.values())]), "job": job, "settings": [], **options}
