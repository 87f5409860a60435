"""The plan: which layer gets which rank, with the numbers behind each, its JSON form and its table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..layers.dense import check_rank
from ..layers.sizes import group_name
from .files import replaced
from .tables import short_count, text_table

PLAN_VERSION = 1


LARGEST_SIZE = 2**40
"""Of a layer's inputs or outputs in a plan; what is larger was never written by us."""


def break_even_rank(in_features: int, out_features: int) -> int:
    """Largest rank at which a pair is smaller than the layer: r (m + n) < m n. 0 if there is none (1 x n layers)."""
    return (in_features * out_features - 1) // (in_features + out_features)


@dataclass(frozen=True)
class RankDecision:
    """One layer's line in a plan. `rank` is None where the layer stays dense, and `reason` says why.

    count: how many matrices of that size the weight is, all cut at that rank.
    """

    in_features: int
    out_features: int
    rank: int | None
    reason: str
    stable_rank: float | None = None
    predicted_loss_increase: float | None = None
    count: int = 1

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def break_even(self) -> int:
        return break_even_rank(self.in_features, self.out_features)

    @property
    def parameters_before(self) -> int:
        return self.count * self.in_features * self.out_features

    @property
    def parameters_after(self) -> int:
        if self.rank is None:
            return self.parameters_before
        return self.count * self.rank * (self.in_features + self.out_features)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `count` only where the weight is a stack of matrices."""
        return {k: v for k, v in asdict(self).items() if k != "count" or v != 1}


@dataclass(eq=False)
class RankPlan(Mapping[str, int]):
    """A mapping {module name: rank} of the layers to factorize, with the numbers behind each in `decisions`.

    `decisions` also holds the layers that stay dense. `rule` is the rule that made it, `notes` what is worth telling.

    Raises:
        TypeError, ValueError: a rank that is no whole number between 1 and min(in_features, out_features).
    """

    decisions: dict[str, RankDecision] = field(default_factory=dict)
    rule: str = "by hand"
    notes: list[str] = field(default_factory=list)
    predicted_loss_increase: float | None = None

    def __post_init__(self) -> None:
        for name, d in self.decisions.items():
            if not isinstance(d, RankDecision):
                raise TypeError(
                    f"decisions must hold a RankDecision for {name}, got {d!r:.80}; {{name: rank}} can be given to factorize as it is"
                )
            for size in (d.in_features, d.out_features, d.count):
                if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_SIZE:
                    raise ValueError(f"{name} has the size {size!r}: sizes are whole numbers from 1 to {LARGEST_SIZE}")
            for field_name in ("stable_rank", "predicted_loss_increase"):
                _check_number(getattr(d, field_name), f"{field_name} of {name}")
            if d.rank is not None:
                check_rank(d.rank, d.in_features, d.out_features, name)
        _check_number(self.predicted_loss_increase, "the plan's predicted_loss_increase")

    def __eq__(self, other: object) -> bool:
        """Equal to another plan with the same decisions, and to any mapping with the same ranks."""
        if isinstance(other, RankPlan):
            return self.to_dict() == other.to_dict()
        return Mapping.__eq__(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, name: str) -> int:
        decision = self.decisions.get(name)
        if decision is None or decision.rank is None:
            raise KeyError(name)
        return decision.rank

    def __iter__(self) -> Iterator[str]:
        return (name for name, d in self.decisions.items() if d.rank is not None)

    def __len__(self) -> int:
        return sum(d.rank is not None for d in self.decisions.values())

    def parameters(self) -> tuple[int, int]:
        """Weight parameters of all layers decided on, before and after."""
        decisions = self.decisions.values()
        return sum(d.parameters_before for d in decisions), sum(d.parameters_after for d in decisions)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with a `version`."""
        return {
            "version": PLAN_VERSION,
            "rule": self.rule,
            "notes": list(self.notes),
            "predicted_loss_increase": self.predicted_loss_increase,
            "layers": {name: d.to_dict() for name, d in self.decisions.items()},
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to `path` as well if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            with replaced(Path(path)) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RankPlan:
        """Reads what `to_dict` wrote. Raises ValueError for anything else, naming the field."""
        if not isinstance(data, Mapping) or not isinstance(data.get("layers"), Mapping):
            raise ValueError(
                "a rank plan is a JSON object with 'layers': {name: {in_features, out_features, rank, ...}}"
            )
        version = data.get("version", PLAN_VERSION)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"the plan's version is {version!r}: it must be a whole number of at least 1")
        if version > PLAN_VERSION:
            raise ValueError(
                f"this plan has version {version}, and this hf_cuttlefish reads up to {PLAN_VERSION}: upgrade it"
            )
        decisions = {}
        for name, d in data["layers"].items():
            try:
                decisions[name] = RankDecision(**d)
            except TypeError as error:
                raise ValueError(f"layer {name!r} of the plan: {error}") from error
        notes = data.get("notes", [])
        if not isinstance(notes, list):
            raise ValueError(f"the plan's notes must be a list, got {notes!r}")
        try:
            return cls(decisions, str(data.get("rule", "by hand")), notes, data.get("predicted_loss_increase"))
        except TypeError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def from_json(cls, source: str | Path) -> RankPlan:
        """Reads JSON text, or the file at a path. Raises ValueError for what is no plan, FileNotFoundError for no file."""
        try:
            is_text = isinstance(source, str) and source.lstrip().startswith("{")
            data = json.loads(str(source) if is_text else Path(source).read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"the plan is no JSON: {error}") from error
        return cls.from_dict(data)

    def summary(self) -> str:
        """A table, one line per group of equal projections: full rank, ranks, parameters before and after."""

        return "\n".join([plan_table(self), *(f"note: {note}" for note in self.notes)])


def _check_number(value: Any, name: str) -> None:
    """Raises TypeError, naming the field, unless the value is a number that fits a float, or None."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300
    if not (value is None or isinstance(value, float) or whole):
        raise TypeError(f"{name} must be a number or null, got {value!r:.80}")


def plan_table(plan: RankPlan) -> str:
    """The plan as a text table, one line per group of layers that differ only in their block's number."""

    groups: dict[str, list[RankDecision]] = {}
    for name, decision in plan.decisions.items():
        groups.setdefault(group_name(name), []).append(decision)
    rows: list[tuple[str, ...]] = [("layers", "count", "full rank", "rank", "before", "after", "share")]
    for name, decisions in groups.items():
        rows.append(_row(name, decisions))
    rows.append(_row(f"all ({plan.rule})", list(plan.decisions.values()), total=True))
    return text_table(rows, total=True)


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
        short_count(before),
        short_count(after),
        f"{after / max(1, before):.0%}",
    )
