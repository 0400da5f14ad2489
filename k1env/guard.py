"""The divergence guard: keeps the best state of the present domain, and goes back to it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from k1.arena import Arena, LaneState
from k1.config import read_dataclass


@dataclass(frozen=True)
class GuardRecord:
    """What a guard has seen, without the best state itself."""

    best_loss: float | None
    phase: int
    rollbacks: int
    in_a_row: int

    @staticmethod
    def from_dict(data: Any) -> GuardRecord:
        """Read what `DivergenceGuard.to_dict` wrote.

        Raises:
            ConfigError: if it is no such record.
        """
        return read_dataclass(GuardRecord, data, "guard", whole=True)


class DivergenceGuard:
    """Watches one lane. A new domain starts a new record, since its losses are others."""

    def __init__(self, arena: Arena, lane: int, tolerance: float) -> None:
        """Start without a record; `tolerance` is the loss relative to the best that is too much."""
        self.arena, self.lane, self.tolerance = arena, lane, tolerance
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.best: LaneState | None = None
        self.best_loss = math.inf
        self.phase = -1
        self.rollbacks = 0
        self.in_a_row = 0

    def is_best(self, phase: int, loss: float) -> bool:
        """Whether a loss is the best of its phase so far; if so, `remember` what reached it."""
        if phase != self.phase:
            self.phase, self.best_loss = phase, math.inf
        return loss < self.best_loss

    def remember(self, state: LaneState, loss: float) -> None:
        """Take a copy of the lane for the best so far."""
        self.best, self.best_loss = state, loss

    def check(self, phase: int, loss: float, finite: bool) -> bool:
        """Go back to the best state if the present one is not finite or far worse.

        Weights, moments, tree and hyper-parameters go back; the stream of text does not, so that
        the batches that did the harm are not met again.

        Args:
            phase: number of the present domain's phase.
            loss: bits per byte of the present domain.
            finite: whether all losses are.

        Returns:
            Whether it went back.
        """
        if finite and (phase != self.phase or loss <= self.tolerance * self.best_loss):
            self.in_a_row = 0
            return False
        assert self.best is not None
        stream = {n: self.arena[n][self.lane].clone() for n in ("data_seed", "data_cursor")}
        diverged = self.arena.trees[self.lane]
        self.arena.write_lane(self.lane, self.best)
        for name, place in stream.items():
            self.arena[name][self.lane] = place
        tree = self.arena.trees[self.lane]  # ids stay used, also those of blocks that are gone
        tree.next_id = max(tree.next_id, diverged.next_id)
        tree.born = [max(pair) for pair in zip(tree.born, diverged.born, strict=True)]
        self.rollbacks += 1
        self.in_a_row += 1
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return the record without the state itself, as plain JSON data."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return asdict(GuardRecord(best, self.phase, self.rollbacks, self.in_a_row))

    def load(self, record: GuardRecord, best: LaneState | None) -> None:
        """Take over what `to_dict` wrote, and the best state."""
        self.best_loss = math.inf if record.best_loss is None else record.best_loss
        self.phase, self.rollbacks = record.phase, record.rollbacks
        self.in_a_row, self.best = record.in_a_row, best
