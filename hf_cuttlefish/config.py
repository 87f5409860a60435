"""Every choice a user can make, validated, with defaults that need none of them."""

from __future__ import annotations

import difflib
import functools
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import regex  # type: ignore[import-untyped]  # re, with a time limit; transformers brings it

CONFIG_VERSION = 1
"""Version of the dictionary that `CuttlefishConfig.to_dict` writes; older ones are read, newer ones refused."""


ALL = ("all", "all-linear")
"""What `target_modules` may say instead of names."""


RANK_RULES = ("loss", "stable_rank", "scaled_stable_rank", "accumulative", "paper", "energy", "ratio")


@dataclass
class CuttlefishConfig:
    """When to switch, which layers to factorize, and how much rank each one keeps.

        config = CuttlefishConfig(target_ratio=0.3, exclude_modules=["key"])
        trainer = Trainer(model, args, callbacks=[CuttlefishCallback(config)])

    All lengths called *steps* are optimizer steps; all *shares* are fractions of the whole run, so that one setting fits a
    300-step fine-tune and a 300-epoch run.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is outside its range, or two fields contradict each other. Both name the field and its value.
    """

    target_modules: str | list[str] = field(
        default="all",
        metadata={
            "help": "'all' (every kind of layer in the repeated blocks), 'all-linear', a list of name endings such as "
            "['query', 'value'], or a regular expression for whole names."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Layers that stay dense: name endings (list) or a regular expression (str)."}
    )
    embeddings: bool = field(
        default=False,
        metadata={"help": "Also factorize the table of tokens and the output layer; both count in target_ratio."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Ranks by hand: name ending or regular expression -> rank; overrides the rule."},
    )
    rank_rule: str = field(
        default="loss",
        metadata={
            "help": "'loss' (one threshold on predicted loss per parameter), 'stable_rank', 'scaled_stable_rank', "
            "'accumulative', 'paper' (the larger of the last two), 'energy', 'ratio'."
        },
    )
    rank_ratio: float = field(
        default=0.25,
        metadata={"help": "Share of the full rank min(m, n), for rule 'ratio', and for 'loss' without statistics."},
    )
    accumulative_share: float = field(
        default=0.8,
        metadata={"help": "Share of the singular values' sum, for rule 'accumulative'."},
    )
    energy_share: float = field(default=0.9, metadata={"help": "Share of ||W||_F^2, for rule 'energy'."})
    stable_rank_scale: str = field(
        default="auto",
        metadata={
            "help": "xi of the scaled stable rank: 'initial' (from the initial weights, as in the paper), 'random_matrix' ((1 "
            "+ sqrt(min/max))^2), or 'auto': 'initial' from random weights, else 'random_matrix'."
        },
    )
    rank_multiple: int | None = field(
        default=None,
        metadata={"help": "Ranks are multiples of this. None: 32 in a decoder at least 512 features wide, else 8."},
    )
    even_ranks: bool | str = field(
        default="auto",
        metadata={
            "help": "Neighbouring blocks share their ranks: at most three kinds of blocks, at the same size. 'auto': where blocks are compiled one "
            "by one, a graph for each kind."
        },
    )
    target_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of the target layers' parameters to keep, for rule 'loss'. None: measured, 0.3 to 0.8 (pretrained "
            "language models: 0.3 to 0.9, or all)."
        },
    )
    max_loss_increase: float | None = field(
        default=None,
        metadata={"help": "Largest rise of the training loss at the switch, as a share of it, for rule 'loss'."},
    )
    objective: str = field(
        default="size",
        metadata={
            "help": "'size': factorize whatever gets smaller; 'speed': only what makes a whole step faster here."
        },
    )
    min_speedup: float = field(
        default=1.05,
        metadata={"help": "With objective='speed': how many times faster a step must get (the paper: 1.5, of layers)."},
    )
    switch_step: int | None = field(default=None, metadata={"help": "Switch after exactly this many optimizer steps."})
    earliest_switch: float = field(
        default=0.3,
        metadata={"help": "Earliest switch, as a share of the run."},
    )
    latest_switch: float = field(default=0.4, metadata={"help": "Latest switch, as a share of the run."})
    check_steps: int | None = field(
        default=None, metadata={"help": "Measure stable ranks every so many steps. None: 30 times a run."}
    )
    stable_rank_tolerance: float = field(
        default=1.0,
        metadata={
            "help": "Converged: each layer's smoothed relative change per run is below this (1.0: 10% in a tenth of the run)."
        },
    )
    statistics_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps before the switch that gather statistics, for rule 'loss'; 0: none. None: enough for the widest "
            "layer, at most 15% of the run."
        },
    )
    statistics_tokens: int = field(
        default=1024, metadata={"help": "Most tokens per layer and micro-batch that enter the statistics."}
    )
    statistics_memory: float | None = field(
        default=None,
        metadata={
            "help": "Most GiB of a GPU for the statistics. Beyond that, those of the largest layers are kept on the CPU. None: "
            "what the largest step leaves free."
        },
    )
    switch: str = field(
        default="auto",
        metadata={
            "help": "'in_place': in the running process; 'restart': in a checkpoint, then stop; 'auto': by engine."
        },
    )
    frobenius_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of the target layers' weights, then of their products, in the place of weight decay."},
    )
    optimizer_state: str = field(
        default="carry",
        metadata={"help": "'carry' projects the optimizer's moments onto the factors, 'reset' starts them at zero."},
    )
    learning_rate_scale: float | None = field(
        default=None,
        metadata={
            "help": "The learning rate after the switch, times this. None: 1 to 3, measured; 1 where it cannot be scaled."
        },
    )
    on_error: str = field(
        default="continue",
        metadata={"help": "If the switch fails: 'continue' at full rank, or 'raise'."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, (tuple, set, frozenset)):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.exclude_modules, (tuple, set, frozenset)):
            self.exclude_modules = sorted(self.exclude_modules)
        self._check_patterns()
        for name, also in (("embeddings", ""), ("even_ranks", " or 'auto'")):
            value = getattr(self, name)
            if not (isinstance(value, bool) or (also and value == "auto")):
                raise TypeError(f"{name} must be True or False{also}, got {value!r:.80}")
        self._check_choice("rank_rule", RANK_RULES)
        self._check_choice("stable_rank_scale", ("auto", "initial", "random_matrix"))
        self._check_choice("objective", ("size", "speed"))
        self._check_choice("switch", ("auto", "in_place", "restart"))
        self._check_choice("optimizer_state", ("carry", "reset"))
        self._check_choice("on_error", ("raise", "continue"))
        for name in ("rank_ratio", "accumulative_share", "energy_share"):
            self._check_number(name, above=0, most=1)
        for name in ("target_ratio", "max_loss_increase"):
            if getattr(self, name) is not None:
                self._check_number(name, above=0, most=1 if name == "target_ratio" else math.inf)
        self._check_number("earliest_switch", least=0, most=1)
        self._check_number("latest_switch", above=0, most=1)
        self._check_number("stable_rank_tolerance", above=0)
        self._check_number("min_speedup", least=1)
        self._check_number("frobenius_decay", least=0)
        if self.learning_rate_scale is not None:
            self._check_number("learning_rate_scale", above=0)
        self._check_integer("statistics_tokens", least=1)
        if self.statistics_memory is not None:
            self._check_number("statistics_memory", least=0)
        for name, least in (("rank_multiple", 1), ("switch_step", 1), ("check_steps", 1), ("statistics_steps", 0)):
            if getattr(self, name) is not None:
                self._check_integer(name, least=least)
        if self.earliest_switch > self.latest_switch:
            raise ValueError(
                f"earliest_switch ({self.earliest_switch}) lies after latest_switch ({self.latest_switch}): "
                "set both, earliest first."
            )
        for name in ("target_ratio", "max_loss_increase"):
            if getattr(self, name) is not None and self.rank_rule != "loss":
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but rank_rule={self.rank_rule!r} does not use it: use rank_rule='loss', "
                    "or rank_rule='ratio' with rank_ratio"
                )
        if self.target_ratio is not None and self.max_loss_increase is not None:
            raise ValueError(
                f"target_ratio ({self.target_ratio}) and max_loss_increase ({self.max_loss_increase}) both fix the size: "
                "give one of them."
            )

    @classmethod
    def coerce(cls, config: CuttlefishConfig | dict[str, Any] | None) -> CuttlefishConfig:
        """A config as it is, from its dictionary, or the default for None. Raises TypeError for anything else."""
        if config is None:
            return cls()
        if isinstance(config, dict):
            return cls.from_dict(config)
        if not isinstance(config, cls):
            raise TypeError(f"config must be a CuttlefishConfig, got {type(config).__name__}: {config!r:.80}")
        return config

    @classmethod
    def paper(cls, **changes: Any) -> CuttlefishConfig:
        """The recipe of the paper (arXiv 2305.02538): plain SVD at max(scaled stable rank, accumulative rank), fresh state.

        What is not kept: the paper's absolute threshold in rank units per epoch, which cannot fire in a short fine-tune; a
        learning rate after the switch, for which its code has 2 times (BERT, fine-tuned) and a third (DeiT, from scratch):
        say which as `learning_rate_scale`.
        """
        reset = cls(rank_rule="paper", optimizer_state="reset", statistics_steps=0, learning_rate_scale=1.0)
        return replace(reset, **{"even_ranks": False, **changes})

    @classmethod
    def paper_cnn(cls, **changes: Any) -> CuttlefishConfig:
        """The paper's recipe for convolutional networks: plain SVD at the scaled stable rank, xi from the initial weights, fresh state.

            CuttlefishConfig.paper_cnn(frobenius_decay=1e-4)  # with weight_decay=0 for the target layers

        Layers that are not measured to be 1.5 times as fast stay dense, which leaves the first ones; objective="size" takes all.
        """
        chosen: dict[str, Any] = {"rank_rule": "scaled_stable_rank", "objective": "speed", "min_speedup": 1.5}
        return cls.paper(**{**chosen, **changes})

    @property
    def names_targets(self) -> bool:
        """Whether the user has named the target layers, rather than all of some kind."""
        return self.target_modules not in ALL

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with a `version`."""
        return {"version": CONFIG_VERSION, **asdict(self)}

    def to_json(self) -> str:
        """The dictionary of `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CuttlefishConfig:
        """Reads what `to_dict` wrote.

        Raises:
            TypeError: `data` is no dictionary.
            ValueError: an unknown field (closest names shown), or a dictionary written by a newer version.
        """
        if not isinstance(data, dict):
            raise TypeError(f"a CuttlefishConfig is read from a dict, not from {type(data).__name__}")
        data = dict(data)
        version = data.pop("version", CONFIG_VERSION)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"version must be a whole number of at least 1, got {version!r}")
        if version > CONFIG_VERSION:
            raise ValueError(
                f"this config has version {version}, and this hf_cuttlefish reads up to {CONFIG_VERSION}: "
                "upgrade with `pip install -U hf-cuttlefish`."
            )
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=3)
                raise ValueError(
                    f"unknown field {name!r}; " + (f"did you mean {close}?" if close else f"known: {known}")
                )
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> CuttlefishConfig:
        """Reads what `to_json` wrote; raises as `from_dict`, and ValueError for text that is no JSON."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"a CuttlefishConfig is read from JSON text: {error}") from error
        return cls.from_dict(data)

    def _check_patterns(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None and name == "exclude_modules":
                continue
            if isinstance(value, str):
                if not value:
                    raise ValueError(f"{name} is empty: give 'all', a list of name endings or a regular expression")
                if value not in ALL:
                    _check_regex(name, value)
            elif isinstance(value, list):
                if not value and name == "target_modules":
                    raise ValueError("target_modules is an empty list: name at least one layer, or use 'all'")
                for item in value:
                    if not isinstance(item, str) or not item:
                        raise TypeError(f"{name} must hold name endings (non-empty str), got {item!r}")
            else:
                raise TypeError(f"{name} must be a str or a list of str, got {type(value).__name__}: {value!r}")
        if not isinstance(self.rank_pattern, dict):
            raise TypeError(f"rank_pattern must be a dict of name -> rank, got {type(self.rank_pattern).__name__}")
        for key, rank in self.rank_pattern.items():
            if not isinstance(key, str) or not key:
                raise TypeError(f"rank_pattern has the key {key!r}: use a name ending or a regular expression")
            _check_regex("rank_pattern", key)
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"rank_pattern[{key!r}] must be a whole number, got {rank!r}")
            if rank < 1:
                raise ValueError(
                    f"rank_pattern[{key!r}] is {rank}: a rank is at least 1 (use exclude_modules to keep it dense)"
                )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"unknown {name} {value!r}: {hint}choose one of {', '.join(choices)}")

    def _check_number(
        self, name: str, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
    ) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        finite = abs(value) < 1e300  # not math.isfinite, which stumbles over whole numbers of that size
        if not (finite and least <= value <= most and value > above):
            low = f"above {above}" if above > -math.inf else f"at least {least}"
            high = f" and at most {most}" if most < math.inf else ""
            raise ValueError(f"{name} is {value}: it must be {low}{high}")

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            at_once = "; to train low rank from the first step, call factorize(model, plan) before"
            raise ValueError(f"{name} is {value}: it must be at least {least}{at_once * (name == 'switch_step')}")


def _name_unknown_fields(original: Any) -> Any:
    """A mistyped keyword gets the closest names, as `from_dict` gives them."""

    @functools.wraps(original)
    def __init__(self: CuttlefishConfig, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in fields(type(self))]
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}"
                raise TypeError(f"CuttlefishConfig has no field {name!r}; {hint}")
        original(self, *args, **kwargs)

    return __init__


CuttlefishConfig.__init__ = _name_unknown_fields(CuttlefishConfig.__init__)  # type: ignore[method-assign]


def _check_regex(name: str, pattern: str) -> None:
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{name} {pattern!r:.200} is no regular expression: {error}") from error
