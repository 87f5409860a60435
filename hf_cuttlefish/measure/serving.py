"""Measure: how long a model takes to answer, several of them in turn, at the shapes that are asked for."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROUND_SECONDS = 0.2
"""About how long one model has its turn in a round; one call at least."""

DECODED = 16
"""Tokens that a decoder writes in one call of the row "decode"."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: the median over rounds, and the quickest and slowest round."""

    median: float
    low: float
    high: float


def time_calls(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 7, device: torch.device | None = None
) -> dict[str, Latency]:
    """Time each of the calls, all in turn in each round, so that what else the machine does falls on all of them.

        time_calls({"ours": lambda: small(x), "dense": lambda: large(x)})["ours"].median

    Args:
        calls: name -> what is timed. rounds: turns that each has; the order is turned around from one to the next.
        device: a GPU is waited for before and after each turn.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, allocates
        repeats[name] = max(1, int(ROUND_SECONDS / max(_seconds(call, 1, device), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds):
        for name in list(calls)[:: 1 if round_ % 2 == 0 else -1]:
            found[name].append(1000 * _seconds(calls[name], repeats[name], device))
    return {name: Latency(statistics.median(times), min(times), max(times)) for name, times in found.items()}


def _seconds(call: Callable[[], Any], repeats: int, device: torch.device | None) -> float:
    """Of one call, on average."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def example_inputs(model: nn.Module, batch: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch that the model takes, on its device: random tokens, images or sound, with no padding.

        model(**example_inputs(model, batch=8, length=128))

    Args:
        batch: examples. length: tokens (128, or as many as the model has positions for); of sound 16,000 values; images have none.

    Raises:
        ValueError: the model takes something else, or has fewer positions than `length`.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    name = getattr(model, "main_input_name", "input_ids")
    draw = torch.Generator().manual_seed(0)
    if name == "input_ids":
        text = config.get_text_config()
        most = getattr(text, "max_position_embeddings", None)
        most = None if most is None or most <= 0 else most - _positions_taken(model)
        if length is not None and most is not None and length > most:
            raise ValueError(f"length is {length}, and {type(model).__name__} has {most} positions")
        tokens = length or min(128, most or 128)
        first = min(3, text.vocab_size - 1)  # behind the padding, usually
        ids = torch.randint(first, text.vocab_size, (batch, tokens), generator=draw).to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids.clone()
        return {key: value for key, value in inputs.items() if _takes(model, key)}
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        shape: tuple[int, ...] = (batch, getattr(vision, "num_channels", 3), height, width)
    elif name == "input_values":
        shape = (batch, length or 16_000)
    else:
        raise ValueError(
            f"{type(model).__name__} takes {name!r}: only models of tokens (input_ids), images (pixel_values) and sound "
            "(input_values) can be given an example here"
        )
    return {name: torch.randn(shape, generator=draw).to(device, dtype)}


def _positions_taken(model: nn.Module) -> int:
    """Positions that no token can have: RoBERTa and MPNet count from behind the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def writes_text(model: nn.Module) -> bool:
    """Whether it is a decoder, whose tokens come one by one."""
    return bool(getattr(model, "can_generate", bool)()) and not model.config.is_encoder_decoder  # type: ignore[union-attr]


def decoding(model: Any, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
    """A call that writes `DECODED` tokens behind these, greedily, with the cache of keys and values."""
    settings = {"max_new_tokens": DECODED, "min_new_tokens": DECODED, "do_sample": False, "num_beams": 1}
    padding = next((i for i in (model.config.pad_token_id, model.config.eos_token_id) if isinstance(i, int)), 0)

    def call() -> Any:
        with torch.inference_mode():
            return model.generate(**inputs, **settings, pad_token_id=padding)

    return call
