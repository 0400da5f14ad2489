"""Contestants by name: policies, and baselines that are no policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from k1.errors import K1Error
from k1env.schedule import Task
from policies import make_policy
from policies.base import Policy
from policies.episode import Contestant, Life
from policies.lookahead import Lookahead
from policies.population import PopulationBasedTraining
from policies.schedules import Constant, Cosine, Plateau, Static, best_static, known_statics

SCHEDULES: dict[str, Callable[[], Contestant]] = {
    "constant": Constant,
    "cosine": Cosine,
    "plateau": Plateau,
    "lookahead": Lookahead,
}
PRIVILEGED = (*SCHEDULES, "static", "pbt")
"""Baselines that are not held to the bounds of the stages."""
EVERY = ("noop", "random", "random-legal", "cheat", "heuristic", *PRIVILEGED)
"""Everything but trained controllers."""


class ByPolicy:
    """A policy, which sees observation and info only."""

    within_bounds = True

    def __init__(self, policy: Policy, identity: str | None = None) -> None:
        """Bind the policy; the identity is that of a policy from a file."""
        self.policy, self.identity = policy, identity

    def play(self, life: Life) -> Task[None]:
        """Let it decide until the episode is over."""
        while not life.over:
            yield from life.step(self.policy.act(life.observation, life.info))


def make_contestant(name: str, actions: Sequence[str], *, seed: int, preset: str) -> Contestant:
    """Build a contestant.

    Args:
        name: one of `EVERY`, `static:LR:TOP_K:COOLDOWN`, or what `policies.make_policy` knows.
        actions: labels of the environment's actions, by index.
        seed: for those that draw random numbers.
        preset: whose static setting is meant by `static`.

    Raises:
        K1Error: for an unknown name, or a preset without a static setting.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]()
    if name == "pbt":
        return PopulationBasedTraining(seed)
    if name == "static":
        return best_static(preset)
    if name.startswith("static:"):
        return _static(name)
    try:
        policy = make_policy(name, actions, seed=seed)
    except K1Error as error:
        raise K1Error(f"{error}; or for a comparison {', '.join(PRIVILEGED)}") from None
    return ByPolicy(policy, policy.state_dict().get("weights"))


def default_policies(preset: str) -> tuple[str, ...]:
    """What is compared by default: `EVERY`, of which `static` only where a search found one."""
    return tuple(name for name in EVERY if name != "static" or preset in known_statics())


def static_name(lr: float, top_k: int, cooldown: int) -> str:
    """Name a setting that is held to the end."""
    return f"static:{lr:g}:{top_k}:{cooldown}"


def _static(name: str) -> Static:
    try:
        lr, top_k, cooldown = name.split(":")[1:]
        values = float(lr), int(top_k), int(cooldown)
    except ValueError:
        raise K1Error(f"{name!r} is no setting: write static:LR:TOP_K:COOLDOWN") from None
    return Static(*values)
