"""Add, delete and prune: what they keep, what they refuse, and what a tree looks like after any."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k1 import edits
from k1.attribution import NEVER
from k1.errors import TopologyError
from k1.forward import read_text
from k1.topology import Topology
from tests.reference import count_text, make_ragged, next_batch, shake

ROUTERS = ("mean", "learned", "evidence")


def counts(trainer):
    """Copy of the counts by block id: int64 [3, buckets]."""
    table = trainer.arena["evidence"][0]
    return {b.id: table[s].clone() for s, b in trainer.tree.blocks.items()}


def set_mean(trainer, **by_id):
    for name, value in by_id.items():
        slot = trainer.tree.slot_of(int(name[1:]))
        trainer.arena["mean_responsibility"][0, slot] = value


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("parent", [3, 5, 4])
def test_add_under_a_leaf_keeps_the_function(make, router, parent):
    trainer = shake(make(model={"router": router}))
    tokens = next_batch(trainer).inputs[0]
    before, old = trainer.logits(tokens), counts(trainer)
    new = trainer.add_agent(parent)
    assert (trainer.logits(tokens) - before).abs().max() < 1e-5
    tree = trainer.tree
    assert tree.path(tree.slot_of(new))[-2] == tree.slot_of(parent)
    now = counts(trainer)
    assert not now.pop(new).any() and all(torch.equal(now[i], old[i]) for i in old)
    assert int(trainer.arena["count"][0, tree.slot_of(new)]) == 0
    assert trainer.arena["weight"][0, tree.slot_of(new)].norm() > 1  # it can learn
    trainer.train(6)
    assert (trainer.logits(tokens) - before).abs().max() > 1e-3


@pytest.mark.parametrize("router", ["mean", "learned"])
@pytest.mark.parametrize("parent", [0, 1, 2])
@pytest.mark.parametrize("rest", [2, 5])
def test_add_under_an_internal_block_keeps_the_function(make, router, parent, rest):
    trainer = shake(make(model={"router": router}))
    trainer.train(2)
    tokens = next_batch(trainer).inputs[0]
    set_mean(trainer, **{f"b{rest}": 99.0})
    before = trainer.logits(tokens)
    for _ in range(2 if parent else 1):  # there is room for one more node with its agents
        trainer.add_agent(parent)
        assert (trainer.logits(tokens) - before).abs().max() < 1e-5


def test_add_splits_the_most_responsible_child_with_its_subtree(make):
    trainer = shake(make())
    trainer.train(3)
    set_mean(trainer, b1=1.0, b2=2.0)
    arena, tree = trainer.arena, trainer.tree
    old = arena.read_lane(0).tensors
    new = trainer.add_agent(0)
    assert new == 7 and trainer.tree is not tree
    tree = trainer.tree
    copied = dict(zip(tree.subtree(tree.slot_of(2)), tree.subtree(tree.slot_of(7)), strict=True))
    assert [tree.blocks[s].id for s in copied.values()] == [7, 8, 9]
    for source, copy in copied.items():
        for name in ("weight", "first", "second", "count", "mean_responsibility"):
            assert torch.equal(arena[name][0, copy], old[name][source])
        assert arena["born"][0, copy] == 3
        assert arena["visits"][0, copy] == arena["updates"][0, copy] == 0, "records are its own"
    both = [tree.slot_of(2), tree.slot_of(7)]
    half = old["log_prior"][both[0]] - torch.log(torch.tensor(2.0))
    torch.testing.assert_close(arena["log_prior"][0, both], half.expand(2))


def test_split_counts_go_by_recency_and_none_is_lost(make):
    trainer = shake(make())
    set_mean(trainer, b1=1.0)
    before = counts(trainer)
    assert all(before[i][age].any() for i in (1, 3, 4) for age in range(3))
    trainer.add_agent(0)
    now = counts(trainer)
    for old, new in ((1, 7), (3, 8), (4, 9)):
        assert torch.equal(now[old] + now[new], before[old])
        assert torch.equal(now[old][0], before[old][0]) and not now[old][1:].any()
        assert torch.equal(now[new][1:], before[old][1:]) and not now[new][0].any()
    for other in (2, 5, 6):
        assert torch.equal(now[other], before[other])
    assert sum(c.sum() for c in now.values()) == sum(c.sum() for c in before.values())


@pytest.mark.parametrize("router", ROUTERS)
def test_delete_renormalises_the_siblings(make, router):
    trainer = shake(make(model={"router": router, "branching": (3, 2)}))
    batch = next_batch(trainer)
    text = read_text(batch, trainer.config)

    def routing():
        done = trainer.engine.gradients(0, 1, batch, text)[3]
        return done.share[1][0]

    before = routing()
    torch.testing.assert_close(before.sum(0), torch.ones_like(before[0]))
    three = [trainer.tree.slot_of(i) for i in (1, 2, 3)]
    weight_before = float(torch.logsumexp(trainer.arena["log_prior"][0, three], 0))
    trainer.delete_agent(2)
    after = routing()
    torch.testing.assert_close(after.sum(0), torch.ones_like(after[0]))
    prior = trainer.arena["log_prior"][0]
    left = [trainer.tree.slot_of(i) for i in (1, 3)]
    mass = torch.logsumexp(prior[left], 0)
    assert float(mass) == pytest.approx(weight_before, rel=1e-5), "the heir takes the prior weight"
    if router == "mean":
        expected = torch.softmax(prior[left], 0)
        torch.testing.assert_close(after[[0, 2], 0], expected, rtol=1e-4, atol=0)
    assert not after[1].any()


@pytest.mark.parametrize("likes", [1, 3])
def test_deleted_counts_go_to_the_sibling_that_is_most_like_it(make, likes):
    trainer = make(model={"branching": (3, 2)})
    evidence, config = trainer.arena["evidence"][0], trainer.config.evidence
    a, b = list(b"abcdefgh" * 30), list(b"hagbfced" * 30)
    for block, text in ((1, a if likes == 1 else b), (2, a), (3, a if likes == 3 else b)):
        evidence[trainer.tree.slot_of(block)] = count_text(text, config)
        evidence[trainer.tree.slot_of(block), 0] = count_text(text[:40], config)[2]
    before = counts(trainer)
    trainer.delete_agent(2)
    now = counts(trainer)
    assert torch.equal(now[likes], before[likes] + before[2])  # age by age
    assert torch.equal(now[4 - likes], before[4 - likes])


def test_deleting_the_last_child_makes_a_leaf(make):
    trainer = shake(make())
    trainer.delete_agent(3)
    slot = trainer.tree.slot_of(1)
    assert not trainer.tree.is_leaf(slot)
    trainer.delete_agent(4)
    assert trainer.tree.is_leaf(slot)
    trainer.arena["mean_responsibility"][0, slot] = 9
    trainer.arena.set_hyper(0, "top_k", 5)
    paths = [path for _ in range(8) for path in trainer.step().path]
    assert any(path == (0, 1) for path in paths)


def test_ids_and_names_are_never_reused(make):
    trainer = make(model={"branching": (4, 3, 2)})
    tree = trainer.tree
    assert tree.name(0) == "Root"
    assert tree.name(tree.slot_of(28)) == "Node 2 / Agent 6 / Sub-Agent 12"
    assert tree.name(tree.slot_of(10), short=True) == "Agent 6"
    seen = {b.id for b in tree.blocks.values()}
    names = {tree.name(s, short=True) for s in tree.blocks}
    trainer.delete_agent(28)
    for _ in range(5):
        new = trainer.add_agent(10)
        name = trainer.tree.name(trainer.tree.slot_of(new), short=True)
        assert new not in seen and name not in names
        seen.add(new)
        names.add(name)
        trainer.delete_agent(new)
    new = trainer.add_agent(10)
    assert trainer.tree.name(trainer.tree.slot_of(new)).endswith("Agent 6 / Sub-Agent 30")
    deep = trainer.add_agent(26)
    assert trainer.tree.name(trainer.tree.slot_of(deep), short=True) == "Level-4 Agent 1"


def full_level(trainer):
    for parent in (1, 2):
        trainer.add_agent(parent)
    return 1


def wide(trainer):
    for parent in (3, 3, 3, 3):
        trainer.add_agent(parent)
    return 3


def deepest(trainer):
    return trainer.add_agent(3)


def no_room_for_a_subtree(trainer):
    trainer.add_agent(1)  # one free slot is left on level 2, and a node has two or three agents
    return 0


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (full_level, "no free slot"),
        (wide, "max_children|children"),
        (deepest, "depth"),
        (no_room_for_a_subtree, "does not fit"),
        (lambda trainer: 77, "no living block"),
    ],
)
def test_no_room_is_an_error_and_nothing_changes(make, prepare, reason):
    trainer = shake(make())
    parent = prepare(trainer)
    trainer.train(1)
    before, tree = trainer.state_hash(), trainer.tree.to_dict()
    with pytest.raises(TopologyError, match=reason):
        trainer.add_agent(parent)
    assert trainer.state_hash() == before and trainer.tree.to_dict() == tree


@pytest.mark.parametrize("block", [0, 77])
def test_what_cannot_be_deleted(make, block):
    trainer = shake(make())
    before = trainer.state_hash()
    with pytest.raises(TopologyError):
        trainer.delete_agent(block)
    assert trainer.state_hash() == before


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.99])
def test_prune_removes_the_least_responsible_leaves(make, fraction):
    trainer = shake(make(model={"branching": (3, 2, 1)}))
    tree, g = trainer.tree, torch.Generator().manual_seed(5)
    weight = {b.id: float(torch.rand((), generator=g)) for b in tree.blocks.values()}
    set_mean(trainer, **{f"b{i}": value for i, value in weight.items()})
    parent = {b.id: tree.blocks[b.parent].id for b in tree.blocks.values() if b.id}
    expected = []
    for _ in range(max(1, int(15 * fraction))):
        leaf = min((i for i in parent if i not in parent.values()), key=weight.__getitem__)
        expected.append(leaf)
        del parent[leaf]
    assert trainer.prune(fraction) == expected
    assert trainer.tree.agents == len(parent)
    assert {b.id for b in trainer.tree.blocks.values()} == {0, *parent}


def check_invariants(trainer):
    tree, arena = trainer.tree, trainer.arena
    by_parent = {}
    for slot, block in tree.blocks.items():
        assert block.slot == slot and block.id < tree.next_id
        start = tree.offset[block.level]
        assert start <= slot < start + tree.capacity[block.level]
        assert block.ordinal <= tree.born[block.level]
        if block.id == 0:
            assert slot == 0 and block.parent == -1
            continue
        assert tree.blocks[block.parent].level == block.level - 1
        assert 0 <= block.rank < tree.max_children
        by_parent.setdefault(block.parent, []).append(block.rank)
    assert all(len(set(ranks)) == len(ranks) for ranks in by_parent.values())
    ids = [b.id for b in tree.blocks.values()]
    names = [tree.name(s, short=True) for s in tree.blocks]
    assert len(set(ids)) == len(ids) and len(set(names)) == len(names)
    dead = [s for s in range(arena.scratch + 1) if s not in tree.blocks]
    for name, tensor in arena.state.items():
        if tensor.dim() > 1 and tensor.shape[1] == arena.scratch + 1:
            empty = NEVER if name in ("last_culprit", "last_update") else 0
            rows = [s for s in dead if s != arena.scratch]
            assert (tensor[0, rows] == empty).all(), name
    for slot in tree.blocks:  # no weight is left behind in a router's column without a child
        ranks = set(range(tree.max_children)) - set(by_parent.get(slot, []))
        for name in ("weight", "first", "second"):
            pieces = arena.block_layout.unpack(arena[name][0, slot])
            assert not pieces["router.weight"][:, sorted(ranks)].any()
    twin = Topology(tree.capacity, tree.max_children)
    twin.load_dict(tree.to_dict())
    assert twin.to_dict() == tree.to_dict() and twin.blocks == tree.blocks


@settings(max_examples=25, deadline=None)
@given(
    ops=st.lists(
        st.tuples(st.sampled_from(["add", "add", "add", "delete", "prune", "step"]),
                  st.integers(0, 10**6)),
        max_size=14,
    ),
    router=st.sampled_from(ROUTERS),
)  # fmt: skip
def test_any_sequence_of_edits_keeps_the_tree_sound(make, ops, router):
    trainer = shake(make(model={"router": router}, train={"batch": 1, "top_k": 4}))
    gone: set[int] = set()
    for op, number in ops:
        alive = sorted(b.id for b in trainer.tree.blocks.values())
        pick = alive[number % len(alive)]
        before, free = trainer.state_hash(), trainer.tree.slots - len(alive)
        try:
            if op == "add":
                reason = edits.why_not_add(trainer.arena, 0, trainer.tree.slot_of(pick))
                new = trainer.add_agent(pick)
                assert reason is None and new not in alive and new not in gone
            elif op == "delete":
                trainer.delete_agent(pick)
            elif op == "prune":
                count = len(trainer.prune((number % 50) / 100))
                asked = int((len(alive) - 1) * (number % 50) / 100)
                assert count == min(max(1, asked), len(alive) - 1)
            else:
                assert trainer.step().loss < 20
        except TopologyError:
            assert trainer.state_hash() == before
            assert op != "add" or reason is not None
            assert op == "add" or pick == 0
        now = {b.id for b in trainer.tree.blocks.values()}
        assert not now & gone
        gone |= set(alive) - now
        assert trainer.tree.slots - len(now) != free or op == "step" or trainer.state_hash()
        check_invariants(trainer)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_system_trains_on_after_edits(make, router):
    trainer = make_ragged(make(model={"router": router}))
    losses = [trainer.step().loss for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    check_invariants(trainer)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
def test_pruning_down_to_the_root_and_growing_again(make, router, mode):
    trainer = make(train={"cooldown": 3}, model={"router": router}, update={"mode": mode})
    for _ in range(8):
        trainer.prune(1.0)
    assert trainer.tree.agents == 0 and trainer.prune(0.5) == []
    report = trainer.step()
    assert report.path == (() if mode == "dense" else ((0,),))
    assert set(report.scales) == {0} and report.agents_updated == 0
    new = trainer.add_agent(0)
    assert any(new in trainer.step().scales for _ in range(5))
    check_invariants(trainer)
