"""Methods of continual learning: each does what its name says, by closed forms where there are."""

import json
from dataclasses import replace

import pytest
import torch

from k1.edits import add_agent
from k1.errors import ConfigError
from k1.evidence import rotate
from k1.experiments.learner import Learner, height
from k1.experiments.methods import METHODS, choose_methods
from k1.experiments.reading import Passages, cut_passages, read_passages
from k1.experiments.stream import orders_of, stream_domains, views
from k1.flops import step_flops
from k1.forward import Batch, RouterState, forward, lane_loss, read_text
from k1.sampling import TokenStore
from k1.topology import ROOT_SLOT
from tests.experiment_helpers import Build, go, rows_of
from tests.reference import next_batch, same_bits, shake


@pytest.fixture
def learn(data) -> Build:
    return Build(data)


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
