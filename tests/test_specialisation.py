"""Specialists among agents: statistics with closed forms, and measures held against plain loops."""

import json
import math
from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch

from k1.data import POOLS
from k1.errors import TopologyError
from k1.experiments.nulls import documents_of, same_domain
from k1.experiments.reading import Passages, cut_passages
from k1.specialisation import information as info
from k1.specialisation.ablation import bits, harm, without
from k1.specialisation.agents import study
from k1.specialisation.names import NOTHING, kind_of, nicknames, typical
from k1.specialisation.ngrams import BigramClassifier, path_ratios, reasons
from k1.specialisation.observe import by_level, each_window, observe, trace
from tests.reference import Reference, count_text, loop_evidence, next_batch, shake


def windows_of(trainer, count=4, pool="validation"):
    return {d: trainer.store.spread(pool, d, count) for d in trainer.data.domains}


def taught(make, **sections):
    """A trainer with three nodes, each of which has counted one domain."""
    trainer = make(model={"branching": (3,)}, **sections)
    for number, domain in enumerate(trainer.data.domains):
        slot = trainer.tree.slot_of(number + 1)
        tokens = trainer.data.tokens(domain, "train").tolist()[:8000]
        trainer.arena["evidence"][0, slot] = count_text(tokens, trainer.config.evidence)
    return trainer


# -- statistics -----------------------------------------------------------------------------------


def test_shares_count_domains_alike_however_many_windows_they_have():
    weight = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.3, 0.7]])
    shares = info.domain_shares(weight, np.array([0, 0, 0, 1]), 2)
    np.testing.assert_allclose(shares, [[0.75, 0.25], [0.125, 0.875]])
    idle = info.domain_shares(np.zeros((2, 1)), np.array([0, 1]), 2)
    np.testing.assert_allclose(idle, [[0.5, 0.5]])


def test_entropy_and_information_have_their_closed_forms():
    nats = math.log2(math.e)
    assert info.entropy(np.array([4.0, 4.0, 0.0]), corrected=False) == 1.0
    assert info.entropy(np.array([4.0, 4.0, 0.0])) == pytest.approx(1 + nats / 16)
    even, apart = np.full((2, 3), 5.0), np.eye(3) * 4
    assert info.mutual_information(even, corrected=False) == pytest.approx(0)
    assert info.mutual_information(even) == pytest.approx(-1 * 2 / (2 * 30) * nats)
    assert info.mutual_information(apart, corrected=False) == pytest.approx(math.log2(3))
    np.testing.assert_array_equal(
        info.contingency(np.array([0, 1, 1]), np.array([2, 0, 0]), 2, 3), [[0, 0, 1], [2, 0, 0]]
    )


def test_the_correction_takes_the_bias_off():
    rng = np.random.default_rng(0)
    tables = [
        info.contingency(rng.integers(0, 4, 200), rng.integers(0, 3, 200), 4, 3) for _ in range(300)
    ]
    plain, corrected = (
        np.mean([info.mutual_information(t, c) for t in tables]) for c in (False, True)
    )
    assert plain == pytest.approx(3 * 2 / 400 * math.log2(math.e), rel=0.1)
    assert abs(corrected) < plain / 8


def test_permutations_give_exact_p_values():
    label = np.repeat([0, 1], 20)
    sure = info.permutation_test(lambda x: float((x == label).mean()), label, draws=99)
    assert sure.p == 0.01 and sure.value == 1.0 and sure.null_mean == pytest.approx(0.5, abs=0.05)
    assert info.permutation_test(lambda x: 1.0, label, draws=99).p == 1.0


def test_agents_that_know_nothing_are_not_specialists_however_many():
    p = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weight = rng.dirichlet(np.full(12, 0.3), 60)
        found = info.information(weight, rng.integers(0, 3, 60), 3, draws=99)
        assert found.top_share.value > 0.4, "the largest of many shares is large by chance"
        p += [found.bits.p, found.top_share.p]
    assert 0.3 < np.mean(p) < 0.7 and np.mean(np.array(p) <= 0.05) < 0.2


