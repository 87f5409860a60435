"""The check of one class: named steps, one after another."""

from __future__ import annotations

import copy
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn

from hf_cuttlefish import CuttlefishConfig, estimate_ranks, factorize, merge
from hf_cuttlefish.decide.targets import find_targets
from hf_cuttlefish.decide.vocabulary import find_vocabulary
from hf_cuttlefish.layers.kinds import KINDS, kind_of
from hf_cuttlefish.layers.low_rank import LowRankLayer

from .classes import find_class
from .inputs import run
from .outcomes import FAILS, NOT_BUILT, NOT_RUN, PASSES, REFUSED, UPSTREAM, require, shorten
from .tiny import build, build_tiny


@dataclass
class Trial:
    """A tiny model on its way through the steps.

    Attributes:
        batch: what its forward takes; None if no batch fits. config: of the model, as it was before it was built.
        shapes: (out, in, number of matrices) of the layers to factorize. size: parameters of the dense model. dense: its outputs.
        expected: outputs once it is factorized. loaded: the model that came back from the disk.
        result: what is known of the class so far.
    """

    model_class: type
    auto_name: str
    model: Any
    batch: dict[str, torch.Tensor] | None
    config: Any
    result: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    size: int = 0
    dense: list[torch.Tensor] = field(default_factory=list)
    expected: list[torch.Tensor] = field(default_factory=list)
    loaded: Any = None


class NothingToFactorize(Exception):
    """The class is refused; the message is our error's."""


def select(trial: Trial) -> None:
    """Find the layers; an error of ours, before anything is changed, is an answer too."""
    try:
        layers = find_targets(trial.model)
        trial.shapes = shapes_of(layers)
    except (ValueError, TypeError) as error:
        raise NothingToFactorize(shorten(error)) from error
    trial.result["layers"] = len(trial.shapes)
    trial.result["kinds"] = dict(Counter(map(kind_name, layers.values())))


def plan(trial: Trial) -> None:
    """The same plan twice from one seed."""
    config = CuttlefishConfig(rank_rule="energy", rank_multiple=1)
    # From the config as it was: building MaskFormer changes the one that it is given.
    again = build(trial.model_class, copy.deepcopy(trial.config))
    plans = [estimate_ranks(m, config).to_json() for m in (trial.model, again)]
    require(plans[0] == plans[1], "another plan from the same seed")


def full_rank(trial: Trial) -> None:
    """At full rank the outputs are the dense model's."""
    if trial.batch is None:
        return
    trial.dense = run(trial.model, trial.batch)
    exact = copy.deepcopy(trial.model)
    factorize(exact, {n: min(m, n_in) for n, (m, n_in, _) in trial.shapes.items()})
    compare(run(exact, trial.batch), trial.dense, 2e-3, "at full rank")


