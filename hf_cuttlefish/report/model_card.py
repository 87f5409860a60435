"""Say in the saved folder what the model is: how it loads, its ranks, and what it came from. A README.md for the hub."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from ..decide.plan import RankDecision, RankPlan
from ..layers.kinds import kind_of
from ..layers.low_rank import low_rank_layers
from ..layers.sizes import count_parameters, group_name, plain_name
from ..patch.report import FactorizationReport
from ..patch.structure import restructure
from ..saving.companions import card_of, remembered, source_of
from .card_source import source_facts
from .flops import FLOPS_PER_PARAMETER
from .inspection import present_plan

logger = logging.getLogger(__name__)

TAGS = ["cuttlefish", "low-rank"]


BEGIN, END = "<!-- hf-cuttlefish: this part is written again with the model -->", "<!-- end of hf-cuttlefish -->"


_MARKED = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n?", re.DOTALL)
_MADE_LOW_RANK = "whose linear layers were made low rank by [Cuttlefish](https://arxiv.org/abs/2305.02538)."
_MERGED = (
    "The factors have been multiplied out again (`hf_cuttlefish.save_merged`): this is a dense model, as large as before, and "
    "loads with transformers alone.\n"
)

_AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "object-detection": "AutoModelForObjectDetection",
    "question-answering": "AutoModelForQuestionAnswering",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
}
"""Task, as the hub calls it, and the class that loads a model of it."""


def model_card(
    model: nn.Module,
    *,
    report: FactorizationReport | None = None,
    name: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The model card of a factorized model; `card.push_to_hub(repo_id)` puts it on the hub.

    Sizes and ranks are read from the model itself.

    Args:
        model: factorized.
        report: of the switch (`callback.report`), for the step of the switch and the rule.
        name: of the model; None: its class.
        base_model: hub name; None: where the model was loaded from, if that looks like a hub name, else as the card there says.
        datasets: hub names of the training data.
        metrics: name -> number, as `trainer.evaluate()` gives them; times and speeds are left out.
        license, language, tags: for the card's front matter, as the hub has them. What is not given (the data sets, too) is
            kept from the card of what the model was loaded from, if that is a folder or in the cache.

    Raises:
        ValueError: the model has no factorized layer.
    """
    plan = present_plan(model)
    report, metrics = report or remembered(model, "report"), metrics or remembered(model, "metrics")
    datasets = [datasets] if isinstance(datasets, str) else list(datasets or [])
    kept = source_facts(model)
    base = base_model or kept.get("base_model")
    task = _task(model)
    numbers = _numbers(metrics or {})
    title = name or type(model).__name__
    results = _results(task, datasets, numbers)
    data = ModelCardData(
        library_name="transformers",
        base_model=base,
        datasets=datasets or kept.get("datasets"),
        language=[language] if isinstance(language, str) else list(language or kept.get("language") or []) or None,
        license=license or kept.get("license"),
        **({} if license else {key: kept[key] for key in ("license_name", "license_link") if key in kept}),
        metrics=[key for key in numbers if key != "loss"] or None,
        pipeline_tag=task,
        tags=[*TAGS, *tags],
        eval_results=results or None,
        model_name=title if results else None,
    )
    bases = [base] if isinstance(base, str) else base or []
    origin = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in bases) or "A model"
    trained = f", trained on {' and '.join(datasets)}," if datasets else ""
    intro = f"{origin}{trained} {_MADE_LOW_RANK}"
    body = "\n\n".join(part for part in (intro, _section(model, plan, report, task, numbers)) if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{body}\n")


def write_companion_card(folder: str | Path, model: nn.Module, dense: bool = False) -> None:
    """The card that every door writes beside the weights; one that cannot be written is only said."""
    try:
        if dense:
            write_dense_card(folder, model)
        else:
            facts = {"report": remembered(model, "report"), "metrics": remembered(model, "metrics")}
            write_model_card(folder, _shape_of(model), **facts)
    except Exception as error:  # the weights are whole
        logger.warning("Cuttlefish: %s got no model card: %s", folder, error)


def _shape_of(model: nn.Module) -> nn.Module:
    """The model; or, where an engine holds its factors in pieces (FSDP1, ZeRO-3), one of its structure without values."""
    pairs = low_rank_layers(model)
    if not isinstance(model, PreTrainedModel) or all(w.ndim > 1 for pair in pairs.values() for w in pair.factors):
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        shape = type(model)(config)
    restructure(shape, {plain_name(name): pair.rank for name, pair in pairs.items()})
    return shape


def write_dense_card(folder: str | Path, model: nn.Module) -> None:
    """Beside the dense form of a factorized model: the front matter and the text of the card of what the model came from.

    Nothing is written where nothing is known.
    """
    text, kept = card_of(source_of(model) or ""), source_facts(model)
    path = Path(folder) / "README.md"
    card = ModelCard(text) if text is not None and BEGIN in text else None
    rest = "" if card is None else _MARKED.sub("", card.text).strip()
    ours_alone = len(rest.splitlines()) <= 3 and rest.endswith(_MADE_LOW_RANK)
    if path.exists() or (not kept and (card is None or ours_alone)):
        return
    if card is not None:
        card.text = f"{rest}\n\n{_MERGED}"
        data: Any = card.data
        data.tags = [tag for tag in data.tags or [] if tag != "low-rank"] or None
    else:
        task = _task(model)
        data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["cuttlefish"], **kept)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {type(model).__name__}\n\n{_MERGED}")
    card.save(path)


