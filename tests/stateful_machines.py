"""Machines of hypothesis that play the environment and the boundary under the checks."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from k1.data import TextData
from k1env.actions import action_table
from k1env.boundary import Boundary, Request, hard_limits
from k1env.env import Phase2Env
from tests.phase2_helpers import boundary_at, index_of, smallest
from tests.stateful_checks import Count, check_bounds, freeze, hold, permits
from tests.stateful_player import Auditor

GATES: dict[str, dict[str, Any]] = {
    "strict": {},
    "lenient": {"margin": -1.0, "alpha": 0.5},
    "a coin": {"margin": 0.0, "alpha": 0.5},
}
ACTIONS = 48
CAPACITY = 14
STARTS: dict[str, tuple[int, int, float]] = {
    "stage 1": (1, 0, 1.0),
    "nearly stage 2": (1, 2, 10.0),
    "too little evidence": (1, 2, 1.0),
    "stage 2": (2, 0, 1.0),
    "stage 3": (3, 0, 1.0),
    "nearly stage 4": (3, 9, 1e6),
    "stage 4": (4, 0, 1.0),
}
"""Stage, successes in it and evidence at the start of a play."""


def boundary_of(stage: int, successes: int = 0, evidence: float = 1.0) -> Boundary:
    """A boundary as after as many successes."""
    made = boundary_at(stage, CAPACITY)
    made.successes, made.evidence = successes, evidence
    made.accepted = made.attempted = successes
    return made


class Rude:
    """An object that raises whatever it is asked."""

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise ValueError("no\nway")


OBJECTS: tuple[Any, ...] = (
    None, "x", "1", b"1", "long\n" * 999, math.nan, math.inf, 0.9, 1.0, 1j, -1, ACTIONS, 10**9,
    10**5000, -(2**63), [], [1], (1,), {}, {1}, True, False, object(), Rude(), print, np.int64(3),
    np.uint8(2), np.int8(-1), np.float32(1), np.float64(math.nan), np.bool_(True), np.array(3),
    np.array([3]), np.array([1, 2]), np.array("x"), np.datetime64("2020"), np.zeros((50, 50)),
    torch.tensor(3), torch.tensor(math.nan), torch.zeros(2), torch.tensor(True),
)  # fmt: skip


class PlayMachine(RuleBasedStateMachine):
    """Any sequence of decisions, real trials among them, looks ahead and back, saves and loads."""

    data: ClassVar[TextData]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    @initialize(
        gate=st.sampled_from(sorted(GATES)),
        start=st.sampled_from(sorted(STARTS)),
        seed=st.integers(0, 3),
    )
    def begin(self, gate: str, start: str, seed: int) -> None:
        env = Phase2Env(config=smallest(GATES[gate]), data=self.data)
        boundary = boundary_of(*STARTS[start])
        self.play = Auditor(env, Path(self.folder.name), seed=seed, boundary=boundary)

    def running(self) -> bool:
        return not self.play.env.session.finished

    @rule(index=st.integers(0, ACTIONS - 1))
    def any_action(self, index: int) -> None:
        self.play.step(index)

    @precondition(running)
    @rule(draw=st.integers(0, 999), forbidden=st.booleans())
    def possible_action(self, draw: int, forbidden: bool) -> None:
        env = self.play.env
        mask = env.action_masks() - (env.permitted_mask() if forbidden else 0)
        choices = np.flatnonzero(mask)
        if len(choices):
            self.play.step(choices[draw % len(choices)])

    @rule(first=st.sampled_from(("tune lr x0.5", "tune lr x2")))
    def there_and_back(self, first: str) -> None:
        for label in (first, "tune lr x2" if first == "tune lr x0.5" else "tune lr x0.5"):
            self.play.step(index_of(self.play.env, label))

    @rule(number=st.integers(0, len(OBJECTS) - 1))
    def any_object(self, number: int) -> None:
        self.play.offer(OBJECTS[number])

    @rule(index=st.integers(0, ACTIONS - 1))
    def peek(self, index: int) -> None:
        self.play.peek(index)

    @rule()
    def undo(self) -> None:
        self.play.undo()

    @rule(index=st.integers(0, ACTIONS - 1))
    def reload(self, index: int) -> None:
        self.play.reload(index)

    @precondition(running)
    @rule(index=st.integers(0, ACTIONS - 1))
    def harm(self, index: int) -> None:
        """Wreck the weights before a decision, which no controller can: the guard steps in."""
        self.play.env.session.arena["shared"][0] *= -20.0
        self.play.step(index)

    def teardown(self) -> None:
        with self.folder:
            if hasattr(self, "play"):
                self.play.close()


CI = settings(
    max_examples=10,
    stateful_step_count=16,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(CI, max_examples=100, stateful_step_count=40)


def play_twice(data: TextData, steps: int) -> None:
    """Play two environments alike: beside one of them, copies look ahead and generators draw."""
    rng = np.random.default_rng(0)
    config = smallest(GATES["a coin"])
    one, other = (Phase2Env(config=config, data=data) for _ in range(2))
    seed = 3
    hold("same seed", freeze(one.reset(seed=seed)) == freeze(other.reset(seed=seed)))
    for step in range(steps):
        mask = one.permitted_mask() if rng.random() < 0.5 else one.action_masks()
        action = int(rng.choice(np.flatnonzero(mask) if rng.random() < 0.9 else np.arange(ACTIONS)))
        if step % 25 == 7:
            other.peek(action)
            other.fork().reset(seed=99)
        torch.rand(3), np.random.random()
        done = one.step(action)
        hold("same seed", freeze(done) == freeze(other.step(action)), f"step {step}")
        if done[2] or done[3]:
            seed += 1
            one.reset(seed=seed), other.reset(seed=seed)
    hashes = [env.session.trainer.state_hash() for env in (one, other)]
    hold("same seed", hashes[0] == hashes[1] and one.ledger.entries == other.ledger.entries)


# -- the boundary by itself, with invented verdicts ----------------------------------------------

TABLE = action_table(smallest().system.model)
KINDS = tuple({(action.kind, action.parameter): action for action in TABLE}.values())
VALUES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.3, 0.31, 0, 1, 3, 5, 20, 50, 60, 100, 240,
          500, 501, -1, 1e9, math.nan, math.inf)  # fmt: skip


class BoundaryMachine(RuleBasedStateMachine):
    """The boundary against a count of its own, in all stages."""

    @initialize(capacity=st.sampled_from((4, 6, 14, 40, 64)))
    def begin(self, capacity: int) -> None:
        self.capacity = capacity
        self.boundary = Boundary(hard_limits(capacity))
        self.count, self.bounds = Count(), self.boundary.bounds

    @rule(
        success=st.booleans(),
        action=st.sampled_from(TABLE),
        value=st.sampled_from(VALUES) | st.none(),
        agents=st.integers(-1, 64),
    )
    def record(self, success: bool, action: Any, value: float | None, agents: int) -> None:
        request = Request(action, value, agents)
        promoted = self.boundary.record(success, request, 0)
        before, self.count = self.count, self.count.after(success)
        hold("stage", promoted == (self.count.stage == before.stage + 1))
        check_bounds(self.boundary.bounds, self.capacity, self.bounds)
        hold("bounds", success or self.boundary.bounds == self.bounds, "widened by a failure")
        self.bounds = self.boundary.bounds

    @precondition(lambda self: self.count.stage < 4)
    @rule()
    def win(self) -> None:
        """Succeed until the next stage opens."""
        stage = self.count.stage
        while self.count.stage == stage:
            self.record(True, TABLE[0], None, 12)

    @rule(agents=st.integers(-1, 64))
    def ask(self, agents: int) -> None:
        for action, value in itertools.product(KINDS, VALUES):
            ruling = self.boundary.rule(Request(action, value, agents))
            expected = permits(self.count.stage, self.bounds, action, value, agents)
            hold("mask", ruling.permitted == expected, ruling.rule)

    @rule()
    def save_and_load(self) -> None:
        stored = json.loads(json.dumps(self.boundary.to_dict()))
        again = Boundary.from_dict(stored)
        hold("restore", again == self.boundary)
        self.boundary = again

    @invariant()
    def counted(self) -> None:
        if hasattr(self, "boundary"):
            hold("evidence", Count.of(self.boundary) == self.count, self.count)
            hold("stage", len(self.boundary.history) == self.count.stage - 1, "history")
