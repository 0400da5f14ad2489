"""One episode of a comparison: charged by operations, cut at a budget, measured on the way.

Every episode of a world may execute equally many operations, those of a decision being its training
steps in all lanes (trials included) and its measurements; measuring on the test pool is the
observer's and free. A request that would go beyond the budget is not carried out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from k1.flops import measuring_flops
from k1env.env import Observation, Phase2Env
from k1env.instances import Instance
from k1env.schedule import Evaluate, Request, Score, Task, Train
from k1env.session import Session

SHARES = tuple(i / 10 for i in range(11))
"""Shares of the budget at which the system is measured."""
TEST_WINDOWS = 4
"""Windows of a measurement, in multiples of what a controller's validation loss is made of."""
CEILING = 16.0
"""Bits per byte that no figure goes beyond, so that one broken system is not all of a mean."""
_ROUNDING = 1e-9


@dataclass
class Life:
    """An episode as a contestant sees it."""

    env: Phase2Env
    observation: Observation
    info: dict[str, Any]
    decisions: int = 0
    total: float = 0.0
    """Sum of the rewards."""
    over: bool = False

    @property
    def session(self) -> Session:
        """The session behind the environment, for those that are not held to its bounds."""
        return self.env.session

    @property
    def share_spent(self) -> float:
        """Share of the environment's own budget that is spent."""
        return self.session.spent / self.session.settings.budget

    def step(self, action: int) -> Task[None]:
        """Make a decision."""
        result = yield from self.env.step_task(action)
        self.session.gate.adopted = {}  # copies of lanes that nobody needs any more
        self.observation, reward, terminated, truncated, self.info = result
        self.total += reward
        self.decisions += 1
        self.over = terminated or truncated

    def tune(self, hyper: Mapping[str, float], lane: int | None = None) -> None:
        """Set hyper-parameters by hand, within the hard limits, in the system or another lane."""
        arena = self.session.arena
        where = self.session.main if lane is None else lane
        for name, value in hyper.items():
            low, high = self.session.boundary.hard.range(name)
            kept = min(max(value, low), high)
            arena.set_hyper(where, name, kept if name == "lr" else round(kept))


class Contestant(Protocol):
    """Whoever plays an episode."""

    within_bounds: bool
    """Whether it acts through the environment's actions alone."""
    identity: str | None
    """What it was read from a file, in short: such a contestant has no memory, and one plays all
    episodes. None for the others, which their name and seed define."""

    def play(self, life: Life) -> Task[None]:
        """Play until the episode is over. The task may be ended at any request."""


def budget_flops(session: Session) -> float:
    """Operations that an episode may execute: those of a starting tree that is only trained on."""
    settings, system = session.settings, session.settings.system
    windows = len(session.world.domains) * system.train.eval_windows
    blocks = session.agents_start + 1
    measured = measuring_flops(system, session.data.vocab_size, blocks, windows)
    return settings.budget * (session.reference_flops + measured / settings.interval)


class Meter:
    """Counts what an episode executes, and measures the system at shares of the budget.

    A share's measurement is of the system as it was when no more than that share was spent.
    """

    def __init__(self, session: Session, split: str, expired: Callable[[], bool]) -> None:
        """Start at nothing.

        Args:
            session: the episode's, after its reset.
            split: the pool to measure on.
            expired: whether it is time to give up.
        """
        self.session, self.split, self.expired = session, split, expired
        self.budget, self.spent = budget_flops(session), 0.0
        self.curve: list[dict[str, float]] = []
        """Bits per byte by domain, at each share so far."""

    def run(self, task: Task[None]) -> Task[None]:
        """Run a task until it ends, or until its next request would go beyond the budget.

        Raises:
            TimeUp: if it is time to give up.
        """
        try:
            request = next(task)
            while True:
                cost = self._cost(request)
                yield from self._measure_before(cost)
                if len(self.curve) == len(SHARES):
                    return
                self.spent += cost
                try:
                    answer = yield request
                except Exception as error:
                    request = task.throw(error)
                else:
                    request = task.send(answer)
        except StopIteration:
            yield from self._measure_before(math.inf)
        finally:
            task.close()

    def _measure_before(self, cost: float) -> Task[None]:
        if self.expired():
            raise TimeUp
        due = [x for x in SHARES if self.spent + cost > x * self.budget * (1 + _ROUNDING)]
        missing = len(due) - len(self.curve)
        if missing > 0:
            windows = TEST_WINDOWS * self.session.settings.system.train.eval_windows
            domains = self.session.world.domains
            found = yield Evaluate(self.session.main, self.split, domains, windows)
            bits = {d: min(x, CEILING) if x == x else CEILING for d, x in found.items()}
            self.curve += [bits] * missing

    def _cost(self, request: Request) -> float:
        session = self.session
        if isinstance(request, Train):
            return request.steps * sum(map(session.step_flops, request.lanes))
        return measured_flops(session, request)


def measured_flops(session: Session, request: Request) -> float:
    """Operations of a session's request to measure; 0 for other requests."""

    def of(lane: int, windows: int) -> float:
        blocks = len(session.arena.trees[lane].blocks)
        return measuring_flops(session.settings.system, session.data.vocab_size, blocks, windows)

    if isinstance(request, Evaluate):
        windows = request.windows or session.settings.system.train.eval_windows
        return of(request.lane, len(request.domains) * windows)
    if isinstance(request, Score):
        windows = request.batch.inputs.shape[1]
        return sum(of(lane, windows) for lane in range(request.start, request.stop))
    return 0.0


class TimeUp(Exception):
    """The time for a comparison is over."""


def play(
    env: Phase2Env,
    contestant: Contestant,
    world: Instance | str,
    seed: int,
    *,
    split: str = "test",
    expired: Callable[[], bool] = lambda: False,
) -> Task[dict[str, Any]]:
    """Play an episode; returns its record as plain JSON data.

    Args:
        env: a seated environment.
        contestant: who plays.
        world: an instance or its name.
        seed: of the reset.
        split: the pool that the system is measured on.
        expired: whether it is time to give up.

    Raises:
        TimeUp: if it is time to give up.
    """
    observation, info = yield from env.reset_task(seed, {"instance": world})
    life = Life(env, observation, info)
    session = env.session
    meter = Meter(session, split, expired)
    yield from meter.run(_to_the_end(contestant, life))
    domains = session.world.domains
    made = [max(0, int(x * session.settings.max_decisions) - 1) for x in SHARES]
    tries = session.tries
    return {
        "domains": list(domains),
        "brought": [len(session.world.seen(n)) for n in made],
        "bits": {domain: [bits[domain] for bits in meter.curve] for domain in domains},
        "budget_flops": meter.budget,
        "flops": meter.spent,
        "decisions": life.decisions,
        "seen": len(session.world.seen(max(0, session.decision - 1))),
        "stage": session.boundary.stage,
        "tried": len(tries),
        "refused": sum(not entry["applied"] for entry in tries),
        "credited": sum(entry["credited"] for entry in tries),
        "rollbacks": session.guard.rollbacks,
        "return": life.total if contestant.within_bounds else None,
        "agents": session.tree.agents,
        "hyper": session.arena.get_hyper(session.main),
        "stop_reason": session.stop_reason or "operations spent",
    }


def _to_the_end(contestant: Contestant, life: Life) -> Task[None]:
    """Let a contestant play; if steps run out before operations do, train on as things are."""
    yield from contestant.play(life)
    session = life.session
    if session.out_of_budget:
        session.trainer.set_mix(session.world.mix(session.decision))
        while True:
            yield Train((session.main,), session.settings.interval)
