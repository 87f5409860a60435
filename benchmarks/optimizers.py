"""Which optimizers go through the switch, and how: one list of cases, tested by tests/patch/test_optimizer_kinds.py.

`python -m benchmarks.optimizers` writes docs/optimizers.md from the list; the test holds the list to what happens, and the page to
the list. Packages that are not installed are skipped there, and their rows stay.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import optimizer_rates

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "optimizers.md"

HEAD = """# Optimizers

Before the run Cuttlefish tries the switch with your optimizer on small matrices. Each optimizer is one of three:

- **carried**: the factors continue with the projected state of their weight ([how](how-it-works.md#optimizer-state)).
- **fresh**: the factors begin like new parameters. All others keep their state.
- **refused**: neither works. A `ValueError` before the first step says why.

An optimizer that is not listed is tried as well:

| it | then |
|---|---|
| keeps state of any name | a trial shows what follows a gradient, its square, the weight or a count |
| takes a first update over 3 times too large | not accepted: a bias correction is missing |
| packs its state (torchao, 8 bits) | unpacked, projected, packed again |
| holds other optimizers (Lookahead, SAM) | they change with it |
| cannot be tried (it holds the model, or fails) | state known from torch and transformers is carried, other state refused when it appears |

`python -m benchmarks.optimizers` writes this page; `tests/patch/test_optimizer_kinds.py` tests every name whose package is installed.
For carried ones, first moments are exact and the product moves at the dense rate.
"""


@dataclass(frozen=True)
class Case:
    """One optimizer.

    Attributes:
        name: `optim=` of TrainingArguments, or module and class. package: as pip knows it; "" for none.
        expected: "carried", "fresh" or "refused". why: a few words for the page.
        make: model -> optimizer; None where Trainer makes it from the name. closure: whether `step` needs one.
    """

    name: str
    package: str
    expected: str
    why: str = ""
    make: Callable[[nn.Module], Any] | None = None
    closure: bool = False


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Those of a model's parameters that Muon takes."""
    return [p for p in model.parameters() if p.ndim == 2]


class Chain(torch.optim.Optimizer):
    """Muon for the matrices and AdamW for the rest, as users write it."""

    def __init__(self, model: nn.Module) -> None:
        rest = [p for p in model.parameters() if p.ndim != 2]
        self.parts = [torch.optim.Muon(matrices(model), lr=2e-3, weight_decay=0.0), torch.optim.AdamW(rest, lr=1e-3)]
        super().__init__([*matrices(model), *rest], {"lr": 1e-3})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def of(module: str, name: str, inner: str = "", **settings: Any) -> Callable[[nn.Module], Any]:
    """A maker of a class of an optional package. inner: how it takes AdamW, "given" or "class"."""

    def make(model: nn.Module) -> Any:
        kind = getattr(importlib.import_module(module), name)
        if inner == "given":
            return kind(torch.optim.AdamW(model.parameters(), lr=1e-3), **settings)
        if inner == "class":
            return kind(model.parameters(), base_optimizer=torch.optim.AdamW, **settings)
        return kind(model.parameters(), **settings)

    return make


TRAINER = (
    Case("adamw_torch", "", "carried"),
    Case("adamw_torch_fused", "", "carried"),
    Case("adafactor", "", "carried", "row and column averages"),
    Case("sgd", "", "carried", "momentum, if any"),
    Case("adagrad", "", "carried"),
    Case("rmsprop", "", "carried"),
    Case("adamw_torch_8bit", "torchao", "carried", "unpacked, projected, packed again"),
    Case("adamw_torch_4bit", "torchao", "fresh", "4 bits of a first moment are too coarse"),
    Case("ademamix", "bitsandbytes", "carried"),
    Case("lion_32bit", "bitsandbytes", "carried"),
    Case("paged_adamw_32bit", "bitsandbytes", "carried"),
    Case("paged_ademamix_32bit", "bitsandbytes", "carried"),
    Case("paged_lion_32bit", "bitsandbytes", "carried"),
    Case("rmsprop_bnb", "bitsandbytes", "carried"),
    Case("rmsprop_bnb_32bit", "bitsandbytes", "carried"),
    *(
        Case(name, "bitsandbytes", "fresh", "codes and scales are separate tensors")
        for name in (
            "adamw_bnb_8bit",
            "adamw_8bit",
            "ademamix_8bit",
            "lion_8bit",
            "paged_adamw_8bit",
            "paged_ademamix_8bit",
            "paged_lion_8bit",
            "rmsprop_bnb_8bit",
        )
    ),
    Case(
        "galore_adamw",
        "galore-torch",
        "fresh",
        "projected gradients; layers outside optim_target_modules are carried",
    ),
    Case("galore_adafactor", "galore-torch", "fresh", "as galore_adamw"),
    Case("galore_adamw_layerwise", "galore-torch", "refused", "steps in hooks of the old weights"),
    Case("apollo_adamw", "apollo-torch", "fresh", "as galore_adamw"),
    Case("apollo_adamw_layerwise", "apollo-torch", "refused", "steps in hooks of the old weights"),
    Case("lomo", "lomo-optim", "carried", "keeps no state"),
    Case("grokadamw", "grokadamw", "fresh", "keeps its state in its groups"),
    Case("schedule_free_adamw", "schedulefree", "carried", "z starts as the factor"),
    Case("schedule_free_radam", "schedulefree", "carried", "z starts as the factor"),
    Case("schedule_free_sgd", "schedulefree", "carried", "z starts as the factor"),
    Case("stable_adamw", "torch-optimi", "carried"),
)
"""All `optim=` names of transformers 5.23 whose optimizers can be installed and made on a CPU."""

NOT_ON_A_CPU = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx is not on PyPI",
    "galore_adamw_8bit": "its step needs a GPU",
    "galore_adamw_8bit_layerwise": "as galore_adamw_layerwise",
    "galore_adafactor_layerwise": "transformers cannot make it",
    "adalomo": "its constructor needs a GPU",
}
"""The others, and why there is no row for them."""

TORCH = (
    Case("torch.optim.Muon", "", "carried", "", lambda model: torch.optim.Muon(matrices(model), lr=1e-3)),
    *(
        Case(f"torch.optim.{name}", "", expected, why, of("torch.optim", name, **settings))
        for name, expected, why, settings in (
            ("Adam", "carried", "", {"amsgrad": True}),
            ("AdamW", "carried", "", {}),
            ("NAdam", "carried", "", {}),
            ("RAdam", "carried", "", {}),
            ("SGD", "carried", "", {"lr": 1e-2, "momentum": 0.9}),
            ("ASGD", "carried", "", {}),
            ("RMSprop", "carried", "", {"lr": 1e-3, "momentum": 0.5, "centered": True}),
            ("Adagrad", "carried", "", {}),
            ("Adafactor", "carried", "row and column averages", {"lr": 1e-3}),
            ("Adamax", "fresh", "a maximum of moduli", {}),
            ("Adadelta", "fresh", "squares of its own updates", {}),
            ("Rprop", "fresh", "signs and step sizes of each weight", {}),
            ("LBFGS", "refused", "a flat history of all parameters", {}),
        )
    ),
)

PACKAGES = (
    Case("lion_pytorch.Lion", "lion-pytorch", "carried", "", of("lion_pytorch", "Lion", lr=1e-3)),
    Case("came_pytorch.CAME", "came-pytorch", "fresh", "averages of residuals", of("came_pytorch", "CAME", lr=1e-3)),
    Case(
        "prodigyopt.Prodigy",
        "prodigyopt",
        "carried",
        "flat copies; p0 starts as the factor",
        of("prodigyopt", "Prodigy"),
    ),
    Case("dadaptation.DAdaptAdam", "dadaptation", "carried", "", of("dadaptation", "DAdaptAdam")),
    Case("adan_pytorch.Adan", "adan-pytorch", "carried", "", of("adan_pytorch", "Adan", lr=1e-3)),
    Case("madgrad.MADGRAD", "madgrad", "carried", "x0 starts as the factor", of("madgrad", "MADGRAD", lr=1e-3)),
    Case("optimi.Adan", "torch-optimi", "carried", "", of("optimi", "Adan", lr=1e-3)),
    Case("optimi.Lion", "torch-optimi", "carried", "", of("optimi", "Lion", lr=1e-3)),
    Case("optimi.Ranger", "torch-optimi", "carried", "", of("optimi", "Ranger", lr=1e-3)),
    Case("torch_optimizer.RAdam", "torch-optimizer", "carried", "", of("torch_optimizer", "RAdam", lr=1e-3)),
    Case(
        "torch_optimizer.MADGRAD",
        "torch-optimizer",
        "carried",
        "state from its constructor",
        of("torch_optimizer", "MADGRAD", lr=1e-3),
    ),
    Case(
        "torch_optimizer.Lamb",
        "torch-optimizer",
        "fresh",
        "norms of the weight",
        of("torch_optimizer", "Lamb", lr=1e-3),
    ),
    Case(
        "torch_optimizer.Shampoo",
        "torch-optimizer",
        "fresh",
        "preconditioners",
        of("torch_optimizer", "Shampoo", lr=1e-2),
    ),
    Case(
        "pytorch_optimizer.SOAP",
        "pytorch-optimizer",
        "fresh",
        "preconditioners",
        of("pytorch_optimizer", "SOAP", lr=1e-3),
    ),
    Case(
        "pytorch_optimizer.ADOPT",
        "pytorch-optimizer",
        "fresh",
        "clipped before it is averaged",
        of("pytorch_optimizer", "ADOPT", lr=1e-3),
    ),
    Case(
        "pytorch_optimizer.Ranger21",
        "pytorch-optimizer",
        "refused",
        "a count in its groups",
        of("pytorch_optimizer", "Ranger21", lr=1e-3, num_iterations=100),
    ),
    Case(
        "pytorch_optimizer.VSGD",
        "pytorch-optimizer",
        "refused",
        "a count in its groups",
        of("pytorch_optimizer", "VSGD", lr=1e-3),
    ),
)

WRAPPERS = (
    Case("a chain of Muon and AdamW", "", "carried", "each keeps its own", Chain),
    Case(
        "pytorch_optimizer.SAM(AdamW)",
        "pytorch-optimizer",
        "carried",
        "",
        of("pytorch_optimizer", "SAM", "class", lr=1e-3),
        closure=True,
    ),
    Case(
        "pytorch_optimizer.Lookahead(AdamW)",
        "pytorch-optimizer",
        "carried",
        "slow weights start as the factors",
        of("pytorch_optimizer", "Lookahead", "given"),
    ),
    Case(
        "torch_optimizer.Lookahead(AdamW)",
        "torch-optimizer",
        "carried",
        "slow weights start as the factors",
        of("torch_optimizer", "Lookahead", "given"),
    ),
    Case(
        "schedulefree.ScheduleFreeWrapper(AdamW)",
        "schedulefree",
        "refused",
        "no torch.optim.Optimizer",
        of("schedulefree", "ScheduleFreeWrapper", "given", momentum=0.9),
    ),
)

TABLES = {
    "`optim=` of `TrainingArguments`": TRAINER,
    "torch.optim": TORCH,
    "Packages": PACKAGES,
    "Optimizers around optimizers": WRAPPERS,
}
CASES = tuple(case for cases in TABLES.values() for case in cases)


def page() -> str:
    """The page, from the list alone: a row for what shares its state, package and reason not to be carried."""
    parts = [HEAD]
    for title, cases in TABLES.items():
        rows: dict[tuple[str, str, str], list[str]] = {}
        for c in cases:
            why = "" if c.expected == "carried" else c.why
            rows.setdefault((c.expected, c.package or "-", why), []).append(f"`{c.name}`")
        parts.append(f"## {title}\n\n| state | package | optimizer | |\n|---|---|---|---|")
        ordered = sorted(rows.items(), key=lambda row: ("carried", "fresh", "refused").index(row[0][0]))
        parts[-1] += "".join(f"\n| {s} | {p} | {', '.join(names)} | {why} |" for (s, p, why), names in ordered) + "\n"
        if cases is TRAINER:
            parts.append("Not tested, because they cannot be had on a CPU:\n\n| optimizer | why |\n|---|---|")
            parts[-1] += "".join(f"\n| `{name}` | {why} |" for name, why in NOT_ON_A_CPU.items()) + "\n"
    return "\n".join([*parts, optimizer_rates.section()])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
