"""The shape of one tree: which slot holds which block, and who is whose child.

Slots are grouped by level: level l owns `capacity[l]` consecutive slots, so a tree level is a plain
slice of every stacked tensor. The topology is small host data; `k1.levels` has its form for the
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
        self._table: TreeTable | None = None

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

    def _changed(self) -> None:
        """Drop what was derived from the blocks."""
        self._by_parent = self._table = None

    @property
    def table(self) -> TreeTable:
        """The tree as arrays; a copy of the tree shares it."""
        if self._table is None:
            self._table = TreeTable.of(self)
        return self._table

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
        self._changed()
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
                self._changed()
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
        self._changed()
        return freed

    def copy(self) -> Topology:
        """Return an independent copy."""
        twin = Topology(self.capacity, self.max_children)
        twin.blocks, twin.next_id, twin.born = dict(self.blocks), self.next_id, list(self.born)
        twin._by_parent, twin._table = self._by_parent, self._table
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
        self._changed()
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
class LevelTable:
    """One level of one tree as arrays, as wide as there are slots (positions are local).

    C = slots of the level, K = most children of any block.
    """

    alive: np.ndarray
    """bool [C]."""
    parent: np.ndarray
    """int64 [C]: position in the level above (0 where dead)."""
    rank: np.ndarray
    """int64 [C]."""
    children: np.ndarray
    """int64 [C, K]: positions in the level below by rank (0 where there is none)."""
    has_child: np.ndarray
    """bool [C, K]."""

    def fields(self) -> tuple[np.ndarray, ...]:
        """All fields, in order."""
        return self.alive, self.parent, self.rank, self.children, self.has_child

    @staticmethod
    def empty(slots: int, ranks: int) -> LevelTable:
        """Make the table of a level without blocks."""
        return LevelTable(
            np.zeros(slots, dtype=np.bool_),
            np.zeros(slots, dtype=np.int64),
            np.zeros(slots, dtype=np.int64),
            np.zeros((slots, ranks), dtype=np.int64),
            np.zeros((slots, ranks), dtype=np.bool_),
        )


@dataclass(frozen=True)
class TreeTable:
    """One tree as arrays. S counts slots and the scratch slot, D levels."""

    levels: tuple[LevelTable, ...]
    width: tuple[int, ...]
    """Slots of each level up to the last one in use."""
    ranks: tuple[int, ...]
    """For each level, ranks that children of its blocks have: 0 without children."""
    chain: np.ndarray
    """int64 [S, D]: slots from the root to each living block; the scratch slot beyond it."""
    depth: np.ndarray
    """int64 [S]: blocks on that way, root and block included; 0 where there is no block."""
    is_leaf: np.ndarray
    """bool [S]."""
    shallowest: int
    """Blocks under the root on the way to the nearest leaf."""
    flat: np.ndarray
    """int64: all fields of all levels one after another, as `LevelTable` names them."""

    @staticmethod
    def of(tree: Topology) -> TreeTable:
        """Lay out a tree."""
        depth_of_all = len(tree.capacity)
        levels = tuple(LevelTable.empty(c, tree.max_children) for c in tree.capacity)
        width, ranks = [0] * depth_of_all, [0] * depth_of_all
        chain = np.full((tree.slots + 1, depth_of_all), tree.slots)
        depth = np.zeros(tree.slots + 1, dtype=np.int64)
        is_leaf = np.zeros(tree.slots + 1, dtype=np.bool_)
        for block in tree.blocks.values():
            here, own = block.slot - tree.offset[block.level], levels[block.level]
            own.alive[here], own.rank[here] = True, block.rank
            width[block.level] = max(width[block.level], here + 1)
            if block.level:
                up = block.parent - tree.offset[block.level - 1]
                above = levels[block.level - 1]
                own.parent[here] = up
                above.children[up, block.rank], above.has_child[up, block.rank] = here, True
                ranks[block.level - 1] = max(ranks[block.level - 1], block.rank + 1)
            path = tree.path(block.slot)
            chain[block.slot, : len(path)] = path
            depth[block.slot] = len(path)
            is_leaf[block.slot] = tree.is_leaf(block.slot)
        shallowest = int(depth[is_leaf].min()) - 1
        flat = np.concatenate([field.ravel() for level in levels for field in level.fields()])
        return TreeTable(
            levels, tuple(width), tuple(ranks), chain, depth, is_leaf, shallowest, flat
        )
