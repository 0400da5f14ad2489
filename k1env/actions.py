"""The action table: one flat list of named actions, fixed by the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from k1.config import ModelConfig
from k1.errors import K1Error

NOOP, ADD, DELETE, PRUNE, TUNE, STOP = "noop", "add", "delete", "prune", "tune", "stop"
BENCHMARK, GOAL = "benchmark", "goal"

PRUNE_FRACTIONS = (0.10, 0.25, 0.50)
TUNE_FACTORS = {
    "lr": (0.1, 0.5, 2.0, 10.0),
    "cooldown": (0.1, 0.5, 2.0, 10.0),
    "top_k": (0.25, 0.5, 2.0, 4.0),
}
BENCHMARK_TEMPLATES = ("mean of all domains seen", "worst domain seen", "newest domain")
GOAL_TEMPLATES = (
    ("lower the loss by 1 %", 0.01, 3),
    ("lower the loss by 3 %", 0.03, 5),
    ("lower the loss by 10 %", 0.10, 10),
)
"""Name, relative fall of the mean loss that reaches the goal, and patience in decisions."""


class ActionError(K1Error):
    """An action that is not in the table."""


@dataclass(frozen=True)
class Action:
    """One entry of the table."""

    index: int
    kind: str
    label: str
    """Stable name, for example `tune lr x2`."""
    slot: int = -1
    """Add: the parent's slot. Delete: the agent's slot."""
    parameter: str = ""
    """Tune: which hyper-parameter."""
    value: float = 0.0
    """Tune: factor. Prune: fraction. Benchmark and goal: number of the template."""

    @property
    def structural(self) -> bool:
        """Whether the action changes the tree."""
        return self.kind in (ADD, DELETE, PRUNE)


def action_table(model: ModelConfig) -> tuple[Action, ...]:
    """Lay out the actions of a configuration."""
    rows: list[tuple[str, str, int, str, float]] = [(NOOP, "no-op", -1, "", 0.0)]
    capacity = model.level_capacity
    slots = sum(capacity)
    rows += [(ADD, f"add under slot {s}", s, "", 0.0) for s in range(slots - capacity[-1])]
    rows += [(DELETE, f"delete slot {s}", s, "", 0.0) for s in range(1, slots)]
    rows += [(PRUNE, f"prune {100 * f:.0f}%", -1, "", f) for f in PRUNE_FRACTIONS]
    for parameter, factors in TUNE_FACTORS.items():
        rows += [(TUNE, f"tune {parameter} x{f:g}", -1, parameter, f) for f in factors]
    rows.append((STOP, "stop", -1, "", 0.0))
    rows += [(BENCHMARK, f"benchmark: {n}", -1, "", i) for i, n in enumerate(BENCHMARK_TEMPLATES)]
    rows += [(GOAL, f"goal: {n}", -1, "", i) for i, (n, _, _) in enumerate(GOAL_TEMPLATES)]
    return tuple(Action(i, *row) for i, row in enumerate(rows))


def tuned_value(parameter: str, current: float, factor: float) -> float:
    """The value that a tune action asks for; whole numbers always move by at least one.

    A cooldown below 1 is 0; a cooldown of 0 rises from 1.
    """
    if parameter == "lr":
        return float(f"{current * factor:.6g}")  # x10 and x0.1 give the old value back
    if factor < 1:
        return float(min(current - 1, int(current * factor)))
    return float(max(current + 1, round(max(current, 1) * factor)))
