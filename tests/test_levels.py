"""The layouts of trees for the device, against plain loops, and the tables that they come from."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from k1 import edits
from k1.arena import Arena
from k1.attribution import index_leaves
from k1.errors import TopologyError
from k1.levels import Extent, LevelIndex, index_levels
from k1.topology import Topology, TreeTable
from tests.helpers import random_tree

CPU = torch.device("cpu")
SEEDS = st.integers(0, 10**6)
TREES = st.lists(st.tuples(SEEDS, st.integers(0, 25)), min_size=1, max_size=4)


def grown(shape: tuple[int, int]) -> Topology:
    seed, grow = shape
    return random_tree(torch.Generator().manual_seed(seed), grow)


# -- by plain loops -----------------------------------------------------------------------------


def looped_extent(trees: list[Topology]) -> Extent:
    """The least room, block by block."""
    width, ranks = [0] * len(trees[0].capacity), 1
    for tree in trees:
        for block in tree.blocks.values():
            here = block.slot - tree.offset[block.level]
            width[block.level] = max(width[block.level], here + 1)
            ranks = max(ranks, block.rank + 1)
    return Extent(tuple(w for w in width if w), ranks)


def looped_levels(trees: list[Topology], extent: Extent | None) -> list[dict[str, Any]]:
    """What each level's index has to hold, as lists."""
    known, room = extent is None, extent or looped_extent(trees)
    slots, places, found = trees[0].slots + 1, len(trees), []
    before = 0
    for level, width in enumerate(room.width):
        offset = trees[0].offset[level]
        above = room.width[level - 1] if level else 1
        below = [b.rank + 1 for t in trees for b in t.blocks.values() if b.level == level + 1]
        most = max(below, default=1) if known else room.ranks
        table: dict[str, Any] = {
            name: [] for name in ("alive", "is_leaf", "parent", "rank", "children", "has_child")
        }
        source, row = [], []
        for lane, tree in enumerate(trees):
            lines: dict[str, list[Any]] = {name: [] for name in table}
            for here in range(width):
                block = tree.blocks.get(offset + here)
                children = {
                    b.rank: b.slot - tree.offset[level + 1]
                    for b in tree.blocks.values()
                    if block is not None and b.parent == block.slot
                }
                up = block.parent - tree.offset[level - 1] if block is not None and level else 0
                lines["alive"].append(block is not None)
                lines["is_leaf"].append(not children)
                lines["parent"].append(up)
                lines["rank"].append(0 if block is None else block.rank)
                lines["children"].append([children.get(rank, 0) for rank in range(most)])
                lines["has_child"].append([rank in children for rank in range(most)])
                source.append(-1 if block is None else before + lane * above + up)
                row.append(lane * slots + offset + here)
            for name, values in lines.items():
                table[name].append(values)
        full = [
            all(held[rank] for lines in table["has_child"] for held in lines)
            for rank in range(most)
        ]
        found.append(
            {
                **table,
                "level": level, "offset": offset, "width": width, "first": places,
                "source": source, "row": row,
                "full_ranks": [*full, False].index(False) if known else 0,
                "any_leaf": not known or any(any(lines) for lines in table["is_leaf"]),
            }
        )  # fmt: skip
        before, places = places, places + len(trees) * width
    return found


def plain(index: LevelIndex) -> dict[str, Any]:
    values = {field.name: getattr(index, field.name) for field in fields(index)}
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}


@given(TREES, SEEDS)
def test_levels_are_those_of_plain_loops(shapes: list[tuple[int, int]], more: int) -> None:
    trees = [grown(shape) for shape in shapes]
    least, most = Extent.of(trees), Extent.full(trees[0])
    assert least == looped_extent(trees)
    rng = np.random.default_rng(more)
    depth = int(rng.integers(len(least.width), len(most.width) + 1))
    lowest = [*least.width, *[1] * depth][:depth]
    widths = [
        int(rng.integers(low, high + 1)) for low, high in zip(lowest, most.width, strict=False)
    ]
    between = Extent(tuple(widths), int(rng.integers(least.ranks, most.ranks + 1)))
    for extent in (None, least, between, most):
        found = index_levels(trees, CPU, extent)
        wanted = looped_levels(trees, extent)
        assert [plain(index) for index in found] == wanted
        for index in found:
            dtypes = {f.name: getattr(index, f.name) for f in fields(index)}
            for name, value in dtypes.items():
                if isinstance(value, Tensor):
                    kind = torch.bool if name in ("alive", "is_leaf", "has_child") else torch.int64
                    assert value.dtype == kind and value.is_contiguous(), name


