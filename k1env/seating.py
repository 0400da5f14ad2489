"""Who sits where: the lanes of one arena, and the environments that share it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from k1.config import Config
from k1.engine import Engine
from k1.errors import K1Error
from k1.trainer import Trainer
from k1env.env import Phase2Env
from k1env.gate import Gate
from k1env.outcome import LedgerLike
from k1env.schedule import Scheduler, Separate
from k1env.session import Seat
from k1env.settings import DEFAULT_INSTANCE
from k1env.setup import Setup
from k1env.wide import Wide, work_room
from k1env.world import text_of

_OWN = ("lr", "top_k", "cooldown", "exploration")
"""Fields of `TrainConfig` in which environments of one arena may differ."""


def _shared(system: Config) -> Config:
    """A system without that in which neighbours may differ."""
    default = Config().train
    return system.replace(train={name: getattr(default, name) for name in _OWN})


def check_alike(setups: Sequence[Setup], data: Any, starts: int | None) -> None:
    """See that environments can live side by side.

    Raises:
        K1Error: if not.
    """
    if len({setup.instance == DEFAULT_INSTANCE for setup in setups}) > 1:
        raise K1Error("the default world cannot be beside instances: it has other observations")
    systems = [_shared(setup.settings.system) for setup in setups]
    if any(system != systems[0] for system in systems):
        raise K1Error(f"environments side by side have one system but for its {_OWN}")
    if data is None and len({text_of(s.instance, s.settings) for s in setups}) > 1:
        raise K1Error("the instances are about different texts: give data that hold all domains")
    kinds = [(setup.settings, setup.instance) for setup in setups]
    if starts is not None and any(kind != kinds[0] for kind in kinds):
        raise K1Error("starts are for all environments: give them one config and one instance")


def seat(
    setups: Sequence[Setup], ledgers: Sequence[LedgerLike], spare: int | None, wide: bool
) -> list[Phase2Env]:
    """Lay out an arena, and make an environment for each of its systems."""
    setup, count = setups[0], len(setups)
    widest = max(Gate.lanes_needed(s.settings.gate) for s in setups)
    if spare is None:
        spare = max(widest, count) if wide else widest * min(count, 2 * (os.cpu_count() or 1))
    if spare < widest:
        raise K1Error(f"spare_lanes = {spare}: a trial takes up to {widest} lanes")
    system, lanes = setup.settings.system, 2 * count + spare
    area = work_room(lanes) if wide else 0
    trainer = Trainer(system, setup.data, device=setup.device, lanes=lanes + area)
    if wide:
        trainer.arena.roomy = True  # or each tree that grows would call for other graphs
        trainer.engine = Engine(trainer.arena, trainer.store, lane_chunk=area)
    calls = Wide(trainer.engine, count, lanes) if wide else Separate(trainer.engine)
    scheduler = Scheduler(calls, range(2 * count, lanes))
    envs = []
    for i, own in enumerate(setups):
        # Wide calls want systems side by side; by itself, a system has its shadow beside it.
        main, shadow = (i, count + i) if wide else (2 * i, 2 * i + 1)
        place = Seat(trainer.at(main), shadow, scheduler)
        envs.append(Phase2Env.seated(own, place, ledgers[i]))
    return envs
