"""Versions of what has moved: nothing is overwritten, and text finds its own by Bayes' rule."""

import math
from dataclasses import replace

import pytest
import torch

from k1.attribution import responsibilities
from k1.config import EvidenceConfig
from k1.evidence import hash_bigrams, history_mask
from k1.experiments.inferred import believed
from k1.experiments.learner import Learner
from k1.experiments.ngrams import hash_ngrams, tables_for
from k1.experiments.plans import Experiment
from k1.experiments.reading import Passages
from k1.experiments.runner import phase_steps
from k1.experiments.stream import views
from k1.experiments.tree_learners import MaskedEngine
from k1.experiments.versions import VersionsLearner, posterior
from k1.flops import step_flops
from k1.forward import Batch
from tests.experiment_helpers import Build, go, rows_of
from tests.reference import same_bits

STEPS = 12


@pytest.fixture
def learn(data) -> Build:
    return Build(data)


# -- who is believed -----------------------------------------------------------------------------


def test_the_posterior_is_that_of_bayes_rule_document_by_document():
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(3, 2, 4, 9, generator=generator, dtype=torch.float64)
    starts = torch.rand(4, 9, generator=generator) < 0.2
    valid = ~starts & (torch.arange(9) > 0)
    found = posterior(ratios, valid, starts, tau=0.5)
    for lane in range(2):
        for text in range(4):
            odds = [1.0] * 3
            for t in range(9):
                if starts[text, t]:
                    odds = [1.0] * 3
                if valid[text, t]:
                    now = ratios[:, lane, text, t].tolist()
                    odds = [o * math.exp(0.5 * x) for o, x in zip(odds, now, strict=True)]
                expected = [o / sum(odds) for o in odds]
                assert found[:, lane, text, t].exp().tolist() == pytest.approx(expected)


def test_alike_versions_are_mixed_evenly(learn):
    learner = go(learn("k1-versions"), 2, STEPS)
    learner.counts[1] = learner.counts[0]
    passages = views(learner.store, "validation", 6, 3).passages["alpha"]
    texts, windows, time = passages.inputs.shape
    nats = torch.rand(2, 1, texts, windows * time, generator=torch.Generator().manual_seed(0))
    mixed = learner.believer(0, 1)(nats, passages)
    assert torch.allclose(mixed, -nats.double().neg().exp().mean(0).log())


@pytest.mark.parametrize("name", ["k1-versions", "vary-unigrams", "vary-trigrams"])
def test_text_finds_its_version(learn, name):
    learner = go(learn(name), 2, STEPS)
    seen = views(learner.store, "validation", 6, 3)
    right = [learner.measure(seen, view)[0] for view in ("windows", "passages")]
    learner.counts.reverse()  # each is taken for the other
    wrong = [learner.measure(seen, view)[0] for view in ("windows", "passages")]
    for found, mistaken in zip(right, wrong, strict=True):
        assert sum(found[:2]) < sum(mistaken[:2])


def texts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (3, 40), generator=generator)
    return tokens, torch.rand(3, 40, generator=generator) < 0.15


def test_bigrams_are_hashed_as_the_routers_hash_them():
    tokens, starts = texts()
    config = EvidenceConfig()
    bucket, context, valid = hash_ngrams(tokens, starts, 2, tables_for(2, config))
    wanted = hash_bigrams(tokens[None], config)
    assert torch.equal(bucket, wanted[0][0]) and torch.equal(context, wanted[1][0])
    mask = history_mask(starts[None])[0].diagonal(dim1=-2, dim2=-1) > 0
    assert torch.equal(valid, mask)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngrams_are_told_apart_by_their_tokens_and_stay_in_the_document(order):
    tokens, starts = texts()
    bucket, context, valid = hash_ngrams(tokens, starts, order, tables_for(3, EvidenceConfig()))
    seen: dict[tuple[int, ...], tuple[int, int]] = {}
    for text in range(3):
        begun = 0
        for t in range(40):
            begun = t if starts[text, t] else begun
            assert bool(valid[text, t]) == (t > begun and t - order + 1 >= begun)
            if valid[text, t]:
                gram = tuple(tokens[text, t - order + 1 : t + 1].tolist())
                found = (int(bucket[text, t]), int(context[text, t]))
                assert seen.setdefault(gram, found) == found
    contexts = {gram[:-1]: found[1] for gram, found in seen.items()}
    assert len({found for found in seen.values()}) == len(seen) > 4
    assert len(set(contexts.values())) == len(contexts)


@pytest.mark.parametrize("name", ["k1-versions", "k1-versions-loss", "vary-trigrams"])
def test_a_prediction_rests_on_nothing_that_comes_after(learn, name):
    learner = go(learn(name), 3, STEPS)
    text = views(learner.store, "validation", 6, 3).passages["beta"]
    before, (documents, windows, time) = predicted(learner, text), text.inputs.shape
    for cut in (5, time - 1, time, 2 * time + 1):
        inputs, targets = text.inputs.flatten(1).clone(), text.targets.flatten(1).clone()
        inputs[:, cut:] = (inputs[:, cut:] + 1) % 256
        targets[:, cut - 1 :] = (targets[:, cut - 1 :] + 1) % 256
        after = predicted(
            learner,
            replace(
                text, inputs=inputs.view_as(text.inputs), targets=targets.view_as(text.targets)
            ),
        )
        assert same_bits(before[..., : cut - 1], after[..., : cut - 1])
        assert not torch.equal(before[..., cut:], after[..., cut:])
    assert before.shape == (1, documents, windows * time)


