"""The kernels that draw, choose and record, against the plain code: the same numbers."""

import pytest
import torch

from k1.attribution import NEVER, SelectionRules, index_leaves, select_paths
from k1.rng import random_bits
from tests.helpers import random_tree
from tests.kernel_harness import device

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


def test_random_numbers(kernels):
    kernels(check_random)


@pytest.mark.parametrize("seed", range(12))
def test_selection_and_the_table_of_paths(kernels, seed):
    kernels(check_selection, seed)
