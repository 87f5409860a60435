"""Even: few distinct ranks. Layers that stand at one place of neighbouring blocks share one, at the same size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..config import CuttlefishConfig
from ..layers.sizes import group_name
from .aligning import multiple_of
from .plan import RankPlan, break_even_rank
from .rules import (
    DEFAULT_RATIO,
    RANK_FLOOR,
    RULES,
    LayerSpectrum,
    Spectra,
    allowed_rank,
    dropped_loss,
    loss_rule,
)

PARTS = 3
"""Into so many runs of blocks a model is cut at most. What a block needs depends on where it stands: one part for all doubles the
predicted loss (MiniLM on TREC), three add 6%."""


def even_ranks(spectra: Spectra, config: CuttlefishConfig, loss: float | None, notes: list[str]) -> dict[str, float]:
    """What the config's rule wants where the layers of a group share a rank (a pure function, as the rules are).

    Rule "loss" shares its size out over groups in place of layers, for the least predicted loss that few ranks can have. Of what
    another rule wants each group gets the mean.
    """
    free = RULES[config.rank_rule](spectra, config, loss, notes)
    groups = even_groups(spectra, parts_of(spectra, free))
    wanted = {names[0]: _mean_rank([spectra[n] for n in names], [free[n] for n in names]) for names in groups}
    if config.rank_rule == "loss":
        stacks = {names[0]: together([spectra[n] for n in names]) for names in groups if _is_known(spectra[names[0]])}
        if stacks:
            wanted |= _spread(stacks, loss_rule(stacks, config, loss, []), config)
    return {name: wanted[names[0]] for names in groups for name in names}


def parts_of(spectra: Spectra, wanted: Mapping[str, float], most: int = PARTS) -> dict[str, int]:
    """Name of a layer -> number of its part: runs of neighbouring blocks that want about the same size.

    Blocks are told by the first number in a layer's name. The runs are those with the least squares about their means.
    """
    blocks: dict[str, dict[int, float]] = {}
    where = {name: match.groups() for name in spectra if (match := re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", name))}
    for name, (container, number) in where.items():
        s, sizes = spectra[name], blocks.setdefault(container, {})
        sizes[int(number)] = sizes.get(int(number), 0.0) + min(wanted[name] * s.rank_size, s.size)
    parts = {}
    for container, sizes in blocks.items():
        order = sorted(sizes)
        begins = runs([sizes[number] for number in order], most)
        parts[container] = {number: sum(i >= begin for begin in begins) for i, number in enumerate(order)}
    return {name: parts[where[name][0]][int(where[name][1])] if name in where else 0 for name in spectra}


def runs(values: Sequence[float], most: int) -> list[int]:
    """Where at most so many runs of neighbours begin, so that the sum of squares about their means is least."""
    sums, squares = [0.0], [0.0]
    for value in values:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value * value)

    def cost(i: int, j: int) -> float:
        return squares[j] - squares[i] - (sums[j] - sums[i]) ** 2 / (j - i)

    count = len(values)
    best: list[tuple[float, list[int]]] = [(cost(0, j), [0]) if j else (0.0, []) for j in range(count + 1)]
    for _ in range(min(most, count) - 1):
        best = [
            min(
                [best[j], *((best[i][0] + cost(i, j), [*best[i][1], i]) for i in range(1, j))],
                key=lambda found: found[0],
            )
            for j in range(count + 1)
        ]
    return best[count][1]


def even_groups(spectra: Spectra, parts: Mapping[str, int]) -> list[list[str]]:
    """Names of the layers that are to share a rank: of one part, they differ in nothing but their block's number."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, s in spectra.items():
        length = len(s.loss_spectrum) if s.loss_spectrum is not None else None
        kind = (group_name(name), parts[name], s.in_features, s.out_features, s.count, length)
        groups.setdefault(kind, []).append(name)
    return list(groups.values())


