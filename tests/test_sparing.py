"""Trust in an agent's updates, and what it costs to spare a leaf."""

import pytest
import torch

from k1.arena import Arena
from k1.config import Config
from k1.engine import Engine
from k1.sampling import TokenStore
from k1.specialisation import sparing as module
from k1.specialisation.sparing import sparing
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
    trainer = shake(make(model={"branching": (2, 3)}))
    trainer.train(6)
    before, on = trainer.state_hash(), windows_of(trainer)
    found = sparing(trainer.engine, 0, on, 4)
    assert trainer.state_hash() == before
    tree = trainer.tree
    leaves = [s for s in sorted(tree.blocks) if s and tree.is_leaf(s)]
    assert [leaf.leaf for leaf in found] == [tree.name(s) for s in leaves]
    bits = {d: float(trainer.engine.bits_per_byte(0, 1, w)[0]) for d, w in on.items()}

    def lost(twin):
        now = {d: float(twin.engine.bits_per_byte(0, 1, w)[0]) for d, w in on.items()}
        return {d: now[d] - bits[d] for d in on}

    visited = trainer.arena["visits"][0].tolist()
    assert visited != trainer.arena["updates"][0].tolist(), (
        "else they could be taken for each other"
    )
    heirs = []
    for leaf, slot in zip(found, leaves, strict=True):
        twin, counts = trainer.fork(), trainer.arena["evidence"][0]
        twin.delete_agent(tree.blocks[slot].id)
        assert leaf.deleted == lost(twin)
        siblings = [s for s in tree.children(tree.blocks[slot].parent) if s != slot]
        (into,) = [s for s in siblings if not twin.arena["evidence"][0, s].equal(counts[s])]
        heirs.append(siblings.index(into))
        twin = trainer.fork()
        twin.merge_agents(tree.blocks[into].id, tree.blocks[slot].id)
        assert leaf.merged == lost(twin)
        assert leaf.signals["responsibility"] == trainer.arena["mean_responsibility"][0, slot]
        assert leaf.signals["updates"] == trainer.arena["updates"][0, slot]
    assert set(heirs) == {0, 1}, "else it could be just any sibling"
    assert any(abs(x) > 1e-4 for leaf in found for x in leaf.deleted.values())


def test_trust_is_in_calm_training_on_all_domains_alike(make, monkeypatch):
    trainer = make()
    trainer.arena.set_mix(0, (1.0, 0.0, 0.0))
    trainer.train(2)
    seen = []

    def measured(engine, lane, steps):
        arena = engine.arena
        seen.append((steps, arena["mix"][lane].tolist(), float(arena["lr_factor"][lane])))
        slots = [s for s in arena.trees[lane].blocks if s]
        return {slot: Trust(1, 3) if slot % 2 else Trust(0, 0) for slot in slots}

    monkeypatch.setattr(module, "trust", measured)
    found = sparing(trainer.engine, 0, windows_of(trainer), 7)
    assert seen == [(7, [pytest.approx(1 / 3)] * 3, pytest.approx(0.1))]
    leaves = [s for s in sorted(trainer.tree.blocks) if s and trainer.tree.is_leaf(s)]
    assert [leaf.signals["trust"] for leaf in found] == [0.4 if s % 2 else None for s in leaves]


def test_any_lane_can_be_asked(data):
    config, device = Config.preset("tiny"), torch.device("cpu")
    arena = Arena(config, data.vocab_size, len(data.domains), 2, device)
    engine = Engine(arena, TokenStore(data, config.model.context, device))
    for lane in (0, 1):
        arena.reset_lane(lane, 5 + lane)
    engine.train(0, 2, 4)
    on = {d: engine.store.spread("validation", d, 4) for d in data.domains}
    found = [sparing(engine, lane, on, 3) for lane in (0, 1)]
    assert found[0] != found[1]
    arena.copy_lane(1, 0)
    assert sparing(engine, 0, on, 3) == found[1]


def test_what_no_sibling_of_its_shape_inherits_cannot_be_merged(make):
    alone = make(model={"branching": (2, 1)})
    assert [leaf.merged for leaf in sparing(alone.engine, 0, windows_of(alone), 1)] == [None] * 2
    trainer = make()
    grown = trainer.add_agent(3)
    found = {leaf.leaf: leaf.merged for leaf in sparing(trainer.engine, 0, windows_of(trainer), 1)}
    tree = trainer.tree
    without = {tree.name(tree.slot_of(grown)), tree.name(tree.slot_of(4))}
    assert {name for name, merged in found.items() if merged is None} == without
