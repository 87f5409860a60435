"""The rank rules: from spectra to the rank that each layer wants, under break-even and alignment. Pure functions."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..config import CuttlefishConfig
from .aligning import multiple_of
from .plan import break_even_rank

DEFAULT_RATIO = 0.4
"""Size of rule "loss" where it cannot be measured (`decide/size.py`): this share of the target layers' parameters, unless the
prediction asks for more (`CURVATURE_SHARE`). Over four data sets it loses 0.14 points, where 1/2 loses 0.08 and 1/3 0.28
(docs/results.md); a size drawn from the prediction alone came out too large for one and too small for another."""


CURVATURE_SHARE = 3e-3
"""The default size grows until the predicted loss increase is at most this share of what dropping all target layers would
cost by the same formula. Pretrained MiniLM and ViT-S stay below it at 0.4 (at 1/3: 0.0005 to 0.0024), so it is a guard for
models whose layers are not as redundant. A share of that sum and not of the training loss: while a new head is still
small all gradients are, and the prediction is a hundred times smaller at 2% of a run than at 30%."""


RANK_FLOOR = 0.5
"""Rule "loss" gives no layer less than this share of the rank that an even spread of the same size would give it: the
prediction knows what a layer does now, not what it will have to learn (docs/how-it-works.md has the comparison)."""


def random_matrix_scale(in_features: int, out_features: int) -> float:
    """xi of a random Gaussian matrix, (1 + sqrt(min / max))^2 = full rank / its stable rank (Marchenko and Pastur 1967)."""
    return (1 + math.sqrt(min(in_features, out_features) / max(in_features, out_features))) ** 2


@dataclass(frozen=True)
class LayerSpectrum:
    """What a rank rule may look at.

    Attributes:
        in_features, out_features: n and m.
        singular_values: of W, falling, (min(m, n),), or None where the rule does not need them.
        loss_spectrum: singular values of K^T W L (see `factorization`), or None without statistics.
        tokens: tokens of an example that reach the loss through this layer.
        initial_stable_rank: of the weights that the run started from, or None.
        measured_stable_rank: of W, where its singular values were not worked out, or None.
        count: how many matrices the weight is; the spectra are then the root of the sum of their squares.
        blind: numbers of the matrices of a stack of which nothing is known, while something is of others.
        price: of one unit of rank, in any currency that is the same for all layers (measured time); None: m + n parameters.
    """

    in_features: int
    out_features: int
    singular_values: torch.Tensor | None = None
    loss_spectrum: torch.Tensor | None = None
    tokens: float = 1.0
    initial_stable_rank: float | None = None
    price: float | None = None
    measured_stable_rank: float | None = None
    count: int = 1
    blind: tuple[int, ...] = ()

    @property
    def least(self) -> int:
        """Rank below which it is not cut: half of break-even where a matrix is cut by its weight alone."""
        return break_even_rank(self.in_features, self.out_features) // 2 if self.blind else 0

    @property
    def size(self) -> int:
        """Numbers of the weight."""
        return self.count * self.in_features * self.out_features

    @property
    def rank_size(self) -> int:
        """Numbers that one unit of rank has."""
        return self.count * (self.in_features + self.out_features)

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def stable_rank(self) -> float | None:
        """Of W, from its singular values; as measured where these were not needed; or None."""
        if self.singular_values is None:
            return self.measured_stable_rank
        top = float(self.singular_values[0]) ** 2
        return float(self.singular_values.square().sum()) / top if top > 0 else 0.0


def allowed_rank(wanted: float, in_features: int, out_features: int, multiple: int) -> tuple[int | None, str]:
    """The smallest multiple that holds `wanted` and stays below break-even; None (dense) if `wanted` reaches break-even.

    In a layer so small that no multiple fits below break-even the rank is not aligned. Returns the rank and a reason.
    """
    limit = break_even_rank(in_features, out_features)
    need = max(1, math.ceil(wanted - 1e-9))
    if need > limit:
        return None, f"rank {need} would not make it smaller (break-even {limit})"
    rank = -(-need // multiple) * multiple
    if rank > limit:
        rank = limit // multiple * multiple
        if rank < 1:
            return need, "rule (too small to align)"
        return rank, "rule, held below break-even"
    return rank, "rule"


def dropped_loss(s: LayerSpectrum, rank: int) -> float | None:
    """Predicted increase of an example's loss: tokens / 2 * the sum of the squares dropped."""
    return None if s.loss_spectrum is None else s.tokens / 2 * float(s.loss_spectrum[rank:].square().sum())


Spectra = Mapping[str, LayerSpectrum]


Rule = Callable[[Spectra, CuttlefishConfig, "float | None", "list[str]"], dict[str, float]]


