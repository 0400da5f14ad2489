"""Gradients that are changed for earlier domains' sake, against closed forms."""

import pytest
import torch

from k1.engine import Engine
from k1.experiments.constrained import (
    Parts,
    PathIntegralEngine,
    PenaltyEngine,
    fisher,
    project,
)
from k1.forward import Batch, read_text
from k1.rng import derive_seed
from k1.topology import ROOT_SLOT
from tests.experiment_helpers import Build, go, next_batch_of
from tests.reference import same_bits


@pytest.fixture
def learn(data) -> Build:
    return Build(data)


def parts(generator: torch.Generator) -> Parts:
    shape = {"generator": generator, "dtype": torch.float64}
    return Parts(torch.randn(2, 3, 4, **shape), torch.randn(2, 5, **shape))


def test_a_gem_finds_the_nearest_gradient_that_does_not_conflict():
    generator = torch.Generator().manual_seed(0)
    g, m = parts(generator), parts(generator)
    sign = torch.sign(g.dot(m))
    m = Parts(m.blocks * -sign[:, None, None], m.shared * -sign[:, None])  # now all conflict
    found = project(g, m, torch.tensor([True, False]))
    assert found.dot(m)[0].abs() < 1e-12
    expected = g.shared[0] - m.shared[0] * g.dot(m)[0] / m.dot(m)[0]
    assert torch.allclose(found.shared[0], expected)
    assert torch.equal(found.blocks[1], g.blocks[1])
    agreeing = project(g, Parts(-m.blocks, -m.shared), torch.tensor([True, True]))
    assert torch.equal(agreeing.blocks, g.blocks) and torch.equal(agreeing.shared, g.shared)


def test_a_gem_does_not_raise_the_loss_of_earlier_text_to_first_order(learn):
    learner = go(learn("a-gem"), 1)
    learner.begin(1)
    engine = learner.engine
    assert learner.overhead == 2.0
    assert engine.memory[0].tolist() == [0, 1, 0]  # beta came first
    batch = next_batch_of(learner)
    full, plain = engine.plain_gradients(0, 1, batch, read_text(batch, learner.arena.config))
    found = engine.constrain(0, 1, plain)
    a = learner.arena
    earlier = learner.store.sample(
        "train", engine.seeds, a["data_cursor"], engine.memory, a.config.train.batch
    )
    _, against = engine.plain_gradients(0, 1, earlier, read_text(earlier, a.config))
    assert float(found.dot(against)[0]) >= -1e-6
    assert full.loss.isfinite().all()


def test_the_penalty_has_the_gradient_of_all_quadratics(learn):
    learner = learn("ewc", runs=2, strength=3.0)
    engine = learner.engine
    assert isinstance(engine, PenaltyEngine)
    generator = torch.Generator().manual_seed(0)
    a, anchors = learner.arena, []
    for _ in range(2):
        a["weight"].copy_(torch.randn(a["weight"].shape, generator=generator))
        a["shared"].copy_(torch.randn(a["shared"].shape, generator=generator))
        importance = Parts(*(torch.rand(t.shape, generator=generator)
                         for t in (a["weight"], a["shared"])))  # fmt: skip
        engine.ties.consolidate(importance)
        anchors.append((importance, Parts.weights(a).clone()))
    here = Parts(*(torch.randn(t.shape, generator=generator).requires_grad_()
                   for t in (a["weight"], a["shared"])))  # fmt: skip
    value = sum(
        1.5 * (f * (t - o) ** 2).sum()
        for held, at in anchors
        for f, t, o in zip(held.tensors(), here.tensors(), at.tensors(), strict=True)
    )
    expected = torch.autograd.grad(value, here.tensors())
    a["weight"].copy_(here.blocks.detach())
    a["shared"].copy_(here.shared.detach())
    found = engine.constrain(0, 2, Parts.zeros(a))
    assert torch.allclose(found.blocks, expected[0], atol=1e-4)
    assert torch.allclose(found.shared, expected[1], atol=1e-4)


def test_the_fisher_is_the_mean_square_of_single_windows_gradients(learn):
    learner = learn("ewc")
    learner.begin(0)
    a, engine = learner.arena, learner.engine
    found = fisher(learner, engine, 3)
    seed = torch.tensor([derive_seed("fisher", 1, 0)])
    windows = [
        learner.store.sample("train", seed, torch.tensor([n]), a["mix"], 1) for n in range(3)
    ]
    squares, together = [], []
    for batch in windows:
        _, levels, shared, _ = engine.gradients(0, 1, batch, read_text(batch, a.config))
        squares.append(shared.square())
        together.append(levels[0][0, 0].square())
    assert torch.allclose(found.shared, torch.stack(squares).mean(0), rtol=1e-4, atol=1e-12)
    assert torch.allclose(found.blocks[0, ROOT_SLOT], torch.stack(together).mean(0), rtol=1e-4)
    joined = Batch(*(torch.cat([getattr(w, n) for w in windows], 1)
                     for n in ("inputs", "targets", "starts", "domain")))  # fmt: skip
    _, _, mean, _ = engine.gradients(0, 1, joined, read_text(joined, a.config))
    assert not torch.allclose(found.shared, mean.square(), rtol=0.5)  # of the batch it is less


