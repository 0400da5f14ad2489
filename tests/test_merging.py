"""Merging siblings: what a split had parted is one again, and harm is measured on a copy."""

import pytest
import torch

from k1 import merging
from k1.edits import delete_agent
from k1.errors import TopologyError
from k1.merging import change, merge_agents
from tests.reference import next_batch, shake


def slots(trainer, *ids):
    return [trainer.tree.slot_of(i) for i in ids]


def windows(trainer):
    return {d: trainer.store.spread("validation", d, 4) for d in trainer.data.domains}


@pytest.mark.parametrize("router", ["mean", "learned", "evidence"])
def test_a_merge_undoes_a_split(make, router):
    trainer = shake(make(model={"router": router}))
    trainer.train(3)
    for block, value in ((1, 1.0), (2, 2.0)):
        trainer.arena["mean_responsibility"][0, trainer.tree.slot_of(block)] = value
    tokens = next_batch(trainer).inputs[0]
    before, old = trainer.logits(tokens), trainer.arena.read_lane(0).tensors
    new = trainer.add_agent(0)
    trainer.merge_agents(2, new)
    assert (trainer.logits(tokens) - before).abs().max() < 1e-5
    assert {b.id for b in trainer.tree.blocks.values()} == set(range(7))
    now = trainer.arena.read_lane(0).tensors
    assert torch.equal(now["evidence"], old["evidence"])
    for name in ("weight", "first", "second", "count"):
        torch.testing.assert_close(now[name], old[name])
    node = trainer.tree.slot_of(2)
    torch.testing.assert_close(now["log_prior"][node], old["log_prior"][node])
    trainer.train(2)


def test_weights_are_averaged_by_steps_and_statistics_add_up(make):
    trainer = shake(make())
    arena = trainer.arena
    kept, gone = slots(trainer, 3, 4)
    arena["count"][0, [kept, gone]] = torch.tensor([1, 3])
    arena["visits"][0, [kept, gone]] = torch.tensor([5, 7])
    arena["log_prior"][0, [kept, gone]] = torch.tensor([0.25, 0.5]).log()
    old = arena.read_lane(0).tensors
    merge_agents(arena, 0, kept, gone)
    now = arena.read_lane(0).tensors
    mean = 0.25 * old["weight"][kept] + 0.75 * old["weight"][gone]
    torch.testing.assert_close(now["weight"][kept], mean)
    assert torch.equal(now["evidence"][kept], old["evidence"][[kept, gone]].sum(0))
    assert now["visits"][kept] == 12 and now["count"][kept] == 3
    assert float(now["log_prior"][kept].exp()) == pytest.approx(0.75)
    assert not now["weight"][gone].any() and not now["evidence"][gone].any()
    rank = trainer.tree.blocks[kept].rank
    parent = trainer.tree.slot_of(1)
    columns = arena.block_layout.unpack(old["weight"][parent])["router.bias"]
    merged = arena.block_layout.unpack(now["weight"][parent])["router.bias"]
    assert float(merged[rank]) == pytest.approx(float(columns[0] + 2 * columns[1]) / 3, rel=1e-4)
    assert not merged[1:].any()


def test_routing_weight_goes_to_the_merged_block_alone(make):
    trainer = shake(make(model={"branching": (3, 2), "router": "mean"}))
    arena = trainer.arena
    a, b, other = slots(trainer, 1, 2, 3)
    before = torch.softmax(arena["log_prior"][0, [a, b, other]], 0)
    kids = {s: trainer.tree.children(s) for s in (a, b)}
    inside = {s: torch.softmax(arena["log_prior"][0, kids[s]], 0) for s in (a, b)}
    merge_agents(arena, 0, a, b)
    after = torch.softmax(arena["log_prior"][0, [a, other]], 0)
    torch.testing.assert_close(after, torch.stack([before[0] + before[1], before[2]]))
    share = before[:2] / before[:2].sum()
    expected = share[0] * inside[a] + share[1] * inside[b]
    found = torch.softmax(arena["log_prior"][0, kids[a]], 0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kept", "gone", "reason"),
    [(0, 1, "no agent"), (1, 1, "no siblings"), (3, 5, "no siblings"), (1, 2, "different shapes")],
)
def test_what_cannot_be_merged(make, kept, gone, reason):
    trainer = shake(make())
    trainer.delete_agent(4)
    before = trainer.state_hash()
    with pytest.raises(TopologyError, match=reason):
        trainer.merge_agents(kept, gone)
    assert trainer.state_hash() == before
    assert merging.why_not_merge(trainer.tree, *slots(trainer, 5, 6)) is None


def test_harm_is_measured_on_a_copy(make):
    trainer = shake(make())
    trainer.train(4)
    before, on = trainer.state_hash(), windows(trainer)
    kept, gone = slots(trainer, 3, 4)
    found = change(trainer.engine, 0, lambda a, lane: merge_agents(a, lane, kept, gone), on)
    assert trainer.state_hash() == before
    for domain, batch in on.items():
        bits = float(trainer.engine.bits_per_byte(0, 1, batch)[0])
        assert found.before[domain] == pytest.approx(bits, rel=1e-6)
    merge_agents(trainer.arena, 0, kept, gone)
    after = {d: float(trainer.engine.bits_per_byte(0, 1, b)[0]) for d, b in on.items()}
    assert found.after == pytest.approx(after, rel=1e-6)
    assert found.harm["alpha"] == pytest.approx(after["alpha"] - found.before["alpha"])
    assert max(map(abs, found.harm.values())) > 1e-4


def test_a_twin_costs_nothing_to_merge(make):
    trainer = shake(make(model={"router": "learned"}))
    new = trainer.add_agent(0)
    (fresh,) = slots(trainer, new)
    weight = trainer.arena["weight"][0]
    (twin,) = (s for s in slots(trainer, 1, 2) if torch.equal(weight[s, :99], weight[fresh, :99]))
    on = windows(trainer)
    merged = change(trainer.engine, 0, lambda a, lane: merge_agents(a, lane, twin, fresh), on)
    deleted = change(trainer.engine, 0, lambda a, lane: delete_agent(a, lane, twin), on)
    assert max(map(abs, merged.harm.values())) < 1e-5
    assert max(map(abs, deleted.harm.values())) > 1e-4, "its routing weight goes to another"
