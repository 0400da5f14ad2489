"""Which leaf can a tree spare: what it costs to lose each, and what would have told without trying.

A leaf that is deleted leaves its text to its siblings; one that is merged is averaged into the
sibling that would inherit its text. Both are measured on copies. Beside the harm stands what is
known before: how responsible the leaf has been of late, how often it has moved, and how often its
updates help while a copy trains on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from k1.arena import Arena
from k1.edits import delete_agent, heir
from k1.engine import Engine
from k1.forward import Batch
from k1.merging import change, copy_of, merge_agents, why_not_merge
from k1.specialisation.trust import trust

SIGNALS = ("responsibility", "updates", "trust")
"""What is known about a leaf: its running responsibility, by which `k1.edits.prune` chooses; its
updates so far; the share of its updates that help."""
CALM = 0.1
"""Height of the learning rate while trust is measured: as late in a phase."""


@dataclass(frozen=True)
class Spared:
    """What a leaf's end would cost."""

    leaf: str
    """Its name."""
    deleted: dict[str, float]
    """By domain: bits per byte lost if it is deleted."""
    merged: dict[str, float] | None
    """By domain: lost if it is merged; None where no sibling of its shape inherits its text."""
    signals: dict[str, float]
    """Each of `SIGNALS`."""


def sparing(
    engine: Engine, lane: int, windows: Mapping[str, Batch], steps: int
) -> tuple[Spared, ...]:
    """Measure what each leaf's end would cost, in the order of the slots.

    Args:
        engine: has the lane, which stays as it is.
        lane: which.
        windows: [1, B, T] of each domain.
        steps: of training, on all domains alike, that trust is measured over.
    """
    arena, tree = engine.arena, engine.arena.trees[lane]
    twin = copy_of(engine, lane)
    domains = len(engine.store.domains)
    twin.arena.set_mix(0, (1 / domains,) * domains)
    twin.arena["lr_factor"][0] = CALM
    trusted = trust(twin, 0, steps)
    found = []
    for slot in [s for s in sorted(trusted) if tree.is_leaf(s)]:
        signals = (
            float(arena["mean_responsibility"][lane, slot]),
            float(arena["updates"][lane, slot]),
            trusted[slot].value,
        )
        found.append(
            Spared(
                tree.name(slot),
                _deleted(engine, lane, slot, windows),
                _merged(engine, lane, slot, windows),
                dict(zip(SIGNALS, signals, strict=True)),
            )
        )
    return tuple(found)


def _deleted(
    engine: Engine, lane: int, slot: int, windows: Mapping[str, Batch]
) -> dict[str, float]:
    def delete(arena: Arena, lane: int) -> None:
        delete_agent(arena, lane, slot)

    return change(engine, lane, delete, windows).harm


def _merged(
    engine: Engine, lane: int, slot: int, windows: Mapping[str, Batch]
) -> dict[str, float] | None:
    into = heir(engine.arena, lane, slot)
    if into is None or why_not_merge(engine.arena.trees[lane], into, slot) is not None:
        return None

    def merge(arena: Arena, lane: int) -> None:
        merge_agents(arena, lane, into, slot)

    return change(engine, lane, merge, windows).harm