@torch.no_grad()
def predicted(learner: VersionsLearner, text: Passages) -> torch.Tensor:
    """Losses of all tokens of some passages, [L, D, N]."""
    parts = (t.flatten(0, 1)[None] for t in (text.inputs, text.targets, text.starts))
    inputs, targets, starts = parts
    nats = learner.reading(0, 1)(Batch(inputs, targets, starts, inputs[..., 0]))
    documents, windows, time = text.inputs.shape
    return learner.believer(0, 1)(nats.unflatten(2, (documents, windows * time)), text)


def test_by_loss_or_by_bigrams_is_not_the_same(learn):
    found = []
    for name in ("k1-versions", "k1-versions-loss"):
        learner = go(learn(name), 2, STEPS)
        text = views(learner.store, "validation", 6, 3).passages["beta"]
        documents, windows, time = text.inputs.shape
        generator = torch.Generator().manual_seed(0)
        nats = torch.rand(2, 1, documents, windows * time, generator=generator)
        found.append(learner.believer(0, 1)(nats, text))
        starts = text.starts.flatten(1)
    assert same_bits(found[1], believed(nats, starts)) and not torch.equal(*found)


# -- nothing is overwritten ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["k1-versions", "k1-versions-free", "dense-versions", "chain-versions"]
)
def test_earlier_versions_stay_as_they_were(learn, name):
    learner = learn(name, runs=2)
    batch = learner.store.spread("validation", "beta", 4)
    wanted = []
    for phase in range(3):
        learner.begin(phase)
        learner.train(0, STEPS, STEPS)
        learner.end()
        with torch.no_grad():
            found = learner.reading(0, 2)(batch.map(lambda t: t.expand(2, -1, *t.shape[2:])))
        assert len(found) == phase + 1
        for version, losses in enumerate(wanted):
            assert same_bits(found[version], losses)
        assert not torch.equal(found[-1], found[0]) or not phase
        wanted = list(found)


def test_a_later_domain_moves_one_path_and_what_all_share(learn):
    learner = go(learn("k1-versions"), 1, STEPS)
    tree = learner.arena.trees[0]
    before, shared = rows_of(learner), learner.arena["shared"].clone()
    learner.begin(1)
    assert isinstance(learner.engine, MaskedEngine)
    learner.train(0, STEPS, STEPS)
    learner.end()
    moved = {slot for slot, row in rows_of(learner).items() if not same_bits(row, before[slot])}
    leaves = [slot for slot in moved if tree.is_leaf(slot)]
    assert len(leaves) == 1 and moved == {0, *tree.path(leaves[0])}
    assert not torch.equal(learner.arena["shared"], shared)
    a = learner.arena
    grown = len(moved) * a.block_layout.total + a.shared_layout.total
    assert learner.parameters(0) == Learner.parameters(learner, 0) + grown


def test_the_path_is_the_one_that_answers_for_the_new_text(learn):
    learner = go(learn("k1-versions"), 1, STEPS)
    learner.traced = 1
    learner.begin(1)
    (batch, text), tree = learner._draw(0, 1, 0), learner.arena.trees[0]
    levels = learner.arena.index(0, 1)
    _, grads, _, _ = learner.engine.gradients(0, 1, batch, text)
    norms = responsibilities(grads, levels, learner.arena.scratch + 1)[0]
    place, expected = 0, [0]
    while not tree.is_leaf(place):
        place = max(tree.children(place), key=lambda slot: float(norms[slot]))
        expected.append(place)
    assert learner.engine.open[0].nonzero()[:, 0].tolist() == sorted(expected)


def test_separate_versions_begin_fresh_and_are_counted_whole(learn):
    learner = go(learn("separate-versions"), 1, STEPS)
    first = rows_of(learner)
    learner.begin(1)
    assert not same_bits(rows_of(learner)[1], first[1])
    learner.train(0, STEPS, STEPS)
    learner.end()
    assert learner.parameters(0) == 2 * Learner.parameters(learner, 0)
    assert isinstance(learner, VersionsLearner) and len(learner.kept) == 2


def test_a_chain_is_one_path_of_the_tree(learn):
    learner, whole = learn("chain-versions"), learn("dense-versions")
    tree = learner.arena.trees[0]
    assert len(tree.blocks) == 1 + len(whole.arena.config.model.branching)
    assert all(len(tree.children(slot)) == 1 - tree.is_leaf(slot) for slot in tree.blocks)
    assert learner.step_flops() < whole.step_flops()
    config = learner.arena.config
    assert config.train == whole.arena.config.train
    assert config.update == whole.arena.config.update


def test_tracing_is_paid_for(learn):
    learner, free = go(learn("k1-versions"), 1, STEPS), go(learn("k1-versions-free"), 1, STEPS)
    assert learner.flops == free.flops
    a, before = learner.arena, learner.flops[0]
    dense = a.config.replace(update={"mode": "dense"})
    each = step_flops(dense, a.vocab_size, len(a.trees[0].blocks), 0)
    learner.begin(1)
    free.begin(1)
    assert learner.flops[0] - before == pytest.approx(16 * each) and free.flops[0] == before


def test_a_chain_makes_more_steps_for_the_flops_of_the_whole_tree(learn):
    plan = Experiment("short", "for tests", ("dense",), steps=100)
    whole, chain = learn("dense-versions"), learn("chain-versions")
    assert phase_steps(whole, plan) == 100
    ratio = whole.step_flops() / chain.step_flops()
    assert ratio > 1.5 and phase_steps(chain, plan) == round(100 * ratio)
