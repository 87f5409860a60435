"""Doors: what transformers reads and writes of a factorized folder, completed on the way.

transformers has one door for a structure of one's own (see loading.py), and none for what else a folder needs to stand alone:
a note in config.json that stops whoever loads it without us, the modelling file beside it, a card, a tokenizer. And it resizes no
output layer that is not its own. Six methods of transformers are therefore wrapped, once, at import; each does what it did, and for folders that are not ours nothing more.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto

from ..decide.stored import conversions, spared
from ..layers.embedding import LowRankOutput
from ..layers.low_rank import LowRankLinear, low_rank_layers
from ..patch.structure import QUANT_METHOD, configs_of, write_structure
from . import modeling_low_rank as standalone
from .standalone import standalone_text, text_with_stacks

logger = logging.getLogger(__name__)

STANDALONE_FILE = f"{standalone.NAME}.py"
STANDALONE_TEXT = standalone_text()
STACKS_TEXT = text_with_stacks()
"""The same for folders with stacks of experts."""

Companion = Callable[[Path, Any, bool], None]
"""Called with a folder, the factorized model that is being saved there, and whether as a dense one; before any upload."""

_COMPANIONS: list[Companion] = []
_SAVING: ContextVar[PreTrainedModel | None] = ContextVar("hf_cuttlefish_saving", default=None)
_MERGING: ContextVar[PreTrainedModel | None] = ContextVar("hf_cuttlefish_merging", default=None)


def open_doors(*companions: Companion) -> None:
    """Wrap transformers' methods. Done once, at import of the package."""
    if _COMPANIONS or getattr(PreTrainedModel.save_pretrained, "_by_cuttlefish", False):
        return
    _COMPANIONS.extend(companions)
    PreTrainedConfig.get_config_dict = classmethod(_reads(PreTrainedConfig.get_config_dict.__func__))  # type: ignore
    PreTrainedConfig.to_json_file = _writes(PreTrainedConfig.to_json_file)  # type: ignore[method-assign]
    PreTrainedModel.save_pretrained = _saves(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]
    PreTrainedModel._upload_modified_files = _uploads(PreTrainedModel._upload_modified_files)  # type: ignore
    PreTrainedModel._get_resized_lm_head = _resizes(PreTrainedModel._get_resized_lm_head)  # type: ignore[method-assign]
    merge = auto.AutoHfQuantizer.merge_quantization_configs
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(_merges(merge))  # type: ignore[method-assign]


def _reads(original: Callable[..., Any]) -> Callable[..., Any]:
    """config.json, without what is for those who load it without us."""

    @functools.wraps(original)
    def get_config_dict(cls: type, name: Any, **kwargs: Any) -> Any:
        settings, rest = original(cls, name, **kwargs)
        if isinstance(settings, dict) and QUANT_METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            _look_inside(settings)
            _look_at_file(name, settings)
            _unstamp(settings)
        return settings, rest

    return get_config_dict


def _unstamp(settings: dict[str, Any]) -> None:
    """Take away what stops others, and what points to our file: the package itself loads the folder."""
    ours = standalone.holders(settings)
    for holder in ours:
        holder.pop("transformers_weights", None)
    entries = settings.get("auto_map")
    if ours and isinstance(entries, dict):
        others = {key: value for key, value in entries.items() if not standalone.names_this_file(value)}
        if others:
            settings["auto_map"] = others
        else:
            del settings["auto_map"]


def _look_inside(settings: dict[str, Any]) -> None:
    """A model put together of factorized ones, saved before its own config said so: its parts' notes count."""
    inside = standalone.holders(settings)
    if inside and not settings.get("quantization_config"):
        settings["quantization_config"] = {**inside[0]["quantization_config"], "inside": True}


def _look_at_file(name: Any, settings: dict[str, Any]) -> None:
    """Say so where the modelling file is not the one that we write. It is not run."""
    path = Path(str(name)) / STANDALONE_FILE
    entries = settings.get("auto_map")
    if isinstance(entries, dict) and any(map(standalone.names_this_file, entries.values())) and path.is_file():
        text = path.read_text("utf-8", errors="replace")
        if text not in (STANDALONE_TEXT, STACKS_TEXT) and f"\nFORMAT = {standalone.FORMAT}\n" in text:
            logger.warning(
                "Cuttlefish: %s is not the text that hf_cuttlefish writes. It is not run here; look at it before you load the "
                "folder with trust_remote_code=True elsewhere, or save the model again.",
                path,
            )


