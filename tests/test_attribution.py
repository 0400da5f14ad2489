"""Responsibilities against plain autograd, and the drill-down against a plain-Python one."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k1.attribution import NEVER, SelectionRules, index_leaves, responsibilities, select_paths
from k1.forward import read_text
from k1.topology import Topology
from tests.helpers import random_tree
from tests.reference import Reference, make_ragged, next_batch, shake

SCALES, ROOT_SCALE = (1.0, 0.15, 0.05), 0.07


def drill_down(
    tree, responsibility, last, step, top_k, cooldown, min_share, picks=99, scales=SCALES,
    root_scale=ROOT_SCALE,
):  # fmt: skip
    """Choose paths by the words of the design; returns ({slot: scale}, culprits)."""
    leaves = [s for s in tree.blocks if tree.is_leaf(s)]
    free = [s for s in leaves if step - last[s] > cooldown]
    if not free:
        earliest = min(last[s] for s in leaves)
        free = [s for s in leaves if last[s] == earliest]
    scale, culprits = {}, []
    for _ in range(picks):
        here = 0
        if not free:
            break
        while not tree.is_leaf(here):
            open_ = [c for c in tree.children(here) if any(s in free for s in tree.subtree(c))]
            here = max(open_, key=lambda c: responsibility[c])
        free.remove(here)
        path = tree.path(here)[::-1]  # from the culprit up to the root
        wanted = {s: scales[min(i, len(scales) - 1)] for i, s in enumerate(path)}
        wanted[0] = root_scale
        agents = [s for s in path if s != 0]
        if not culprits:
            for s in agents[top_k:]:
                del wanted[s]
        else:
            used = {s for s in scale if s != 0}
            if len(used | set(agents)) > top_k:
                continue
            if responsibility[here] < min_share * responsibility[culprits[0]]:
                continue
        for s, value in wanted.items():
            scale[s] = max(scale.get(s, 0.0), value)
        culprits.append(here)
    return scale, culprits


def run_select(tree, responsibility, last, step, top_k, cooldown, min_share, picks, uniform=None,
               exploration=0.0):  # fmt: skip
    slots = tree.slots + 1
    rules = SelectionRules(
        torch.tensor([top_k]), torch.tensor([cooldown]), torch.tensor([exploration]),
        SCALES, ROOT_SCALE, min_share,
    )  # fmt: skip
    uniform = torch.full((1, 1 + slots), 0.5) if uniform is None else uniform
    leaves = index_leaves([tree], [top_k], torch.device("cpu"))
    leaves = replace(leaves, looks=torch.tensor([picks]), most=picks)
    return select_paths(
        torch.tensor([responsibility]), torch.tensor([last]), torch.tensor([step]), uniform,
        leaves, rules,
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    grow=st.integers(1, 24),
    top_k=st.integers(1, 10),
    cooldown=st.integers(0, 12),
    min_share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    picks=st.sampled_from([1, 2, 5, 14]),
)
@example(seed=1, grow=20, top_k=2, cooldown=0, min_share=0.0, picks=14)
def test_select_paths_is_the_plain_drill_down(seed, grow, top_k, cooldown, min_share, picks):
    g = torch.Generator().manual_seed(seed)
    tree = random_tree(g, grow)
    slots = tree.slots + 1
    responsibility = ((torch.randperm(slots, generator=g) + 1) / slots).tolist()
    step = 40
    last = (step - torch.randint(1, 16, (slots,), generator=g)).tolist()
    never = torch.rand(slots, generator=g) < 0.2
    last = [NEVER if n else x for n, x in zip(never.tolist(), last, strict=True)]
    args = tree, responsibility, last, step, top_k, cooldown, min_share, picks
    found = run_select(*args)
    scale, culprits = drill_down(*args)
    expected = torch.zeros(slots)
    for slot, value in scale.items():
        expected[slot] = value
    assert [c for c in found.culprits[0].tolist() if c >= 0] == culprits
    torch.testing.assert_close(found.scale[0], expected)
    assert 1 <= int((found.scale[0, 1:] > 0).sum()) <= top_k or tree.agents == 0
    on_path = {s for c in culprits for s in tree.path(c)}
    assert set(found.on_path[0].nonzero().flatten().tolist()) == on_path


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 24), st.integers(1, 10))
def test_exploration_drills_down_by_the_random_scores(seed, grow, top_k):
    g = torch.Generator().manual_seed(seed)
    tree = random_tree(g, grow)
    slots = tree.slots + 1
    measured = torch.rand(slots, generator=g).tolist()
    uniform = torch.rand(1, 1 + slots, generator=g)
    uniform[0, 0] = 0.3
    last = [NEVER] * slots
    rest = (last, 1, top_k, 0, 0.0, 1)
    explored = run_select(tree, measured, *rest, uniform, exploration=0.31)
    attributed = run_select(tree, measured, *rest, uniform, exploration=0.3)
    assert explored.culprits[0].tolist() == drill_down(tree, uniform[0, 1:].tolist(), *rest)[1]
    assert attributed.culprits[0].tolist() == drill_down(tree, measured, *rest)[1]


def test_top_k_smaller_than_the_depth_cuts_the_upper_blocks():
    tree = Topology.full((2, 2, 2), (1, 2, 4, 8), 2)
    measured = torch.arange(16.0).tolist()
    for top_k, expected in ((1, [1.0, 0, 0]), (2, [1.0, 0.15, 0]), (3, [1.0, 0.15, 0.05])):
        found = run_select(tree, measured, [NEVER] * 16, 0, top_k, 0, 0.1, 1)
        leaf, parent, node, root = tree.path(14)[::-1]
        assert found.scale[0, [leaf, parent, node]].tolist() == pytest.approx(expected)
        assert found.scale[0, root] == pytest.approx(ROOT_SCALE)
        assert found.on_path[0].sum() == 4


def test_a_block_on_two_paths_gets_the_larger_scale():
    tree = Topology((1, 2, 4, 4), 3)
    node = tree.insert(0)
    leaf, inner = tree.insert(node), tree.insert(node)
    deep = tree.insert(inner)
    measured = [0.0] * 12
    measured[inner], measured[deep], measured[leaf] = 3.0, 2.0, 1.0
    found = run_select(tree, measured, [NEVER] * 12, 0, 9, 0, 0.1, 2)
    assert found.culprits[0].tolist() == [deep, leaf]
    assert float(found.scale[0, node]) == pytest.approx(0.15)  # 0.05 as the deep one's grandparent


@pytest.mark.parametrize("router", ["mean", "learned", "evidence"])
@pytest.mark.parametrize("ragged", [False, True])
def test_responsibility_is_the_norm_of_a_blocks_own_gradient(make, router, ragged):
    trainer = make(model={"router": router}, update={"mode": "exact"})
    shake(make_ragged(trainer) if ragged else trainer)
    batch = next_batch(trainer)
    reference = Reference.of(trainer).gradients(batch)
    grads = trainer.engine.gradients(0, 1, batch, read_text(batch, trainer.config))[1]
    levels = trainer.arena.index(0, 1)
    measured = responsibilities(grads, levels, trainer.arena.scratch + 1)[0]
    report = trainer.step()
    for slot, block in trainer.tree.blocks.items():
        own = [g for name, g in reference[block.id].items()]
        norm = math.sqrt(sum(float(g.square().sum()) for g in own))
        assert float(measured[slot]) == pytest.approx(norm, rel=1e-4)
        assert report.responsibility[block.id] == pytest.approx(norm, rel=1e-4)
    dead = [s for s in range(trainer.arena.scratch + 1) if s not in trainer.tree.blocks]
    assert not measured[dead].any()


@pytest.mark.parametrize("router", ["mean", "learned", "evidence"])
def test_every_gradient_equals_plain_autograd(make, router):
    trainer = shake(make_ragged(make(model={"router": router})))
    batch = next_batch(trainer)
    reference = Reference.of(trainer).gradients(batch)
    text = read_text(batch, trainer.config)
    _, grads, shared, _ = trainer.engine.gradients(0, 1, batch, text)
    for slot, block in trainer.tree.blocks.items():
        row = grads[block.level][0, slot - trainer.tree.offset[block.level]]
        for name, piece in trainer.arena.block_layout.unpack(row).items():
            expected = reference[block.id][name].float()
            torch.testing.assert_close(piece, expected, rtol=1e-3, atol=1e-5)
    for name, piece in trainer.arena.shared_layout.unpack(shared[0]).items():
        torch.testing.assert_close(piece, reference[-1][name].float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_top_k_is_never_exceeded(make, mode, top_k):
    trainer = shake(make(update={"mode": mode, "min_share": 0.0}, train={"top_k": top_k}))
    for _ in range(12):
        report = trainer.step()
        assert report.agents_updated == top_k and 0 in report.scales  # 2 + 1 + 2 fit into 5
        on_path = {i for path in report.path for i in path}
        assert set(report.scales) == on_path if top_k > 1 else len(on_path) == 3
    assert int(trainer.arena["blocks_updated"][0]) == 12 * top_k
    make_ragged(trainer)
    assert all(1 <= trainer.step().agents_updated <= top_k for _ in range(12))


def test_a_culprit_rests_for_the_cooldown(make):
    trainer = make(train={"cooldown": 3, "top_k": 2}, update={"mode": "exact"}, seed=3)
    chosen = [trainer.step().path[0][-1] for _ in range(24)]
    for i, culprit in enumerate(chosen):
        assert culprit not in chosen[max(0, i - 3) : i]
    trainer.arena.set_hyper(0, "cooldown", 0)
    assert len(set(chosen)) == 4
    # With no leaf eligible (4 leaves, cooldown 50) the one that rested longest is taken.
    trainer.arena.set_hyper(0, "cooldown", 50)
    more = [trainer.step().path[0][-1] for _ in range(12)]
    assert more[:4] == chosen[-4:] and more[4:8] == more[:4] and more[8:] == more[:4]


def test_cooldown_zero_lets_a_culprit_return_at_once(make):
    trainer = make(train={"cooldown": 0, "top_k": 2}, update={"mode": "exact"}, seed=3)
    chosen = [trainer.step().path[0][-1] for _ in range(20)]
    assert any(a == b for a, b in pairwise(chosen))


@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_without_exploration_the_path_follows_the_responsibilities(make, mode):
    trainer = shake(make_ragged(make(train={"top_k": 4, "cooldown": 2}, update={"mode": mode})))
    tree, arena = trainer.tree, trainer.arena
    looks = arena.leaves(0, 1)
    for step in range(15):
        last = arena["last_culprit"][0].tolist()
        report = trainer.step()
        measured = {tree.slot_of(i): value for i, value in report.responsibility.items()}
        scale, culprits = drill_down(
            tree, measured, last, step, 4, 2, 0.1, looks.most, (1.0, 0.15, 0.05), 0.05
        )
        assert [p[-1] for p in report.path] == [tree.blocks[c].id for c in culprits]
        assert report.scales == pytest.approx({tree.blocks[s].id: v for s, v in scale.items()})


def test_full_exploration_visits_all_leaves_and_none_visits_few(make):
    visits = {}
    for exploration in (0.0, 1.0):
        trainer = make(
            model={"branching": (3, 2)},
            train={"exploration": exploration, "top_k": 2, "batch": 1},
            update={"attribution_every": 1000},
        )
        visits[exploration] = Counter(trainer.step().path[0][-1] for _ in range(72))
        counted = trainer.arena["visits"][0]
        for block, times in visits[exploration].items():
            assert counted[trainer.tree.slot_of(block)] == times
    assert len(visits[0.0]) == 1  # one attribution, no cooldown: always the same leaf
    assert len(visits[1.0]) == 6
    assert all(3 <= times <= 26 for times in visits[1.0].values())
