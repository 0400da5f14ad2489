"""The kernels that draw, choose and record, against the plain code: the same numbers."""

import pytest
import torch

from k1.attribution import NEVER, SelectionRules, index_leaves, select_paths
from k1.levels import index_levels
from k1.rng import random_bits
from tests.helpers import random_tree
from tests.kernel_harness import device, ragged_trees

SCALES = (1.0, 0.15, 0.05)


def check_random():
    from k1.kernels.random import random_bits_fused

    seed = torch.tensor([5, -77, 1 << 60], device=device())
    counter = torch.tensor([0, 3, 99], device=device())
    for width in (1, 37, 1500):
        found = random_bits_fused(seed, 3, counter, width).cpu()
        assert torch.equal(found, random_bits(seed.cpu(), 3, counter.cpu(), width))


def check_selection(seed):
    from k1.kernels.select import list_paths, select_paths_fused

    g = torch.Generator().manual_seed(seed)
    trees = [random_tree(g, grow) for grow in (24, 20, 15)]
    top_k = torch.randint(1, 9, (3,), generator=g)
    leaves = index_leaves(trees, top_k.tolist(), device())
    lanes, slots, levels = leaves.chain.shape
    last = torch.randint(20, 40, (lanes, slots), generator=g)
    last[torch.rand(lanes, slots, generator=g) < 0.3] = NEVER
    rules = SelectionRules(
        top_k.to(device()), torch.randint(0, 30, (3,), generator=g).to(device()),
        torch.tensor([0.0, 0.5, 1.0], device=device()), SCALES, 0.07, 0.3,
    )  # fmt: skip
    args = (
        torch.rand(lanes, slots, generator=g), last, torch.tensor([40, 41, 42]),
        torch.rand(lanes, slots + 1, generator=g),
    )  # fmt: skip
    args = [value.to(device()) for value in args]
    wanted, found = (f(*args, leaves, rules) for f in (select_paths, select_paths_fused))
    assert torch.equal(found.culprits, wanted.culprits)
    assert torch.equal(found.on_path, wanted.on_path)
    torch.testing.assert_close(found.scale, wanted.scale)

    counts = (1,) + (leaves.most,) * (levels - 1)
    table = list_paths(wanted.on_path, leaves, counts)
    row, place = table.row.tolist(), table.place.tolist()
    on_path = wanted.on_path.flatten().tolist()
    assert [at >= 0 for at in place] == on_path
    assert all(row[at] == i for i, at in enumerate(place) if at >= 0)
    padding = [r for i, r in enumerate(row) if place[r] != i]
    assert len(padding) == len(row) - sum(on_path)
    assert all(r % slots == slots - 1 for r in padding)
    for level in range(levels):
        cut = table.cut(level)
        for at in range(cut.start, cut.stop):
            lane = (at - cut.start) // counts[level]
            assert row[at] // slots == lane
            if row[at] not in padding:
                assert int(leaves.depth[lane, row[at] % slots]) == level + 1


def places_by_torch(table, levels):
    """Where each of a table's blocks has its input and its output, and whether it is a leaf."""
    index = torch.cat([level.row for level in levels])
    first, count = levels[0].first, len(index)

    def at_rows(values, none):
        full = torch.full_like(table.place, none).scatter(0, index, values)
        return full[table.row]

    places = torch.arange(first, first + count, device=device())
    leaf = torch.cat([level.is_leaf.flatten() for level in levels]).long()
    source = at_rows(torch.cat([level.source for level in levels]), -1)
    return source, at_rows(places, -1), at_rows(leaf, 0) != 0


def check_inputs(trees, seed):
    from k1.kernels.select import find_inputs, list_paths

    levels = index_levels(trees, device())
    leaves = index_leaves(trees, [9] * len(trees), device())
    on_path = torch.rand(leaves.depth.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    on_path = on_path.to(device()) & (leaves.depth > 0)
    counts = tuple(max(1, index.width - 1) for index in levels)  # room for all in one lane, or not
    for table in (
        list_paths(on_path, leaves, counts),
        list_paths(leaves.depth > 0, leaves, counts),
    ):
        source, place, leaf = places_by_torch(table, levels)
        slots = leaves.depth.shape[1]
        padded = table.row % slots == slots - 1
        assert padded.any() and leaf.any() and not leaf[~padded].all()
        assert bool((source[padded] == -1).all()) and bool((source[~padded] >= 0).all())
        found = find_inputs(table, levels, leaves=True)
        assert torch.equal(found[0], source)
        assert torch.equal(found[1], torch.where(leaf, place, -1))
        found = find_inputs(table, levels, leaves=False)
        assert torch.equal(found[0], source) and bool((found[1] == -1).all())


def test_random_numbers(kernels):
    kernels(check_random)


@pytest.mark.parametrize("seed", range(12))
def test_selection_and_the_table_of_paths(kernels, seed):
    kernels(check_selection, seed)


def test_places_of_inputs_and_of_leaves_outputs(kernels):
    kernels(check_inputs, ragged_trees(), 0)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        kernels(check_inputs, [random_tree(g, grow) for grow in (24, 9, 15)], seed)
    # More entries than one program takes.
    kernels(check_inputs, ragged_trees() * 4, 1)
