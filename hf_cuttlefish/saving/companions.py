"""What a folder needs beside the weights to be used at once: tokenizer, processor, chat template, licence."""

from __future__ import annotations

import logging
import os
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

TOKENIZER = (
    *(
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.tiktoken",
        "spiece.model",
    ),
    "sentencepiece*.model",
)
COMPANIONS = (
    *TOKENIZER,
    *("chat_template*", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "2_Normalize/*", "LICENSE*"),
)
"""Files beside a model's weights: tokenizer, processor, sentence-transformers."""

CARD = "README.md"


def source_of(model: nn.Module) -> str | None:
    """The folder or hub name that a model was loaded from; None for one that was made."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def hub_name(source: str | None) -> str | None:
    """The source, if it has the form of a hub name and is no folder here."""
    return source if source and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists() else None


def companions(source: str, fetch: bool = False) -> dict[str, Path]:
    """The files of a folder or hub name: path inside the folder -> file.

    Args:
        fetch: of a hub name, download what the cache lacks; else only what is in the cache counts, and no hub is asked.
    """
    folder = _folder(source, [*COMPANIONS], fetch)
    if folder is None:
        return {}
    files = (file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file())
    return {str(file.relative_to(folder)): file for file in files}


def card_of(source: str) -> str | None:
    """The text of the source's model card, if it has one that is here."""
    folder = _folder(source, [CARD], False)
    path = None if folder is None else folder / CARD
    return path.read_text("utf-8-sig", errors="replace") if path is not None and path.is_file() else None


def copy_companions(source: str, folder: str | os.PathLike[str], fetch: bool = False) -> list[str]:
    """Copy them; what has been written there already stays. A folder that holds a tokenizer gets no other's files."""
    target = Path(folder)
    own_tokenizer = any(any(target.glob(pattern)) for pattern in TOKENIZER)
    copied = []
    for path, file in companions(source, fetch).items():
        if own_tokenizer and any(Path(path).match(pattern) for pattern in TOKENIZER):
            continue
        if not (target / path).exists():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / path)
            copied.append(path)
    return copied


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, **facts: Any) -> None:
    """What is known of a model and stands nowhere in it: its processing_class, and for the card `report` and `metrics`."""
    _KNOWN.setdefault(model, {}).update({name: fact for name, fact in facts.items() if fact is not None})


def remembered(model: nn.Module, name: str) -> Any:
    """What `remember` was told, or None."""
    return _KNOWN.get(model, {}).get(name)


def check_processing_class(processing_class: Any) -> None:
    """Raises TypeError unless it is None or can be saved."""
    if processing_class is not None and not hasattr(processing_class, "save_pretrained"):
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__}: it must be a tokenizer or a processor, which has "
            "save_pretrained"
        )


def keep_companions(folder: str | os.PathLike[str], model: nn.Module, dense: bool = False) -> None:
    """Put what belongs to a model beside its weights: its tokenizer or processor, if it is known, and its source's files."""
    processing_class = remembered(model, "processing_class")
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    source = source_of(model)
    if source is None or (os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(folder)):
        return
    try:
        copy_companions(source, folder)
    except OSError as error:  # the weights are whole
        logger.warning("Cuttlefish: what lies beside the weights in %s is not copied to %s: %s", source, folder, error)


def _folder(source: str, patterns: list[str], fetch: bool) -> Path | None:
    if os.path.isdir(source):
        return Path(source)
    if hub_name(source) is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=not fetch))
    except (LocalEntryNotFoundError, HfHubHTTPError):
        if fetch:
            raise
        return None
