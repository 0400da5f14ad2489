"""Controllers of Phase 2: each is `act(observation, info) -> int`."""

from __future__ import annotations

from collections.abc import Sequence

from k1.errors import K1Error
from policies.base import Policy
from policies.heuristic import HeuristicPolicy
from policies.simple import NoopPolicy, RandomPolicy

POLICIES = ("heuristic", "random", "noop")
__all__ = ["POLICIES", "HeuristicPolicy", "NoopPolicy", "Policy", "RandomPolicy", "make_policy"]


def make_policy(name: str, actions: Sequence[str], *, seed: int = 0) -> Policy:
    """Build a policy by name.

    Args:
        name: one of `POLICIES`.
        actions: labels of the environment's actions, by index (`Phase2Env.actions`).
        seed: for policies that draw random numbers.

    Raises:
        K1Error: for an unknown name.
    """
    if name == "heuristic":
        return HeuristicPolicy(actions)
    if name == "random":
        return RandomPolicy(seed)
    if name == "noop":
        return NoopPolicy()
    raise K1Error(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
