"""Trust in an agent's updates, and what it costs to spare a leaf."""

from k1.specialisation.sparing import CALM, sparing
from k1.specialisation.trust import Trust, trust
from tests.reference import shake


def windows_of(trainer, count=4):
    return {d: trainer.store.spread("validation", d, count) for d in trainer.data.domains}


# -- trust ----------------------------------------------------------------------------------------


def test_trust_counts_the_updates_that_help_unseen_text(make):
    trainer = make(train={"lr": 3e-3}, update={"probe_fraction": 1.0})
    before = trainer.state_hash()
    found = trust(trainer.engine, 0, 12)
    assert trainer.state_hash() == before
    assert set(found) == {s for s in trainer.tree.blocks if s}
    twin = trainer.fork()
    counted = dict.fromkeys(found, (0, 0))
    for _ in range(12):
        a = twin.arena
        probe = twin.store.sample("train", a["data_seed"], a["data_cursor"] + 1, a["mix"], 4)
        bits_before = float(twin.engine.bits_per_byte(0, 1, probe)[0])
        report = twin.step()
        good = float(twin.engine.bits_per_byte(0, 1, probe)[0]) < bits_before
        for block in set(report.scales) - {0}:
            slot = twin.tree.slot_of(block)
            helped, updates = counted[slot]
            counted[slot] = (helped + good, updates + 1)
    assert {s: (t.helped, t.updates) for s, t in found.items()} == counted
    assert sum(t.helped for t in found.values()) > 0.6 * sum(t.updates for t in found.values())
    assert Trust(0, 0).value == 0.5 and Trust(3, 3).value == 0.8


def test_updates_that_wreck_are_not_trusted(make):
    found = trust(make(train={"lr": 3.0}).engine, 0, 10)
    assert sum(t.helped for t in found.values()) < 0.5 * sum(t.updates for t in found.values())


# -- leaves to spare ------------------------------------------------------------------------------


def test_what_a_leaf_is_worth_is_measured_on_copies(make):
    trainer = shake(make())
    trainer.train(6)
    before, on = trainer.state_hash(), windows_of(trainer)
    found = sparing(trainer.engine, 0, on, 4)
    assert trainer.state_hash() == before
    tree = trainer.tree
    leaves = [s for s in sorted(tree.blocks) if s and tree.is_leaf(s)]
    assert [leaf.leaf for leaf in found] == [tree.name(s) for s in leaves]

    def lost(edit):
        twin = trainer.fork()
        edit(twin)
        now, then = (
            {d: float(e.bits_per_byte(0, 1, w)[0]) for d, w in on.items()}
            for e in (twin.engine, trainer.engine)
        )
        return {d: now[d] - then[d] for d in on}

    calm = trainer.fork()
    calm.arena.set_mix(0, (1 / 3,) * 3)
    calm.arena["lr_factor"][0] = CALM
    trusted = trust(calm.engine, 0, 4)
    for leaf, slot in zip(found, leaves, strict=True):
        block = tree.blocks[slot]
        (sibling,) = [s for s in tree.children(block.parent) if s != slot]
        assert leaf.deleted == lost(lambda twin, b=block: twin.delete_agent(b.id))
        assert leaf.merged == lost(
            lambda twin, b=block, s=sibling: twin.merge_agents(tree.blocks[s].id, b.id)
        )
        assert leaf.signals == {
            "responsibility": float(trainer.arena["mean_responsibility"][0, slot]),
            "updates": float(trainer.arena["updates"][0, slot]),
            "trust": trusted[slot].value,
        }
    assert any(abs(x) > 1e-4 for leaf in found for x in leaf.deleted.values())
    assert any(leaf.deleted != leaf.merged for leaf in found)


def test_an_only_child_cannot_be_merged(make):
    trainer = make(model={"branching": (2, 1)})
    found = sparing(trainer.engine, 0, windows_of(trainer), 1)
    assert len(found) == 2 and all(leaf.merged is None for leaf in found)
