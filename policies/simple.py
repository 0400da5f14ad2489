"""Controllers to compare with: one does nothing, one does anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from policies.base import Observation


class NoopPolicy:
    """Always trains on."""

    reason = "trains on"

    def act(self, observation: Observation, info: Mapping[str, Any]) -> int:
        """Choose the no-op."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return the (empty) memory."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a memory over: there is none."""


class RandomPolicy:
    """Draws uniformly from the possible actions, forbidden ones included."""

    reason = "drawn at random"

    def __init__(self, seed: int = 0) -> None:
        """Seed the generator."""
        self._generator = np.random.default_rng(seed)

    def act(self, observation: Observation, info: Mapping[str, Any]) -> int:
        """Draw an action."""
        return int(self._generator.choice(np.flatnonzero(info["action_mask"])))

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state."""
        return {"generator": self._generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a generator's state over."""
        self._generator.bit_generator.state = state["generator"]
