"""Carry the optimizer: the one place that touches an optimizer. Factors take their weight's place, and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layers.parts import whole
from ..maths.projection import KINDS
from .edits import Edit
from .factor_state import FactorParameters, State, carried_pairs, not_carried, state_of_factors, state_summary
from .optimizer_parts import beside_groups, groups_in, kept_elsewhere, states_in
from .rehearsal import Verdict, rehearse


class SwapParameters(Edit):
    """The factors take their weights' places in an optimizer, with their weights' state projected.

    Each pair stands where its weight stood, (down, up), so that groups keep the order of `named_parameters` and saved states,
    which go by position, load again. The optimizer, those inside it and their groups stay the same objects: the scheduler and
    a GradScaler keep what they know. `apply` and `undo` only swap references, so neither can fail half-way.

    Args:
        mode: "carry" projects the state where that is right, and else starts it as the optimizer would; "reset" always does.
        gather: gives the whole of a tensor of which the processes hold parts.
        verdicts: as `check_can_switch` gives them; asked for where they are missing.

    Raises:
        TypeError: as `inner_optimizer`.
        ValueError: as `check_holds` and `check_can_switch`, or an unknown mode.
    """

    def __init__(
        self,
        optimizer: Any,
        pairs: Sequence[FactorParameters],
        mode: str = "carry",
        gather: Callable[[torch.Tensor], torch.Tensor] = whole,
        verdicts: Mapping[int, Verdict] | None = None,
    ) -> None:
        self.optimizer = inner_optimizer(optimizer)
        weights = {p.name: p.weight for p in pairs}
        check_holds(self.optimizer, weights)
        if verdicts is None:
            verdicts = check_can_switch(self.optimizer, weights, mode)
        name = type(self.optimizer).__name__
        # Groups and state of the optimizer itself, and of those inside it.
        self._of_groups = groups_in(self.optimizer)
        self._groups = groups_with_factors(self._of_groups, pairs)
        self._states = states_in(self.optimizer)
        self._new = [
            state_of_factors(held, pairs, mode, gather, name, State(self.optimizer, which, verdicts))
            for which, held in enumerate(self._states)
        ]
        self._removed = [p.weight for p in pairs]
        had = sum(any(held.get(pair.weight) for held in self._states) for pair in pairs)
        self.summary = state_summary(name, carried_pairs(pairs, self._states, verdicts, mode), had, len(pairs))
        self._beside = beside_groups(self._of_groups, self._removed)
        self._old_groups: list[list[nn.Parameter]] = []
        self._old_state: list[dict[torch.Tensor, Any]] = [{} for _ in self._states]

    def apply(self) -> None:
        self._old_groups = [group["params"] for group in self._of_groups]
        for group, params in zip(self._of_groups, self._groups, strict=True):
            group["params"] = params
        for held, new, old in zip(self._states, self._new, self._old_state, strict=True):
            for parameter in self._removed:
                if parameter in held:
                    old[parameter] = held.pop(parameter)
            held.update(new)
        for kept, parameter, _ in self._beside:
            kept.pop(parameter, None)

    def undo(self) -> None:
        if not self._old_groups:
            return
        for group, params in zip(self._of_groups, self._old_groups, strict=True):
            group["params"] = params
        for held, new, old in zip(self._states, self._new, self._old_state, strict=True):
            for parameter in new:
                held.pop(parameter, None)
            held.update(old)
        for kept, parameter, value in self._beside:
            kept[parameter] = value


class CheckParameters(Edit):
    """Changes nothing, and fails unless the optimizer holds what it held, each replaced weight exchanged for its two factors."""

    def __init__(self, model: nn.Module, optimizer: Any, pairs: Sequence[FactorParameters]) -> None:
        self.model, self.optimizer, self.pairs = model, inner_optimizer(optimizer), pairs
        self._before = {id(p) for p in held_by(self.optimizer)}

    def apply(self) -> None:
        """Raises RuntimeError for a difference."""
        after = [id(p) for p in held_by(self.optimizer)]
        expected = set(self._before)
        for pair in self.pairs:
            if id(pair.weight) in expected:
                expected -= {id(pair.weight)}
                expected |= {id(pair.down), id(pair.up)}
        stale = {id(p.weight) for p in self.pairs} & {id(p) for p in self.model.parameters()}
        if set(after) != expected or len(after) != len(set(after)) or stale:
            raise RuntimeError(
                "after the switch the optimizer and the model hold different parameters; nothing was changed"
            )


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper.

    Raises:
        TypeError: something whose parameter groups cannot be edited (a DeepSpeed or an unknown optimizer).
    """
    if optimizer is None:
        raise TypeError(
            "optimizer is None: give the torch optimizer that trains the model, such as torch.optim.AdamW(model.parameters()); "
            "without training, factorize(model, plan) needs none"
        )
    seen = unwrapped(optimizer)
    kind = type(seen)
    if kind.__module__.startswith("deepspeed") or not isinstance(seen, torch.optim.Optimizer):
        raise TypeError(
            f"{kind.__module__}.{kind.__name__} is no torch.optim.Optimizer whose parameters can be replaced"
        )
    return seen


def unwrapped(optimizer: Any) -> Any:
    """What Accelerate's wrapper is around."""
    while type(optimizer).__module__.startswith("accelerate.") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_holds(optimizer: Any, weights: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError unless the optimizer holds every trainable weight given, naming the first that it does not."""
    held = {id(p) for p in held_by(inner_optimizer(optimizer))}
    missing = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {missing[0]}.weight ({len(missing)} of {len(weights)} target weights are missing): "
            "pass the optimizer of this very model, made after the model was last changed, or freeze the layers with "
            "requires_grad_(False)"
        )


def held_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimizer and of those inside it, each as often as it stands in one of them."""
    inside = [p for group in groups_in(optimizer) for p in group["params"]]
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for group in optimizer.param_groups for p in group["params"]] + list(
        {id(p): p for p in inside if id(p) not in own}.values()
    )


