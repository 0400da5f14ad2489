"""Error rates: intervals of rates, power of the gate's test, odds of a promotion by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from k1env.actions import NOOP, Action
from k1env.boundary import (
    EVIDENCE_TO_ADVANCE,
    FAILURE_FACTOR,
    SUCCESS_FACTOR,
    SUCCESSES_TO_ADVANCE,
    Boundary,
    Request,
    hard_limits,
)

_ROUNDING = 1e-9


def clopper_pearson(hits: int, tries: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a probability: it holds the true one at least that often.

    Args:
        hits: how often it happened.
        tries: out of how many; with 0 nothing is known.
        confidence: of the two-sided interval.
    """
    if not 0 <= hits <= tries:
        raise ValueError(f"{hits} of {tries}")
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, hits, tries - hits + 1)) if hits else 0.0
    high = float(stats.beta.isf(tail, hits + 1, tries - hits)) if hits < tries else 1.0
    return low, high


def power(effect: float, std: float, seeds: int, margin: float, alpha: float) -> float:
    """Probability that the gate's t-test passes, for normal differences and no early end.

    Args:
        effect: true mean of the differences.
        std: their true standard deviation, above 0.
        seeds: how many there are.
        margin: what the mean has to exceed.
        alpha: level of the test.
    """
    threshold = stats.t.isf(alpha, seeds - 1)
    shift = (effect - margin) / std * math.sqrt(seeds)
    return float(stats.nct.sf(threshold, seeds - 1, shift))


def promotion_probability(
    rate: float, attempts: int, needed: int, *, evidence: bool = True
) -> float:
    """Probability that a stage opens within so many attempts, each accepted with the same rate.

    Args:
        rate: probability of a success, independent of all others.
        attempts: how many are made.
        needed: successes that the stage takes.
        evidence: whether it takes the evidence too, as K-1 does; else successes are just counted.
    """
    log_success, log_failure = math.log(SUCCESS_FACTOR), math.log(FAILURE_FACTOR)
    waiting = np.zeros(attempts + 1)  # by successes so far, the stage still closed
    waiting[0] = 1.0
    opened = 0.0
    for number in range(1, attempts + 1):
        succeeded = rate * waiting[:-1]
        waiting *= 1.0 - rate
        count = np.arange(1, attempts + 1)
        log_evidence = count * log_success + (number - count) * log_failure
        enough = log_evidence >= math.log(EVIDENCE_TO_ADVANCE) - _ROUNDING
        opens = (count >= needed) & (enough if evidence else True)
        opened += float(succeeded[opens].sum())
        waiting[1:] += np.where(opens, 0.0, succeeded)
    return opened


def promotions(verdicts: Sequence[bool]) -> int:
    """Stages that open for who is given these verdicts, one after the other."""
    boundary, nothing = Boundary(hard_limits(60)), Request(Action(0, NOOP, "no-op"), None, 60)
    for number, accepted in enumerate(verdicts):
        boundary.record(accepted, nothing, number)
    return boundary.stage - 1


def counted_promotions(verdicts: Sequence[bool]) -> int:
    """The same where successes are just counted, without evidence."""
    needed = np.cumsum(SUCCESSES_TO_ADVANCE)
    return int((sum(verdicts) >= needed).sum())
