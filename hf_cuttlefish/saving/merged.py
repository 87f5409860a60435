"""Save a factorized model as the dense model that it stands for."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..engines.around import check_not_wrapped, unwrap
from ..layers.kinds import kind_of
from ..layers.low_rank import low_rank_layers
from ..layers.vocabulary import with_tied
from ..patch.merge import check_mergeable
from ..patch.structure import write_structure
from ..patch.twins import with_exchanged
from .companions import check_processing_class, remember
from .doors import merging


def save_merged(
    model: PreTrainedModel, folder: str | os.PathLike[str], processing_class: Any = None, **kwargs: Any
) -> None:
    """Save a factorized model as the dense model that it stands for, in a folder that loads without hf_cuttlefish.

        save_merged(trainer.model, "dense")
        AutoModelForSequenceClassification.from_pretrained("dense")

    Tokenizer, processor, chat template and the card's front matter come from where the model was loaded, if that is here.

    The model itself stays factorized, on its device, and may go on training. Peak memory: the model, and on the CPU the
    dense weights of its factorized layers; they are multiplied out one layer at a time, so that a device holds one of them.

    Args:
        model: bare, or as DDP or torch.compile has wrapped it.
        folder: made if it is missing.
        processing_class: a tokenizer or processor, to be saved in the folder.
        kwargs: as of `save_pretrained`: max_shard_size, is_main_process, push_to_hub, ...

    Raises:
        TypeError: the model has no `save_pretrained` of transformers (for a PEFT model merge its adapters first), or neither
            has processing_class.
        ValueError: it has no factorized layer, a layer is on the meta device, a factor is quantized or holds an adapter, or an
            engine has sharded the model.
        NotADirectoryError: the folder is a file.
    """
    model = unwrap(model)  # type: ignore[assignment]
    check_not_wrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_merged saves models of transformers, got {type(model).__name__}; of a PEFT model give "
            "model.merge_and_unload(), of any other module use merge(copy.deepcopy(model))"
        )
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no factorized layer to merge: use save_pretrained")
    check_mergeable(layers)
    for name, layer in layers.items():
        if layer.up.weight.is_meta or layer.down.weight.is_meta:
            raise ValueError(
                f"{name} is on the meta device (left on disk): load the model into memory before merging it"
            )
    if os.path.isfile(folder):
        raise NotADirectoryError(f"{os.fspath(folder)} is a file: give a folder")
    check_processing_class(processing_class)
    dense: dict[int, tuple[nn.Module, nn.Module | nn.Parameter]] = {}
    for layer in layers.values():
        twin = layer.to_dense()
        twin.weight = nn.Parameter(cast(torch.Tensor, twin.weight).detach().cpu(), requires_grad=False)
        dense[id(layer)] = layer, kind_of(twin).seat
    merged = cast(PreTrainedModel, with_exchanged(model, with_tied(model, dense)))
    write_structure(merged)
    if processing_class is not None:
        remember(model, processing_class=processing_class)
    with merging(model):
        merged.save_pretrained(folder, **kwargs)
