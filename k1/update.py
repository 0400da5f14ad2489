"""The update of a step by PyTorch: clipping, learning rates, AdamW on the rows that may move.

`k1.kernels.update` does the same on CUDA in a handful of launches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k1.arena import Arena
from k1.attribution import Selection
from k1.optimizer import Rows, adamw, clip_factor
from k1.path import Gradients, PathPass
from k1.records import FullGradients, culprits_alone

if TYPE_CHECKING:
    from k1.kernels.tree import TreePass

ROWS = ("weight", "first", "second", "count")
SHARED_ROWS = ("shared", "shared_first", "shared_second", "shared_count")


def learning_rate(arena: Arena, lanes: slice) -> Tensor:
    """Learning rate [L] of some lanes' next step at displacement scale 1."""
    warmup = arena.config.optimizer.warmup
    rise = ((arena["step"][lanes] + 1) / max(1, warmup)).clamp(max=1.0)
    return arena["lr"][lanes] * arena["lr_factor"][lanes] * rise


class Update:
    """One step's update of lanes start..stop."""

    def __init__(
        self,
        arena: Arena,
        start: int,
        stop: int,
        selection: Selection,
        sharers: Tensor | None = None,
    ) -> None:
        """Begin an update.

        Args:
            arena: the lanes.
            start: first lane.
            stop: one past the last lane.
            selection: the displacement of each block; one at 0 stays as it is.
            sharers: bool [L]: lanes whose shared part takes part; by default all of them.
        """
        self._arena, self._lanes, self._selection = arena, slice(start, stop), selection
        self._sharers = sharers
        self._fine = torch.ones(stop - start, dtype=torch.bool, device=arena.device)
        self._rate = learning_rate(arena, self._lanes)

    def full(self, full: FullGradients) -> Tensor:
        """Move what is selected by the gradients of all blocks.

        Returns:
            bool [L]: whether all gradients that matter are finite; a lane where not stays as it is.
        """
        scale = self._selection.scale
        squares = torch.where(scale > 0, full.measured, 0.0).square().sum(1)
        factor = self._clip(squares, full.by_shared)
        for row, grad in full.by_row:
            self._move(row, grad, scale, factor)
        self._move_shared(full.by_shared, factor)
        return self._fine

    def path(self, done: PathPass | TreePass, found: Gradients, last: bool) -> Tensor:
        """Move path blocks by their gradients: all that is selected, or the culprits alone.

        Args:
            done: the pass that the gradients come from.
            found: the gradients.
            last: whether all moves; before that, the culprits do, clipped by their own norm.

        Returns:
            bool [L]: whether all gradients that matter have been finite so far.
        """
        scale = self._selection.scale
        factor = self._clip(self._by_lane(done.row, found.squares, scale), found.by_shared)
        if last:
            self._move_shared(found.by_shared, factor)
        else:
            scale = culprits_alone(self._selection)
            own = self._by_lane(done.row, found.squares, scale)
            factor = clip_factor(own, self._arena.config.optimizer.clip)
        self._move(done.row, found.by_row, scale, factor)
        return self._fine

    def _clip(self, squares: Tensor, by_shared: Tensor) -> Tensor:
        """Clip factor [L], given the blocks' squared norms [L]; notes which lanes are finite."""
        config = self._arena.config
        if config.update.shared_scale > 0:
            if self._sharers is not None:
                by_shared = torch.where(self._sharers[:, None], by_shared, 0.0)
            squares = squares + by_shared.square().sum(1)
        self._fine = self._fine & torch.isfinite(squares)
        return clip_factor(squares, config.optimizer.clip)

    def _by_lane(self, row: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """Sum values [M] of those arena rows that have a displacement [L, S], by lane: [L]."""
        lane = torch.arange(len(scale), device=row.device)
        own = row // (self._arena.scratch + 1) == lane[:, None]
        # No products: one lane's NaN is its own.
        return torch.where(own & (scale.flatten()[row] > 0), values, 0.0).sum(1)

    def _move(self, row: Tensor, grad: Tensor, scale: Tensor, factor: Tensor) -> None:
        """Make the optimizer step of some blocks.

        Args:
            row: int64 [M]: the blocks' rows among those of the lanes.
            grad: [M, P].
            scale: displacement [L, S]; a block at 0 stays as it is.
            factor: of the gradients [L].
        """
        lane, scale = row // (self._arena.scratch + 1), scale.flatten()[row]
        on, rate = (scale > 0) & self._fine[lane], self._rate[lane] * scale
        state = [self._arena[name][self._lanes].flatten(0, 1) for name in ROWS]
        weight, first, second, count = state
        old = Rows(weight[row], first[row], second[row], count[row])
        new = adamw(old, grad * factor[lane, None], rate, on, self._arena.config.optimizer)
        for target, value in zip(state, vars(new).values(), strict=True):
            target[row] = value

    def _move_shared(self, grad: Tensor, factor: Tensor) -> None:
        scale = self._arena.config.update.shared_scale
        state = [self._arena[name][self._lanes] for name in SHARED_ROWS]
        on = self._fine & (scale > 0)
        if self._sharers is not None:
            on = on & self._sharers
        old, rate = Rows(*state), self._rate * scale
        new = adamw(old, grad * factor[:, None], rate, on, self._arena.config.optimizer)
        for target, value in zip(state, vars(new).values(), strict=True):
            target.copy_(value)