def write_model_card(folder: str | Path, model: nn.Module, **facts: Any) -> ModelCard:
    """Write the card into a saved folder as README.md; a card that is there already is kept and completed.

        model.save_pretrained(folder)
        write_model_card(folder, model, report=cuttlefish.report).push_to_hub(repo_id)

    Of a card written by hand, or by `Trainer.create_model_card`, the text and the front matter stay; what is missing in the
    front matter is added, and so is our part of the text, or it is exchanged if it is there already. `create_model_card` and
    `Trainer.push_to_hub` write theirs from scratch: call this after them, with `.push_to_hub(repo_id)` on what it returns.

    Args:
        folder: as `save_pretrained` has written it. model, facts: as of `model_card`.

    Raises:
        FileNotFoundError: no such folder. ValueError: as `model_card`, or a README.md whose front matter cannot be read.
    """
    path = Path(folder) / "README.md"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: save the model first")
    card = model_card(model, **facts)
    if path.exists():
        try:
            # A card without front matter gets an empty one, so that reading it logs nothing.
            text = path.read_text("utf-8-sig")
            old = ModelCard(text if text.lstrip().startswith("---") else f"---\n---\n{text}")
        except Exception as error:  # of the YAML parser, or of the hub's classes
            raise ValueError(f"the front matter of {path} cannot be read: {error}; mend or remove it") from error
        card = _completed(old, card)
    card.save(path)
    return card


def _completed(old: ModelCard, new: ModelCard) -> ModelCard:
    """The old card with what only the new one knows."""
    data: Any = old.data
    known: Any = new.data
    if known.eval_results and not data.eval_results:
        data.eval_results, data.model_name = known.eval_results, data.model_name or known.model_name
    for key in ("library_name", "base_model", "datasets", "language", "license", "metrics", "pipeline_tag"):
        if getattr(data, key) is None:
            setattr(data, key, getattr(known, key))
    data.tags = list(dict.fromkeys([*(data.tags or []), *(known.tags or [])]))
    part = new.text[new.text.index(BEGIN) :]
    if _MARKED.search(old.text):
        old.text = _MARKED.sub(lambda _: part, old.text, count=1)
    else:
        old.text = f"{old.text.rstrip()}\n\n{part}"
    return old


