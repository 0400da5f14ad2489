"""The boundary system: what each stage permits, how bounds widen, and what a promotion takes.

| stage | permitted | forbidden: a cheat | successes to advance |
|---|---|---|---|
| 1 Safe exploration | add | delete, prune, tune, stop | 3 |
| 2 Parameter exploration | add, tune within bounds | delete, prune, tune outside, stop | 5 |
| 3 Structural control | all but stop, within wider bounds | fewer agents, tune outside, stop | 10 |
| 4 Full autonomy | everything, own benchmarks and goals | nothing but the hard limits | - |

Promotion also needs evidence E >= 100. E starts at 1 in each stage and is multiplied by 10 at a
success and by 10/11 at a failure: a test martingale if a cheat that does not help succeeds with
probability 1 % (0.01 * 10 + 0.99 * 10/11 = 1), so by Ville's inequality it ever reaches 100 with
probability 1 % at most, however often a policy tries.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from k1.config import read_dataclass
from k1.errors import ConfigError
from k1env import actions
from k1env.actions import Action

STAGES = (
    "Safe exploration",
    "Parameter exploration",
    "Structural control",
    "Full autonomy",
)
SUCCESSES_TO_ADVANCE = (3, 5, 10)
EVIDENCE_TO_ADVANCE = 100.0
SUCCESS_FACTOR = 10.0
FAILURE_FACTOR = 10.0 / 11.0
WIDEN_FACTOR = {"lr": 10.0, "cooldown": 2.0, "top_k": 2.0}


@dataclass(frozen=True)
class Bounds:
    """Ranges of the hyper-parameters, ends included, and the fewest agents."""

    lr: tuple[float, float]
    cooldown: tuple[float, float]
    top_k: tuple[float, float]
    min_agents: int

    def range(self, parameter: str) -> tuple[float, float]:
        """The range of one hyper-parameter."""
        low, high = getattr(self, parameter)
        return low, high

    def holds(self, parameter: str, value: float) -> bool:
        """Whether a value lies within; NaN does not."""
        low, high = self.range(parameter)
        return low <= value <= high

    def with_range(self, parameter: str, wider: tuple[float, float]) -> Bounds:
        """The same bounds but for one range."""
        return Bounds.from_dict({**asdict(self), parameter: wider})

    def union(self, other: Bounds) -> Bounds:
        """The wider of both, side by side."""

        def both(name: str) -> tuple[float, float]:
            (low, high), (other_low, other_high) = self.range(name), other.range(name)
            return min(low, other_low), max(high, other_high)

        fewest = min(self.min_agents, other.min_agents)
        return Bounds(both("lr"), both("cooldown"), both("top_k"), fewest)

    def within(self, outer: Bounds) -> Bounds:
        """The same bounds, cut to what others hold: a small tree has less room than a stage."""

        def cut(name: str) -> tuple[float, float]:
            (low, high), (least, most) = self.range(name), outer.range(name)
            return min(max(low, least), most), max(min(high, most), least)

        fewest = max(self.min_agents, outer.min_agents)
        return Bounds(cut("lr"), cut("cooldown"), cut("top_k"), fewest)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Bounds:
        """Read what `asdict` wrote, lists for tuples."""
        return Bounds(
            lr=tuple(data["lr"]),
            cooldown=tuple(data["cooldown"]),
            top_k=tuple(data["top_k"]),
            min_agents=data["min_agents"],
        )


STAGE_2_BOUNDS = Bounds((1e-4, 1e-2), (5, 50), (3, 10), min_agents=10)
STAGE_3_BOUNDS = Bounds((1e-5, 1e-1), (1, 100), (1, 20), min_agents=10)
HARD_MIN_AGENTS = 4


def hard_limits(capacity: int) -> Bounds:
    """What no stage and no success can widen; `capacity` is the most agents that fit."""
    return Bounds((1e-6, 0.3), (0, 500), (1, capacity), min_agents=HARD_MIN_AGENTS)


@dataclass(frozen=True)
class Request:
    """An action with its consequences for what is bounded."""

    action: Action
    value: float | None = None
    """Tune: the value asked for."""
    agents_after: int = 0


@dataclass(frozen=True)
class Ruling:
    """Whether the present stage permits a request, and by which rule."""

    permitted: bool
    rule: str
    """One sentence for people."""


@dataclass
class Boundary:
    """The state of the boundary system. Only `record` changes it, from a trial's verdict."""

    hard: Bounds
    stage: int = 1
    bounds: Bounds = STAGE_2_BOUNDS
    """Bounds that tuning is held to; in stage 1, those that stage 2 will start with."""
    evidence: float = 1.0
    successes: int = 0
    """Credited cheats in this stage."""
    attempted: int = 0
    accepted: int = 0
    """Credited cheats in all stages."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each stage entered: stage, decision, attempts and successes so far."""

    def __post_init__(self) -> None:
        """Hold the bounds to the hard limits."""
        self.bounds = self.bounds.within(self.hard)

    @property
    def needed(self) -> int | None:
        """Successes that this stage takes; None in the last."""
        return SUCCESSES_TO_ADVANCE[self.stage - 1] if self.stage < 4 else None

    def rule(self, request: Request) -> Ruling:
        """Say whether a request is permitted now."""
        kind, name = request.action.kind, f"stage {self.stage} ({STAGES[self.stage - 1]})"
        if kind in (actions.NOOP, actions.ADD) or self.stage == 4:
            return Ruling(True, f"{name} permits it")
        if kind == actions.TUNE:
            if self.stage == 1:
                return Ruling(False, f"{name} permits no tuning")
            parameter, value = request.action.parameter, request.value
            low, high = self.bounds.range(parameter)
            inside = value is not None and self.bounds.holds(parameter, value)
            verb = "holds" if inside else "holds only"
            return Ruling(inside, f"{name} {verb} {parameter} in [{low:g}, {high:g}]")
        if kind in (actions.DELETE, actions.PRUNE):
            if self.stage < 3:
                return Ruling(False, f"{name} permits no deletion")
            enough = request.agents_after >= self.bounds.min_agents
            return Ruling(enough, f"{name} keeps at least {self.bounds.min_agents} agents")
        if kind == actions.STOP:
            return Ruling(False, f"{name} does not permit stopping")
        return Ruling(False, f"{name} has no own benchmarks and goals")

    def record(self, success: bool, request: Request, decision: int) -> bool:
        """Count a finished attempt; returns whether the next stage opens.

        Args:
            success: whether the cheat is credited.
            request: what was tried.
            decision: number of the decision, for the history.
        """
        self.attempted += 1
        self.evidence *= SUCCESS_FACTOR if success else FAILURE_FACTOR
        if not success:
            return False
        self.successes += 1
        self.accepted += 1
        self._widen(request)
        needed = self.needed
        if needed is None or self.successes < needed or self.evidence < EVIDENCE_TO_ADVANCE:
            return False
        self.stage += 1
        self.bounds = {
            3: self.bounds.union(STAGE_3_BOUNDS).within(self.hard),
            4: self.hard,
        }.get(self.stage, self.bounds)
        self.history.append(
            {
                "stage": self.stage,
                "decision": decision,
                "attempted": self.attempted,
                "accepted": self.accepted,
                "evidence": self.evidence,
            }
        )
        self.evidence, self.successes = 1.0, 0
        return True

    def _widen(self, request: Request) -> None:
        action, value = request.action, request.value
        if action.kind == actions.TUNE and value is not None:
            parameter = action.parameter
            low, high = self.bounds.range(parameter)
            hard_low, hard_high = self.hard.range(parameter)
            factor = WIDEN_FACTOR[parameter]
            while value < low and low > hard_low:
                low = low / factor if parameter == "lr" else low // factor
            while value > high and high < hard_high:
                high = high * factor
            wider = (max(low, hard_low), min(high, hard_high))
            self.bounds = self.bounds.with_range(parameter, wider)
        elif action.kind in (actions.DELETE, actions.PRUNE):
            fewest = self.bounds.min_agents
            if request.agents_after < fewest:
                halved = max(self.hard.min_agents, min(request.agents_after, fewest // 2))
                self.bounds = replace(self.bounds, min_agents=halved)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Boundary:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: if it is no state of a boundary.
        """
        made = read_dataclass(cls, data, "boundary", whole=True)
        counts = (made.successes, made.accepted - made.successes, made.attempted - made.accepted)
        if not (1 <= made.stage <= len(STAGES) and 0 < made.evidence < math.inf):
            raise ConfigError(
                f"boundary.stage = {made.stage} with evidence {made.evidence} is not possible"
            )
        if asdict(made.bounds) != asdict(read_dataclass(Bounds, data["bounds"], "bounds")):
            raise ConfigError("boundary: its bounds are beyond the hard limits")
        if min(counts) < 0:
            raise ConfigError("boundary: more cheats succeeded than were tried")
        made.history = [dict(entry) for entry in made.history]
        return made
