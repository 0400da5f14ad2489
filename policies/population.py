"""Population-based training (Jaderberg et al. 2017) in lanes, at the compute of one system.

This is the algorithm that Ray Tune's scheduler carries out (truncation selection, then perturbation
of what was copied), without Ray: its members are lanes of the arena. All of them together may spend
what one system may, so each gets a share. The stream of text moves on with the population's
compute, as it does for a system that is only trained on; otherwise a member would never meet the
later domains. The system that is reported is the member with the lowest validation loss.
"""

from __future__ import annotations

import math

import numpy as np

from k1.rng import derive_seed
from k1env.actions import tuned_value
from k1env.instances import COOLDOWN, LR, TOP_K
from k1env.schedule import Claim, Evaluate, Task, Train
from policies.episode import Life

MEMBERS = 4
READY = 3
"""Intervals of each member between exchanges."""
TRUNCATED = 1
"""Members at the lower end that copy as many at the upper end."""
FACTORS = (0.5, 2.0)
"""A copied hyper-parameter is multiplied by one of them."""
STARTS = {"lr": LR, "top_k": TOP_K, "cooldown": COOLDOWN}
"""What members start with, by lot; the first one starts with the world's own settings."""


class PopulationBasedTraining:
    """Members train side by side; now and then the worst copy the best and vary their settings."""

    within_bounds = False
    identity: str | None = None

    def __init__(self, seed: int) -> None:
        """Seed the draws."""
        self._generator = np.random.default_rng(seed)
        self.lanes: tuple[int, ...] = ()
        self.exchanges: list[tuple[int, int]] = []
        """Each copy: from which member, to which."""

    def play(self, life: Life) -> Task[None]:
        """Train the population; the budget ends it."""
        session, arena = life.session, life.session.arena
        room = yield Claim(MEMBERS)
        try:
            self.lanes = tuple(range(room.start, room.start + MEMBERS))
            arena.copy_lane(session.main, *self.lanes)
            for member, lane in enumerate(self.lanes):
                self._own_batches(life, member)
                if member:
                    starts = {n: float(self._draw(values)) for n, values in STARTS.items()}
                    life.tune(starts, lane)
            while True:
                yield from self._round(life)
        finally:
            room.release()

    def _draw(self, values: tuple[float, ...]) -> float:
        return values[int(self._generator.integers(len(values)))]

    def _own_batches(self, life: Life, member: int) -> None:
        seed = derive_seed("member of a population", life.session.world.seed, member)
        life.session.arena["data_seed"][self.lanes[member]] = seed

    def _round(self, life: Life) -> Task[None]:
        session, arena = life.session, life.session.arena
        session.decision = life.decisions * MEMBERS
        session.trainer.set_mix(session.world.mix(session.decision))
        for lane in self.lanes:
            arena.copy_mix(session.main, lane)
        yield Train(self.lanes, session.settings.interval)
        losses = []
        for lane in self.lanes:
            bits = yield Evaluate(lane, "validation", session.world.domains)
            seen = [bits[domain] for domain in session.seen]
            losses.append(sum(seen) / len(seen))
        losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
        ranked = sorted(range(MEMBERS), key=losses.__getitem__)
        arena.copy_lane(self.lanes[ranked[0]], session.main)
        life.decisions += 1
        if life.decisions % READY == 0:
            self._exchange(life, ranked)

    def _exchange(self, life: Life, ranked: list[int]) -> None:
        arena = life.session.arena
        pairs = zip(ranked[:TRUNCATED], reversed(ranked[-TRUNCATED:]), strict=True)
        for better, worse in pairs:
            target = self.lanes[worse]
            arena.copy_lane(self.lanes[better], target)
            self._own_batches(life, worse)
            hyper = arena.get_hyper(target)
            varied = {n: tuned_value(n, hyper[n], self._draw(FACTORS)) for n in STARTS}
            life.tune(varied, target)
            self.exchanges.append((better, worse))
