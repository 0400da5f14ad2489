"""The world outside the system: which text comes when, and what an episode starts with.

A world is an instance (`k1env.instances`) or, by default, the text in its own order with the
settings' own start.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from k1.config import ModelConfig
from k1.errors import ConfigError
from k1.rng import derive_seed
from k1env.instances import (
    MOST_DOMAINS,
    ROOM,
    Choice,
    Instance,
    InstanceSet,
    domains_of,
    find_instance,
)
from k1env.settings import DEFAULT_INSTANCE, Settings


class World:
    """One episode's world; its stream of domains is a function of the decision's number."""

    settings: Settings
    """The settings of the episode: what the instance names is replaced by the instance's."""

    domains: tuple[str, ...]
    """Domains of the world, in the order in which they enter the stream."""

    seed: int
    """Decides weights and batches."""

    branching: tuple[int, ...]
    """The tree that the episode starts with."""

    def __init__(
        self, settings: Settings, domains: tuple[str, ...], seed: int, instance: Instance | None
    ) -> None:
        """Make the world of an episode.

        Args:
            settings: the settings of all episodes.
            domains: the domains of the data, in their own order.
            seed: the episode's seed.
            instance: None is the default world.
        """
        self.instance = instance
        if instance is None:
            self.settings, self.domains, self.seed = settings, domains, seed
            self.branching = settings.system.model.branching
            self._shifts = tuple(settings.phase_decisions * n for n in range(1, len(domains)))
        else:
            self.settings = _settings_in(instance, settings)
            self.domains, self.seed = instance.domains, derive_seed("world", instance.seed, seed)
            self.branching, self._shifts = instance.branching, instance.shifts

    def phase(self, decision: int) -> int:
        """Number of the phase that a decision falls into; the last one goes on for ever."""
        return sum(decision >= shift for shift in self._shifts)

    def into_phase(self, decision: int) -> int:
        """Decisions since the present phase began."""
        return decision - (0, *self._shifts)[self.phase(decision)]

    def current(self, decision: int) -> str:
        """The domain that the stream mainly comes from."""
        return self.domains[self.phase(decision)]

    def seen(self, decision: int) -> tuple[str, ...]:
        """Domains that have been in the stream so far."""
        return self.domains[: self.phase(decision) + 1]

    def mix(self, decision: int) -> dict[str, float]:
        """Share of each domain in the stream."""
        seen = self.seen(decision)
        if len(seen) == 1:
            return {seen[0]: 1.0}
        before = self.settings.replay / (len(seen) - 1)
        return {**dict.fromkeys(seen[:-1], before), seen[-1]: 1.0 - self.settings.replay}

    def shown(self, decision: int) -> tuple[str, ...]:
        """Domains that a controller sees figures of, in their rows' order.

        By default these are all, in the data's order. In an instance they are those seen, in the
        order of their arrival: names mean nothing to a controller that is to meet new domains.
        """
        return self.domains if self.instance is None else self.seen(decision)

    def to_dict(self) -> Any:
        """Describe the world as plain JSON data, for the ledger."""
        if self.instance is not None:
            return asdict(self.instance)
        start = self.settings.system.train
        return [*self.domains, start.lr, start.cooldown, start.top_k]


class Worlds:
    """The worlds that a session can be given."""

    rows: int
    """Domains that a controller's view has room for, in every one of them."""

    def __init__(self, settings: Settings, domains: tuple[str, ...], choice: Choice | None) -> None:
        """Bind the settings, the text and the usual choice.

        Args:
            settings: the settings of all episodes.
            domains: the domains of the data, in their own order.
            choice: an instance, its name, a set or "default"; None is `settings.instance`.
        """
        self.settings, self.domains = settings, domains
        self.choice = settings.instance if choice is None else choice
        self.rows = len(domains) if self.choice == DEFAULT_INSTANCE else MOST_DOMAINS

    def draw(self, seed: int, choice: Choice | None = None) -> World:
        """Return the world of the episode with a seed.

        Args:
            seed: draws the instance if a set is chosen.
            choice: in place of the usual choice.

        Raises:
            ConfigError: if there is no such instance, or it needs other text or a larger tree.
        """
        choice = self.choice if choice is None else choice
        if isinstance(choice, str):
            instance = None if choice == DEFAULT_INSTANCE else find_instance(choice, seed)
        else:
            instance = choice.draw(seed) if isinstance(choice, InstanceSet) else choice
        if instance is not None:
            _check_fit(instance, self.settings.system.model, self.domains)
        world = World(self.settings, self.domains, seed, instance)
        if len(world.domains) > self.rows:
            raise ConfigError(
                f"the world has {len(world.domains)} domains, and this environment's observation "
                f"has room for {self.rows}: make one for that world"
            )
        return world


def with_room(settings: Settings) -> Settings:
    """Give every instance's tree room, and with it all of them the same actions.

    Settings whose arena has that room already are left as they are.
    """
    model = settings.system.model
    wanted = replace(model, branching=ROOM).level_capacity
    had = model.level_capacity
    if len(had) >= len(wanted) and all(h >= w for h, w in zip(had, wanted, strict=False)):
        return settings
    return replace(settings, system=settings.system.replace(model={"branching": ROOM}))


def text_of(choice: Choice, settings: Settings) -> str:
    """Name the text that a choice of instances is about, where nobody has named another.

    A set's text holds what all of its worlds need and nothing else: who trains on train worlds
    never loads the domains to test on.
    """
    source = settings.system.data.source
    if source != "builtin" or choice == DEFAULT_INSTANCE:
        return source
    if isinstance(choice, str):
        domains = domains_of(choice.partition("/")[0])
    else:
        worlds = choice.worlds if isinstance(choice, InstanceSet) else (choice,)
        domains = tuple(dict.fromkeys(d for world in worlds for d in world.domains))
    return f"builtin:{','.join(domains)}"


def _settings_in(instance: Instance, settings: Settings) -> Settings:
    start = ("lr", "cooldown", "top_k", "exploration")
    return replace(
        settings,
        system=settings.system.replace(train={name: getattr(instance, name) for name in start}),
        phase1_steps=settings.phase1_steps if instance.pretrained else 0,
        budget=instance.budget * settings.interval,
        max_decisions=instance.budget,
    )


def _check_fit(instance: Instance, model: ModelConfig, domains: tuple[str, ...]) -> None:
    missing = [domain for domain in instance.domains if domain not in domains]
    if missing:
        raise ConfigError(
            f"instance {instance.name!r} needs the domain {missing[0]!r}, and the data have "
            f"{', '.join(domains)} only: give data that hold it, or another instance"
        )
    capacity, count = model.level_capacity[1:], 1
    fits = len(instance.branching) <= len(capacity)
    for children, slots in zip(instance.branching, capacity, strict=False):
        count *= children
        fits = fits and count <= slots and children <= model.max_children
    if not fits:
        raise ConfigError(
            f"the tree {instance.branching} of instance {instance.name!r} does not fit into the "
            f"slots of model.branching = {model.branching}: make the environment with that "
            "instance, or with a larger tree"
        )
