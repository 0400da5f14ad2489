"""Statistics over seeds: means with intervals, paired tests, Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k1.bench.study_report import half_width


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95 % t-interval, which is NaN for one value."""

    mean: float
    half: float

    def show(self, digits: int = 3, sign: bool = False) -> str:
        """Write it for people."""
        text = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return text if math.isnan(self.half) else f"{text} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Summarise one value for each seed."""
    return Interval(statistics.fmean(values), half_width(list(values)))


def paired_p(values: Sequence[float], reference: Sequence[float]) -> float:
    """Two-sided p of a paired t-test; NaN for fewer than two pairs, 1 if all differences are 0.

    Raises:
        ValueError: if the samples do not pair.
    """
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    if len(differences) < 2:
        return math.nan
    if max(differences) == min(differences):
        return 1.0 if differences[0] == 0 else 0.0
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for their number, as Holm 1979; NaN stays and does not count."""
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted, largest = dict(p_values), 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[name] = largest
    return adjusted
