"""Inputs, from the signature of `forward`."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf

from .recipes import HIDDEN

LENGTH, BATCH = 8, 2


def batches(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Batches that the model may take, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    needed = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    named = [model.main_input_name] if isinstance(model.main_input_name, str) else list(model.main_input_name)
    mains = [n for n in named if n in parameters] or list(parameters)[:1]
    common = ["input_ids", "pixel_values", "input_values", "input_features", "attention_mask", "decoder_input_ids"]
    common = [n for n in common if n in parameters]
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in parameters and model.config.is_encoder_decoder else []
    sets = [[*mains, *needed, *decoder], [*mains, *needed, *decoder, "attention_mask"], [*common, *needed], needed]
    sets += [[n, *needed] for n in ("input_ids", "pixel_values") if n in parameters]
    sets += [[*common, *(n for n in ("bbox", "token_type_ids") if n in parameters), *needed]]
    seen = set()
    for names in sets:
        names = [n for n in dict.fromkeys(names) if n in parameters]
        if not names or tuple(names) in seen:
            continue
        seen.add(tuple(names))
        choices = [list(values(model, n)) for n in names]
        for combination in itertools.islice(itertools.product(*choices), 12):
            yield {n: v.clone() for n, v in zip(names, combination, strict=True) if v is not None}


def values(model: Any, name: str) -> Iterator[torch.Tensor | None]:
    """What an argument of this name may be."""
    config = model.config
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    if name in ("input_ids", "decoder_input_ids", "text_input_ids", "labels"):
        ids = ordinary_tokens(config)
        if type(model).__name__.endswith("ForMultipleChoice"):
            yield ids[torch.randint(len(ids), (BATCH, 2, LENGTH), generator=generator)]
        yield ids[torch.randint(len(ids), (BATCH, LENGTH), generator=generator)]
        books = next(
            (v for c in configs(config) for k in ("num_codebooks", "num_quantizers") if (v := getattr(c, k, 0))), 0
        )
        if books:
            yield torch.randint(1, 4, (BATCH, LENGTH, books), generator=generator)
            yield torch.randint(1, 4, (BATCH, books, LENGTH), generator=generator)
            yield torch.randint(1, 4, (BATCH * books, LENGTH), generator=generator)
    elif name.endswith("attention_mask"):
        yield torch.ones(BATCH, LENGTH, dtype=torch.long)
    elif name == "token_type_ids":
        yield torch.zeros(BATCH, LENGTH, dtype=torch.long)
    elif name.endswith("pixel_values") or name in ("pixel_values_videos", "images"):
        channels = first(config, "num_channels", "in_channels", "in_chans", default=3)
        for size in dict.fromkeys([first_size(config), 64, 224]):
            yield noise(channels, size, size)
            yield noise(first(config, "num_frames", "frames", default=2), channels, size, size)
    elif name in ("input_features", "spectrogram", "fbank", "input_values", "audio_values", "speech", "waveform"):
        bins = first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "mel_dim", default=80)
        frames = first(config, "max_length", "max_source_positions", default=64)
        if name in ("input_values", "audio_values", "waveform"):
            yield noise(4000)
            yield noise(1, 4000)
        for length in dict.fromkeys([64, 2 * frames, frames]):
            yield noise(bins, length)
            yield noise(length, bins)
    elif name == "bbox":
        yield torch.tensor([1, 2, 30, 40]).expand(BATCH, LENGTH, 4)
    elif name in ("inputs_embeds", "hidden_states", "encoder_hidden_states"):
        yield noise(LENGTH, first(config, "hidden_size", "d_model", default=HIDDEN))
    elif name in ("past_values", "future_values"):
        yield noise(first(config, "context_length", "prediction_length", default=32) + 8)
        yield noise(first(config, "context_length", default=32), first(config, "num_input_channels", default=1))
    elif name == "past_time_features":
        yield noise(first(config, "context_length", default=32) + 8, first(config, "num_time_features", default=1))
    elif name == "past_observed_mask":
        yield torch.ones(BATCH, first(config, "context_length", default=32) + 8)
    elif name in ("input_points", "input_boxes"):
        yield torch.tensor([[[5.0, 5.0]]]).expand(BATCH, 1, 1, 2)
    elif name == "task_inputs":
        yield torch.ones(BATCH, 77, dtype=torch.long)
    elif name == "pixel_mask":
        yield None
    else:
        yield None
        yield noise(LENGTH, first(config, "hidden_size", "d_model", default=HIDDEN))


def configs(config: Any) -> Iterator[Any]:
    """The config and the ones inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, hf.PreTrainedConfig):
            yield from configs(value)


def first(config: Any, *names: str, default: int) -> int:
    """The first of the fields that the config or one inside it has as a number."""
    for name in names:
        for part in configs(config):
            value = getattr(part, name, None)
            if type(value) is int and value > 0:
                return value
    return default


def first_size(config: Any) -> int:
    """Pixels of a side."""
    for part in configs(config):
        size = getattr(part, "image_size", None)
        size = size[0] if isinstance(size, (list, tuple)) and size else size
        if type(size) is int and size > 0:
            return size
    return 64


def ordinary_tokens(config: Any) -> torch.Tensor:
    """Token ids that stand for no image, sound, padding or end."""
    special = {
        v
        for part in configs(config)
        for k, v in vars(part).items()
        if re.search(r"token|_id$|_idx$", k) and type(v) is int
    }
    vocabulary = min(
        [getattr(part, "vocab_size", None) or 64 for part in configs(config) if hasattr(part, "vocab_size")] or [64]
    )
    ids = [i for i in range(3, min(vocabulary, 100)) if i not in special]
    return torch.tensor(ids or [1])


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """Every floating-point tensor of an output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, (tuple, list, dict)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def run(model: Any, batch: dict[str, torch.Tensor], gradients: bool = False) -> list[torch.Tensor]:
    """What the model returns, with the same random numbers each time (masked autoencoders, samplers)."""
    torch.manual_seed(5)
    with torch.set_grad_enabled(gradients):
        return list(tensors(model(**{n: v.clone() for n, v in batch.items()})))