def _writes(original: Callable[..., Any]) -> Callable[..., Any]:
    """config.json, and beside it what a factorized folder needs."""

    @functools.wraps(original)
    def to_json_file(self: PreTrainedConfig, json_file_path: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(self, json_file_path, *args, **kwargs)
        path = Path(json_file_path)
        if path.name == "config.json":
            model, factorized = _SAVING.get(), _MERGING.get()
            low_rank = standalone.complete(str(path.parent), type(self), _text_for(model, path.parent))
            if not low_rank:
                _remove_ours(path.parent)
            if model is not None and model.config is self and (low_rank or factorized is not None):
                for companion in _COMPANIONS:
                    companion(path.parent, factorized or model, not low_rank)
        return done

    return to_json_file


def _remove_ours(folder: Path) -> None:
    """A dense model is saved where a factorized one was."""
    file = folder / STANDALONE_FILE
    if file.is_file() and file.read_text("utf-8", errors="replace") in (STANDALONE_TEXT, STACKS_TEXT):
        file.unlink()


def _saves(original: Callable[..., Any]) -> Callable[..., Any]:
    """A model, whose config says what it is, whoever has put it together."""

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        note_what_it_is(self)
        token = _SAVING.set(self)
        try:
            with _factors_spared(self):
                return original(self, *args, **kwargs)
        finally:
            _SAVING.reset(token)

    save_pretrained._by_cuttlefish = True  # type: ignore[attr-defined]
    return save_pretrained


@contextlib.contextmanager
def _factors_spared(model: PreTrainedModel) -> Iterator[None]:
    """Where transformers would take stacks of experts apart, it leaves the factors of those that are factorized as they are."""
    own = vars(model).get("_weight_conversions")
    changes = own if own is not None else [c for c in conversions(model, add_legacy=False) if not _is_prefix(c)]
    if not low_rank_layers(model) or not changes:
        yield
        return
    model._weight_conversions = spared(changes)  # type: ignore[assignment]
    try:
        yield
    finally:
        if own is None:
            del model._weight_conversions
        else:
            model._weight_conversions = own


def _is_prefix(change: Any) -> bool:
    """Whether a conversion was made for one file: a model that came from none has none."""
    return type(change).__name__ == "PrefixChange"


def _uploads(original: Callable[..., Any]) -> Callable[..., Any]:
    """A folder on its way to the hub: `push_to_hub` has written a card of its own over ours."""

    @functools.wraps(original)
    def _upload_modified_files(self: PreTrainedModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if low_rank_layers(self) and Path(working_dir, STANDALONE_FILE).is_file():
            for companion in _COMPANIONS:
                companion(Path(working_dir), self, False)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files


@contextlib.contextmanager
def merging(model: PreTrainedModel) -> Iterator[None]:
    """What is saved meanwhile is the dense form of this factorized model."""
    token = _MERGING.set(model)
    try:
        yield
    finally:
        _MERGING.reset(token)


def note_what_it_is(model: PreTrainedModel) -> None:
    """The structure in the model's config, unless something has put wrappers between its modules: then it was noted before."""
    layers = low_rank_layers(model)
    if any(part.startswith("_") for name in layers for part in name.split(".")):
        return
    if layers or any(standalone.is_note(getattr(c, "quantization_config", None)) for _, c in configs_of(model)):
        write_structure(model)


def _resizes(original: Callable[..., Any]) -> Callable[..., Any]:
    """An output layer for another number of tokens: of a low-rank one the factor that has them."""

    @functools.wraps(original)
    def _get_resized_lm_head(
        self: PreTrainedModel, old: Any, tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if tokens is not None and isinstance(old, LowRankLinear):
            old.up = original(self, old.up, tokens, *args, **kwargs)
            return old
        if tokens is not None and isinstance(old, LowRankOutput):
            return old.resized(tokens)  # its table has been
        return original(self, old, tokens, *args, **kwargs)

    return _get_resized_lm_head


def _merges(original: Callable[..., Any]) -> Callable[..., Any]:
    """quantization_config= for a factorized folder: our words."""

    @functools.wraps(original)
    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        note = quantization_config
        method = note.get("quant_method") if isinstance(note, dict) else getattr(note, "quant_method", None)
        if method == QUANT_METHOD and quantization_config_from_args is not None:
            raise ValueError(
                f"quantization_config={type(quantization_config_from_args).__name__} was given for a folder that hf_cuttlefish "
                "has factorized, and from_pretrained takes one structure: load it without quantization_config and quantize the "
                "model then (torchao's quantize_), or merge it into a dense folder (`hf-cuttlefish merge FOLDER OUT`, or "
                "hf_cuttlefish.save_merged) and load that with quantization_config"
            )
        return original(quantization_config, quantization_config_from_args)

    return merge_quantization_configs


def put_beside(folder: str | os.PathLike[str], model: Any = None) -> None:
    """The modelling file, for a folder into which a factorized model's config.json is copied."""
    Path(folder, STANDALONE_FILE).write_text(_text_for(model, Path(folder)), "utf-8")


def _text_for(model: Any, folder: Path) -> str:
    """The text of the modelling file: that which knows experts where the model, or the one that lies there, has some."""
    if model is not None:
        has_stacks = any(layer.origin == "Experts" for layer in low_rank_layers(model).values())
    else:
        file = folder / STANDALONE_FILE
        has_stacks = file.is_file() and file.read_text("utf-8", errors="replace") == STACKS_TEXT
    return STACKS_TEXT if has_stacks else STANDALONE_TEXT