def test_windows_of_one_document_are_no_independent_witnesses():
    """Leaves that tell documents apart, but not domains, tell nothing about domains."""
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(24), 8)
    label, sure = (np.arange(24) % 3)[document], 0
    alone = np.zeros(40, dtype=bool)
    for trial in range(40):
        weight = np.eye(4)[rng.integers(0, 4, 24)[document]]
        sure += info.information(weight, label, 3, 199, document).bits.p < 0.05
        alone[trial] = info.information(weight, label, 3, 99).bits.p < 0.05
    assert sure <= 5 < 20 < alone.sum()
    weight = np.eye(3)[label]
    assert info.information(weight, label, 3, 199, document).bits.p == 1 / 200
    by_chance = rng.permutation(24)[document]
    told = info.routing_accuracy(by_chance, label, 24, 3, document)
    assert told < 0.5 < info.routing_accuracy(by_chance, label, 24, 3)


def test_agents_that_know_are_found():
    label = np.arange(60) % 3
    weight = 0.2 + 0.4 * np.eye(3)[label]
    found = info.information(weight[:, [1, 0, 2]], label, 3, draws=199)
    assert found.bits.p == found.top_share.p == 1 / 200
    assert found.bits.value == pytest.approx(math.log2(3), abs=0.05)
    assert found.top_share.value == pytest.approx(0.6)
    assert {0: 1, 1: 0, 2: 2}[found.top_agent] == found.top_domain


def test_accuracy_is_judged_on_windows_that_it_was_not_learnt_from():
    label = np.arange(90) % 3
    assert info.routing_accuracy((label + 1) % 3, label, 3, 3) == 1.0
    own = info.routing_accuracy(np.arange(90), label, 90, 3)
    assert own == pytest.approx(1 / 3, abs=0.05), "an agent for every window has learnt nothing"


# -- observation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["mean", "learned", "evidence"])
def test_traces_equal_the_plain_implementation(make, router):
    trainer = shake(make(model={"router": router}))
    trainer.add_agent(6)
    trainer.delete_agent(3)
    trainer.delete_agent(4)  # leaves on three levels
    batch = next_batch(trainer, 1)
    found = trace(trainer.engine, 0, batch)
    plain, tree = Reference.of(trainer), trainer.tree
    norms = {
        i: math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        for i, grads in plain.gradients(batch).items()
    }
    tokens, starts = batch.inputs[0], batch.starts[0]
    x = plain.shared["embedding"][tokens] + plain.shared["position"][: tokens.shape[-1]]
    share = {0: torch.ones(tokens.shape)}
    ys = {0: plain.run_block(0, x)}
    for slot in sorted(tree.blocks):
        block = tree.blocks[slot].id
        kids = plain.children(block)
        weight = plain.routing(block, ys[block], tokens, starts) if kids else None
        for number, child in enumerate(kids):
            share[child] = share[block] * weight[..., number]
            ys[child] = plain.run_block(child, ys[block])
    for slot, block in tree.blocks.items():
        assert float(found.responsibility[slot]) == pytest.approx(norms[block.id], rel=2e-4)
        expected = float(share[block.id].detach().mean())
        assert float(found.routing[slot]) == pytest.approx(expected, rel=1e-4)
    assert float(found.nats.mean()) == pytest.approx(plain.value(batch), rel=1e-5)


def test_an_observation_has_a_row_for_each_window(make):
    trainer = shake(make())
    seen = observe(trainer.engine, 0, windows_of(trainer, 3))
    assert seen.label.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose(seen.leaves(seen.routing).sum(1), 1, rtol=1e-5)
    tree = trainer.tree
    level = np.array([tree.blocks[slot].level for slot in seen.slots])
    for one in (1, 2):
        np.testing.assert_allclose(seen.responsibility[:, level == one].sum(1), 1, rtol=1e-9)
    assert torch.equal(seen.tokens[3], trainer.store.spread("validation", "beta", 3).inputs[0, 0])
    assert not by_level(np.zeros((1, 6)), tree, seen.slots).any()


# -- ablation -------------------------------------------------------------------------------------


