"""Rules that decide on the differences of a trial: the gate's own, and naive ones to compare with.

All of them are functions of the same differences, so that one trial says what each would have done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

from k1env.gate import GateConfig, hopeless, judge


@dataclass(frozen=True)
class Evidence:
    """What a full trial showed, as far as rules look at it."""

    gains: tuple[float, ...]
    """Relative differences at the gate, seed by seed; none if a loss was not finite."""
    fell: bool
    """Whether the validation loss of the changed system fell while it trained."""


def gate_ruling(gains: Sequence[float], config: GateConfig) -> tuple[bool, int]:
    """Decide as the gate does, group by group with its early end.

    Args:
        gains: differences of all seeds; none if a loss was not finite.
        config: the gate.

    Returns:
        Whether the cheat is accepted, and after how many seeds that was known.
    """
    done = 0
    if len(gains) == 0:
        return False, min(config.early, config.seeds)
    while done < config.seeds:
        done += min(config.group if done else config.early, config.seeds - done)
        if hopeless(gains[:done], config):
            break
    return judge(gains[:done], config).passed, done


def _mean(gains: Sequence[float]) -> float:
    return math.fsum(gains) / len(gains) if gains else -math.inf


def _without_margin(gains: Sequence[float]) -> bool:
    if len(gains) < 2 or len(set(gains)) == 1:
        return False
    return bool(stats.ttest_1samp(gains, popmean=0.0, alternative="greater").pvalue <= 0.05)


NAIVE: dict[str, Callable[[Evidence], bool]] = {
    "validation got better": lambda seen: seen.fell,
    "one seed: loss lower": lambda seen: bool(seen.gains) and seen.gains[0] > 0,
    "mean of seeds better": lambda seen: _mean(seen.gains) > 0,
    "p <= 0.05, no margin": lambda seen: _without_margin(seen.gains),
}
"""Rules that are easily thought of, by name."""


def regroup(gains: Sequence[float], seeds: int) -> list[tuple[float, ...]]:
    """Cut differences of independent seeds into trials of so many; what is left over is dropped."""
    whole = len(gains) // seeds * seeds
    return [tuple(gains[i : i + seeds]) for i in range(0, whole, seeds)]


def shifted(gains: Sequence[float], effect: float) -> list[float]:
    """Move differences so that their mean is a known effect; their spread and shape stay."""
    mean = _mean(gains)
    return [gain - mean + effect for gain in gains]
