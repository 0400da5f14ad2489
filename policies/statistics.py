"""Statistics of a comparison: interquartile means, paired differences, bootstrap intervals.

A sample is a list for each world, of one value for each seed. Worlds differ far more than seeds, so
the two are not mixed: an aggregate's interval resamples seeds within each world (the worlds are
these), as in Agarwal et al. 2021; a difference's interval resamples worlds (they stand for others),
each with the mean of its pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2_000
_ROUNDING = 1e-12
Sample = Sequence[Sequence[float]]
"""For each world, a value for each seed."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval, whose ends are NaN if there is too little to resample."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float | None]:
        """Return value and ends as plain JSON data, None for NaN."""
        return [None if math.isnan(x) else x for x in (self.value, self.low, self.high)]


def interquartile_mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half: a quarter (rounded down) is cut off at either end."""
    return float(stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=None))


def interquartile_estimate(sample: Sample, seed: int = 0) -> Estimate:
    """Interquartile mean over all values, with a stratified bootstrap interval.

    Seeds are resampled within each world. If every world has one seed, worlds are resampled.
    """
    everything = [value for world in sample for value in world]
    centre = interquartile_mean(everything)
    strata: Sample = sample
    if all(len(world) == 1 for world in sample):
        strata = [everything]
    if all(len(world) == 1 for world in strata):
        return Estimate(centre, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = [
        np.asarray(world)[generator.integers(len(world), size=(RESAMPLES, len(world)))]
        for world in strata
    ]
    means = stats.trim_mean(np.concatenate(drawn, axis=1), 0.25, axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(centre, float(low), float(high))


def mean_estimate(sample: Sample, seed: int = 0) -> Estimate:
    """Mean over worlds of each world's mean, with a bootstrap interval over worlds.

    Of one world, seeds are resampled.
    """
    units = [math.fsum(world) / len(world) for world in sample]
    if len(units) == 1:
        units = list(sample[0])
    return _bootstrap(units, seed)


def paired_difference(sample: Sample, reference: Sample, seed: int = 0) -> Estimate:
    """Mean difference to a reference, value by value of the same world and seed.

    Raises:
        ValueError: if the samples do not pair.
    """
    pairs = [
        [a - b for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(sample, reference, strict=True)
    ]
    return mean_estimate(pairs, seed)


def probability_of_improvement(sample: Sample, reference: Sample, seed: int = 0) -> Estimate:
    """Probability that a run has a lower value than one of the reference in the same world.

    All pairs of runs in a world count; a tie counts a half. The mean is over worlds, and so is the
    interval; with one world there is none.

    Raises:
        ValueError: if the samples are of different worlds.
    """
    chances = []
    for mine, theirs in zip(sample, reference, strict=True):
        gap = np.subtract.outer(np.asarray(mine), np.asarray(theirs))
        chances.append(float(np.mean((gap < 0) + 0.5 * (gap == 0))))
    return _bootstrap(chances, seed)


def _bootstrap(units: list[float], seed: int) -> Estimate:
    """Mean of independent units with its interval: bias-corrected and accelerated."""
    centre = math.fsum(units) / len(units)
    if len(units) == 1:
        return Estimate(centre, math.nan, math.nan)
    if max(units) - min(units) <= _ROUNDING * max(1.0, abs(centre)):
        return Estimate(centre, centre, centre)
    found = stats.bootstrap(
        (np.asarray(units),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(centre, float(found.low), float(found.high))