def stable_rank_rule(
    spectra: Spectra, config: CuttlefishConfig, loss: float | None, notes: list[str]
) -> dict[str, float]:
    """The stable rank itself."""
    return {name: s.stable_rank or 1.0 for name, s in spectra.items()}


def scaled_stable_rank_rule(
    spectra: Spectra, config: CuttlefishConfig, loss: float | None, notes: list[str]
) -> dict[str, float]:
    """xi times the stable rank, at most the full rank (arXiv 2305.02538, section 3.2; xi from W0 or from random matrices)."""
    initial = {n: s.initial_stable_rank for n, s in spectra.items() if s.initial_stable_rank}
    scale = config.stable_rank_scale
    if scale == "auto":
        scale = "initial" if starts_at_random(spectra) else "random_matrix"
        notes.append(f"xi from {'the initial weights' if scale == 'initial' else 'random-matrix theory'}")
    if scale == "initial" and len(initial) < len(spectra):
        raise ValueError(
            "stable_rank_scale='initial' needs the stable ranks of the weights that the run started from, and they are "
            "not known here: pass initial_stable_ranks, or use 'random_matrix'"
        )
    result = {}
    for name, s in spectra.items():
        first = s.initial_stable_rank
        xi = s.full_rank / first if scale == "initial" and first else random_matrix_scale(s.in_features, s.out_features)
        result[name] = min(float(s.full_rank), xi * (s.stable_rank or 0.0))
    return result


