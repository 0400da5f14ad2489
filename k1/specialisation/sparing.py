"""Which leaf can a tree spare: what it costs to lose each, and what would have told without trying.

A leaf that is deleted leaves its text to its siblings; one that is merged is averaged into the
sibling that would inherit its text. Both are measured on copies. Beside the harm stands what is
known before: how responsible the leaf has been of late, how often it has moved, and how often its
updates help while a copy trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from k1.edits import delete_agent, heir
from k1.engine import Engine
from k1.forward import Batch
from k1.merging import bits_on, change, copy_of, merge_agents, why_not_merge
from k1.specialisation.trust import Trust, trust

SIGNALS = ("responsibility", "updates", "trust")
"""What is known about a leaf: its running responsibility, by which `k1.edits.prune` chooses; its
updates so far; the share of its updates that help."""
CALM = 0.1
"""Height of the learning rate while trust is measured: as at the end of a phase."""


@dataclass(frozen=True)
class Spared:
    """What a leaf's end would cost."""

    leaf: str
    """Its name."""
    deleted: dict[str, float]
    """By domain: bits per byte lost if it is deleted."""
    merged: dict[str, float] | None
    """By domain: lost if it is merged; None where no sibling of its shape inherits its text."""
    signals: dict[str, float | None]
    """Each of `SIGNALS`; no trust of a leaf that has not moved while it was measured."""


def sparing(
    engine: Engine, lane: int, windows: Mapping[str, Batch], steps: int
) -> tuple[Spared, ...]:
    """Measure what each leaf's end would cost, in the order of the slots.

    Args:
        engine: has the lane, which stays as it is.
        lane: which.
        windows: [1, B, T] of each domain.
        steps: of training that trust is measured over: on all domains alike, and by the ordinary
            step with the arena's settings, whatever a method adds to it.
    """
    arena, tree = engine.arena, engine.arena.trees[lane]
    before = bits_on(engine, lane, windows)

    def lost(edit: Callable[..., object], *slots: int) -> dict[str, float]:
        return change(engine, lane, lambda twin, own: edit(twin, own, *slots), windows, before).harm

    trusted = _trust(engine, lane, steps)
    found = []
    for slot in [s for s in sorted(trusted) if tree.is_leaf(s)]:
        into = heir(arena, lane, slot)
        alike = into is not None and why_not_merge(tree, into, slot) is None
        found.append(
            Spared(
                tree.name(slot),
                lost(delete_agent, slot),
                lost(merge_agents, into, slot) if into is not None and alike else None,
                {
                    "responsibility": float(arena["mean_responsibility"][lane, slot]),
                    "updates": float(arena["updates"][lane, slot]),
                    "trust": trusted[slot].value if trusted[slot].updates else None,
                },
            )
        )
    return tuple(found)


def _trust(engine: Engine, lane: int, steps: int) -> dict[int, Trust]:
    """Trust in agents while a copy trains on, on all domains alike and at a calm rate."""
    twin, domains = copy_of(engine, lane), len(engine.store.domains)
    twin.arena.set_mix(0, (1 / domains,) * domains)
    twin.arena["lr_factor"][0] = CALM
    return trust(twin, 0, steps)
