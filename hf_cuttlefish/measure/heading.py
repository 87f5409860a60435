"""Measure: do the weights still travel in one direction, or do they wander? It decides the rate of the low-rank phase.

The displacement of the weights over one stretch of the run is compared with that over a later one, a stretch between them
left out so that momentum does not carry over. Their cosine is the share of directed travel: near 0 where noise rules (the rate
is as high as the run can use), near 1 where each step repeats the last (the rate is too low for what is left to learn). It has
no unit, needs no loss and no state of an optimizer, and a sample of each layer's entries is enough (issue 16; docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

ENTRIES = 1024
"""About how many entries are kept of each layer, evenly spaced."""


class Heading:
    """Samples of the weights at steps some way apart; `alignment` compares four of them.

        heading = Heading(stretch=12)
        heading.note(12, weights); heading.alignment(48)

    Args:
        stretch: steps between two samples.
    """

    def __init__(self, stretch: int) -> None:
        self.stretch = stretch
        self.samples: dict[int, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def note(self, step: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep a sample of the weights (or of samples) of this step; those that nothing will be compared with any more are dropped."""
        self.samples = {s: v for s, v in self.samples.items() if s >= step - 5 * self.stretch}
        self.samples[step] = {name: sample(weight) for name, weight in weights.items()}

    def alignment(self, step: int) -> float | None:
        """Mean over layers of cos(W(s - 2h) - W(s - 4h), W(s) - W(s - h)), s the step and h the stretch; None if unknown."""
        found = []
        for back in (4, 2, 1, 0):
            wanted = step - back * self.stretch
            at = min(self.samples, key=lambda s: abs(s - wanted), default=None)
            if at is None or abs(at - wanted) > self.stretch / 2:
                return None
            found.append(at)
        if len(set(found)) < 4:
            return None
        a, b, c, d = (self.samples[s] for s in found)
        cosines = []
        for name in d:
            first, last = b[name] - a[name], d[name] - c[name]
            norm = float(first.norm() * last.norm())
            if norm > 0:
                cosines.append(float(first @ last) / norm)
        return sum(cosines) / len(cosines) if cosines else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The samples as a flat dictionary of tensors on the CPU (for safetensors)."""
        return {f"heading/{step}/{name}": v for step, s in self.samples.items() for name, v in s.items()}

    def load_state_dict(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Reads what `state_dict` gave, among other entries."""
        self.samples = {}
        for key, value in flat.items():
            if key.startswith("heading/"):
                _, step, name = key.split("/", 2)
                self.samples.setdefault(int(step), {})[name] = value


def sample(weight: torch.Tensor) -> torch.Tensor:
    """Some entries of a weight, flat, fp32 and on the CPU; a sample is its own."""
    flat = weight.detach().reshape(-1)
    apart = max(1, flat.numel() // ENTRIES) | 1  # odd: widths are even, and an even number would see a few columns only
    return flat[::apart].to("cpu", torch.float32, copy=True).contiguous()
