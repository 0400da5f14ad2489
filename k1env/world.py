"""The world outside the system: which text comes when.

An instance is an order of domains, starting hyper-parameters and a seed. Instances are drawn from
the set `train` or `test`; which set one belongs to is decided by a hash of what it consists of, so
the sets share nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from k1.rng import derive_seed
from k1env.settings import Settings

START_LR = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3)
START_COOLDOWN = (2, 5, 10, 20)
START_TOP_K = (3, 4, 6)


@dataclass(frozen=True)
class Instance:
    """One world. Hyper-parameters are those that the system starts Phase 2 with."""

    domains: tuple[str, ...]
    lr: float
    cooldown: int
    top_k: int
    seed: int


def draw_instance(settings: Settings, domains: tuple[str, ...], seed: int) -> Instance:
    """Draw the instance that belongs to a seed.

    Args:
        settings: which set to draw from; "default" keeps the configuration's own start.
        domains: the domains of the data, in their own order.
        seed: same seed, same instance.
    """
    start = settings.system.train
    if settings.instance == "default":
        return Instance(domains, start.lr, start.cooldown, start.top_k, seed)
    for attempt in itertools.count():

        def pick(name: str, options: tuple, attempt: int = attempt) -> int:
            key = derive_seed("instance", settings.instance, seed, name, attempt)
            return key % len(options)

        left = list(domains)
        order = tuple(left.pop(pick(f"order {i}", tuple(left))) for i in range(len(domains)))
        lr = START_LR[pick("lr", START_LR)]
        cooldown = START_COOLDOWN[pick("cooldown", START_COOLDOWN)]
        top_k = START_TOP_K[pick("top_k", START_TOP_K)]
        if instance_set(order, lr, cooldown, top_k) == settings.instance:
            return Instance(order, lr, cooldown, top_k, seed)
    raise AssertionError("unreachable")


def instance_set(domains: tuple[str, ...], lr: float, cooldown: int, top_k: int) -> str:
    """Say which set an instance belongs to: "test" for about one in four."""
    return "test" if derive_seed("set", *domains, lr, cooldown, top_k) % 4 == 0 else "train"


class World:
    """The stream of domains of one instance, as a function of the decision's number."""

    def __init__(self, instance: Instance, settings: Settings) -> None:
        """Bind an instance to the settings of the stream."""
        self.instance, self.settings = instance, settings

    def phase(self, decision: int) -> int:
        """Number of the phase that a decision falls into; the last one goes on for ever."""
        return min(decision // self.settings.phase_decisions, len(self.instance.domains) - 1)

    def current(self, decision: int) -> str:
        """The domain that the stream mainly comes from."""
        return self.instance.domains[self.phase(decision)]

    def seen(self, decision: int) -> tuple[str, ...]:
        """Domains that have been in the stream so far."""
        return self.instance.domains[: self.phase(decision) + 1]

    def mix(self, decision: int) -> dict[str, float]:
        """Share of each domain in the stream."""
        seen = self.seen(decision)
        if len(seen) == 1:
            return {seen[0]: 1.0}
        before = self.settings.replay / (len(seen) - 1)
        return {**dict.fromkeys(seen[:-1], before), seen[-1]: 1.0 - self.settings.replay}
