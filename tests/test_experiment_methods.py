"""Methods of continual learning: each does what its name says, by closed forms where there are."""

import json
from dataclasses import replace

import pytest
import torch

from k1.edits import add_agent
from k1.engine import Engine
from k1.errors import ConfigError
from k1.evidence import rotate
from k1.experiments.constrained import (
    Parts,
    PathIntegralEngine,
    PenaltyEngine,
    fisher,
    project,
)
from k1.experiments.learner import Learner, Run, height
from k1.experiments.methods import METHODS, choose_methods
from k1.experiments.reading import Passages, cut_passages, read_passages
from k1.experiments.stream import orders_of, stream_domains, views
from k1.flops import step_flops
from k1.forward import Batch, RouterState, forward, lane_loss, read_text
from k1.rng import derive_seed
from k1.sampling import TokenStore
from k1.topology import ROOT_SLOT
from tests.reference import next_batch, same_bits, shake, small_config

ORDER = ("beta", "alpha", "gamma")
SPARE = {"model": {"spare": 2.0}}


@pytest.fixture
def learn(data):
    """Build a learner of a method: `learn(name, runs=2, strength=0, **sections)`."""

    def build(name: str, runs: int = 1, strength: float = 0.0, **sections) -> Learner:
        config = small_config(**{**SPARE, **sections})
        store = TokenStore(data, config.model.context, "cpu")
        method = METHODS[name]
        lanes = [Run(name, ORDER, seed, 3e-3, strength) for seed in range(1, runs + 1)]
        return method.learner(
            method, config, store, data.vocab_size, lanes, "cpu", **method.options
        )

    return build


def go(learner: Learner, phases: int, steps: int = 4) -> Learner:
    for phase in range(phases):
        learner.begin(phase)
        learner.train(0, steps, steps)
        learner.end()
    return learner


def rows_of(learner: Learner) -> dict[int, torch.Tensor]:
    return {
        slot: learner.arena["weight"][0, slot].clone() for slot in learner.arena.trees[0].blocks
    }


# -- the stream ----------------------------------------------------------------------------------


def test_orders_are_permutations_by_number(data):
    assert stream_domains(data) == ("alpha", "beta", "gamma")
    every = orders_of(("a", "b", "c"), "all")
    assert len(set(every)) == 6 and orders_of(("a", "b", "c"), "6,1,6") == (every[5], every[0])
    for wrong in ("0", "7", "x", ""):
        with pytest.raises(ConfigError, match="give all, or numbers from 1 to 6"):
            orders_of(("a", "b", "c"), wrong)
    with pytest.raises(ConfigError, match="two domains"):
        orders_of(("a",), "all")


def test_a_phase_trains_on_its_domain_with_replay_of_earlier_ones(learn):
    dense, joint, replay = learn("dense"), learn("joint"), learn("replay-5")
    for learner in (dense, joint, replay):
        learner.begin(2)
    names = dense.store.domains
    mixes = [dict(zip(names, one.arena["mix"][0].tolist(), strict=True)) for one in (dense, joint)]
    assert mixes[0] == {"alpha": 0, "beta": 0, "gamma": 1}
    assert mixes[1] == pytest.approx(dict.fromkeys(names, 1 / 3))
    shares = dict(zip(names, replay.arena["mix"][0].tolist(), strict=True))
    assert shares == pytest.approx({"gamma": 0.95, "alpha": 0.025, "beta": 0.025})


def test_the_learning_rate_rises_and_falls_within_a_phase():
    assert height(0.025) == pytest.approx(0.5, abs=0.01) and height(1.0) == pytest.approx(0.1)
    assert height(0.5) == pytest.approx(0.55)


def test_flops_and_moved_parameters_are_counted(learn):
    learner = go(learn("dense"), 1, steps=5)
    assert learner.flops[0] == pytest.approx(5 * step_flops(learner.arena.config, 256, 7, 0))
    assert learner.moved == [1.0]
    path = go(learn("k1-full-path", train={"top_k": 2}), 1, steps=8)
    a = path.arena
    block, shared = a.block_layout.total, a.shared_layout.total
    assert path.moved[0] == pytest.approx((3 * block + shared) / (7 * block + shared))
    assert path.flops[0] == pytest.approx(8 * step_flops(a.config, 256, 7, 3))


# -- reading documents ---------------------------------------------------------------------------


