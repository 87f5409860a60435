"""Tie: the moments of one weight that several layers use, as a table of tokens and the output layer tied to it do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .factors import GRADIENT_DAMPING, INPUT_DAMPING, LayerMoments


def joined(weight: torch.Tensor, uses: Sequence[tuple[LayerMoments, bool]]) -> LayerMoments:
    """Moments of a weight (m, n), m <= n, in the sum of what its uses lose by a cut, as nearly as one pair of moments says it.

        joined(table, [(as_input, False), (as_output, True)])

    A use with moments S and M loses tokens / 2 * tr(S D M D^T) by a change D of the smaller side. The sum of such terms is no
    single one; this is the one with their marginals: S weighted by the traces of M, and M by those of S.

    Args:
        uses: the moments of each, and whether that layer's weight is the transpose (n, m).
    """
    if len(uses) == 1:
        return uses[0][0]
    w = weight.detach().double()
    square = w @ w.mT
    signal, metric, total = torch.zeros_like(square), torch.zeros_like(square), 0.0
    for moments, transposed in uses:
        damping = GRADIENT_DAMPING if transposed else INPUT_DAMPING  # of the side that is not kept
        s = moments.signal.to(w) + damping * moments.other_level * square
        m = torch.eye(len(w), dtype=w.dtype, device=w.device) if moments.metric is None else moments.metric.to(w)
        worth = moments.tokens * float(s.trace()) * float(m.trace())
        if worth > 0:
            signal += s * (worth / s.trace())
            metric += m * (worth / m.trace())
            total += worth
    if total <= 0:
        return uses[0][0]
    return LayerMoments(signal / total, metric / total, tokens=total)