@given(TREES, st.lists(st.integers(1, 14), min_size=4, max_size=4))
def test_leaves_are_those_of_plain_loops(shapes: list[tuple[int, int]], top: list[int]) -> None:
    trees = [grown(shape) for shape in shapes]
    top_k, slots = top[: len(trees)], trees[0].slots
    for room in (None, lambda looks: looks + 5):
        found = index_leaves(trees, top_k, CPU, room)
        deepest = max(len(tree.path(slot)) for tree in trees for slot in tree.blocks)
        levels = len(trees[0].capacity) if room else deepest
        looks = []
        for lane, tree in enumerate(trees):
            depths = []
            for slot in range(slots + 1):
                path = tree.path(slot) if slot in tree.blocks else []
                leaf = bool(path) and all(b.parent != slot for b in tree.blocks.values())
                padded = [*path, *[slots] * (levels - len(path))]
                assert found.chain[lane, slot].tolist() == padded
                assert int(found.depth[lane, slot]) == len(path)
                assert bool(found.is_leaf[lane, slot]) == leaf
                depths += [len(path) - 1] if leaf else []
            looks.append(max(1, top_k[lane] - min(depths) + 1))
        assert found.chain.shape == (len(trees), slots + 1, levels)
        assert found.looks.tolist() == looks
        assert found.most == (max(looks) + 5 if room else max(looks))


# -- tables that are kept -----------------------------------------------------------------------


def fresh(tree: Topology) -> TreeTable:
    """The table of a tree that has nothing kept."""
    twin = Topology(tree.capacity, tree.max_children)
    twin.load_dict(tree.to_dict())
    return TreeTable.of(twin)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return bool(one == other)


@given(
    st.tuples(SEEDS, st.integers(0, 20)),
    st.lists(
        st.tuples(st.sampled_from(["insert", "remove", "copy_subtree", "load"]), SEEDS), max_size=8
    ),
)
def test_the_table_follows_every_edit_and_leaks_into_no_copy(
    shape: tuple[int, int], turns: list[tuple[str, int]]
) -> None:
    tree = grown(shape)
    for kind, number in turns:
        table, twin = tree.table, tree.copy()
        assert tree.table is table and twin.table is table, "it is made once, and shared"
        bits = table.flat.tobytes() + table.chain.tobytes()
        pick = sorted(tree.blocks)[number % len(tree.blocks)]
        try:
            if kind == "load":
                tree.load_dict(grown((number, number % 20)).to_dict())
            else:
                getattr(tree, kind)(pick)
            assert tree.table is not table
        except TopologyError:
            assert same(tree.table, table), "an edit that is refused changes nothing"
        assert same(tree.table, fresh(tree)) and same(twin.table, fresh(twin))
        assert twin.table is table and table.flat.tobytes() + table.chain.tobytes() == bits
        assert [tree.children(s) for s in tree.blocks] == [
            sorted((b.slot for b in tree.blocks.values() if b.parent == s), key=rank_in(tree))
            for s in tree.blocks
        ]


def rank_in(tree: Topology) -> Any:
    return lambda slot: tree.blocks[slot].rank


def test_an_index_is_no_view_of_a_table() -> None:
    """Indices are overwritten in place; tables are shared by all copies of a tree."""
    tree = grown((3, 20))
    before = tree.table.flat.copy(), tree.table.chain.copy(), tree.table.depth.copy()
    for extent in (None, Extent.full(tree)):
        for index in index_levels([tree], CPU, extent):
            for value in vars(index).values():
                if isinstance(value, Tensor):
                    value.fill_(1)
    leaves = index_leaves([tree], [3], CPU)
    for value in (leaves.chain, leaves.depth, leaves.is_leaf):
        value.fill_(1)
    table = tree.table
    assert all(map(np.array_equal, before, (table.flat, table.chain, table.depth)))
    assert same(table, fresh(tree))


