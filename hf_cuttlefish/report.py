"""Tell: what the switch did, as a table, as numbers, and as lines for Trainer's log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .plan import RankDecision, RankPlan


@dataclass
class FactorizationReport:
    """What `factorize` did. Counts are numbers of parameters.

    Attributes:
        plan: the plan carried out.
        parameters_before, parameters_after: of the whole model, each parameter counted once.
        target_parameters_before, target_parameters_after: weights of the layers decided on.
        encoder_parameters_before, encoder_parameters_after: of the repeated blocks' container (everything in it), or of
            the targets where there is no such container.
        seconds: time of each part of the switch.
        optimizer: what became of the optimizer's state.
        skipped: parameters that are no layers (3-D expert weights) and stayed dense.

    Raises:
        TypeError: a count that is no whole number, or another field of the wrong type.
    """

    plan: RankPlan
    parameters_before: int
    parameters_after: int
    target_parameters_before: int
    target_parameters_after: int
    encoder_parameters_before: int
    encoder_parameters_after: int
    seconds: dict[str, float] = field(default_factory=dict)
    optimizer: str = "no optimizer"
    skipped: dict[str, int] = field(default_factory=dict)
    step: int | None = None

    def __post_init__(self) -> None:
        counts = {f.name: getattr(self, f.name) for f in fields(self) if "parameters" in f.name}
        wrong = [f"{name} {value!r:.80}" for name, value in counts.items() if type(value) is not int or value < 0]
        wrong += [f"step {self.step!r:.80}"] if not isinstance(self.step, int | None) else []
        wrong += [f"optimizer {self.optimizer!r:.80}"] if not isinstance(self.optimizer, str) else []
        for name, kinds in (("seconds", (int, float)), ("skipped", int)):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(v, kinds) for v in value.values()):
                wrong.append(f"{name} {value!r:.80}")
        if wrong:
            raise TypeError(f"the report of the switch has values of the wrong type: {', '.join(wrong)}")

    @classmethod
    def from_dict(cls, plan: RankPlan, data: Mapping[str, Any]) -> FactorizationReport:
        """Reads what `to_dict` wrote, the plan aside. Raises ValueError for anything else."""
        try:
            return cls(plan=plan, **data)
        except TypeError as error:
            raise ValueError(f"the saved report of the switch cannot be read: {error!s:.200}") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        result = {k: v for k, v in asdict(self).items() if k != "plan"}
        return {**result, "plan": self.plan.to_dict()}

    def headline(self) -> str:
        """One line for the log."""
        return (
            f"Cuttlefish factorized {len(self.plan)} of {len(self.plan.decisions)} target layers"
            + (f" at step {self.step}" if self.step is not None else "")
            + f": {_count(self.parameters_before)} -> {_count(self.parameters_after)} parameters "
            f"({self.parameters_after / max(1, self.parameters_before):.0%}), encoder "
            f"{_count(self.encoder_parameters_before)} -> {_count(self.encoder_parameters_after)} "
            f"({self.encoder_parameters_after / max(1, self.encoder_parameters_before):.0%})"
        )

    def __str__(self) -> str:
        lines = [self.headline(), plan_table(self.plan)]
        after, before = self.target_parameters_after, max(1, self.target_parameters_before)
        lines.append(f"FLOPs of the target layers (estimated, per token): {after / before:.0%} of before")
        if self.skipped:
            lines.append(
                f"left dense: {len(self.skipped)} 3-D expert weights, {_count(sum(self.skipped.values()))} parameters"
            )
        lines += [f"note: {note}" for note in self.plan.notes]
        lines.append(f"optimizer: {self.optimizer}")
        if self.seconds:
            lines.append("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()))
        return "\n".join(lines)


def plan_table(plan: RankPlan) -> str:
    """The plan as a text table, one line per group of layers that differ only in their block's number."""
    from .plan import group_name

    groups: dict[str, list[RankDecision]] = {}
    for name, decision in plan.decisions.items():
        groups.setdefault(group_name(name), []).append(decision)
    rows: list[tuple[str, ...]] = [("layers", "count", "full rank", "rank", "before", "after", "share")]
    for name, decisions in groups.items():
        rows.append(_row(name, decisions))
    rows.append(_row(f"all ({plan.rule})", list(plan.decisions.values()), total=True))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:-1], "-" * len(lines[0]), lines[-1]])


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", None) or parameter.numel()  # ZeRO-3 holds a part


def count_parameters(model: nn.Module, names: set[str] | None = None) -> int:
    """Number of parameters, each counted once; only those under the given module names if any are given."""
    if names is None:
        return sum(_numel(p) for p in model.parameters())
    found = {id(p): _numel(p) for name in names for p in model.get_submodule(name).parameters()}
    return sum(found.values())


def block_containers(model: nn.Module, layers: Mapping[str, Any]) -> set[str]:
    """Outermost containers of repeated blocks (the module holding the numbered children) that hold the given layers."""
    containers = set()
    for name in layers:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        containers.add(".".join(parts[:first]) if first else name)
    return containers


def _row(name: str, decisions: list[RankDecision], total: bool = False) -> tuple[str, ...]:
    ranks = sorted(d.rank for d in decisions if d.rank is not None)
    dense = sum(d.rank is None for d in decisions)
    spread = "dense" if not ranks else str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}-{ranks[-1]}"
    if ranks and dense:
        spread += f", {dense} dense"
    full = sorted({d.full_rank for d in decisions})
    before, after = sum(d.parameters_before for d in decisions), sum(d.parameters_after for d in decisions)
    return (
        name,
        str(len(decisions)),
        "" if total else "-".join(str(f) for f in ({full[0], full[-1]} if len(full) > 1 else full)),
        "" if total else spread,
        _count(before),
        _count(after),
        f"{after / max(1, before):.0%}",
    )


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