# --- before the first step ---


def check_can_switch(optimizer: Any, weights: Mapping[str, nn.Parameter], mode: str = "carry") -> dict[int, Verdict]:
    """What becomes of the state of each weight at the switch, by its id, tried on a miniature of the optimizer.

        check_can_switch(optimizer, {name: layer.weight for name, layer in layers.items()})

    Nothing is changed, and no random state moves on. Costs some milliseconds for each parameter group.

    Raises:
        TypeError: as `inner_optimizer`. ValueError: the optimizer knows the weights by other ways than groups and state, or can
        neither carry their state nor start it anew; the text says which.
    """
    if mode not in ("carry", "reset"):
        raise ValueError(f"optimizer_state is {mode!r}: it must be 'carry' or 'reset'")
    inner = inner_optimizer(optimizer)
    held = {id(p) for p in held_by(inner)}
    mine = {name: weight for name, weight in weights.items() if id(weight) in held}
    if (where := kept_elsewhere(inner, mine)) is not None:
        raise ValueError(
            f"{type(inner).__name__} keeps target weights in {where}, which cannot follow the switch: use an optimizer that knows "
            "its parameters by its groups and its state alone, or exclude these layers"
        )
    by_groups: dict[tuple[int, ...], Verdict] = {}
    verdicts: dict[int, Verdict] = {}
    groups = [(id(group), {id(p) for p in group["params"]}) for group in groups_in(inner)]
    for weight in mine.values():
        key = tuple(group for group, params in groups if id(weight) in params)
        if key not in by_groups:
            by_groups[key] = rehearse(inner, weight, _swap_one, mode)
        verdicts[id(weight)] = by_groups[key]
    for verdict in by_groups.values():
        if verdict.how == "refused":
            raise ValueError(
                f"the switch cannot be made with this optimizer: {verdict.why}. Use another one (AdamW, Adafactor, Lion, SGD "
                "and others are carried, see docs/optimizers.md)"
                + ("" if mode == "carry" else ", or optimizer_state='carry'")
            )
    return verdicts


def check_state(optimizer: Any, weights: Mapping[str, nn.Parameter], mode: str = "carry") -> None:
    """After the first step, when the state has appeared: raises ValueError for state with which nothing could be tried.

    Cheap where all names of the state are known.
    """
    inner = inner_optimizer(optimizer)
    if mode == "reset":
        return
    odd = {
        name: weight
        for name, weight in weights.items()
        for held in states_in(inner)
        if not_carried(held.get(weight) or {}, weight, KINDS)
    }
    verdicts = check_can_switch(inner, odd, mode) if odd else {}
    for name, weight in odd.items():
        verdict = verdicts.get(id(weight))
        if verdict is not None and verdict.how == "unknown":
            keys = [k for held in states_in(inner) for k in not_carried(held.get(weight) or {}, weight, KINDS)]
            raise ValueError(
                f"{type(inner).__name__} keeps the state {', '.join(sorted(set(keys)))} of {name}.weight, which has no known "
                f"projection, and whether it can start anew cannot be tried: {verdict.why}. Use another optimizer, or "
                "optimizer_state='reset' to start it empty all the same"
            )


def _swap_one(
    twin: torch.optim.Optimizer, weight: nn.Parameter, down: nn.Parameter, up: nn.Parameter, verdict: Verdict
) -> None:
    """The switch of a miniature."""
    pair = FactorParameters("miniature", weight, down, up)
    mode = "carry" if verdict.how == "carried" else "reset"
    SwapParameters(twin, [pair], mode, verdicts={id(weight): verdict}).apply()


def groups_with_factors(
    groups: Iterable[Mapping[str, Any]], pairs: Iterable[FactorParameters]
) -> list[list[nn.Parameter]]:
    """The parameters of each group, where each pair stands where its weight stood, or behind those that come before it now."""
    pair_of = {id(p.weight): p for p in pairs}
    found = []
    for group in groups:
        held: list[nn.Parameter] = group["params"]
        at = {id(parameter): i for i, parameter in enumerate(held)}
        placed = []
        for i, parameter in enumerate(held):
            pair = pair_of.get(id(parameter))
            place = max([i, *(at.get(id(other), i) for other in (pair.behind if pair is not None else ()))])
            placed.append((place, place > i, i, [parameter] if pair is None else [pair.down, pair.up]))
        found.append([new for *_, several in sorted(placed, key=lambda row: row[:3]) for new in several])
    return found


def follow_modules(optimizer: Any, changes: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Exchange the parameters of replaced modules, (old, new), whose new weights are about to be loaded; their state is dropped."""
    inner = inner_optimizer(optimizer)
    new_of: dict[int, list[nn.Parameter]] = {}
    gone: list[nn.Parameter] = []
    for old, new in changes:
        kept = {id(p) for p in new.parameters()}
        old_parameters = [p for p in old.parameters() if id(p) not in kept]
        fresh = [p for p in new.parameters() if id(p) not in {id(q) for q in old.parameters()}]
        for i, parameter in enumerate(old_parameters):
            new_of[id(parameter)] = fresh if i == 0 else []
        gone += old_parameters
    for group in groups_in(inner):
        group["params"] = [q for p in group["params"] for q in new_of.get(id(p), [p])]
    for state in states_in(inner):
        for parameter in gone:
            state.pop(parameter, None)
