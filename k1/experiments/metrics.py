"""What a run over a stream of domains is judged by: pure functions of its bits per byte.

The matrix R has a row for the untrained system and one after each phase, and a column for each
domain in the order of the stream: `R[p, j]` is the bits per byte of domain j after p phases, and
domain j is learnt in phase j + 1. With D domains R is [D + 1, D]. Fewer bits are better, so signs
are those of bits: forgetting and gaps are positive when something got worse, transfers are positive
when something got better.

Forgetting and retention follow Chaudhry et al. 2018 ("Riemannian walk for incremental learning"),
transfers Lopez-Paz and Ranzato 2017 ("Gradient episodic memory"), the gap within a phase De Lange
et al. 2023 ("Continual evaluation for lifelong learning").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Point = tuple[int, Sequence[float]]
"""Phase (from 0) of an evaluation within the stream, and the bits of every domain."""


def as_matrix(rows: Sequence[Sequence[float | None]]) -> Matrix:
    """Make R of rows; a figure that was not finite (None) is NaN.

    Raises:
        ValueError: if the shape is not [D + 1, D].
    """
    matrix = np.array(rows, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] + 1:
        raise ValueError(f"a matrix of shape {matrix.shape} is not [domains + 1, domains]")
    return matrix


def learnt(r: Matrix) -> Matrix:
    """Bits of each domain right after its own phase: [D]."""
    return np.diagonal(r, offset=-1).copy()


def final_bits(r: Matrix) -> float:
    """Mean over domains of the bits at the end of the stream."""
    return float(r[-1].mean())


def new_domain_bits(r: Matrix) -> float:
    """Mean bits right after their own phase of the domains that came after the first."""
    return float(learnt(r)[1:].mean())


def forgetting(r: Matrix) -> Matrix:
    """Bits that each domain but the last has lost at the end, against its best before: [D - 1].

    Its best is over the phases from its own to the last but one, as Chaudhry et al. define it; so
    forgetting is negative where the last phase helped.
    """
    last = r.shape[1] - 1
    best = [r[j + 1 : last + 1, j].min() for j in range(last)]
    return np.asarray(r[-1, :last] - best)


def average_forgetting(r: Matrix) -> float:
    """Mean of `forgetting` over domains, in bits per byte."""
    return float(forgetting(r).mean())


def forgetting_percent(r: Matrix) -> float:
    """Mean over domains of the bits lost since the domain's own phase, in per cent of these."""
    own, last = learnt(r)[:-1], r[-1, :-1]
    return float(100 * (last / own - 1).mean())


def forgetting_perplexity_percent(r: Matrix) -> float:
    """The same of the perplexity of a byte, 2 ** bits."""
    return float(100 * (np.exp2(r[-1, :-1] - learnt(r)[:-1]) - 1).mean())


def backward_transfer(r: Matrix) -> float:
    """Bits saved on earlier domains since their own phase, mean over domains; BWT."""
    return float((learnt(r)[:-1] - r[-1, :-1]).mean())


def forward_transfer(r: Matrix) -> float:
    """Bits saved on later domains before their own phase, against the untrained system; FWT."""
    return float(np.mean([r[0, j] - r[j, j] for j in range(1, r.shape[1])]))


def retention(r: Matrix) -> float:
    """Share of what was learnt of a domain (untrained minus learnt) that is left at the end."""
    own, last = learnt(r)[:-1], r[-1, :-1]
    return float(((r[0, :-1] - last) / (r[0, :-1] - own)).mean())


def average_anytime(curve: Sequence[Point]) -> float:
    """Mean over evaluations of the mean bits of the domains met so far, the present one too."""
    return float(np.mean([np.mean(bits[: phase + 1]) for phase, bits in curve]))


def stability_gap(r: Matrix, curve: Sequence[Point]) -> float:
    """Largest loss of an earlier domain within a phase against its bits when that phase began."""
    worst = -math.inf
    for phase, bits in curve:
        for j in range(phase):
            worst = max(worst, float(bits[j]) - float(r[phase, j]))
    return worst


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the points (cost, harm) that no other beats in both: cost rises, harm falls.

    Args:
        points: pairs of which less is better; those that are not finite are dropped.
    """
    kept: list[tuple[float, float]] = []
    for cost, harm in sorted(p for p in points if all(map(math.isfinite, p))):
        if not kept or harm < kept[-1][1]:
            kept.append((cost, harm))
    return kept


def harm_at(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """Harm of a method at a given cost, on straight lines between the points of its frontier.

    Args:
        points: pairs (cost, harm), such as (new-domain bits, forgetting), of a sweep.
        cost: where to read.

    Returns:
        The harm; the last point's beyond the dearest; None below the cheapest, which the method
        does not reach.
    """
    line = frontier(points)
    if not line or cost < line[0][0]:
        return None
    costs, harms = zip(*line, strict=True)
    return float(np.interp(cost, costs, harms))