def test_passages_begin_at_documents_and_end_with_them(data):
    store = TokenStore(data, 16, "cpu")
    found = cut_passages(store, "validation", "beta", 5, 40)
    tokens, starts = data.tokens("beta", "validation"), data.starts("beta", "validation")
    begins = starts.nonzero()[:, 0].tolist()
    assert len(found.inputs) == 5
    for passage in range(5):
        first = next(
            b
            for b in begins
            if torch.equal(tokens[b : b + 64], found.inputs[passage].flatten()[:64])
        )
        end = next((b for b in begins if b > first), len(tokens))
        assert int(found.counts[passage].sum()) == min(40 * 16, end - first - 1)
    targets = found.targets.flatten(1)[:, :-1]
    assert torch.equal(targets[found.counts.flatten(1)[:, 1:]],
                       found.inputs.flatten(1)[:, 1:][found.counts.flatten(1)[:, 1:]])  # fmt: skip


def test_reading_one_window_is_measuring_it(make):
    trainer = shake(make())
    batch = next_batch(trainer, 6)
    starts = torch.zeros_like(batch.starts)
    starts[..., 0] = True
    batch = replace(batch, starts=starts)
    one = [t[0, :, None] for t in (batch.inputs, batch.targets, starts, torch.ones_like(starts))]
    expected = float(trainer.engine.bits_per_byte(0, 1, batch)[0])
    assert read_passages(trainer.engine, Passages(*one))[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("router", ["mean", "evidence"])
def test_evidence_is_carried_from_window_to_window(make, router):
    trainer = shake(make(model={"router": router}))
    arena, time = trainer.arena, trainer.config.model.context
    tokens = trainer.data.tokens("alpha", "validation").long()[: 2 * time + 1]
    starts = torch.zeros(1, 2, time, dtype=torch.bool)
    starts[0, 0, 0] = True
    inputs, targets = tokens[:-1].view(1, 2, time), tokens[1:].view(1, 2, time)
    counts = torch.ones_like(starts)
    counts[0, 0] = False  # the first window is read and not counted, but for one token
    counts[0, 0, 0] = True
    (found,) = read_passages(trainer.engine, Passages(inputs, targets, starts, counts))
    whole = [Batch(inputs[:, i : i + 1], targets[:, i : i + 1], starts[:, i : i + 1],
                   inputs[:, i : i + 1, 0]) for i in range(2)]  # fmt: skip
    forest = arena.forest(0, 1)

    def run(batch, state):
        text = read_text(batch, trainer.config)
        return forward(forest.weights(), state, forest.levels, batch, text, trainer.config)

    first = run(whole[0], forest.router)
    prior = [p[..., -1] for p in first.prior]
    second = run(whole[1], RouterState(prior, forest.router.counts))
    logits = torch.log_softmax(trainer.logits(inputs[0, :1]), -1)
    nats = time * float(lane_loss(forest.weights(), second.output, whole[1])[0])
    nats -= float(logits[0, 0, targets[0, 0, 0]])
    assert found == pytest.approx(nats / 0.6931471805599453 / (time + 1), rel=1e-5)
    alone = run(whole[1], forest.router)
    carried = not torch.allclose(alone.output, second.output, atol=1e-6)
    assert carried == (router == "evidence")


# -- trees ---------------------------------------------------------------------------------------


def test_a_fixed_leaf_takes_every_step_of_its_phase(learn):
    learner = learn("fixed-leaf", runs=3, train={"top_k": 2})
    leaves = []
    for phase in range(3):
        before = learner.arena["visits"].clone()
        learner.begin(phase)
        learner.train(0, 6, 6)
        gained = learner.arena["visits"] - before
        assert (gained.max(1).values == 6).all() and (gained.sum(1) == 6).all()
        leaves.append(gained.argmax(1).tolist())
    assert all(len(set(lane)) == 3 for lane in zip(*leaves, strict=True))


def test_one_counter_counts_the_steps_of_the_lane(learn):
    learner = go(learn("k1-one-counter"), 1, steps=7)
    rows = learner.arena["updates"][0] > 0
    last = learner.arena["last_update"][0][rows]
    assert torch.equal(learner.arena["count"][0][rows], torch.full_like(last, 7).minimum(last + 1)
                       .maximum(torch.full_like(last, 6)))  # fmt: skip


def test_a_grown_node_counts_the_new_text_alone(learn):
    learner = go(learn("k1-frozen-grow"), 1, steps=12)
    before = learner.arena["evidence"][0].sum(1)
    nodes = learner.arena.trees[0].children(ROOT_SLOT)
    assert before[nodes].sum() > 0
    learner.begin(1)
    (new,) = set(learner.arena.trees[0].children(ROOT_SLOT)) - set(nodes)
    after = learner.arena["evidence"][0]
    assert torch.equal(after.sum(1)[nodes], before[nodes])
    assert (after[nodes, 1:] == 0).all() and (after[new, 0] == 0).all()
    buckets = learner.arena.config.evidence.buckets
    windows = 64 * learner.arena.config.train.batch
    context = learner.arena.config.model.context
    assert after[new, :, :buckets].sum() <= windows * (context - 1) * 256
    assert after[new, :, :buckets].sum() > windows * (context - 2) * 256


def test_growth_keeps_the_function_where_routing_is_learned(learn):
    learner = go(learn("k1-learned-grow"), 1)
    batch = learner.store.spread("validation", "alpha", 4)
    before = learner.engine.bits_per_byte(0, 1, batch)
    for _ in range(2):
        rotate(learner.arena["evidence"][0])
    add_agent(learner.arena, 0, ROOT_SLOT)
    assert torch.allclose(learner.engine.bits_per_byte(0, 1, batch), before, atol=1e-5)


def test_only_what_was_grown_for_a_domain_moves(learn):
    learner = go(learn("k1-own-grow"), 2, steps=6)
    old = set(learner.arena.trees[0].blocks)
    learner.begin(2)
    shared, before = learner.arena["shared"].clone(), rows_of(learner)
    learner.train(0, 6, 6)
    after = rows_of(learner)
    own = set(learner.arena.trees[0].subtree(learner.grown[0]))
    assert len(own) == 3 and own.isdisjoint(old)
    for slot in old:
        assert same_bits(after[slot], before[slot])
    assert same_bits(learner.arena["shared"], shared)
    assert (learner.arena["updates"][0, sorted(own)] == 6).all()


@pytest.mark.parametrize(
    ("name", "root", "shared"),
    [("dense", True, True), ("dense-frozen-shared", True, False), ("k1-frozen", False, False)],
)
def test_what_is_frozen_after_the_first_domain_stays(learn, name, root, shared):
    learner = go(learn(name), 1)
    held = learner.arena["shared"].clone(), learner.arena["weight"][0, ROOT_SLOT].clone()
    learner.begin(1)
    learner.train(0, 4, 4)
    assert same_bits(learner.arena["shared"], held[0]) == (not shared)
    assert same_bits(learner.arena["weight"][0, ROOT_SLOT], held[1]) == (not root)


def test_a_low_learning_rate_holds_from_the_second_domain_on(learn):
    learner = learn("dense-low-lr")
    learner.begin(0)
    assert learner.arena.get_hyper(0)["lr"] == pytest.approx(3e-3)
    learner.begin(1)
    assert learner.arena.get_hyper(0)["lr"] == pytest.approx(3e-4)


def test_separate_trees_are_fresh_and_stand_still(learn):
    learner = learn("separate", runs=2)
    seen = views(learner.store, "validation", 4, 2)
    fresh = [learner.arena["weight"][lane].clone() for lane in range(2)]
    learner.begin(0)
    learner.train(0, 4, 4)
    first = learner.measure(seen, "windows")
    learner.begin(1)
    assert all(same_bits(learner.arena["weight"][lane], fresh[lane]) for lane in range(2))
    learner.train(0, 4, 4)
    second = learner.measure(seen, "windows")
    for lane in range(2):
        assert second[lane][0] == first[lane][0]
        assert second[lane][1] != first[lane][1]
    assert learner.parameters(0) == 2 * Learner.parameters(learner, 0)


# -- constrained gradients -----------------------------------------------------------------------


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


def next_batch_of(learner: Learner, windows: int = 4) -> Batch:
    a = learner.arena
    return learner.store.sample("train", a["data_seed"], a["data_cursor"], a["mix"], windows)


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


# -- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_through_a_stream(learn, name):
    learner = go(learn(name, runs=2, strength=METHODS[name].strengths[0]), 3, steps=2)
    seen = views(learner.store, "validation", 2, 2)
    for view in ("windows", "passages"):
        bits = torch.tensor(learner.measure(seen, view))
        assert bits.shape == (2, 3) and bits.isfinite().all()
    assert not learner.arena["skipped"].any()
    assert min(learner.flops) > 0


def test_a_run_ends_as_it_would_alone(learn):
    both, alone = go(learn("k1-frozen-grow", runs=2), 2), go(learn("k1-frozen-grow"), 2)
    assert both.arena.hash_lane(0) == alone.arena.hash_lane(0)


def test_methods_are_plain_data_with_names_of_their_own():
    assert all(name == method.name for name, method in METHODS.items())
    with pytest.raises(ConfigError, match="no method 'x'"):
        choose_methods(["dense", "x"])
    for method in METHODS.values():
        json.dumps([method.always, method.later, method.options])
