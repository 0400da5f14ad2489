"""What stage 4 adds: own benchmarks, own goals, and the evidence for stopping.

Benchmarks and goals are additive: they steer stopping and reports, never the gate or the reward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from k1.config import read_dataclass
from k1.errors import ConfigError
from k1env.actions import BENCHMARK_TEMPLATES, GOAL_TEMPLATES

DEFAULT_PATIENCE = 5
STABLE = 0.002
"""Relative change below which a benchmark counts as stable, and a loss as a plateau."""
PLATEAU, NO_STRUCTURE, STABLE_BENCHMARK, BEST_COMPUTE = (
    "loss plateau",
    "no structural trial helped lately",
    "own benchmark stable",
    "compute per gain at its best",
)


@dataclass
class Benchmark:
    """A figure that the controller chose to watch."""

    template: int
    created: int
    values: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it measures."""
        return BENCHMARK_TEMPLATES[self.template]

    def measure(self, bits: dict[str, float], seen: tuple[str, ...]) -> float:
        """Compute the figure from bits per byte of all domains."""
        values = [bits[domain] for domain in seen]
        return [sum(values) / len(values), max(values), values[-1]][self.template]


@dataclass
class Goal:
    """A fall of the mean loss that the controller set itself."""

    template: int
    created: int
    start: float
    reached: int | None = None
    """Decision at which it was reached."""

    @property
    def name(self) -> str:
        """What it asks for."""
        return GOAL_TEMPLATES[self.template][0]

    @property
    def target(self) -> float:
        """The loss that reaches it."""
        return self.start * (1 - GOAL_TEMPLATES[self.template][1])

    @property
    def patience(self) -> int:
        """Decisions without progress that count as a plateau."""
        return GOAL_TEMPLATES[self.template][2]


@dataclass
class Autonomy:
    """Records for self-stopping, kept from the first decision on."""

    seen: int = 0
    """Domains seen; the records of losses start anew when there is one more."""
    losses: list[float] = field(default_factory=list)
    """Mean validation loss over the domains seen, after each decision."""
    compute: list[int] = field(default_factory=list)
    """Lane steps spent by each decision."""
    last_structural_gain: int = -1
    """Decision of the last structural cheat that was credited."""
    structural_tries: list[int] = field(default_factory=list)
    """Decisions at which a structural change was made or tried."""
    benchmarks: list[Benchmark] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    @property
    def patience(self) -> int:
        """The patience that the controller chose with its last goal."""
        return self.goals[-1].patience if self.goals else DEFAULT_PATIENCE

    def observe(
        self, decision: int, bits: dict[str, float], seen: tuple[str, ...], spent: int
    ) -> None:
        """Record the figures after a decision."""
        mean = sum(bits[d] for d in seen) / len(seen)
        if len(seen) != self.seen:
            self.seen, self.losses, self.compute = len(seen), [], []
        self.losses.append(mean)
        self.compute.append(spent)
        for benchmark in self.benchmarks:
            benchmark.values.append(benchmark.measure(bits, seen))
        for goal in self.goals:
            if goal.reached is None and mean <= goal.target:
                goal.reached = decision

    def stop_criteria(self, decision: int) -> list[str]:
        """Name the criteria for stopping that hold now."""
        patience, held = self.patience, []
        if len(self.losses) > patience:
            before, after = min(self.losses[:-patience]), min(self.losses[-patience:])
            if not after < before * (1 - STABLE):
                held.append(PLATEAU)
        recent = [d for d in self.structural_tries if d > decision - 2 * patience]
        if recent and self.last_structural_gain <= decision - 2 * patience:
            held.append(NO_STRUCTURE)
        for benchmark in self.benchmarks:
            values = benchmark.values[-patience:]
            if len(values) == patience and max(values) - min(values) <= STABLE * values[-1]:
                held.append(STABLE_BENCHMARK)
                break
        if self._compute_at_best():
            held.append(BEST_COMPUTE)
        return held

    def _compute_at_best(self) -> bool:
        """Whether the last stretch bought less loss per lane step than the whole so far."""
        patience = self.patience
        if len(self.losses) <= 2 * patience:
            return False
        recent = (self.losses[-patience - 1] - self.losses[-1]) / max(
            1, sum(self.compute[-patience:])
        )
        overall = (self.losses[0] - self.losses[-1]) / max(1, sum(self.compute[1:]))
        return recent < overall

    def to_dict(self) -> dict[str, Any]:
        """Return the records as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Autonomy:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: if it is no such record.
        """
        made = read_dataclass(cls, data, "autonomy", whole=True)
        for name, kept, known in (
            ("benchmarks", made.benchmarks, BENCHMARK_TEMPLATES),
            ("goals", made.goals, GOAL_TEMPLATES),
        ):
            if not all(0 <= one.template < len(known) for one in kept):
                raise ConfigError(f"autonomy.{name} has one of an unknown template")
        return made
