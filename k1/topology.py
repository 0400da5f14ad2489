"""The shape of one tree: which slot holds which block, and who is whose child.

Slots are grouped by level: level l owns `capacity[l]` consecutive slots, so a tree level is a plain
slice of every stacked tensor. The topology is small host data; `LevelIndex` is its form for the
device, padded to the widest lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k1.errors import TopologyError

ROOT_SLOT = 0
LEVEL_NAMES = ("Root", "Node", "Agent", "Sub-Agent")


@dataclass(frozen=True)
class Block:
    """One living block. `ordinal` numbers the blocks of a level in order of birth, for names."""

    slot: int
    id: int
    parent: int
    """Slot of the parent; -1 for the root."""
    rank: int
    """Column of the parent's router that belongs to this child."""
    level: int
    ordinal: int


class Topology:
    """The tree of one lane. Slots are reused; ids never are."""

    def __init__(self, capacity: tuple[int, ...], max_children: int) -> None:
        """Make a tree of the root alone, with id 0."""
        self.capacity = capacity
        self.max_children = max_children
        self.offset = tuple(sum(capacity[:level]) for level in range(len(capacity)))
        self.blocks: dict[int, Block] = {ROOT_SLOT: Block(ROOT_SLOT, 0, -1, 0, 0, 1)}
        self.next_id = 1
        self.born = [1] + [0] * (len(capacity) - 1)
        self._by_parent: dict[int, list[Block]] | None = None

    @classmethod
    def full(
        cls, branching: tuple[int, ...], capacity: tuple[int, ...], max_children: int
    ) -> Topology:
        """Make a tree with `branching[l]` children under every block of level l."""
        tree = cls(capacity, max_children)
        parents = [ROOT_SLOT]
        for width in branching:
            parents = [tree.insert(parent) for parent in parents for _ in range(width)]
        return tree

    @property
    def slots(self) -> int:
        """Slots in all, without the scratch row."""
        return sum(self.capacity)

    @property
    def agents(self) -> int:
        """Blocks without the root."""
        return len(self.blocks) - 1

    def children(self, slot: int) -> list[int]:
        """Slots of a block's children, by rank."""
        return [b.slot for b in sorted(self._children(slot), key=lambda b: b.rank)]

    def _children(self, slot: int) -> list[Block]:
        if self._by_parent is None:
            self._by_parent = {}
            for block in self.blocks.values():
                self._by_parent.setdefault(block.parent, []).append(block)
        return self._by_parent.get(slot, [])

    def is_leaf(self, slot: int) -> bool:
        """Whether the block has no children."""
        return not self._children(slot)

    def subtree(self, slot: int) -> list[int]:
        """Slots of a block and all its descendants, ancestors first."""
        found = [slot]
        for current in found:
            found.extend(self.children(current))
        return found

    def path(self, slot: int) -> list[int]:
        """Slots from the root down to a block."""
        chain = [slot]
        while chain[-1] != ROOT_SLOT:
            chain.append(self.blocks[chain[-1]].parent)
        return chain[::-1]

    def free_slots(self, level: int) -> list[int]:
        """Free slots of a level, lowest first."""
        start = self.offset[level]
        return [s for s in range(start, start + self.capacity[level]) if s not in self.blocks]

    def slot_of(self, block_id: int) -> int:
        """Find the slot of a living block.

        Raises:
            TopologyError: if no living block has this id.
        """
        for block in self.blocks.values():
            if block.id == block_id:
                return block.slot
        alive = sorted(block.id for block in self.blocks.values())
        raise TopologyError(f"no living block has id {block_id}: living ids are {alive}")

    def name(self, slot: int, short: bool = False) -> str:
        """Name a block for people: `Node 2 / Agent 6 / Sub-Agent 13`, or only its last part."""
        parts = [self._own_name(s) for s in self.path(slot)]
        return parts[-1] if short or len(parts) == 1 else " / ".join(parts[1:])

    def _own_name(self, slot: int) -> str:
        block = self.blocks[slot]
        if block.level == 0:
            return "Root"
        deeper = block.level >= len(LEVEL_NAMES)
        level = f"Level-{block.level} Agent" if deeper else LEVEL_NAMES[block.level]
        return f"{level} {block.ordinal}"

    def why_not_add(self, parent: int) -> str | None:
        """Say why no agent can be added under a block, or None if one can."""
        if parent not in self.blocks:
            return f"slot {parent} holds no block"
        level = self.blocks[parent].level
        if level + 1 >= len(self.capacity):
            return "the tree is at its greatest depth there (model.spare_levels)"
        if len(self._children(parent)) >= self.max_children:
            return f"it already has {self.max_children} children (model.max_children)"
        if not self.free_slots(level + 1):
            return f"level {level + 1} has no free slot (model.spare)"
        return None

    def insert(self, parent: int) -> int:
        """Add one block under `parent` and return its slot.

        Raises:
            TopologyError: if there is no room.
        """
        reason = self.why_not_add(parent)
        if reason:
            where = self.name(parent) if parent in self.blocks else f"slot {parent}"
            raise TopologyError(f"cannot add an agent under {where}: {reason}")
        level = self.blocks[parent].level + 1
        slot = self.free_slots(level)[0]
        used = {block.rank for block in self._children(parent)}
        rank = min(set(range(self.max_children)) - used)
        self.born[level] += 1
        self.blocks[slot] = Block(slot, self.next_id, parent, rank, level, self.born[level])
        self._by_parent = None
        self.next_id += 1
        return slot

    def room_for_copy(self, source: int) -> bool:
        """Whether the whole subtree of `source` fits once more beside it."""
        need = [0] * len(self.capacity)
        for slot in self.subtree(source):
            need[self.blocks[slot].level] += 1
        return all(len(self.free_slots(level)) >= n for level, n in enumerate(need) if n)

    def copy_subtree(self, source: int) -> dict[int, int]:
        """Insert a copy of a subtree beside it; returns {source slot: new slot}, ancestors first.

        Children keep their ranks, so a copied router still means the same children.

        Raises:
            TopologyError: if there is no room for all of it (then nothing is changed).
        """
        if not self.room_for_copy(source):
            raise TopologyError(
                f"cannot split {self.name(source)}: its subtree does not fit into the free slots "
                "(model.spare)"
            )
        made: dict[int, int] = {}
        for slot in self.subtree(source):
            old = self.blocks[slot]
            new = self.insert(made.get(old.parent, old.parent))
            if slot != source:
                block = self.blocks[new]
                self.blocks[new] = Block(
                    new, block.id, block.parent, old.rank, block.level, block.ordinal
                )
                self._by_parent = None
            made[slot] = new
        return made

    def remove(self, slot: int) -> list[int]:
        """Remove a block with its subtree and return the freed slots.

        Raises:
            TopologyError: for the root or an empty slot.
        """
        if slot == ROOT_SLOT or slot not in self.blocks:
            what = "the root" if slot == ROOT_SLOT else f"slot {slot}, which holds no block"
            raise TopologyError(f"cannot delete {what}: choose a living agent")
        freed = self.subtree(slot)
        for gone in freed:
            del self.blocks[gone]
        self._by_parent = None
        return freed

    def copy(self) -> Topology:
        """Return an independent copy."""
        twin = Topology(self.capacity, self.max_children)
        twin.blocks, twin.next_id, twin.born = dict(self.blocks), self.next_id, list(self.born)
        return twin

    def signature(self) -> str:
        """Identify the living blocks, as text: equal for equal trees of one run."""
        return ",".join(map(str, sorted(block.id for block in self.blocks.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return the tree as plain JSON data."""
        rows = [[b.slot, b.id, b.parent, b.rank, b.level, b.ordinal] for b in self._ordered()]
        return {"blocks": rows, "next_id": self.next_id, "born": list(self.born)}

    def _ordered(self) -> list[Block]:
        return [self.blocks[slot] for slot in sorted(self.blocks)]

    def load_dict(self, data: dict[str, Any]) -> None:
        """Take over what `to_dict` wrote for the same capacities.

        Raises:
            TopologyError: if it is no tree, or none that these capacities hold.
        """
        try:
            blocks = [Block(*row) for row in data["blocks"]]
            next_id, born = data["next_id"], list(data["born"])
            wrong = self._why_no_tree(blocks, next_id, born)
            if data.keys() != self.to_dict().keys():
                wrong = "it has parts that a tree has not"
        except (KeyError, TypeError, AttributeError) as error:
            wrong = f"a part is missing or of another type ({error})"
        if wrong:
            raise TopologyError(f"what was saved is no tree of this configuration: {wrong}")
        self.blocks = {block.slot: block for block in blocks}
        self._by_parent = None
        self.next_id, self.born = next_id, born

    def _why_no_tree(self, blocks: list[Block], next_id: Any, born: list[Any]) -> str | None:
        """Say why blocks are no tree that fits, or None if they are one."""
        numbers = [next_id, *born, *(n for block in blocks for n in vars(block).values())]
        if not all(type(n) is int and abs(n) < 2**62 for n in numbers):
            return "a number is none"
        by_slot = {block.slot: block for block in blocks}
        root = by_slot.get(ROOT_SLOT)
        if root is None or (root.parent, root.level) != (-1, 0):
            return "it has no root"
        if len(by_slot) < len(blocks) or len({block.id for block in blocks}) < len(blocks):
            return "a slot or an id is used twice"
        if list(by_slot) != sorted(by_slot):
            return "its slots are in disorder"
        if not all(0 <= block.id < next_id for block in blocks) or len(born) != len(self.capacity):
            return "its counts do not fit"
        places = {(block.parent, block.rank) for block in blocks}
        if len(places) < len(blocks):
            return "two children have one rank"
        for block in blocks:
            level = block.level
            if not (0 <= level < len(self.capacity) and 0 <= block.rank < self.max_children):
                return f"block {block.id} is at no place of it"
            if not 0 <= block.slot - self.offset[level] < self.capacity[level]:
                return f"block {block.id} is in a slot of another level"
            parent = by_slot.get(block.parent)
            if level and (parent is None or parent.level != level - 1):
                return f"block {block.id} has no parent a level above"
        return None


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
        ranks, width = 1, [0] * len(trees[0].capacity)
        for tree in trees:
            for block in tree.blocks.values():
                used = block.slot - tree.offset[block.level] + 1
                width[block.level] = max(width[block.level], used)
                ranks = max(ranks, block.rank + 1)
        return Extent(tuple(w for w in width if w), ranks)

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


def _ranks_under(trees: list[Topology], level: int) -> int:
    """Count the ranks that children of a level's blocks have: at least 1."""
    below = (b for tree in trees for b in tree.blocks.values() if b.level == level + 1)
    return max((block.rank + 1 for block in below), default=1)


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
    depth, slots = len(width), first.slots + 1
    lanes, levels, first_place = len(trees), [], 0
    for level in range(depth):
        offset, w = first.offset[level], width[level]
        alive = torch.zeros(lanes, w, dtype=torch.bool)
        parent, rank = (torch.zeros(lanes, w, dtype=torch.int64) for _ in range(2))
        most = _ranks_under(trees, level) if host_knows else extent.ranks
        children = torch.zeros(lanes, w, most, dtype=torch.int64)
        has_child = torch.zeros(lanes, w, most, dtype=torch.bool)
        for lane, tree in enumerate(trees):
            for block in tree.blocks.values():
                if block.level == level:
                    here = block.slot - offset
                    alive[lane, here] = True
                    rank[lane, here] = block.rank
                    parent[lane, here] = max(0, block.parent - tree.offset[max(0, level - 1)])
                elif block.level == level + 1:
                    up = block.parent - offset
                    children[lane, up, block.rank] = block.slot - tree.offset[level + 1]
                    has_child[lane, up, block.rank] = True
        lane_number = torch.arange(lanes)[:, None]
        above, before = (width[level - 1], first_place) if level else (1, 0)
        first_place = before + lanes * above
        source = torch.where(alive, before + parent + lane_number * above, -1)
        row = torch.arange(offset, offset + w) + lane_number * slots
        is_leaf = ~has_child.any(-1)
        everywhere = has_child.flatten(0, 1).all(0).tolist()
        levels.append(
            LevelIndex(
                level,
                offset,
                w,
                alive=alive.to(device),
                is_leaf=is_leaf.to(device),
                parent=parent.to(device),
                rank=rank.to(device),
                first=first_place,
                source=source.flatten().to(device),
                row=row.flatten().to(device),
                children=children.to(device),
                has_child=has_child.to(device),
                full_ranks=(*everywhere, False).index(False) if host_knows else 0,
                any_leaf=bool(is_leaf.any()) or not host_knows,
            )
        )
    return levels