def test_in_documents_routing_goes_on_with_what_it_has_gathered(make):
    trainer = taught(make, evidence={"tau": 0.3})
    texts = {
        domain: cut_passages(trainer.store, "validation", domain, passages=3, length=3)
        for domain in trainer.data.domains
    }
    seen = observe(trainer.engine, trainer.lane, texts)
    windows = [goes_on for text in texts.values() for _, goes_on in each_window(text)]
    assert seen.document.tolist() == (np.cumsum(np.logical_not(windows)) - 1).tolist()
    assert len(seen.label) == len(windows) > len(set(seen.document.tolist()))
    after, alone = [], []
    row = 0
    for number, text in enumerate(texts.values()):
        own = list(seen.slots).index(trainer.tree.slot_of(number + 1))
        for batch, goes_on in each_window(text):
            found = trace(trainer.engine, trainer.lane, batch).routing[seen.slots[own]]
            if goes_on:
                after.append(seen.routing[row, own])
                alone.append(float(found))
            else:
                assert seen.routing[row, own] == pytest.approx(float(found))
            row += 1
    assert len(after) > 4 and np.mean(after) > np.mean(alone)

    # The losses of these windows are those of reading: the evidence is the same.
    domain = trainer.data.domains[0]
    text = texts[domain]
    full = Passages(*(t[:1] for t in (text.inputs, text.targets, text.starts, text.counts)))
    assert full.counts.all()
    nats, router, length = 0.0, None, 0.0
    for batch, _ in each_window(full):
        found = trace(trainer.engine, trainer.lane, batch, router)
        nats, router = nats + float(found.nats.double().sum()), found.router
        length += float(trainer.store.token_bytes[batch.targets].sum())
    whole = trainer.arena.forest(trainer.lane, trainer.lane + 1)
    expected = bits(trainer.engine, whole, {domain: full})[domain]
    assert nats / math.log(2) / length == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("router", ["mean", "learned"])
def test_removing_one_of_two_is_deleting_it(make, router):
    trainer = shake(make(model={"router": router}))
    before, on = trainer.state_hash(), windows_of(trainer)
    for block in (2, 5):
        slot, fork = trainer.tree.slot_of(block), trainer.fork()
        lost = harm(trainer.engine, 0, [slot], on)[slot]
        whole = bits(trainer.engine, trainer.arena.forest(0, 1), on)
        fork.delete_agent(block)
        after = bits(fork.engine, fork.arena.forest(0, 1), on)
        assert lost == pytest.approx({d: after[d] - whole[d] for d in on}, abs=1e-5)
        assert max(map(abs, lost.values())) > 1e-3
    assert trainer.state_hash() == before


def test_an_only_child_is_bypassed_as_if_it_had_never_been(make):
    trainer = shake(make(model={"branching": (2, 1, 2)}))
    block, on = 3, windows_of(trainer)
    slot, fork = trainer.tree.slot_of(block), trainer.fork()
    with pytest.raises(TopologyError, match="bypass it"):
        without(trainer.engine, 0, slot, "removed")
    found = bits(trainer.engine, without(trainer.engine, 0, slot, "bypassed"), on)
    fork.delete_agent(block)
    expected = bits(fork.engine, fork.arena.forest(0, 1), on)
    assert found == pytest.approx(expected, abs=1e-5)
    assert fork.state_hash() != trainer.state_hash()
    for wrong in (0, 99):
        with pytest.raises(TopologyError, match="no agent"):
            without(trainer.engine, 0, wrong, "removed")


# -- bigrams --------------------------------------------------------------------------------------


def test_the_classifier_is_naive_bayes_over_the_training_text(make, data):
    trainer = make()
    config = trainer.config.evidence
    found = BigramClassifier.fit(trainer.store, config)
    plain = [
        sum(
            count_text(data.tokenizer.encode(doc.text + "\n\n").tolist(), config, 1)[2]
            for doc in documents_of(data, domain, "train")[:-1]
        )
        for domain in data.domains
    ]
    last = [documents_of(data, domain, "train")[-1].text for domain in data.domains]
    for number, text in enumerate(last):
        plain[number] = plain[number] + count_text(list(text.encode()), config, 1)[2]
        assert torch.equal(found.counts[number].long(), plain[number])
    batch = trainer.store.spread("validation", "beta", 40)
    scores = found.scores(batch)
    for row in (0, 7):
        tokens, starts = batch.inputs[0, row].tolist(), batch.starts[0, row].tolist()
        if any(starts[1:]):
            continue
        loops = loop_evidence([c.tolist() for c in found.counts], tokens, starts, config)
        assert scores[row].tolist() == pytest.approx([r[-1] for r in loops], rel=1e-9)
    assert (found.classify(batch) == 1).mean() > 0.9


