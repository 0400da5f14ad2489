"""Instances: the worlds that controllers are trained, chosen and tested on.

An instance is one world: which text comes when, the shape of the tree, the settings that it starts
with, what may be spent. There are three sets, written down in `instances.json` beside this file:

- `train` (64): orders of six domains;
- `validation` (16): each order holds one domain that no train world has;
- `test` (24): each order holds at least one of two domains that no other world has.

No order of domains, shape or seed is in two sets. Starting settings and budgets are dealt from the
same values in all of them, so that bad and good starts are equally frequent everywhere.

`python -m k1env.instances --write` draws the sets anew and writes the file; the same code always
writes the same file. Own text brings own worlds: `instances_over`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from k1.config import read_dataclass
from k1.errors import ConfigError
from k1.rng import derive_seed

T = TypeVar("T")
Order = tuple[str, ...]

SPLITS = ("train", "validation", "test")
SIZES = {"train": 64, "validation": 16, "test": 24}
SET_SEED = 0
FILE = Path(__file__).with_name("instances.json")

TRAIN_DOMAINS = ("code", "prose", "science", "numerics", "tables", "stubs")
VALIDATION_DOMAINS = ("checks",)
TEST_DOMAINS = ("headers", "symbols")

MOST_DOMAINS = 4
"""Most domains of a world; as many rows has a controller's view of them."""

ROOM = (4, 3, 2)
"""The tree in whose slots the tree of every world fits, with a free one on each of its levels."""

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "train": ((2, 2), (3, 3), (4, 2), (5, 2), (2, 2, 2), (2, 3, 3), (3, 2, 2), (4, 3, 2)),
    "validation": ((3, 2), (3, 4), (2, 4, 2)),
    "test": ((5,), (2, 3), (4, 4), (2, 2, 3), (3, 3, 2)),
}
"""Branching of the trees; none is in two sets."""

LR = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
COOLDOWN = (0, 2, 5, 10, 20, 50)
TOP_K = (1, 2, 3, 4, 6, 12)
EXPLORATION = (0.0, 0.0, 0.1, 0.3)
PRETRAINED = (True, True, True, False)
PHASE_DECISIONS = (3, 4, 6, 8)
BUDGET = (60, 120, 240)


@dataclass(frozen=True)
class Instance:
    """One world. Whatever it does not name is as `k1env.Settings` says."""

    name: str
    """For people: the set and the number in it."""
    domains: tuple[str, ...]
    """Domains in the order in which they enter the stream of text."""
    shifts: tuple[int, ...]
    """Decisions from which on the second, third, ... domain is in the stream; increasing."""
    branching: tuple[int, ...]
    """Children per block of the tree that the episode starts with, level by level."""
    lr: float
    """Learning rate that Phase 2 starts with; many are bad."""
    cooldown: int
    """Steps for which a culprit rests, at the start."""
    top_k: int
    """Most agents that a step updates, at the start."""
    exploration: float
    """Probability of a random leaf in place of the attributed one."""
    pretrained: bool
    """Whether Phase 1 comes first; otherwise Phase 2 starts on fresh weights."""
    budget: int
    """Lane steps that may be spent, trials included, in intervals (`Settings.interval` each).

    It alone ends an episode that is not stopped: a decision takes an interval at least.
    """
    seed: int
    """Goes into the weights and batches of every episode, beside the seed of its reset."""

    def __post_init__(self) -> None:
        """Refuse what is no world, naming the field."""
        starts = (0, *self.shifts)
        for name, ok in (
            ("domains", 0 < len(set(self.domains)) == len(self.domains) <= MOST_DOMAINS),
            ("shifts", len(starts) == len(self.domains)),
            ("shifts", all(a < b for a, b in itertools.pairwise(starts))),
            ("branching", len(self.branching) > 0 and min(self.branching) > 0),
            ("lr", 0 < self.lr < math.inf),
            ("cooldown", self.cooldown >= 0),
            ("top_k", self.top_k >= 1),
            ("exploration", 0 <= self.exploration <= 1),
            ("budget", self.budget >= 1),
        ):
            if not ok:
                value = getattr(self, name)
                raise ConfigError(f"instance {self.name!r}: {name} = {value!r} is not possible")


