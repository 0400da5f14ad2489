"""Trust: how often an agent's updates helped text that they had not seen.

A copy of a lane goes on training. Before and after each step, the loss is measured on a probe: the
first windows of the batch that comes next. All agents that the step moved get the credit or the
blame, since they moved at once; over many steps with other companions, that tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k1.engine import Engine
from k1.forward import Batch
from k1.measure import measure
from k1.merging import copy_of
from k1.topology import ROOT_SLOT


@dataclass(frozen=True)
class Trust:
    """What became of an agent's updates."""

    helped: int
    updates: int

    @property
    def value(self) -> float:
        """Share that helped, (helped + 1) / (updates + 2): a half without any updates."""
        return (self.helped + 1) / (self.updates + 2)


def trust(engine: Engine, lane: int, steps: int) -> dict[int, Trust]:
    """Train a copy of a lane for some steps, and see whose updates help: by slot.

    Args:
        engine: has the lane, which stays as it is.
        lane: which.
        steps: how many. The probe costs two forward passes of `update.probe_fraction` of a batch
            for each.
    """
    twin = copy_of(engine, lane)
    arena, update = twin.arena, twin.arena.config.update
    agents = [slot for slot in sorted(arena.trees[0].blocks) if slot != ROOT_SLOT]
    size = max(1, round(arena.config.train.batch * update.probe_fraction))
    helped = torch.zeros(arena.scratch + 1, dtype=torch.int64)
    updates = torch.zeros_like(helped)
    for _ in range(steps):
        probe = _next_batch(twin).head(size)
        before = measure(twin, 0, 1, probe)
        result = twin.step(0, 1)
        moved = ((result.selection.scale[0] > 0) & result.fine[0]).cpu().long()
        updates += moved
        helped += moved * int(measure(twin, 0, 1, probe)[0] < before[0])
    return {slot: Trust(int(helped[slot]), int(updates[slot])) for slot in agents}


def _next_batch(engine: Engine) -> Batch:
    """The batch after the one that the next step takes."""
    a = engine.arena
    return engine.store.sample(
        "train", a["data_seed"], a["data_cursor"] + 1, a["mix"], a.config.train.batch
    )