def test_without_strength_a_penalty_is_dense_and_a_strong_one_holds(learn):
    plain, none, strong = learn("dense"), learn("ewc"), learn("ewc", strength=1e5)
    for learner in (plain, none, strong):
        go(learner, 1, steps=8)
    start = plain.arena["shared"].clone()
    for learner in (plain, none, strong):
        learner.begin(1)
        learner.train(0, 8, 8)
    assert torch.allclose(plain.arena["weight"], none.arena["weight"], atol=1e-6)
    moved = [
        float((strong.engine.ties.importance.shared * (one.arena["shared"] - start).square()).sum())
        for one in (none, strong)
    ]
    assert moved[1] < moved[0] / 2


def test_the_credit_of_synaptic_intelligence_adds_up_to_the_fall_of_the_loss(learn):
    learner = learn("si", optimizer={"clip": 0.0, "weight_decay": 0.0})
    learner.begin(0)
    engine, a = learner.engine, learner.arena
    assert isinstance(engine, PathIntegralEngine)
    a.set_hyper(0, "lr", 1e-4)
    batch = next_batch_of(learner)
    first = float(engine.step(0, 1, batch).loss[0])
    for _ in range(19):
        engine.step(0, 1, batch)
    credit = sum(float(t.double().sum()) for t in engine.credit.tensors())
    last = float(engine.step(0, 1, batch).loss[0])
    assert first - last > 0.01
    assert credit == pytest.approx(first - last, rel=0.05)


def test_synaptic_intelligence_divides_credit_by_the_way_that_was_gone(learn):
    learner = learn("si")
    engine, a = learner.engine, learner.arena
    a["shared"].add_(0.5)
    engine.credit.shared.fill_(2.0)
    engine.credit.blocks.fill_(-1.0)  # what did harm is not held on to
    engine.settle(0.25)
    assert torch.allclose(engine.ties.importance.shared, torch.full_like(a["shared"], 4.0))
    assert not engine.ties.importance.blocks.any() and not engine.credit.shared.any()
    assert not engine.constrain(0, 1, Parts.zeros(a)).shared.any()
    a["shared"].add_(1.0)
    engine.ties.strength.fill_(0.5)
    assert torch.allclose(engine.constrain(0, 1, Parts.zeros(a)).shared,
                          torch.full_like(a["shared"], 2.0), atol=1e-5)  # fmt: skip


def test_guarded_growth_moves_the_common_parts_under_their_ties(learn):
    learner = go(learn("k1-guarded-grow", runs=2, strength=2.0), 1, steps=6)
    a, old = learner.arena, set(learner.arena.trees[0].blocks)
    learner.begin(1)
    own = learner.arena.trees[0].subtree(learner.grown[0])
    assert learner.ties.importance.shared.any() and old.isdisjoint(own)
    assert not learner.ties.importance.blocks[0, own].any()
    before, shared = a["weight"].clone(), a["shared"].clone()
    learner.train(0, 6, 6)
    moved = (a["weight"][0] != before[0]).any(1)
    assert moved.nonzero()[:, 0].tolist() == sorted([ROOT_SLOT, *own])
    assert not same_bits(a["shared"], shared)


def test_ties_pull_path_blocks_back_and_are_clipped_with_the_rest(learn):
    learner = go(learn("k1-guarded-grow", runs=2, strength=2.0), 1, steps=6)
    learner.begin(1)
    engine, a = learner.engine, learner.arena
    batch = next_batch_of(learner)
    text, selection = read_text(batch, a.config), engine._select(0, 2, a["responsibility"])
    with torch.no_grad():
        done = engine.path_pass(0, 2, batch, text, selection)
    a["weight"].add_(0.1)
    a["shared"].add_(0.1)
    with torch.no_grad():
        away = engine.path_pass(0, 2, batch, text, selection)
        plain = Engine._path_gradients(engine, 0, 2, engine.path_pass(0, 2, batch, text, selection))
        found = engine._path_gradients(0, 2, away)
    held = learner.ties.importance
    by_row = plain.by_row + 0.2 * held.blocks.flatten(0, 1)[done.row]
    assert torch.allclose(found.by_row, by_row, atol=1e-6)
    assert torch.allclose(found.squares, by_row.square().sum(1), rtol=1e-4)
    assert torch.allclose(found.by_shared, plain.by_shared + 0.2 * held.shared, atol=1e-6)
    assert held.blocks[:, ROOT_SLOT].any()
