"""Lanes from all over an arena, copied side by side to be worked on together, and back.

The engine works on ranges of lanes, and a CUDA graph is recorded for each range. Lanes that are
copied to where others were before them find graphs that are recorded already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from k1.arena import Arena
from k1.errors import K1Error
from k1.levels import on_device

MEASURED = ("weight", "shared", "log_prior", "evidence")
"""State of a lane that its bits per byte depend on."""


def write_rows(targets: Iterable[Tensor], index: Tensor, sources: Iterable[Tensor]) -> None:
    """Write rows of tensors, none of them twice, in one launch each.

    Told to be deterministic, torch checks and sorts the index first, for a row could come twice.

    Args:
        targets: what to write to.
        index: int64 [N]: which rows.
        sources: N rows for each target.
    """
    told = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if told:
        torch.use_deterministic_algorithms(False)
    try:
        for target, source in zip(targets, sources, strict=True):
            target.index_copy_(0, index, source)
    finally:
        if told:
            torch.use_deterministic_algorithms(True, warn_only=warn_only)


class WorkArea:
    """The last lanes of an arena: nobody's own, but room for copies of the others."""

    def __init__(self, arena: Arena, start: int) -> None:
        """Take the lanes from `start` to the arena's end."""
        self.arena, self.start = arena, start
        self._back: Tensor | None = None

    def pack(
        self, lanes: Sequence[int], width: int, names: Iterable[str] | None = None
    ) -> tuple[int, int]:
        """Copy lanes side by side, and their first one over and over to fill up a width.

        A copy is good for training and measuring, but shares its tree with the original.

        Args:
            lanes: which lanes, in which order; none of them twice, none of the work area.
            width: how many lanes of the work area are filled.
            names: state tensors to copy; by default all of them, as `unpack` needs it.

        Returns:
            The range start..stop of the copies.

        Raises:
            K1Error: if the lanes are no such lanes, or have no room.
        """
        arena, start, stop = self.arena, self.start, self.start + width
        if len(set(lanes)) < len(lanes) or not all(0 <= lane < start for lane in lanes):
            raise K1Error(f"lanes {list(lanes)} are not different ones before the work area")
        if not 0 < len(lanes) <= width <= arena.lanes - start:
            raise K1Error(f"{len(lanes)} lanes as {width} have no room in the work area")
        filled = [*lanes, *[lanes[0]] * (width - len(lanes))]
        index = on_device(arena.device, np.array(filled))
        for name in arena.state if names is None else names:
            tensor = arena[name]
            torch.index_select(tensor[:start], 0, index, out=tensor[start:stop])
        arena.follow(filled, start)
        self._back = index[: len(lanes)] if names is None else None
        self._lanes = list(lanes)
        return start, stop

    def unpack(self) -> None:
        """Copy the lanes that were packed last back to where they came from, once.

        Raises:
            K1Error: if they were not packed whole, or are back already.
        """
        if self._back is None:
            raise K1Error("only lanes that were packed whole can be copied back, and once")
        arena, start, stop = self.arena, self.start, self.start + len(self._lanes)
        tensors = arena.state.values()
        write_rows([t[:start] for t in tensors], self._back, [t[start:stop] for t in tensors])
        for lane, step in zip(self._lanes, arena.host_step[start:stop], strict=True):
            arena.host_step[lane] = step
        self._back = None
