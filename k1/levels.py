"""The levels of several trees for the device: which block is where, and who is whose child."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k1.topology import Topology


@dataclass(frozen=True)
class LevelIndex:
    """One level of several lanes as device tensors, `width` slots wide (positions are local).

    Shapes use L lanes, W = this level's width, K = most children that any block has.
    """

    level: int
    offset: int
    width: int
    alive: Tensor
    """bool [L, W]."""
    is_leaf: Tensor
    """bool [L, W]; dead slots count as leaves."""
    parent: Tensor
    """int64 [L, W]: position in the level above (0 where dead)."""
    rank: Tensor
    """int64 [L, W]."""
    first: int
    """Where this level begins in the list of all inputs and outputs: L inputs of roots, then the
    outputs of each level, lane by lane."""
    source: Tensor
    """int64 [L * W]: the place of each block's input in that list; -1 where dead."""
    row: Tensor
    """int64 [L * W]: the block's row in the flattened arena, of these lanes alone."""
    children: Tensor
    """int64 [L, W, K]: positions in the level below by rank (0 where there is none)."""
    has_child: Tensor
    """bool [L, W, K]."""
    full_ranks: int
    """Host knowledge: children 0 .. full_ranks - 1 exist for every position of every lane."""
    any_leaf: bool
    """Host knowledge: some position of some lane is a leaf or dead."""

    def copy_(self, other: LevelIndex) -> None:
        """Take over another index of the same shape in place, which keeps the addresses."""
        for name, value in vars(other).items():
            if isinstance(value, Tensor):
                getattr(self, name).copy_(value)


@dataclass(frozen=True)
class Extent:
    """How much room the levels of an index have."""

    width: tuple[int, ...]
    """Slots of each level."""
    ranks: int
    """Most children of one block."""

    @staticmethod
    def of(trees: list[Topology]) -> Extent:
        """Find the least room that some trees need."""
        tables = [tree.table for tree in trees]
        width = np.max([table.width for table in tables], axis=0)
        ranks = max(1, *(max(table.ranks) for table in tables))
        return Extent(tuple(int(w) for w in width if w), ranks)

    @staticmethod
    def full(tree: Topology) -> Extent:
        """Make room for any tree of the same capacities."""
        return Extent(tree.capacity, tree.max_children)

    def rounded_up(self, branching: tuple[int, ...], trees: list[Topology]) -> Extent:
        """Make room for any tree: as the tree began while that suffices, else all there is.

        What is compiled or recorded for one extent then serves until a tree outgrows it.
        """
        begun, count = [1], 1
        for children in branching:
            count *= children
            begun.append(count)
        capacity, most = trees[0].capacity, trees[0].max_children
        begun += [0] * (len(capacity) - len(begun))
        width = [
            begun[level] if used <= begun[level] else capacity[level]
            for level, used in enumerate(self.width)
        ]
        return Extent(tuple(width), max(branching) if self.ranks <= max(branching) else most)


def on_device(device: torch.device, array: Any) -> Tensor:
    """Hold a host array on a device, without waiting for what that still has to do."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def index_levels(
    trees: list[Topology], device: torch.device, extent: Extent | None = None
) -> list[LevelIndex]:
    """Lay out the levels of several trees for the device.

    Args:
        trees: one for each lane.
        device: where the index is held.
        extent: room to leave; by default each level is as wide as its widest lane, with room for
            the children that its blocks have, and the index says what the host knows of these
            trees. With an extent it knows nothing of them.
    """
    host_knows = extent is None
    extent = extent or Extent.of(trees)
    first, width = trees[0], extent.width
    slots = first.slots + 1
    lanes, levels, first_place = len(trees), [], 0
    lane_number = np.arange(lanes)[:, None]
    flat, at = np.stack([tree.table.flat for tree in trees]), 0
    ranks = np.max([tree.table.ranks for tree in trees], axis=0).clip(min=1).tolist()
    for level, w in enumerate(width):
        offset, most = first.offset[level], ranks[level] if host_knows else extent.ranks
        fields = []
        for field in first.table.levels[level].fields():
            whole = flat[:, at : at + field.size].reshape(lanes, *field.shape)
            fields.append(whole[:, :w] if field.ndim == 1 else whole[:, :w, :most])
            at += field.size
        alive, parent, rank, children, has_child = (np.ascontiguousarray(f) for f in fields)
        alive, has_child = alive.astype(np.bool_), has_child.astype(np.bool_)
        above, before = (width[level - 1], first_place) if level else (1, 0)
        first_place = before + lanes * above
        source = np.where(alive, before + parent + lane_number * above, -1)
        row = np.arange(offset, offset + w) + lane_number * slots
        is_leaf = np.logical_not(has_child.any(-1))
        everywhere = [bool(has_child[..., rank].all()) for rank in range(most)]
        levels.append(
            LevelIndex(
                level,
                offset,
                w,
                alive=on_device(device, alive),
                is_leaf=on_device(device, is_leaf),
                parent=on_device(device, parent),
                rank=on_device(device, rank),
                first=first_place,
                source=on_device(device, source.reshape(-1)),
                row=on_device(device, row.reshape(-1)),
                children=on_device(device, children),
                has_child=on_device(device, has_child),
                full_ranks=(*everywhere, False).index(False) if host_knows else 0,
                any_leaf=bool(is_leaf.any()) or not host_knows,
            )
        )
    return levels
