"""Lanes for tests of wide calls."""

from __future__ import annotations

from typing import Any

from k1.engine import Engine
from k1.trainer import Trainer
from k1env.wide import Wide, work_room


def lanes_of_all_kinds(make: Any, lanes: int = 6, **sections: Any) -> Trainer:
    """Lanes with different trees, weights, streams, steps and records, and a work area."""
    trainer: Trainer = make(lanes=lanes + work_room(lanes), **sections)
    arena = trainer.arena
    for lane in range(1, lanes):
        arena.reset_lane(lane, lane, (1 + lane % 3, 1 + lane % 2))
    trainer.engine = Engine(arena, trainer.store, lane_chunk=work_room(lanes))
    trainer.engine.train(0, lanes, 2)
    for lane in range(0, lanes, 2):
        trainer.engine.train(lane, lane + 1, 1 + lane)
    return trainer


def wide(trainer: Trainer, lanes: int = 6, keeps: int = 0) -> Wide:
    """Wide calls for the lanes before the work area."""
    return Wide(trainer.engine, keeps, lanes)