def factorize_low(trial: Trial) -> None:
    """Low rank leaves as many parameters as the plan says."""
    trial.size = count(trial.model)
    ranks = {n: max(1, min(min(shape[:2]) // 4, 4)) for n, shape in trial.shapes.items()}
    factorize(trial.model, ranks)
    saved = sum(c * (m * n - ranks[name] * (m + n)) for name, (m, n, c) in trial.shapes.items())
    require(trial.size - count(trial.model) == saved, "the parameter count is not the plan's")


def go_backward(trial: Trial) -> None:
    """Finite outputs, and gradients for both factors."""
    if trial.batch is None:
        return
    trial.expected = run(trial.model, trial.batch)
    require(finite(trial.expected) or not finite(trial.dense), "outputs are not finite")
    trial.result["trained"] = backward(trial.model, trial.batch)


def save_and_load(trial: Trial) -> None:
    """The saved folder gives the same layers, weights and outputs back."""
    model = trial.model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        trial.loaded, trial.result["loaded_by"] = load(trial.model_class, trial.auto_name, folder)
        loaded, saved = ranks_of(trial.loaded), ranks_of(model)
        require(loaded == saved, f"{len(loaded)} factorized layers loaded, {len(saved)} saved")
        same_weights(model, trial.loaded)
        if trial.batch is not None:
            compare(run(trial.loaded, trial.batch), trial.expected, 1e-4, "after loading")


def merge_back(trial: Trial) -> None:
    """Merged, the loaded model is dense again and gives the same outputs."""
    loaded = trial.loaded
    merge(loaded)
    require(not ranks_of(loaded) and not hasattr(loaded.config, "quantization_config"), "something stays factorized")
    require(count(loaded) == trial.size, "another parameter count after merging")
    if trial.batch is not None:
        compare(run(loaded, trial.batch), trial.expected, 2e-3, "after merging")


def vocabulary(trial: Trial) -> None:
    """What `embeddings=True` adds, alone and from a new model: the tables of tokens and their output layers, through the same steps."""
    model = build(trial.model_class, copy.deepcopy(trial.config))
    try:
        layers = find_vocabulary(model)
    except (ValueError, TypeError) as error:
        trial.result["vocabulary"] = shorten(error)
        return
    trial.result["vocabulary"] = {
        "tables": sum(kind_of(layer).is_vocabulary for layer in layers.values()),
        "tied": sum(len(kind_of(layer).tied(model)) for layer in layers.values()),
        "untied": sum(not kind_of(layer).is_vocabulary for layer in layers.values()),
    }
    alone = Trial(trial.model_class, trial.auto_name, model, trial.batch, trial.config, {}, shapes_of(layers))
    for action in (full_rank, factorize_low, go_backward, save_and_load, merge_back):
        action(alone)
    trial.result["vocabulary"]["trained"] = alone.result.get("trained", 0)


STEPS: tuple[tuple[str, Callable[[Trial], None]], ...] = (
    ("select", select),
    ("plan", plan),
    ("full rank", full_rank),
    ("factorize", factorize_low),
    ("backward", go_backward),
    ("save and load", save_and_load),
    ("merge", merge_back),
    ("vocabulary", vocabulary),
)
"""What is done to a model of each class, under the names that the records have."""


def shapes_of(layers: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """(out, in, number of matrices) of each."""
    return {name: (*kind_of(layer).size, kind_of(layer).count) for name, layer in layers.items()}


def kind_name(layer: nn.Module) -> str:
    """The word of the layer's kind; convolutions in groups apart."""
    word = next(word for word, kind in KINDS.items() if type(kind_of(layer)) is kind)
    return f"{word}, grouped" if getattr(layer, "groups", 1) != 1 else word


def check(name: str, model_type: str, auto_name: str) -> dict[str, Any]:
    """The result of one class: {"status", "reason", ...}. Raises nothing."""
    result: dict[str, Any] = {"class": name, "model_type": model_type, "auto": auto_name}
    model_class = find_class(name, model_type)
    try:
        own = getattr(model_class, "config_class", None)
    except ImportError as error:  # a stand-in for a class that needs a package
        return {**result, "status": NOT_BUILT, "reason": shorten(error)}
    result["model_type"] = getattr(own, "model_type", "") or model_type  # not that of an alias
    model, batch, note = build_tiny(model_class, model_type)
    if model is None:
        return {**result, "status": NOT_BUILT, "reason": note}
    result |= {"recipe": note["recipe"], "parameters": count(model)}
    trial = Trial(model_class, auto_name, model, batch, note["config"], result)
    for step, action in STEPS:
        try:
            action(trial)
        except NothingToFactorize as error:
            return {**result, "status": REFUSED, "reason": str(error)}
        except Exception as error:
            upstream = control(model_class, copy.deepcopy(note["config"]), batch, step, auto_name)
            failed = {**result, "status": UPSTREAM if upstream else FAILS, "reason": f"{step}: {shorten(error)}"}
            return failed | ({"control": upstream} if upstream else {})
    if batch is None:
        return {**result, "status": NOT_RUN, "reason": note["forward"]}
    return {**result, "status": PASSES, "reason": ""}


def control(model_class: type, config: Any, batch: dict[str, torch.Tensor] | None, step: str, auto_name: str) -> str:
    """What the same step does to the dense model, untouched by us: what goes wrong there, or "" if nothing does."""
    try:
        model = build(model_class, config)
        if step == "plan":
            return ""
        if batch is not None:
            dense = run(model, batch)
            compare(run(model, batch), dense, 1e-4, "in a second forward")
            if step in ("full rank", "merge", "vocabulary"):  # how much rounding is multiplied by this model
                moved = copy.deepcopy(model)
                with torch.no_grad():
                    for parameter in moved.parameters():
                        parameter.mul_(1 + 1e-6)
                compare(run(moved, batch), dense, 2e-3, "after a change of 1e-6")
            if step in ("backward", "vocabulary"):
                mean_square(model, batch)
        if step in ("save and load", "merge", "vocabulary"):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                loaded, _ = load(model_class, auto_name, folder)
                same_weights(model, loaded)
                if batch is not None:
                    compare(run(loaded, batch), dense, 1e-4, "dense, after loading")
    except Exception as error:
        return shorten(error)
    return ""


def backward(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Layers whose two factors get a finite gradient that is not zero. Raises where none does though it could."""
    try:
        loss = mean_square(model, batch)
    except AssertionError:  # Reformer goes backward in training mode alone
        loss = mean_square(model.train(), batch)
        model.eval()
    if loss is None:
        return 0  # the class runs its forward without gradients
    trained = 0
    for name, layer in low_rank(model).items():
        grads = [layer.down.weight.grad, layer.up.weight.grad]
        present = [g for g in grads if g is not None]
        require(len(present) in (0, 2), f"only one factor of {name} has a gradient")
        require(all(bool(g.isfinite().all()) for g in present) or not math.isfinite(float(loss)), f"gradient of {name}")
        trained += len(present) == 2 and all(bool(g.any()) for g in present)
    model.zero_grad()
    return trained


def mean_square(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """A loss from whatever the model returns, after its backward; None where nothing needs a gradient."""
    losses = [t.float().square().mean() for t in run(model, batch, gradients=True) if t.requires_grad]
    if not losses:
        return None
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.detach()


def load(model_class: type, auto_name: str, folder: str) -> tuple[Any, str]:
    """The saved model, and what loaded it: the auto class where it gives this class, else the class itself."""
    try:
        model = getattr(hf, auto_name).from_pretrained(folder)
        by = auto_name
    except Exception:  # AutoBackbone takes no folder; a failure of ours comes again in the next line
        model, by = None, ""
    if type(model) is not model_class:  # one auto class can stand for several classes
        model, by = model_class.from_pretrained(folder), model_class.__name__  # type: ignore[attr-defined]
    return model.float().eval(), by


def low_rank(model: nn.Module) -> dict[str, LowRankLayer]:
    """The factorized layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLayer)}


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Their ranks."""
    return {n: m.rank for n, m in low_rank(model).items()}


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in model.parameters())


def same_weights(model: nn.Module, other: nn.Module) -> None:
    """Raises unless both hold the same parameters, bit for bit."""
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        require(name in theirs, f"{name} is missing after loading")
        require(torch.equal(parameter, theirs[name]), f"{name} has other values after loading")


def finite(outputs: list[torch.Tensor]) -> bool:
    """Whether no output is NaN or Inf."""
    return all(bool(t.isfinite().all()) for t in outputs)


def compare(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float, when: str) -> None:
    """Raises where an output differs by more than a share of its largest value."""
    require(len(actual) == len(expected), f"another number of outputs {when}")
    for x, y in zip(actual, expected, strict=True):
        require(x.shape == y.shape, f"another shape of an output {when}")
        x, y = x.nan_to_num(), y.nan_to_num()
        far = float((x - y).abs().max()) / (1e-6 + float(y.abs().max()))
        require(far <= tolerance, f"outputs differ by {far:.1e} of their size {when}")
