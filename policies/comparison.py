"""What the records of a comparison say: measures of each episode, statistics of each controller."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.episode import SHARES
from policies.statistics import (
    Estimate,
    Sample,
    interquartile_estimate,
    mean_estimate,
    paired_difference,
    probability_of_improvement,
)

Record = dict[str, Any]
Measure = Callable[[Record], float]


def curve(record: Record) -> list[float]:
    """Bits per byte at each share of the budget, averaged over the domains brought until then.

    A domain counts from when the stream brings it to a system that is only trained on, so that
    all controllers are measured on the same domains at the same compute. At the end, these are all.
    """
    bits = np.array([record["bits"][domain] for domain in record["domains"]])
    return [float(bits[:count, i].mean()) for i, count in enumerate(record["brought"])]


def final(record: Record) -> float:
    """Bits per byte when the budget is spent, averaged over the world's domains."""
    return curve(record)[-1]


def anytime(record: Record) -> float:
    """Bits per byte averaged over the whole budget (by the trapezoidal rule)."""
    return float(np.trapezoid(curve(record), SHARES))


def final_seen(record: Record) -> float:
    """Bits per byte at the end, averaged over the domains that this episode's stream got to."""
    domains = record["domains"][: record["seen"]]
    return statistics.fmean(record["bits"][domain][-1] for domain in domains)


MEASURES: dict[str, Measure] = {"final": final, "anytime": anytime, "final_seen": final_seen}


@dataclass(frozen=True)
class Cells:
    """The episodes that every controller has finished, by controller, world and seed."""

    records: dict[str, dict[str, dict[int, Record]]]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Cells:
        """Keep worlds and seeds that all controllers have, so that all are measured on the same."""
        policies = list(dict.fromkeys(r["policy"] for r in records))
        found = {(r["policy"], r["world"], r["seed"]): r for r in records}
        cells = dict.fromkeys((r["world"], r["seed"]) for r in records)
        common = [cell for cell in cells if all((p, *cell) in found for p in policies)]
        table: dict[str, dict[str, dict[int, Record]]] = {policy: {} for policy in policies}
        for policy, (world, seed) in itertools.product(policies, common):
            table[policy].setdefault(world, {})[seed] = found[policy, world, seed]
        return cls(table)

    @property
    def policies(self) -> list[str]:
        """The controllers."""
        return list(self.records)

    @property
    def count(self) -> int:
        """Episodes of each controller."""
        worlds = next(iter(self.records.values()), {})
        return sum(len(by_seed) for by_seed in worlds.values())

    def sample(self, policy: str, measure: Measure) -> Sample:
        """A measure of a controller's episodes, for each world a list over seeds."""
        worlds = self.records[policy].values()
        return [[measure(by_seed[seed]) for seed in sorted(by_seed)] for by_seed in worlds]

    def mean(self, policy: str, name: str) -> float | None:
        """Mean of a field over a controller's episodes; None if it has none."""
        values = [record[name] for by_seed in self.records[policy].values()
                  for record in by_seed.values()]  # fmt: skip
        return None if None in values else statistics.fmean(values)


def summarize(cells: Cells) -> dict[str, dict[str, Any]]:
    """Statistics of each controller by itself."""
    found: dict[str, dict[str, Any]] = {}
    for policy in cells.policies:
        row: dict[str, Any] = {"episodes": cells.count}
        for name, measure in MEASURES.items():
            row[name] = interquartile_estimate(cells.sample(policy, measure)).to_list()
        share = cells.sample(policy, lambda r: r["flops"] / r["budget_flops"])
        row["compute"] = mean_estimate(share).value
        for name in ("decisions", "stage", "tried", "refused", "credited", "return"):
            row[name] = cells.mean(policy, name)
        points = [_point(i) for i in range(len(SHARES))]
        row["curve"] = [interquartile_estimate(cells.sample(policy, p)).to_list() for p in points]
        row["domains"] = _by_domain(cells, policy)
        found[policy] = row
    return found


def _point(number: int) -> Measure:
    return lambda record: curve(record)[number]


def _by_domain(cells: Cells, policy: str) -> dict[str, Any]:
    """Final bits per byte of each domain, over the worlds that have it."""
    worlds = cells.records[policy]
    domains = dict.fromkeys(
        domain for by_seed in worlds.values() for r in by_seed.values() for domain in r["domains"]
    )
    found = {}
    for domain in domains:
        sample = [
            [r["bits"][domain][-1] for r in by_seed.values()]
            for by_seed in worlds.values()
            if domain in next(iter(by_seed.values()))["domains"]
        ]
        found[domain] = interquartile_estimate(sample).to_list()
    return found


def compare(cells: Cells, policy: str, reference: str) -> dict[str, Any]:
    """Statistics of a controller against another, paired by world and seed."""
    row: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        mine, theirs = cells.sample(policy, measure), cells.sample(reference, measure)
        row[name] = paired_difference(mine, theirs).to_list()
        row[f"{name}_improves"] = probability_of_improvement(mine, theirs).to_list()
    row["return"] = None
    if all(cells.mean(p, "return") is not None for p in (policy, reference)):
        mine, theirs = (cells.sample(p, _reward) for p in (policy, reference))
        row["return"] = paired_difference(mine, theirs).to_list()
    return row


def _reward(record: Record) -> float:
    return float(record["return"])


def compare_all(
    records: Sequence[Record], reference: str | None, every_pair: bool = False
) -> dict[str, Any]:
    """All statistics of a comparison, as plain JSON data.

    Args:
        records: the finished episodes.
        reference: the controller that others are compared with, or None.
        every_pair: compare every two controllers.
    """
    cells = Cells.of(records)
    if not cells.count:
        return {"policies": {}, "against": {}, "episodes": 0, "worlds": 0}
    chosen = cells.policies if every_pair else [p for p in cells.policies if p == reference]
    against = {
        other: {p: compare(cells, p, other) for p in cells.policies if p != other}
        for other in chosen
    }
    return {
        "policies": summarize(cells),
        "against": against,
        "episodes": cells.count,
        "worlds": len(cells.records[cells.policies[0]]),
    }


def estimate(row: list[float | None]) -> Estimate:
    """Read what `Estimate.to_list` wrote."""
    return Estimate(*(float("nan") if x is None else x for x in row))
