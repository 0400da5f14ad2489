"""Controllers of Phase 2: each is `act(observation, info) -> int`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from k1.errors import K1Error
from policies.base import Policy
from policies.heuristic import HeuristicPolicy
from policies.simple import CheatPolicy, NoopPolicy, RandomLegalPolicy, RandomPolicy

POLICIES = ("heuristic", "random", "random-legal", "cheat", "noop", "ppo")
ZIP = ".zip"
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
    """Return a policy's name, or the absolute path of the folder or zip that a name means.

    Raises:
        K1Error: if it is neither.
    """
    if name in POLICIES:
        return name
    if Path(name).is_dir() or (name.endswith(ZIP) and Path(name).exists()):
        return str(Path(name).absolute())
    raise K1Error(
        f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}, or the folder of a "
        "training by train_ppo.py, or a zip of Stable-Baselines3 with such a policy"
    )


def make_policy(name: str, actions: Sequence[str], *, seed: int = 0) -> Policy:
    """Build a policy by name.

    Args:
        name: one of `POLICIES`, or the folder of a trained controller: that of its training (its
            best weights then, if it has been validated) or one of the checkpoints in it; or a zip
            that Stable-Baselines3 saved of such a controller, of which the weights alone are read.
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
    from policies.sb3_zip import load_sb3_zip

    if name == "ppo":
        return LearnedPolicy(actions, load_shipped())
    load = load_sb3_zip if name.endswith(ZIP) and not Path(name).is_dir() else load_controller
    return LearnedPolicy(actions, load(Path(name)))