def together(members: Sequence[LayerSpectrum]) -> LayerSpectrum:
    """Layers of one shape as one stack that is cut at one rank: what a rank costs and what it keeps is the sum of theirs."""
    squares = [s.tokens * s.loss_spectrum.double().square() for s in members]  # type: ignore[union-attr]
    prices = [s.price for s in members if s.price is not None]
    return replace(
        members[0],
        singular_values=None,
        loss_spectrum=torch.stack(squares).sum(0).sqrt(),
        tokens=1.0,
        count=sum(s.count for s in members),
        price=math.fsum(prices) if len(prices) == len(members) else None,
        blind=tuple(number for s in members for number in s.blind),
    )


def note_of_even(plan: RankPlan, why: str) -> str:
    """What a report says of it."""
    shapes = {(d.in_features, d.out_features, d.rank) for d in plan.decisions.values() if d.rank is not None}
    return (
        f"even ranks ({why}): {len(plan)} layers in {len(shapes)} distinct shapes; even_ranks=False gives each its own"
    )


def _is_known(s: LayerSpectrum) -> bool:
    return s.loss_spectrum is not None


def _mean_rank(members: Sequence[LayerSpectrum], wanted: Sequence[float]) -> float:
    """One rank that comes to as many parameters as those wanted; above break-even a layer is as large as it is dense."""
    m, n = members[0].out_features, members[0].in_features
    return math.fsum(min(rank, m * n / (m + n)) for rank in wanted) / len(wanted)


def _spread(stacks: Spectra, wanted: Mapping[str, float], config: CuttlefishConfig) -> dict[str, float]:
    """The ranks with the least predicted loss at the size of those wanted, or at the size asked for where that is more.

    A threshold alone wastes room: one step of a group is a step of all its layers.
    """
    multiple, total = multiple_of(config), sum(s.size for s in stacks.values())
    allowed: _Ranks = {
        n: allowed_rank(wanted[n], s.in_features, s.out_features, multiple)[0] for n, s in stacks.items()
    }
    room = float(_size(stacks, allowed))
    if config.target_ratio is not None or config.max_loss_increase is None:
        room = max(room, (config.target_ratio or DEFAULT_RATIO) * total)
    share = RANK_FLOOR * room / total
    lowest: _Ranks = {}
    for n, s in stacks.items():
        limit = break_even_rank(s.in_features, s.out_features)
        lowest[n] = allowed_rank(max(s.least, share * limit), s.in_features, s.out_features, multiple)[0]
    found = [_grown(stacks, begun, room, multiple) for begun in (allowed, lowest) if _size(stacks, begun) <= room]
    best = min(found, key=lambda ranks: sum(dropped_loss(s, r) or 0.0 for n, s in stacks.items() if (r := ranks[n])))
    return {n: float(min(s.in_features, s.out_features) if (r := best[n]) is None else r) for n, s in stacks.items()}


_Ranks = dict[str, int | None]


def _size(stacks: Spectra, ranks: _Ranks) -> int:
    return sum(s.size if (rank := ranks[n]) is None else rank * s.rank_size for n, s in stacks.items())


def _grown(stacks: Spectra, ranks: _Ranks, room: float, multiple: int) -> _Ranks:
    """The ranks, raised by multiples where that gains most for its price, until nothing more fits into the room."""
    ranks, room = dict(ranks), room - _size(stacks, ranks)
    while True:
        steps = []
        for n, s in stacks.items():
            if (rank := ranks[n]) is None:
                continue
            fits = rank + multiple <= break_even_rank(s.in_features, s.out_features)
            cost = multiple * s.rank_size if fits else s.size - rank * s.rank_size
            kept = (dropped_loss(s, rank) or 0.0) - ((dropped_loss(s, rank + multiple) or 0.0) if fits else 0.0)
            if cost <= room:
                steps.append(
                    (kept * s.rank_size / (cost * (s.price or s.rank_size)), cost, n, rank + multiple if fits else None)
                )
        if not steps:
            return ranks
        _, cost, name, rank = max(steps, key=lambda step: step[0])
        ranks[name], room = rank, room - cost
