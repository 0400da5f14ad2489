"""A readable controller.

Its rules, in the order in which they are asked:

1. **Stop on evidence**: in stage 4, stop when at least three of the four stopping criteria hold.
2. **Own yardsticks**: in stage 4, set a benchmark and a goal, once.
3. **Grow**: when the newest domain has been in the stream for a while, is still served much worse
   than the others, and its loss has stopped falling, add an agent under the root; at most once per
   domain, and only where deletion is permitted, so that it can be taken back. It splits the child
   that is held responsible. (Growing at once and for good did harm: more blocks share the same
   updates, and no cheat could then beat the shadow, which had not grown.)
4. **Prune idle agents**: where deletion is permitted and a tenth of the agents or more are neither
   responsible nor updated, prune a tenth of them.
5. **Tune on a plateau**: where tuning is permitted, move one hyper-parameter when the loss has
   stopped falling; if the loss is higher two decisions later, move it back.
6. **Probe one bound at a time**: try the forbidden action with the best record. A success makes
   the same direction the next candidate; a refusal makes it wait, twice as long each time. A new
   domain ends all waiting, for what helps depends on the text.
7. Otherwise train on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

from k1.config import read_dataclass
from k1.errors import ConfigError
from policies.base import Observation

# Forbidden actions worth trying, with the score that they start with. Moves that let more blocks
# learn, or learn faster, come first: a young system is usually held back by too little, not too
# much. Structural losses come last.
PROBES = {
    "tune lr x2": 1.0,
    "tune top_k x2": 0.9,
    "tune cooldown x0.5": 0.8,
    "tune cooldown x0.1": 0.7,
    "tune lr x10": 0.5,
    "tune top_k x4": 0.5,
    "prune 10%": 0.4,
    "tune lr x0.5": 0.3,
    "prune 25%": 0.2,
}
PLATEAU_MOVES = ("tune lr x0.5", "tune top_k x2", "tune cooldown x0.5", "tune lr x2")
OPPOSITE = {
    "tune lr x0.5": "tune lr x2",
    "tune lr x2": "tune lr x0.5",
    "tune top_k x2": "tune top_k x0.5",
    "tune cooldown x0.5": "tune cooldown x2",
}
FIRST_WAIT = 3
"""Decisions that an action waits after its first refusal."""
PLATEAU = 0.001
"""Relative fall per decision below which the loss counts as flat."""
FLAT_DECISIONS = 3
CRITERIA_TO_STOP = 3
DELETION_FROM = 3
"""Stage from which on deletion is permitted."""
GROW_AFTER = 4
"""Decisions that a new domain is given before the tree may grow for it."""
BADLY_SERVED = 1.15
"""A domain is badly served at this many times the mean loss of the others."""


class HeuristicPolicy:
    """The scripted controller that the module's rules describe."""

    def __init__(self, actions: Sequence[str]) -> None:
        """Learn the labels of the actions, by index."""
        self._index = {label: i for i, label in enumerate(actions)}
        self.reason = ""
        self._losses: list[float] = []
        self._seen = 0
        self._grown_for: list[str] = []
        self._score = dict(PROBES)
        self._wait = dict.fromkeys(PROBES, FIRST_WAIT)
        self._free_at = dict.fromkeys(PROBES, 0)
        self._last = ""
        self._tuned: dict[str, Any] | None = None
        self._next_plateau_move = 0
        self._yardsticks = 0

    def act(self, observation: Observation, info: Mapping[str, Any]) -> int:
        """Choose an action by the first rule that applies."""
        self._learn(info)
        rules = (
            self._stop_on_evidence,
            self._set_yardsticks,
            self._grow,
            self._prune_idle,
            self._tune_on_plateau,
            self._probe,
        )
        label, self.reason = "no-op", "nothing to do but train"
        for rule in rules:
            choice = rule(observation, info)
            if choice is not None:
                label, self.reason = choice
                break
        self._last = label
        return self._index[label]

    def _learn(self, info: Mapping[str, Any]) -> None:
        """Take in what came of the last decision."""
        seen = info["seen"]
        if len(seen) != self._seen:
            self._seen, self._losses = len(seen), []
            self._tuned = None
            self._wait = dict.fromkeys(PROBES, FIRST_WAIT)
            self._free_at = dict.fromkeys(PROBES, 0)
        self._losses.append(sum(info["bits_per_byte"][d] for d in seen) / len(seen))
        label = self._last
        if info["tried"] and label in self._score:
            if info["credited"]:
                self._score[label] += 0.5
                self._wait[label], self._free_at[label] = FIRST_WAIT, info["decision"]
            else:
                self._score[label] -= 0.2
                self._free_at[label] = info["decision"] + self._wait[label]
                self._wait[label] *= 2

    def _possible(self, label: str, info: Mapping[str, Any]) -> bool:
        return bool(info["action_mask"][self._index[label]])

    def _permitted(self, label: str, info: Mapping[str, Any]) -> bool:
        return bool(info["permitted_mask"][self._index[label]])

    def _flat(self) -> bool:
        recent = self._losses[-FLAT_DECISIONS - 1 :]
        if len(recent) <= FLAT_DECISIONS:
            return False
        return recent[0] - recent[-1] < PLATEAU * FLAT_DECISIONS * recent[0]

    # -- the rules -------------------------------------------------------------------------------

    def _stop_on_evidence(
        self, observation: Observation, info: Mapping[str, Any]
    ) -> tuple[str, str] | None:
        held = info["stop_criteria"]
        if info["stage"] == 4 and len(held) >= CRITERIA_TO_STOP:
            return "stop", f"evidence for stopping: {', '.join(held)}"
        return None

    def _set_yardsticks(
        self, observation: Observation, info: Mapping[str, Any]
    ) -> tuple[str, str] | None:
        wanted = ("benchmark: worst domain seen", "goal: lower the loss by 3 %")
        if info["stage"] == 4 and self._yardsticks < len(wanted):
            self._yardsticks += 1
            return wanted[self._yardsticks - 1], "a yardstick of its own"
        return None

    def _grow(self, observation: Observation, info: Mapping[str, Any]) -> tuple[str, str] | None:
        seen, bits = info["seen"], info["bits_per_byte"]
        newest = seen[-1]
        if len(seen) < 2 or newest in self._grown_for:
            return None
        others = sum(bits[d] for d in seen[:-1]) / (len(seen) - 1)
        label = "add under slot 0"
        waited = len(self._losses) > GROW_AFTER and info["stage"] >= DELETION_FROM
        if (
            waited
            and self._flat()
            and bits[newest] > BADLY_SERVED * others
            and self._permitted(label, info)
        ):
            self._grown_for.append(newest)
            return label, f"{newest} is new and badly served ({bits[newest]:.2f} bits per byte)"
        return None

    def _prune_idle(
        self, observation: Observation, info: Mapping[str, Any]
    ) -> tuple[str, str] | None:
        label = "prune 10%"
        if not self._permitted(label, info) or not self._flat():
            return None
        rows = observation["agents"].reshape(-1, 7)
        alive, leaf = rows[:, 0] > 0, rows[:, 6] > 0
        idle = alive & leaf & (rows[:, 3] < 0.05) & (rows[:, 4] < 0.01)
        if idle.sum() >= 0.1 * alive.sum():
            return label, f"{int(idle.sum())} agents are idle"
        return None

    def _tune_on_plateau(
        self, observation: Observation, info: Mapping[str, Any]
    ) -> tuple[str, str] | None:
        if self._tuned is not None and info["decision"] >= self._tuned["decision"] + 2:
            tuned, self._tuned = self._tuned, None
            back = OPPOSITE[tuned["label"]]
            if self._losses[-1] > tuned["loss"] and self._permitted(back, info):
                return back, f"{tuned['label']} did not help"
        if self._tuned is not None or not self._flat():
            return None
        for _ in PLATEAU_MOVES:
            label = PLATEAU_MOVES[self._next_plateau_move % len(PLATEAU_MOVES)]
            self._next_plateau_move += 1
            if self._permitted(label, info):
                self._tuned = {
                    "label": label,
                    "decision": info["decision"],
                    "loss": self._losses[-1],
                }
                return label, "the loss is flat"
        return None

    def _probe(self, observation: Observation, info: Mapping[str, Any]) -> tuple[str, str] | None:
        ready = [
            label
            for label in PROBES  # in this order: a stored memory has its keys sorted
            if self._free_at[label] <= info["decision"]
            and self._possible(label, info)
            and not self._permitted(label, info)
        ]
        if not ready:
            return None
        best = max(ready, key=lambda label: self._score[label])
        return best, f"probes a bound (record {self._score[best]:+.1f})"

    # -- memory ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain JSON data."""
        return {name: deepcopy(getattr(self, name)) for name in _MEMORY}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a memory over.

        Raises:
            ConfigError: if it is none of this controller's.
        """
        memory = read_dataclass(
            _Memory, {name.removeprefix("_"): state[name] for name in _MEMORY}, "memory", whole=True
        )
        probed = (memory.score.keys(), memory.wait.keys(), memory.free_at.keys())
        if not all(labels == PROBES.keys() for labels in probed):
            raise ConfigError("memory: what is probed differs: was it written by another version?")
        for name in _MEMORY:
            setattr(self, name, deepcopy(getattr(memory, name.removeprefix("_"))))


@dataclass
class _Tuned:
    """What was tuned last, when, and the loss before."""

    label: str
    decision: int
    loss: float


@dataclass
class _Memory:
    """What the controller remembers, under its names without the underscore."""

    losses: list[float]
    seen: int
    grown_for: list[str]
    score: dict[str, float]
    wait: dict[str, int]
    free_at: dict[str, int]
    last: str
    tuned: dict[str, Any] | None
    next_plateau_move: int
    yardsticks: int

    def __post_init__(self) -> None:
        """See that what was tuned is whole."""
        if self.tuned is not None:
            read_dataclass(_Tuned, self.tuned, "memory.tuned", whole=True)


_MEMORY = tuple(f"_{field.name}" for field in fields(_Memory))
