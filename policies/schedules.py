"""Settings held by hand, as people do today: no decisions, and no bounds but the hard limits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from k1.errors import K1Error
from k1env.boundary import hard_limits
from k1env.schedule import Task
from policies.episode import Life

STATIC_FILE = Path(__file__).with_name("static.json")
COSINE_END = 0.1
"""Share of the starting learning rate that the cosine ends at."""
PLATEAU_FACTOR = 0.5
PLATEAU_PATIENCE = 5
"""Decisions without improvement after which the learning rate falls."""
PLATEAU_THRESHOLD = 0.001
"""Relative fall of the loss that counts as improvement."""
_NOOP = 0


class Constant:
    """The settings that the world starts with, to the end."""

    within_bounds = False
    identity: str | None = None

    def play(self, life: Life) -> Task[None]:
        """Set what `settings` says before each decision, which is a no-op."""
        start = life.session.arena.get_hyper(life.session.main)
        while not life.over:
            life.tune(self.settings(life, start))
            yield from life.step(_NOOP)

    def settings(self, life: Life, start: dict[str, float]) -> dict[str, float]:
        """Hyper-parameters for the coming decision; those not named stay."""
        return {}


class Cosine(Constant):
    """The learning rate falls from its start to a tenth of it along half a cosine."""

    def settings(self, life: Life, start: dict[str, float]) -> dict[str, float]:
        """The learning rate at the present share of the budget."""
        height = (1 + math.cos(math.pi * min(1.0, life.share_spent))) / 2
        return {"lr": start["lr"] * (COSINE_END + (1 - COSINE_END) * height)}


class Plateau(Constant):
    """The learning rate halves when the validation loss has not improved for some decisions.

    The loss is the mean over the domains seen. When a domain arrives it is counted anew.
    """

    def __init__(self) -> None:
        """Start without a best loss."""
        self._best, self._waited, self._seen = math.inf, 0, 0
        self._lr: float | None = None

    def settings(self, life: Life, start: dict[str, float]) -> dict[str, float]:
        """The learning rate after what the last decision came to."""
        lr = start["lr"] if self._lr is None else self._lr
        bits, seen = life.info["bits_per_byte"], life.info["seen"]
        loss = sum(bits[d] for d in seen) / len(seen)
        if len(seen) != self._seen:
            self._best, self._waited, self._seen = loss, 0, len(seen)
        elif loss < self._best * (1 - PLATEAU_THRESHOLD):
            self._best, self._waited = loss, 0
        else:
            self._waited += 1
        if self._waited >= PLATEAU_PATIENCE:
            lr, self._waited = lr * PLATEAU_FACTOR, 0
        self._lr = lr
        return {"lr": lr}


class Static(Constant):
    """One setting for every world."""

    def __init__(self, lr: float, top_k: int, cooldown: int) -> None:
        """Bind the setting.

        Raises:
            K1Error: if it is beyond the hard limits of every tree.
        """
        limits = hard_limits(1)
        for name, value in (("lr", lr), ("cooldown", cooldown)):
            low, high = limits.range(name)
            if not low <= value <= high:
                raise K1Error(f"{name} = {value:g} is not possible: from {low:g} to {high:g}")
        if top_k < 1:
            raise K1Error(f"top_k = {top_k:g} is not possible: 1 or more")
        self.identity = f"{lr:g}:{top_k}:{cooldown}"
        self._fixed = {"lr": lr, "top_k": float(top_k), "cooldown": float(cooldown)}

    def settings(self, life: Life, start: dict[str, float]) -> dict[str, float]:
        """The setting."""
        return self._fixed


def known_statics(file: Path = STATIC_FILE) -> dict[str, Any]:
    """What grid searches found, by preset."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def best_static(preset: str, file: Path = STATIC_FILE) -> Static:
    """The setting that a grid search on train worlds found best (`scripts/grid_search.py`).

    Raises:
        K1Error: if there was no search for a preset.
    """
    found = known_statics(file)
    if preset not in found:
        raise K1Error(
            f"no static setting is known for preset {preset!r}: find one by "
            f"`python scripts/grid_search.py --preset {preset} --write`, or leave static out"
        )
    return Static(**found[preset]["best"])