def _section(
    model: nn.Module, plan: RankPlan, report: FactorizationReport | None, task: str | None, numbers: Mapping[str, float]
) -> str:
    """Our part of the text, between two marks."""
    before, after = plan.parameters()
    total = count_parameters(model)
    flops = ["their FLOPs a token", *_change(FLOPS_PER_PARAMETER * before, FLOPS_PER_PARAMETER * after)]
    on_maps = any(
        kind_of(layer).has_maps for layer in low_rank_layers(model).values()
    )  # then it takes a forward to know
    parts = [
        BEGIN,
        *_how_to_load(model, task),
        "## Size",
        _table(
            ["", "before", "after", ""],
            [
                ["parameters", *_change(total + before - after, total)],
                ["of these, factorized projections", *_change(before, after)],
                *([] if on_maps else [flops]),
            ],
        ),
        *([_history(report)] if report is not None else []),
        "## Ranks",
        _ranks(plan),
    ]
    if numbers:
        rows = [[_cell(key), f"{value:.4g}"] for key, value in numbers.items()]
        parts += ["## Results", _table(["metric", "value"], rows)]
    return "\n\n".join([*parts, END])


def _how_to_load(model: nn.Module, task: str | None) -> list[str]:
    auto = auto_class(model)
    imported, pipeline = (
        (auto, "") if task is None else (f"{auto}, pipeline", f'\npipe = pipeline("{task}", model=folder)')
    )
    return [
        "## How to load",
        "```sh\npip install hf-cuttlefish\n```",
        "```python\n"
        "import hf_cuttlefish  # first: transformers alone refuses this folder\n"
        f"from transformers import {imported}\n\n"
        'folder = "..."  # this folder, or its name on the hub\n'
        f"model = {auto}.from_pretrained(folder)"
        f"{pipeline}\n```",
        f"Without the package, `{auto}.from_pretrained(folder, trust_remote_code=True)` loads it through the file "
        "`modeling_low_rank.py` in this folder.",
        "`hf_cuttlefish.merge(model)` turns it into an ordinary dense model, and "
        "`hf_cuttlefish.save_merged(model, folder)` saves one that loads without the package.",
    ]


def _history(report: FactorizationReport) -> str:
    when = f" after step {report.step}" if report.step is not None else ""
    return f"The ranks were chosen by the rule `{report.plan.rule}`; the layers were exchanged{when}."


def _ranks(plan: RankPlan) -> str:
    groups: dict[str, list[RankDecision]] = {}
    for name, decision in plan.decisions.items():
        groups.setdefault(group_name(name), []).append(decision)
    rows = [
        [
            f"`{name}`",
            ", ".join(dict.fromkeys(f"{d.out_features} x {d.in_features}" for d in group)),
            ", ".join("dense" if d.rank is None else str(d.rank) for d in group),
        ]
        for name, group in groups.items()
    ]
    return _table(["layers", "shape", "rank, first to last block"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _change(before: int, after: int) -> list[str]:
    return [f"{before:,}", f"{after:,}", f"{after / max(1, before):.0%}"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics without the Trainer's prefix, its times and its speeds."""
    found = {}
    for key, value in metrics.items():
        short = key.removeprefix("eval_").removeprefix("test_")
        timing = short.endswith(("_per_second", "runtime", "_time")) or short in ("epoch", "step")
        if not timing and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[short] = float(value)
    return found


def _results(task: str | None, datasets: Sequence[str], numbers: Mapping[str, float]) -> list[EvalResult]:
    """For the front matter; which of several data sets the numbers belong to is not known."""
    if task is None or len(datasets) != 1:
        return []
    return [EvalResult(task, datasets[0], datasets[0], key, value, metric_name=key) for key, value in numbers.items()]


def auto_class(model: nn.Module) -> str:
    """The class whose `from_pretrained` loads such a model."""
    return _AUTO_CLASSES.get(_task(model) or "", type(model).__name__)


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    classes: Any
    for task, classes in TASK_MAPPING.items():
        for value in classes.values():
            if name == value or (isinstance(value, (tuple, list)) and name in value):
                return task
    return None
