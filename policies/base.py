"""What every controller is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Observation = Mapping[str, np.ndarray]


class Policy(Protocol):
    """A controller. Its memory is plain JSON data, so that a run can be resumed."""

    reason: str
    """Why it chose its last action, in a few words."""

    def act(self, observation: Observation, info: Mapping[str, Any]) -> int:
        """Choose an action."""

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain JSON data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a memory over."""
