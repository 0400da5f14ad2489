"""How good a controller in training is: whole episodes on worlds that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k1env.env import Phase2Env
from k1env.schedule import Task
from k1env.vector import Phase2VectorEnv
from policies.learned import NetworkPolicy


@dataclass(frozen=True)
class Validation:
    """Means over worlds."""

    total: float
    """Return of an episode."""
    bits_per_byte: float
    """Validation loss at the end, averaged over the domains that were in the stream."""
    length: float
    """Decisions of an episode."""
    stage: float
    """Stage at the end."""
    worlds: int


def validate(envs: Phase2VectorEnv, policy: NetworkPolicy, seeds: Sequence[int]) -> Validation:
    """Play one episode in each environment, side by side.

    Args:
        envs: one environment for each world.
        policy: it has no memory, so it can play all episodes at once.
        seeds: of the episodes, one for each environment.
    """
    tasks = [_play(env, policy, seed) for env, seed in zip(envs.envs, seeds, strict=True)]
    rows = envs.envs[0].session.scheduler.run(tasks)
    total, bits, length, stage = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return Validation(total, bits, length, stage, len(rows))


def _play(
    env: Phase2Env, policy: NetworkPolicy, seed: int
) -> Task[tuple[float, float, float, float]]:
    """One episode: return, bits per byte at the end, decisions, stage."""
    observation, info = yield from env.reset_task(seed)
    total, over = 0.0, False
    while not over:
        action = policy.act(observation, info)
        observation, reward, ended, truncated, info = yield from env.step_task(action)
        env.session.gate.adopted = {}  # copies of lanes that nobody needs any more
        total, over = total + reward, ended or truncated
    session = env.session
    met = session.world.seen(session.decision - 1)
    bits = sum(session.bits[domain] for domain in met) / len(met)
    return total, bits, float(session.decision), float(session.boundary.stage)
