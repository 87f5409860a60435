"""Tell: what the switch did, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..decide.plan import RankPlan, plan_table
from ..decide.tables import short_count


@dataclass
class FactorizationReport:
    """What `factorize` did. Counts are numbers of parameters.

    Attributes:
        plan: the plan carried out.
        parameters_before, parameters_after: of the whole model, each parameter counted once.
        target_parameters_before, target_parameters_after: weights of the layers decided on.
        encoder_parameters_before, encoder_parameters_after: of the repeated blocks' container (everything in it), or of
            the targets where there is no such container.
        bytes_before, bytes_after: of all weights, as a file holds them; 0 where an older version did not say.
        looked_up_before, looked_up_after: of the target parameters those that no token is multiplied by (tables of tokens).
        seconds: time of each part of the switch, and of a step before it.
        optimizer: what became of the optimizer's state.
        on_maps: whether some layers work at each position of a feature map, so that FLOPs depend on the image.
        skipped: parameters that are no layers (3-D expert weights) and stayed dense.

    Raises:
        TypeError: a count that is no whole number, or another field of the wrong type.
    """

    page: ClassVar[Callable[..., str] | None] = None
    """Writes the page of `to_html`; the package sets it when it is loaded, since pages come after reports."""

    plan: RankPlan
    parameters_before: int
    parameters_after: int
    target_parameters_before: int
    target_parameters_after: int
    encoder_parameters_before: int
    encoder_parameters_after: int
    bytes_before: int = 0
    bytes_after: int = 0
    looked_up_before: int = 0
    looked_up_after: int = 0
    on_maps: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    optimizer: str = "no optimizer"
    skipped: dict[str, int] = field(default_factory=dict)
    step: int | None = None

    def __post_init__(self) -> None:
        self.known: dict[str, Any] = {}  # what a callback knows of the run besides, for `to_html`
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        wrong = [f"{name} {value!r:.80}" for name, value in counts.items() if type(value) is not int or value < 0]
        wrong += [f"step {self.step!r:.80}"] if not isinstance(self.step, int | None) else []
        wrong += [f"on_maps {self.on_maps!r:.80}"] if not isinstance(self.on_maps, bool) else []
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

    def to_html(
        self,
        path: str | Path | None = None,
        *,
        history: Iterable[Mapping[str, Any]] | None = None,
        log: Iterable[Mapping[str, Any]] | None = None,
        seconds: tuple[float, float] | None = None,
    ) -> str:
        """A page that tells the run: sizes, speed, loss around the switch, ranks layer by layer, stable ranks, how to load.

            callback.report.to_html("report.html")
            cuttlefish.report.to_html("report.html", history=cuttlefish.history, log=[{"step": 1, "loss": 0.7}, ...])

        The page stands alone: no script, no font, no file from elsewhere; it needs no other package. `callback.report` knows
        history, log and seconds already.

        Args:
            path: file to write; None: the page is only returned. history: as of `Cuttlefish.history`.
            log: records with `step`, and `loss` or metrics, as `trainer.state.log_history`.
            seconds: of a training step before the switch and after it.
        """
        given = {"history": history, "log": log, "seconds": seconds}
        facts = {**self.known, **{name: value for name, value in given.items() if value is not None}}
        if FactorizationReport.page is None:
            raise RuntimeError("the package is not loaded: import hf_cuttlefish first")
        return FactorizationReport.page(self, path, **facts)

    def headline(self) -> str:
        """One line for the log."""
        return (
            f"Cuttlefish factorized {len(self.plan)} of {len(self.plan.decisions)} target layers"
            + (f" at step {self.step}" if self.step is not None else "")
            + f": {short_count(self.parameters_before)} -> {short_count(self.parameters_after)} parameters "
            f"({self.parameters_after / max(1, self.parameters_before):.0%}), encoder "
            f"{short_count(self.encoder_parameters_before)} -> {short_count(self.encoder_parameters_after)} "
            f"({self.encoder_parameters_after / max(1, self.encoder_parameters_before):.0%})"
        )

    def __str__(self) -> str:
        lines = [self.headline(), plan_table(self.plan)]
        if self.bytes_before:
            lines.append(
                f"all weights, as a file holds them: {self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB "
                f"({self.bytes_after / self.bytes_before:.0%})"
            )
        after = self.target_parameters_after - self.looked_up_after
        before = max(1, self.target_parameters_before - self.looked_up_before)
        if not self.on_maps:
            lines.append(f"FLOPs of the target layers (estimated, per token): {after / before:.0%} of before")
        if self.skipped:
            lines.append(
                f"left dense: {len(self.skipped)} 3-D expert weights, {short_count(sum(self.skipped.values()))} parameters"
            )
        lines += [f"note: {note}" for note in self.plan.notes]
        lines.append(f"optimizer: {self.optimizer}")
        if self.seconds:
            lines.append("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()))
        return "\n".join(lines)
