"""What the tests of many environments share."""

from __future__ import annotations

from typing import Any

import numpy as np

from k1env.env import Phase2Env
from k1env.settings import Settings
from tests.phase2_helpers import index_of, quick

SCRIPTS = (
    ("no-op", "tune lr x0.1", "add under slot 0", "tune lr x2", "no-op", "add under slot 1"),
    ("add under slot 0", "no-op", "prune 10%", "no-op", "stop", "no-op"),
    ("tune lr x2", "add under slot 0", "tune top_k x2", "delete slot 3", "no-op", "tune lr x10"),
)
"""What each environment does: permitted, forbidden and impossible things, side by side."""


def varied() -> list[Settings]:
    """Settings of environments that differ in length, interval, phases and start."""
    short = quick(max_decisions=2, phase_decisions=1)
    other = quick().system.replace(train={"lr": 3e-3, "top_k": 4, "cooldown": 2})
    return [
        quick(max_decisions=4, interval=3),
        short,
        quick(gate={"group": 1, "horizon": 3}, system=other, phase1_mode="sparse", phase1_steps=7),
    ]


def scripted(env: Phase2Env, turn: int) -> list[int]:
    """The action of each environment in a turn."""
    return [index_of(env, script[turn % len(script)]) for script in SCRIPTS]


def same(one: Any, other: Any) -> bool:
    """Whether results are the same to the last bit, arrays of objects included."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, np.ndarray) and one.dtype != object:
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, np.ndarray | tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other
