"""One-step lookahead: every action of a small set is tried before one is chosen.

It is what `Phase2Env.peek` offers, for many episodes at once: a candidate is carried out on a fork
in a spare lane, trained for an interval on the batches to come, and measured on the validation
pool. Then the best one's change is made in the system, which trains on as if it had been chosen
without looking. The forks' operations are charged. The bounds of the stages do not hold here: a
forbidden action would be tried by the gate, which is another question than this one.
"""

from __future__ import annotations

import math

from k1env.actions import Action
from k1env.schedule import Claim, Evaluate, Task, Train
from policies.episode import Life

CANDIDATES = (
    "no-op",
    "tune lr x0.1",
    "tune lr x0.5",
    "tune lr x2",
    "tune lr x10",
    "tune top_k x2",
)
EVERY = len(CANDIDATES)
"""Decisions from one look to the next: so about half of all operations go into looking."""


class Lookahead:
    """Chooses the action whose fork has the lowest validation loss after one interval."""

    within_bounds = False
    identity: str | None = None

    def __init__(self) -> None:
        """Start with nothing chosen."""
        self.chosen: list[str] = []
        """Label of each decision's action."""

    def play(self, life: Life) -> Task[None]:
        """Look ahead at every `EVERY`-th decision, and train on at the others."""
        session = life.session
        while not life.over:
            action = session.table[0]
            if life.decisions % EVERY == 0:
                action = yield from self._look(life)
                session.moves.change(action, session.main)
            self.chosen.append(action.label)
            yield from life.step(0)

    def _look(self, life: Life) -> Task[Action]:
        session, arena = life.session, life.session.arena
        candidates = [a for a in session.table if a.label in CANDIDATES and session.possible(a)]
        session.trainer.set_mix(session.world.mix(session.decision))
        room = yield Claim(len(candidates))
        try:
            lanes = tuple(range(room.start, room.start + len(candidates)))
            arena.copy_lane(session.main, *lanes)
            for action, lane in zip(candidates, lanes, strict=True):
                session.moves.change(action, lane)
            yield Train(lanes, session.settings.interval)
            losses = []
            for lane in lanes:
                bits = yield Evaluate(lane, "validation", session.seen)
                losses.append(sum(bits.values()) / len(bits))
        finally:
            room.release()
        losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
        return candidates[losses.index(min(losses))]