# -- room that stays ----------------------------------------------------------------------------


def places(arena: Arena, start: int, stop: int) -> list[tuple[int, torch.Size]]:
    """Addresses and shapes of all that a recording would read of trees."""
    leaves = arena.leaves(start, stop)
    tensors = [v for i in arena.index(start, stop) for v in vars(i).values()]
    tensors += [leaves.chain, leaves.depth, leaves.is_leaf, leaves.looks]
    return [(t.data_ptr(), t.shape) for t in tensors if isinstance(t, Tensor)]


def edit_at_random(arena: Arena, lane: int, rng: np.random.Generator) -> None:
    slot = int(rng.choice(sorted(arena.trees[lane].blocks)))
    if rng.random() < 0.6 and edits.why_not_add(arena, lane, slot) is None:
        edits.add_agent(arena, lane, slot)
    elif slot:
        edits.delete_agent(arena, lane, slot)


def test_a_roomy_index_never_moves(make: Any) -> None:
    trainer = make(lanes=2)
    arena = trainer.arena
    arena.reset_lane(1, 5)
    arena.fixed_room = arena.roomy = True
    rng, met = np.random.default_rng(0), dict[tuple[int, int, int], Any]()
    shapes = set()
    for turn in range(60):
        lane = turn % 2
        if turn % 3 == 2:
            arena.set_hyper(lane, "top_k", int(rng.integers(1, 30)))
        else:
            edit_at_random(arena, lane, rng)
        shapes.add(arena.trees[lane].signature())
        for start, stop in ((0, 2), (1, 2)):
            trees, leaves = arena.trees[start:stop], arena.leaves(start, stop)
            key = start, stop, leaves.most
            assert met.setdefault(key, places(arena, start, stop)) == places(arena, start, stop)
            wanted = index_levels(trees, CPU, Extent.full(trees[0]))
            held = arena.index(start, stop)
            assert [plain(i) for i in held] == [plain(i) for i in wanted]
            exact = index_leaves(trees, arena.host_top_k[start:stop], CPU)
            depth = exact.chain.shape[2]
            assert torch.equal(leaves.chain[..., :depth], exact.chain)
            assert bool((leaves.chain[..., depth:] == arena.scratch).all())
            assert all(torch.equal(getattr(leaves, n), getattr(exact, n))
                       for n in ("depth", "is_leaf", "looks"))  # fmt: skip
            assert leaves.most >= exact.most
    assert len(shapes) > 20
    assert {most for *_, most in met} == {12, 24, 48}, "few shapes, whatever top_k is"
    levels = {key[:2]: found[:-4] for key, found in met.items()}
    assert all(found[:-4] == levels[key[:2]] for key, found in met.items())


@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
@pytest.mark.parametrize("router", ["mean", "learned", "evidence"])
def test_a_roomy_arena_trains_as_a_tight_one(make: Any, mode: str, router: str) -> None:
    found = []
    for roomy in (False, True):
        trainer = make(lanes=2, update={"mode": mode}, model={"router": router})
        arena = trainer.arena
        arena.reset_lane(1, 5)
        arena.fixed_room = arena.roomy = roomy
        rng = np.random.default_rng(1)
        for _ in range(4):
            for lane in (0, 1):
                edit_at_random(arena, lane, rng)
            arena.set_hyper(1, "top_k", int(rng.integers(1, 15)))
            trainer.engine.train(0, 2, 2)
        found.append((arena, trainer.evaluate()))
    (tight, bits), (other, same_bits) = found
    assert [t.to_dict() for t in tight.trees] == [t.to_dict() for t in other.trees]
    for name, wanted in tight.state.items():
        torch.testing.assert_close(other[name], wanted, rtol=1e-4, atol=1e-6, msg=name)
    assert same_bits == pytest.approx(bits, rel=1e-5)