def starts_at_random(spectra: Spectra) -> bool:
    """Whether the run began with random weights, as far as is known: these have the stable rank of a random matrix."""
    shares = sorted(
        s.initial_stable_rank * random_matrix_scale(s.in_features, s.out_features) / s.full_rank
        for s in spectra.values()
        if s.initial_stable_rank
    )
    return bool(shares) and len(shares) == len(spectra) and shares[len(shares) // 2] >= 0.8


def accumulative_rule(
    spectra: Spectra, config: CuttlefishConfig, loss: float | None, notes: list[str]
) -> dict[str, float]:
    """Fewest leading singular values that sum to a share p of all (arXiv 2305.02538, for transformers)."""
    return {n: float(_leading_share(_values(s), config.accumulative_share)) for n, s in spectra.items()}


def paper_rule(spectra: Spectra, config: CuttlefishConfig, loss: float | None, notes: list[str]) -> dict[str, float]:
    """The larger of scaled stable rank and accumulative rank, as the paper has it for transformers."""
    scaled = scaled_stable_rank_rule(spectra, config, loss, notes)
    accumulative = accumulative_rule(spectra, config, loss, notes)
    return {name: max(scaled[name], accumulative[name]) for name in spectra}


def energy_rule(spectra: Spectra, config: CuttlefishConfig, loss: float | None, notes: list[str]) -> dict[str, float]:
    """Fewest leading singular values that hold a share of ||W||_F^2."""
    return {n: float(_leading_share(_values(s).square(), config.energy_share)) for n, s in spectra.items()}


def ratio_rule(spectra: Spectra, config: CuttlefishConfig, loss: float | None, notes: list[str]) -> dict[str, float]:
    """A fixed share of the full rank (Pufferfish, arXiv 2103.03936), at least one multiple; just below break-even at most."""
    return {n: _ratio_rank(s, config.rank_ratio, multiple_of(config)) for n, s in spectra.items()}


def loss_rule(spectra: Spectra, config: CuttlefishConfig, loss: float | None, notes: list[str]) -> dict[str, float]:
    """One threshold for the whole model on predicted loss per parameter (or other price of rank), tokens * s^2 / 2 / (m + n).

    The size follows from `target_ratio`, or from `max_loss_increase` times the training loss; by default it is
    `DEFAULT_RATIO`, or more where the prediction asks for it (`CURVATURE_SHARE`).
    Layers without statistics get rank_ratio; so do all layers if there are none.
    """
    known = {n: s for n, s in spectra.items() if s.loss_spectrum is not None}
    missing = {n: s for n, s in spectra.items() if s.loss_spectrum is None}
    if missing:
        which = (
            "the layers"
            if not known
            else f"{len(missing)} of {len(spectra)} layers, {', '.join(list(missing)[:3])}, ..."
        )
        ratio = config.target_ratio
        even = (
            f"rank ratio {config.rank_ratio}"
            if ratio is None
            else f"the same share of the parameters, {ratio}, in each"
        )
        notes.append(f"no usable statistics for {which}: {even} there")
    wanted = {n: _fallback_rank(s, config) for n, s in missing.items()}
    if not known:
        return wanted
    thresholds = _Thresholds(known, multiple_of(config))
    if not thresholds.levels:
        return {**wanted, **thresholds.ranks(0.0)}
    # The lowest threshold that the size asked for allows, or the highest that the loss allows.
    if config.target_ratio is not None:
        index = thresholds.largest_within(config.target_ratio)
        if index == len(thresholds.levels):
            notes.append(
                f"target_ratio {config.target_ratio} cannot be reached: one multiple of rank in each layer is more"
            )
    elif config.max_loss_increase is not None and loss is not None and math.isfinite(loss) and loss > 0:
        index = thresholds.smallest_within(config.max_loss_increase * loss)
    else:
        if config.max_loss_increase is not None:
            notes.append(
                "max_loss_increase is not used: the model returned no loss to compare with; the default size holds"
            )
        guard = thresholds.smallest_within(CURVATURE_SHARE * sum(dropped_loss(s, 0) or 0.0 for s in known.values()))
        index = min(thresholds.largest_within(DEFAULT_RATIO), guard)
    return {**wanted, **thresholds.ranks(thresholds.levels[min(index, len(thresholds.levels) - 1)])}


class _Thresholds:
    """What one threshold on predicted loss per parameter, for the whole model, makes of its layers.

    Args:
        spectra: of layers with statistics. multiple: of ranks, to which they are aligned.

    Attributes:
        levels: all thresholds at which something changes, rising: sizes fall along them, and predicted losses rise.
    """

    def __init__(self, spectra: Spectra, multiple: int) -> None:
        self._spectra, self._multiple = spectra, multiple
        self._size = sum(s.size for s in spectra.values())
        self._scores = {
            n: (s.loss_spectrum.square() * (s.tokens / 2 / (s.price or s.rank_size))).tolist()  # type: ignore[union-attr]
            for n, s in spectra.items()
        }
        self.levels = sorted({v for values in self._scores.values() for v in values if v > 0})

    def ranks(self, threshold: float) -> dict[str, float]:
        """Wanted ranks: the directions above the threshold, but no less than the floor."""
        needs = {n: _count_above(self._scores[n], threshold) for n in self._spectra}
        kept = sum(min(needs[n] * s.rank_size, s.size) for n, s in self._spectra.items())
        even = RANK_FLOOR * kept / self._size
        return {
            n: max(1.0, needs[n], even * break_even_rank(s.in_features, s.out_features), s.least)
            for n, s in self._spectra.items()
        }

    def measure(self, threshold: float) -> tuple[float, float]:
        """Kept share of the parameters and predicted loss increase at a threshold, after alignment and break-even."""
        kept = increase = 0.0
        for n, need in self.ranks(threshold).items():
            s = self._spectra[n]
            rank, _ = allowed_rank(need, s.in_features, s.out_features, self._multiple)
            kept += s.size if rank is None else rank * s.rank_size
            increase += 0.0 if rank is None else dropped_loss(s, rank) or 0.0
        return kept / self._size, increase

    def largest_within(self, ratio: float) -> int:
        """Index of the lowest threshold whose model is no larger than `ratio`; the number of levels where there is none."""
        return bisect.bisect_left(self.levels, True, key=lambda t: self.measure(t)[0] <= ratio)

    def smallest_within(self, bound: float) -> int:
        """Index of the highest threshold whose predicted increase is at most `bound`."""
        return max(bisect.bisect_left(self.levels, True, key=lambda t: self.measure(t)[1] > bound) - 1, 0)


RULES: dict[str, Rule] = {
    "loss": loss_rule,
    "stable_rank": stable_rank_rule,
    "scaled_stable_rank": scaled_stable_rank_rule,
    "accumulative": accumulative_rule,
    "paper": paper_rule,
    "energy": energy_rule,
    "ratio": ratio_rule,
}


def _fallback_rank(s: LayerSpectrum, config: CuttlefishConfig) -> float:
    """The rank of a layer without statistics under rule "loss"."""
    if config.target_ratio is None:
        return _ratio_rank(s, config.rank_ratio, multiple_of(config))
    rank = config.target_ratio * s.in_features * s.out_features / (s.in_features + s.out_features)
    return float(max(1, int(rank) // multiple_of(config) * multiple_of(config) or int(rank)))


def _ratio_rank(s: LayerSpectrum, ratio: float, multiple: int) -> float:
    limit = break_even_rank(s.in_features, s.out_features)
    rank = max(1, round(ratio * s.full_rank))
    if rank > limit:
        return float(rank)
    aligned = max(round(rank / multiple), 1) * multiple
    return float(aligned if aligned <= limit else rank)


def _values(s: LayerSpectrum) -> torch.Tensor:
    if s.singular_values is None:
        raise ValueError("this rule needs the singular values of the weights")
    return s.singular_values


def _leading_share(values: torch.Tensor, share: float) -> int:
    total = float(values.sum())
    if total <= 0:
        return 1
    return min(int((values.cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1, len(values))


def _count_above(falling: list[float], threshold: float) -> float:
    return float(bisect.bisect_right(falling, -threshold, key=lambda value: -value))
