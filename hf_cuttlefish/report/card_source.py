"""What a model card keeps of the card of what the model came from."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from ..saving.companions import card_of, hub_name, source_of

KEPT = ("license", "license_name", "license_link", "language", "datasets", "base_model")


def source_facts(model: nn.Module) -> dict[str, Any]:
    """Licence, language, data sets and base model, from the card of the folder or hub name that the model was loaded from.

    The base model is the hub name itself, where it was one. Nothing is asked of a hub, and a broken card says nothing.
    """
    source = source_of(model)
    facts: dict[str, Any] = {}
    text = card_of(source) if source else None
    if text is not None and text.lstrip().startswith("---"):
        try:
            data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        except Exception:  # of the YAML parser, or of the hub's classes
            data = {}
        facts = {key: data[key] for key in KEPT if data.get(key)}
    if hub_name(source):
        facts["base_model"] = source
    return facts
