"""The state of a run, as checkpoints hold it: written as JSON, and checked before anything is believed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..config import ALL, CuttlefishConfig
from ..decide.plan import RankPlan
from ..layers.low_rank import low_rank_layers
from ..measure.history import StableRankHistory
from ..patch.report import FactorizationReport

STATE_VERSION = 1
_FIELDS = (
    "global_step",
    "switch_at",
    "switch_step",
    "reason",
    "finished",
    "gathering",
    "plan",
    "report",
    "history",
)


_OF_TIME = (
    "switch_step",
    "earliest_switch",
    "latest_switch",
    "stable_rank_tolerance",
    "check_steps",
    "statistics_steps",
    "rank_rule",
)
"""Fields of the config that say when to switch."""
_ALWAYS_FREE = ("on_error", "switch", "version")
"""Fields that may change even after the switch."""


@dataclass
class RunState:
    """Where a run is, but for the statistics being gathered.

    Attributes:
        global_step: optimizer steps taken. switch_at: step at which the switch is due, or None. switch_step: of the switch, or
            None. reason: why. finished: nothing more will come. gathering: statistics are being gathered.
        plan, report: of the switch, or None. history: of the stable ranks. config: of the run, or None where it was not noted.
        statistics_needed: see `Schedule.need`. measured: whether there are measurements beside the state.
    """

    global_step: int
    switch_at: int | None
    switch_step: int | None
    reason: str | None
    finished: bool
    gathering: bool
    plan: RankPlan | None
    report: FactorizationReport | None
    history: StableRankHistory
    config: dict[str, Any] | None = None
    statistics_needed: int = 0
    measured: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with a `version`."""
        return {
            "version": STATE_VERSION,
            **{name: getattr(self, name) for name in _FIELDS},
            "plan": None if self.plan is None else self.plan.to_dict(),
            "report": None if self.report is None else {k: v for k, v in self.report.to_dict().items() if k != "plan"},
            "history": self.history.to_dict(),
            "config": self.config,
            "statistics_needed": self.statistics_needed,
            "measured": self.measured,
        }

    @classmethod
    def from_dict(cls, data: Any, model: nn.Module) -> RunState:
        """Reads what `to_dict` wrote, for a model that holds that checkpoint's weights already.

        Raises:
            ValueError: a state written by a newer version, one that does not fit the model, or one that is broken.
        """
        _check_fields(data)
        # JSON files are written with sorted keys; the order of layers is the model's.
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        plan = None if data["plan"] is None else RankPlan.from_dict(data["plan"])
        if plan is not None:
            plan.decisions = dict(sorted(plan.decisions.items(), key=lambda item: order.get(item[0], -1)))
        _check_model(model, plan, data["switch_step"])
        report = None
        if data["report"] is not None and plan is not None:
            report = FactorizationReport.from_dict(plan, data["report"])
        history = StableRankHistory.from_dict(data["history"])
        history.ranks = dict(sorted(history.ranks.items(), key=lambda item: order.get(item[0], -1)))
        return cls(
            data["global_step"],
            data["switch_at"],
            data["switch_step"],
            data["reason"],
            bool(data["finished"]),
            bool(data["gathering"]),
            plan,
            report,
            history,
            data.get("config") if isinstance(data.get("config"), dict) else None,
            _whole_number(data.get("statistics_needed", 0)),
            bool(data.get("measured", False)),
        )

    def under(self, config: CuttlefishConfig, layers: Collection[str]) -> RunState:
        """The state as a run with this config, and these target layers, goes on from it. A new config counts from here on.

        Raises:
            ValueError: a field that has decided the switch, which has been, is another now; it is named.
        """
        new, old = config.to_dict(), self.config
        changed = [] if old is None else [name for name in new if name in old and new[name] != old[name]]
        named = [c["target_modules"] for c in (new, old or new) if "target_modules" in c]
        if self.switch_step is not None and all(value in ALL for value in named):
            changed = [name for name in changed if name != "target_modules"]  # the default was "all-linear" once
        if self.switch_step is not None:
            for name in changed:
                if name not in _ALWAYS_FREE:
                    raise ValueError(
                        f"{name} is {new[name]!r}, and the run to be resumed has switched at step {self.switch_step} with "
                        f"{(old or {})[name]!r}, which nothing changes any more: leave {name} as it was, or resume from a checkpoint "
                        "before the switch"
                    )
            return self
        state = replace(self, config=new)
        if set(changed) - set(_ALWAYS_FREE):
            state.finished = False  # what failed may go well with another config
        if set(changed) & set(_OF_TIME):
            state.switch_at, state.gathering = None, False
        if set(layers) != set(self.history.ranks):
            known = {name: self.history.ranks[name] for name in layers if name in self.history.ranks}
            state.history = StableRankHistory()
            if len(known) == len(layers):
                state.history.steps, state.history.ranks = self.history.steps, known
            elif state.gathering:  # layers that were not gathered before
                state.switch_at, state.gathering = None, False
        return state


def _whole_number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"the saved state's statistics_needed must be a whole number of steps, got {value!r:.80}")
    return value


def _check_fields(data: Any) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"the saved state of Cuttlefish must be a JSON object, got {data!r:.80}")
    version = data.get("version", STATE_VERSION)
    missing = sorted(set(_FIELDS) - set(data))
    if missing:
        raise ValueError(f"this is no state of Cuttlefish: it has no {', '.join(missing)}")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= STATE_VERSION:
        raise ValueError(
            f"this state has version {version}, and this hf_cuttlefish reads up to {STATE_VERSION}: upgrade it"
        )
    for name in ("global_step", "switch_at", "switch_step"):
        if type(data[name]) is not int and (data[name] is not None or name == "global_step"):
            raise ValueError(f"the saved state's {name} must be a whole number of steps, got {data[name]!r:.80}")


def _check_model(model: nn.Module, plan: RankPlan | None, switch_step: Any) -> None:
    """Raises ValueError unless the model has the factorized layers of the plan, and no others."""
    present = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    if plan is not None and dict(plan) != present:
        raise ValueError(
            f"the saved run had switched at step {switch_step} and factorized {len(plan)} layers, but the model "
            f"here has {len(present)} factorized layers: load the checkpoint's weights first "
            "(follow_checkpoints(model), then load_state_dict; with model_init, call follow_checkpoints inside it)"
        )
    if plan is None and present:
        raise ValueError("the saved run had not switched, but the model here is factorized already")