def test_reasons_add_up_to_the_evidence_and_name_the_bigrams(make):
    trainer = taught(make)
    batch = trainer.store.spread("validation", "beta", 1)
    tokens, starts = batch.inputs[0, 0].tolist(), batch.starts[0, 0].tolist()
    assert not any(starts[1:])
    tables = [
        (trainer.arena["evidence"][0, trainer.tree.slot_of(i)].sum(0) / 256).tolist()
        for i in (1, 2, 3)
    ]
    loops = loop_evidence(tables, tokens, starts, trainer.config.evidence)
    for child in (1, 2, 3):
        slot = trainer.tree.slot_of(child)
        spoke = reasons(trainer.arena, 0, slot, batch, most=99)
        total = path_ratios(trainer.arena, 0, slot, batch)[0].sum()
        assert float(total) == pytest.approx(loops[child - 1][-1], rel=1e-9)
        pairs = set(pairwise(tokens))
        assert {r.tokens for r in spoke} <= pairs and all(r.nats > 0 for r in spoke)
        assert [r.nats for r in spoke] == sorted((r.nats for r in spoke), reverse=True)
        row = [0.0, *loops[child - 1]]
        first = spoke[0] if spoke else None
        if first:
            steps = [
                row[t + 1] - row[t]
                for t in range(1, 16)
                if (tokens[t - 1], tokens[t]) == first.tokens
            ]
            assert first.nats == pytest.approx(sum(steps)) and first.times == len(steps)
    plain = make(model={"router": "learned"})
    assert reasons(plain.arena, 0, 1, batch) == []
    assert not path_ratios(plain.arena, 0, 1, batch)[0].any()


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("\n    ", "indented lines"), ("1872", "numbers"), ("__init__", "names with underscores"),
        ("():", "brackets and operators"), (",", "punctuation"), ("Warwick", "capitalised words"),
        ("the", "short words"), ("continuous", "long words"), ("church", "words"),
    ],
)  # fmt: skip
def test_every_word_has_a_kind(word, kind):
    assert kind_of(word) == kind


def test_typical_words_are_more_frequent_by_more_than_chance():
    own = Counter({"self": 60, "the": 100, "rare": 2})
    rest = Counter({"self": 5, "the": 100, "other": 60})
    (word,) = typical(own, rest, most=5)
    assert word.word == "self" and word.z > 4 and 3 < word.ratio < 14
    assert typical(own, own, most=5) == ()
    one = Counter({"data": 50.0})
    assert typical(one, Counter({"data": 0.0}), most=5) == (), "a word with no other has no odds"


def test_names_show_what_they_rest_on_and_nobody_gets_one_for_nothing():
    code = "\n    self.value = self.other(1)\n    return self.value" * 4
    prose = "The church was restored after a fire by the Earl of Warwick. " * 4
    texts = [code, prose] * 6
    weight = np.array([[0.9, 0.1], [0.1, 0.9]] * 6)
    coder, writer = nicknames(texts, weight)
    assert coder.name == "brackets and operators, words | self ⏎···· value"
    assert writer.name == "short words, capitalised words"
    assert {"self", "value"} <= {w.word for w in coder.words}
    assert {w.word for w in coder.words} & {w.word for w in writer.words} == set()
    assert [n.name for n in nicknames(texts, np.full((12, 2), 0.5))] == [NOTHING, NOTHING]


# -- the null, and the whole ----------------------------------------------------------------------


def test_the_same_domain_three_times_shares_its_documents_out(data):
    parts = same_domain(data, "beta")
    assert parts.domains == ("beta 1", "beta 2", "beta 3")
    for pool in POOLS:
        dealt = [documents_of(parts, domain, pool) for domain in parts.domains]
        assert sorted(d.text for part in dealt for d in part) == sorted(
            d.text for d in documents_of(data, "beta", pool)
        )
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_study_finds_the_specialists_that_there_are_and_no_others(make, data):
    trainer = taught(make)
    before, on = trainer.state_hash(), windows_of(trainer, 24)
    found = study(trainer.engine, 0, on, data.tokenizer, draws=199)
    assert trainer.state_hash() == before
    assert json.loads(json.dumps(asdict(found)))["windows"] == 72
    routing = found.information["routing"]
    assert routing.bits.p == routing.top_share.p == 1 / 200
    assert found.accuracy["routing"] > 0.8 and found.accuracy["bigrams"] > 0.8
    assert found.accuracy["chance"] == pytest.approx(1 / 3)
    for agent, domain in zip(found.agents, data.domains, strict=True):
        shares = agent.shares["routing"]
        assert max(shares, key=shares.__getitem__) == domain
        assert agent.ablation == "removed" and set(agent.harm) == set(data.domains)
    nothing = study(make(model={"branching": (3,)}).engine, 0, on, data.tokenizer, draws=99)
    assert nothing.information["routing"].bits.p == 1.0
    assert nothing.accuracy["routing"] < 0.5
    assert {agent.nickname.name for agent in nothing.agents} == {NOTHING}
