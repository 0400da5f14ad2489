"""Controllers of Phase 2: each is `act(observation, info) -> int`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from k1.errors import K1Error
from policies.base import Policy
from policies.heuristic import HeuristicPolicy
from policies.simple import CheatPolicy, NoopPolicy, RandomLegalPolicy, RandomPolicy

POLICIES = ("heuristic", "random", "random-legal", "cheat", "noop", "ppo")
__all__ = [
    "POLICIES",
    "HeuristicPolicy",
    "NoopPolicy",
    "Policy",
    "RandomPolicy",
    "find_policy",
    "make_policy",
]


def find_policy(name: str) -> str:
    """Return a policy's name, or the absolute path of the folder that a name means.

    Raises:
        K1Error: if it is neither.
    """
    if name in POLICIES:
        return name
    if Path(name).is_dir():
        return str(Path(name).absolute())
    raise K1Error(
        f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}, or the folder of a "
        "training by train_ppo.py"
    )


def make_policy(name: str, actions: Sequence[str], *, seed: int = 0) -> Policy:
    """Build a policy by name.

    Args:
        name: one of `POLICIES`, or the folder of a trained controller: that of its training (its
            best weights then, if it has been validated) or one of the checkpoints in it.
        actions: labels of the environment's actions, by index (`Phase2Env.actions`).
        seed: for policies that draw random numbers.

    Raises:
        K1Error: for an unknown name, or weights that are missing, damaged or of another version.
    """
    name = find_policy(name)
    if name == "heuristic":
        return HeuristicPolicy(actions)
    drawing: dict[str, Callable[[int], Policy]] = {
        "random": RandomPolicy,
        "random-legal": RandomLegalPolicy,
        "cheat": CheatPolicy,
    }
    if name in drawing:
        return drawing[name](seed)
    if name == "noop":
        return NoopPolicy()
    from policies.learned import LearnedPolicy, load_controller, load_shipped

    return LearnedPolicy(actions, load_shipped() if name == "ppo" else load_controller(Path(name)))
