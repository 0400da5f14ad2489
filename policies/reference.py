"""What training on alone comes to: what a controller's rewards are compared with.

Most of an episode's return is decided by its world: fresh weights have much to learn, trained ones
little. So a controller can learn from its rewards less those that the no-op would have had from the
same start for the same compute. The differences add up to the return less that of the no-op's
episode, which is the same whatever the controller does, so by the sum of rewards what is best stays
best. And a trial costs at once what its compute would have been worth.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from k1env.env import Phase2Env
from k1env.schedule import Task
from k1env.vector import Phase2VectorEnv


@dataclass
class Reference:
    """Rewards of the no-op's episodes."""

    curves: dict[int, list[float]] = field(default_factory=dict)
    """By the seed of the start: the sum of rewards after 0, 1, ... intervals."""

    def between(self, seed: int, begin: float, end: float) -> float:
        """What the no-op earns from one amount of compute to another.

        Args:
            seed: of the start.
            begin: compute spent, in intervals.
            end: compute spent later; what lies behind the budget is worth nothing.
        """
        curve = self.curves[seed]
        last = len(curve) - 1
        places = [min(begin, last), min(end, last)]
        before, after = np.interp(places, np.arange(len(curve)), curve)
        return float(after - before)

    def rest(self, seed: int, begin: float) -> float:
        """What the no-op earns from an amount of compute on, to the end of its episode."""
        return self.between(seed, begin, math.inf)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the curves as plain JSON data, which has no numbers for keys."""
        return {str(seed): curve for seed, curve in self.curves.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Sequence[float]]) -> Reference:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: if a curve is none.
        """
        curves = {int(seed): list(curve) for seed, curve in state.items()}
        if not all(len(curve) > 1 and np.isfinite(curve).all() for curve in curves.values()):
            raise ValueError("a curve of the reference is none")
        return cls(curves)


def train_on_alone(envs: Phase2VectorEnv, seeds: Iterable[int]) -> Reference:
    """Play an episode of no-ops from each start, side by side; the environments need a reset then.

    Args:
        envs: the environments.
        seeds: of the starts.
    """
    envs.prepare()
    found, queue = Reference(), deque(seeds)
    noop = envs.actions.index("no-op")

    def play(env: Phase2Env) -> Task[None]:
        while queue:
            seed = queue.popleft()
            yield from env.reset_task(seed)
            curve, over = [0.0], False
            while not over:
                _, reward, ended, truncated, _ = yield from env.step_task(noop)
                curve.append(curve[-1] + reward)
                over = ended or truncated
            found.curves[seed] = curve

    envs.run([play(env) for env in envs.envs])
    return found
