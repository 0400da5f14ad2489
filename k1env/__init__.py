"""Phase 2 as a Gymnasium environment: `gymnasium.make("k1env/Phase2-v0")`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register, registry

if TYPE_CHECKING:
    from k1env.env import Phase2Env as Phase2Env
    from k1env.instances import Instance as Instance
    from k1env.sb3 import SB3VecEnv as SB3VecEnv
    from k1env.session import Session as Session
    from k1env.settings import Settings as Settings
    from k1env.vector import Phase2VectorEnv as Phase2VectorEnv

ENV_ID = "k1env/Phase2-v0"
_HOMES = {
    "Instance": "k1env.instances",
    "Phase2Env": "k1env.env",
    "Phase2VectorEnv": "k1env.vector",
    "SB3VecEnv": "k1env.sb3",
    "Session": "k1env.session",
    "Settings": "k1env.settings",
}
__all__ = [
    "ENV_ID",
    "Instance",
    "Phase2Env",
    "Phase2VectorEnv",
    "SB3VecEnv",
    "Session",
    "Settings",
]

if ENV_ID not in registry:
    register(
        id=ENV_ID,
        entry_point="k1env.env:Phase2Env",
        vector_entry_point="k1env.vector:Phase2VectorEnv",
    )


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'k1env' has no attribute {name!r}")
