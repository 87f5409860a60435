"""Which classes there are, found in the auto mappings."""

from __future__ import annotations

import importlib
import inspect

import transformers as hf
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def model_classes() -> dict[str, tuple[str, str]]:
    """Class name -> (model type, auto class that loads it), each class once, in the order of the auto mappings."""
    found: dict[str, tuple[str, str]] = {}
    for auto_name, auto in vars(modeling_auto).items():
        if not (inspect.isclass(auto) and issubclass(auto, _BaseAutoModelClass) and auto is not _BaseAutoModelClass):
            continue
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or not hasattr(hf, auto_name):
            continue
        for model_type, names in mapping._model_mapping.items():
            for name in [names] if isinstance(names, str) else names:
                if name not in found:
                    found[name] = (model_type, auto_name)
    return found


def find_class(name: str, model_type: str) -> type:
    """A model class by its name; some (Voxtral's text model) are in their own module alone."""
    if hasattr(hf, name):
        return getattr(hf, name)
    package = CONFIG_MAPPING[model_type].__module__.rpartition(".configuration_")
    return getattr(importlib.import_module(f"{package[0]}.modeling_{package[2]}"), name)