@dataclass(frozen=True)
class InstanceSet:
    """Worlds to draw from, beside the sets of the file."""

    name: str
    """For people, and part of what the draw depends on."""
    worlds: tuple[Instance, ...]

    def draw(self, seed: int) -> Instance:
        """Draw a world: the same seed, the same world."""
        return self.worlds[derive_seed("world of a set", self.name, seed) % len(self.worlds)]


Choice = Instance | InstanceSet | str
"""The worlds of episodes: one, a set to draw from by seed, the name of either, or "default"."""


@cache
def _sets() -> dict[str, tuple[Instance, ...]]:
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        split: tuple(read_dataclass(Instance, entry, "instance") for entry in data[split])
        for split in SPLITS
    }


def instances(split: str) -> tuple[Instance, ...]:
    """Return the worlds of a set.

    Raises:
        ConfigError: if there is no such set.
    """
    if split not in SPLITS:
        raise ConfigError(
            f"unknown set of instances {split!r}: choose train, validation or test, "
            "or one instance such as train/17"
        )
    return _sets()[split]


def sample_instance(split: str, seed: int) -> Instance:
    """Draw a world from a set: the same seed, the same world.

    Raises:
        ConfigError: if there is no such set.
    """
    return InstanceSet(split, instances(split)).draw(seed)


def find_instance(name: str, seed: int) -> Instance:
    """Return the world with a name ("train/17"), or draw one from a set ("train") by a seed.

    Raises:
        ConfigError: if there is no such set or number.
    """
    split, slash, number = name.partition("/")
    if not slash:
        return sample_instance(split, seed)
    worlds = instances(split)
    if not (number.isdecimal() and number.isascii() and int(number) < len(worlds)):
        raise ConfigError(f"no instance {name!r}: choose {split}/0 to {split}/{len(worlds) - 1}")
    return worlds[int(number)]


def domains_of(split: str) -> tuple[str, ...]:
    """Return the domains that the worlds of a set need, in the order of the builtin text.

    Raises:
        ConfigError: if there is no such set.
    """
    used = {domain for instance in instances(split) for domain in instance.domains}
    every = (*TRAIN_DOMAINS, *VALIDATION_DOMAINS, *TEST_DOMAINS)
    return tuple(domain for domain in every if domain in used)


