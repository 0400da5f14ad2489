"""Controllers to compare with: one does nothing, others act at random."""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class _Drawing(ABC):
    """Draws actions; its memory is the state of its generator."""

    reason = "drawn at random"

    def __init__(self, seed: int = 0) -> None:
        """Seed the generator."""
        self._generator = np.random.default_rng(seed)

    def act(self, observation: Observation, info: Mapping[str, Any]) -> int:
        """Draw an action."""
        return int(self._generator.choice(np.flatnonzero(self._choices(info))))

    @abstractmethod
    def _choices(self, info: Mapping[str, Any]) -> np.ndarray:
        """Which actions to draw from; at least one."""

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state."""
        return {"generator": self._generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a generator's state over."""
        self._generator.bit_generator.state = state["generator"]


class RandomPolicy(_Drawing):
    """Draws uniformly from the possible actions, forbidden ones included."""

    def _choices(self, info: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(info["action_mask"])


class RandomLegalPolicy(_Drawing):
    """Draws uniformly from the possible actions that the present stage permits."""

    def _choices(self, info: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(info["permitted_mask"])


class CheatPolicy(_Drawing):
    """Draws uniformly from the possible actions that are forbidden; trains on if there is none.

    It is there to see that trying cheats again and again does not pay.
    """

    reason = "drawn from what is forbidden"

    def _choices(self, info: Mapping[str, Any]) -> np.ndarray:
        possible, permitted = np.asarray(info["action_mask"]), np.asarray(info["permitted_mask"])
        forbidden = possible.astype(bool) & ~permitted.astype(bool)
        if not forbidden.any():
            forbidden[0] = True  # the no-op
        return forbidden