def instances_over(
    domains: Sequence[str], seed: int = 0, sizes: Mapping[str, int] = SIZES
) -> dict[str, tuple[Instance, ...]]:
    """Draw train, validation and test worlds over any text.

    A third of the domains (rounded down) is in test worlds alone, and of nine domains or more also
    a ninth in validation worlds. With fewer than nine, validation worlds have orders of the train
    domains that no train world has; with three that leaves one order to each of the two.

    Args:
        domains: names of the domains, at least three.
        seed: same names and seed, same worlds.
        sizes: worlds in each set.

    Raises:
        ConfigError: if there are fewer than three domains, or one twice.
    """
    if len(domains) < 3 or len(set(domains)) < len(domains):
        raise ConfigError(
            f"instances over {', '.join(domains) or 'nothing'}: give three different domains or "
            "more, for one must be left to test on"
        )
    drawn = _Draw("held-out domains", seed)
    left = sorted(domains)
    test = [left.pop(drawn.below(len(left))) for _ in range(len(domains) // 3)]
    validation = [left.pop(drawn.below(len(left))) for _ in range(len(domains) // 9)]
    return _draw_sets(tuple(left), tuple(validation), tuple(test), seed, sizes)


class _Draw:
    """Draws that depend on a name and a seed only, whatever the version of Python."""

    def __init__(self, *key: str | int) -> None:
        self.key, self.count = key, 0

    def below(self, limit: int) -> int:
        self.count += 1
        return derive_seed("instances", *self.key, self.count) % limit

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def deal(self, options: Sequence[T], count: int) -> list[T]:
        """Draw as cards are dealt from shuffled packs, so that all come equally often."""
        dealt: list[T] = []
        while len(dealt) < count:
            pack = list(options)
            dealt += [pack.pop(self.below(len(pack))) for _ in options]
        return dealt[:count]


def _draw_sets(
    known: Order, validation: Order, test: Order, seed: int, sizes: Mapping[str, int]
) -> dict[str, tuple[Instance, ...]]:
    """Draw the three sets.

    Args:
        known: domains of all sets.
        validation: domains of validation worlds alone; may be empty.
        test: domains of test worlds alone.
        seed: decides everything.
        sizes: worlds in each set.
    """
    among_known = _count_orders(len(known))
    orders: dict[str, list[Order]] = {}
    available = _count_orders(len(known) + len(test)) - among_known
    orders["test"] = _draw_orders(
        _Draw("test", seed), (*known, *test), min(sizes["test"], available),
        lambda order: not set(test).isdisjoint(order),
    )  # fmt: skip
    available = _count_orders(len(known) + len(validation)) - among_known
    available = available or max(1, among_known // 4)
    orders["validation"] = _draw_orders(
        _Draw("validation", seed), (*known, *validation), min(sizes["validation"], available),
        lambda order: not validation or not set(validation).isdisjoint(order),
    )  # fmt: skip
    available = among_known - (0 if validation else len(orders["validation"]))
    orders["train"] = _draw_orders(
        _Draw("train", seed), known, min(sizes["train"], available),
        lambda order: order not in orders["validation"],
    )  # fmt: skip
    return {split: _draw_worlds(split, orders[split], seed, sizes[split]) for split in SPLITS}


def _count_orders(domains: int) -> int:
    return sum(math.perm(domains, length) for length in range(2, MOST_DOMAINS + 1))


def _draw_orders(
    draw: _Draw, domains: Order, count: int, allowed: Callable[[Order], bool]
) -> list[Order]:
    """Draw different orders of two domains or more."""
    found: dict[Order, None] = {}
    lengths = range(2, min(MOST_DOMAINS, len(domains)) + 1)
    while len(found) < count:
        left = list(domains)
        order = tuple(left.pop(draw.below(len(left))) for _ in range(draw.pick(lengths)))
        if allowed(order):
            found[order] = None
    return list(found)


def _draw_worlds(split: str, orders: list[Order], seed: int, count: int) -> tuple[Instance, ...]:
    draw = _Draw(split, "worlds", seed)
    fields: dict[str, Sequence[Any]] = {
        "branching": SHAPES[split],
        "lr": LR,
        "cooldown": COOLDOWN,
        "top_k": TOP_K,
        "exploration": EXPLORATION,
        "pretrained": PRETRAINED,
        "budget": BUDGET,
    }
    columns = {name: draw.deal(options, count) for name, options in fields.items()}
    worlds: list[Instance] = []
    while len(worlds) < count:
        number = len(worlds)
        order = orders[number % len(orders)]
        row = {name: column[number] for name, column in columns.items()}
        agents = sum(itertools.accumulate(row["branching"], int.__mul__))
        phases = [draw.pick(PHASE_DECISIONS) for _ in order[1:]]
        world = Instance(
            name=f"{split}/{number}",
            domains=order,
            shifts=tuple(itertools.accumulate(phases)),
            **{**row, "top_k": min(row["top_k"], agents)},
            # Sets have residues of their own, so that no seed is in two of them.
            seed=draw.below(10**9) * len(SPLITS) + SPLITS.index(split),
        )
        if all(world.seed != other.seed for other in worlds):
            worlds.append(world)
    return tuple(worlds)


def file_text() -> str:
    """Return what the file of instances has to hold: one line for each world."""
    sets = _draw_sets(TRAIN_DOMAINS, VALIDATION_DOMAINS, TEST_DOMAINS, SET_SEED, SIZES)
    parts = []
    for split, worlds in sets.items():
        lines = ",\n".join(f"    {json.dumps(asdict(world))}" for world in worlds)
        parts.append(f'  "{split}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Print the file of instances, or write it."""
    parser = argparse.ArgumentParser(prog="python -m k1env.instances", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} in place")
    if parser.parse_args().write:
        FILE.write_text(file_text(), encoding="utf-8")
    else:
        sys.stdout.write(file_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
