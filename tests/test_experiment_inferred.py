"""Methods that keep something apart for each domain and find it again by the loss so far."""

import math

import pytest
import torch

from k1.experiments.inferred import believed, texts
from k1.experiments.learner import Learner
from k1.experiments.packed import FREE, PackNetLearner, largest
from k1.experiments.progressive import ProgressiveLearner, from_earlier, run_columns
from k1.experiments.stream import views
from k1.flops import step_flops
from k1.forward import Batch, lane_loss, read_text
from tests.experiment_helpers import Build, go, next_batch_of
from tests.reference import same_bits


@pytest.fixture
def learn(data) -> Build:
    return Build(data)


def read(learner, domain="beta") -> torch.Tensor:
    """Losses of all readers of lane 0: [R, N]."""
    batch = learner.store.spread("validation", domain, 4)
    with torch.no_grad():
        return learner.reading(0, 1)(batch)[:, 0]


# -- who is believed -----------------------------------------------------------------------------


def test_the_reader_with_the_least_loss_so_far_is_believed():
    generator = torch.Generator().manual_seed(0)
    nats = torch.rand(3, 2, 4, 9, generator=generator)
    starts = torch.rand(4, 9, generator=generator) < 0.2
    found = believed(nats, starts)
    for lane in range(2):
        for text in range(4):
            sums = [0.0] * 3
            for t in range(9):
                if starts[text, t]:
                    sums = [0.0] * 3
                best = sums.index(min(sums))
                assert found[lane, text, t] == nats[best, lane, text, t].double()
                sums = [s + float(n) for s, n in zip(sums, nats[:, lane, text, t], strict=True)]


def test_no_choice_knows_what_comes_after_it():
    generator = torch.Generator().manual_seed(0)
    nats = torch.rand(2, 1, 1, 12, generator=generator)
    other = nats.clone()
    other[..., 7:] = other[..., 7:].flip(0)
    none = torch.zeros(1, 12, dtype=torch.bool)
    assert same_bits(believed(nats, none)[..., :7], believed(other, none)[..., :7])


def test_a_reader_alone_measures_what_the_engine_measures(learn):
    learner = go(learn("packnet", runs=2), 1)
    seen = views(learner.store, "validation", 6, 2)
    for view in ("windows", "passages"):
        expected = torch.tensor(Learner.measure(learner, seen, view))
        assert torch.allclose(torch.tensor(learner.measure(seen, view)), expected, rtol=1e-5)


def test_passages_are_believed_from_window_to_window(learn):
    learner = go(learn("packnet"), 2, steps=6)
    passages = texts(views(learner.store, "validation", 6, 3), "passages", "alpha")
    found = learner._bits(0, 1, passages)[0]
    total = length = 0.0
    for one in range(len(passages.inputs)):
        parts = [t[one][None] for t in (passages.inputs, passages.targets, passages.starts)]
        with torch.no_grad():
            nats = learner.reading(0, 1)(Batch(*parts, parts[0][..., 0]))[:, 0].double()
        sums = torch.zeros(2, dtype=torch.float64)
        for t, counts in enumerate(passages.counts[one].flatten().tolist()):
            if counts:
                total += float(nats[int(sums.argmin()), t])
                length += float(learner.store.token_bytes[parts[1].flatten()[t]])
            sums += nats[:, t]
    assert found == pytest.approx(total / math.log(2) / length, rel=1e-9)


# -- PackNet -------------------------------------------------------------------------------------


def test_the_largest_weights_are_kept_layer_by_layer():
    weight = torch.tensor([[3.0, -5.0, 1.0, 0.0, 2.0, 9.0], [0.0, 0.0, 1.0, 2.0, 0.0, 7.0]])
    free = torch.tensor([[True] * 5 + [False]] * 2)
    kept = largest(weight, free, 0.5)
    assert kept.tolist() == [[True, True, False, False, False, False],
                             [False, False, False, True, False, False]]  # fmt: skip
    assert (largest(weight, free, 1.0) == (free & (weight != 0))).all()


def test_weights_of_earlier_domains_stay_and_their_mask_restores_the_loss_to_the_bit(learn):
    learner = go(learn("packnet", runs=2), 1, steps=6)
    assert isinstance(learner, PackNetLearner)
    a, owner = learner.arena, learner.owner
    weights, first = a["weight"].clone(), owner.blocks == 1
    losses = read(learner)[0]
    learner.begin(1)
    learner.train(0, 3, 6)
    assert same_bits(read(learner)[0], losses)  # before it is pruned, too
    assert not same_bits(read(learner)[1], losses)
    learner.train(3, 3, 6)
    second, kept = owner.blocks == 2, a["weight"].clone()
    seconds = read(learner)[1]
    learner.begin(2)
    learner.train(0, 6, 6)
    assert same_bits(a["weight"][first], weights[first])
    assert same_bits(a["weight"][second], kept[second])
    assert same_bits(read(learner)[0], losses) and same_bits(read(learner)[1], seconds)
    assert not same_bits(read(learner)[2], seconds)
    assert (a["weight"][owner.blocks == FREE] == 0).all()


def test_domains_get_equal_shares_of_every_layer(learn):
    learner = go(learn("packnet"), 3, steps=6)
    a = learner.arena
    owner = a.block_layout.unpack(learner.owner.blocks[0])
    for name, size in zip(a.block_layout.names, a.block_layout.sizes, strict=True):
        if name.startswith("router"):
            continue
        shares = [int((owner[name][0] == o).sum()) for o in (1, 2, 3)]
        if owner[name].dim() == 2:
            assert shares == [size, 0, 0]
        else:
            assert shares == pytest.approx([size / 3] * 3, abs=1.01) and sum(shares) == size
    assert learner.parameters(0) == Learner.parameters(learner, 0)
    dense = learn("dense")
    assert learner.step_flops() == dense.step_flops()
    moved = go(learn("packnet"), 1, steps=6).moved[0]
    assert 0.6 < moved < 0.9  # all of it for four steps, a third of the matrices for two


def test_training_is_pruned_once_wherever_it_is_cut(learn):
    whole, cut = learn("packnet"), learn("packnet")
    for learner, pieces in ((whole, [9]), (cut, [1, 5, 2, 1])):
        learner.begin(0)
        done = 0
        for steps in pieces:
            learner.train(done, steps, 9)
            done += steps
    assert whole.arena.hash_lane(0) == cut.arena.hash_lane(0)
    assert torch.equal(whole.owner.blocks, cut.owner.blocks) and (cut.owner.blocks == 1).any()


# -- progressive networks ------------------------------------------------------------------------


def test_the_first_column_is_a_dense_tree(learn):
    dense, first = go(learn("dense"), 1), go(learn("progressive"), 1)
    assert torch.allclose(first.arena["weight"], dense.arena["weight"], atol=1e-6)
    assert torch.allclose(first.arena["shared"], dense.arena["shared"], atol=1e-6)
    assert first.step_flops() == dense.step_flops()


def test_earlier_columns_stand_still_and_later_ones_begin_as_trees_alone(learn):
    learner = go(learn("progressive", runs=2), 1, steps=6)
    assert isinstance(learner, ProgressiveLearner)
    losses, fresh = read(learner), learn("progressive", runs=2)
    fresh.begin(0)
    learner.begin(1)
    at_birth = read(learner)
    assert same_bits(at_birth[0], losses[0])
    assert torch.allclose(at_birth[1], read(fresh)[0], atol=1e-6)
    learner.train(0, 6, 6)
    assert learner.engine.lateral.any((2, 3, 4)).all()
    seconds = read(learner)
    learner.begin(2)
    learner.train(0, 6, 6)
    thirds = read(learner)
    assert len(thirds) == 3 and same_bits(thirds[:2], seconds)


def test_every_adapter_is_learnt_and_has_the_gradient_of_the_loss(learn):
    learner = go(learn("progressive"), 2, steps=6)
    learner.begin(2)
    engine, a = learner.engine, learner.arena
    generator = torch.Generator().manual_seed(0)
    engine.lateral.copy_(torch.randn(engine.lateral.shape, generator=generator) * 0.1)
    batch = next_batch_of(learner)
    engine._all_gradients(0, 1, batch, read_text(batch, a.config))

    def loss() -> float:
        with torch.no_grad():
            columns = engine.columns(0, 1)
            done = run_columns(columns, batch)[-1]
            return float(lane_loss(columns[-1].forest.weights(), done.output, batch)[0])

    gradient = engine._gradient.clone()
    internal = [s for s in a.trees[0].blocks if not a.trees[0].is_leaf(s)]
    places = [*internal, engine.lateral.shape[2] - 1]
    assert len(places) == learner.adapters
    for column in range(2):
        for place in places:
            part = gradient[0, column, place]
            assert part.any()
            direction = part / part.norm()
            kept = engine.lateral.clone()
            engine.lateral[0, column, place] += 0.01 * direction
            above = loss()
            engine.lateral.copy_(kept)
            engine.lateral[0, column, place] -= 0.01 * direction
            slope = (above - loss()) / 0.02
            engine.lateral.copy_(kept)
            assert slope == pytest.approx(float(part.norm()), rel=0.05, abs=2e-5)


def test_adapters_add_normed_outputs_times_their_matrices():
    generator = torch.Generator().manual_seed(0)
    lateral = torch.randn(2, 2, 3, 4, 4, generator=generator)
    ys = [torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2)]
    found = from_earlier(lateral, ys)
    y = [(t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
         for t in ys]  # fmt: skip
    expected = torch.einsum("qlwnd,lqwde->lwne", torch.stack(y), lateral)
    assert torch.allclose(found, expected, atol=1e-4)


def test_all_columns_are_paid_for(learn):
    learner = go(learn("progressive"), 3)
    a = learner.arena
    tree = Learner.parameters(learner, 0)
    assert learner.adapters == 4  # a root, two nodes and the output
    assert learner.parameters(0) == 3 * tree + 3 * 4 * 16 * 16
    assert learner.moving(0) == pytest.approx((tree + 2 * 4 * 16 * 16) / learner.parameters(0))
    tokens = a.config.train.batch * a.config.model.context
    dense = step_flops(a.config, a.vocab_size, 7, 0)
    forward = (dense / tokens - 3 * 2 * 16 * a.vocab_size) / 3
    adapters = 4 * 2 * 16 * 16
    # Two columns forward; adapters forward from 0 to 1, from both to 2, and back once for these.
    expected = dense + tokens * (2 * forward + (1 + 2 + 2) * adapters)
    assert learner.step_flops() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["packnet", "progressive", "mixture"])
def test_lanes_side_by_side_are_lanes_alone(learn, name):
    """On a CPU lanes are trained one by one, on a GPU all at once."""
    learner = go(learn(name, runs=2), 2)
    engine, a = learner.engine, learner.arena
    windows = learner.store.spread("validation", "gamma", 4)
    batch = windows.map(lambda t: t.expand(2, *t.shape[1:]))
    with torch.no_grad():
        nats = learner.reading(0, 2)(batch)
    together = engine._all_gradients(0, 2, batch, read_text(batch, a.config))
    rows = a["weight"].new_zeros(2, *a["weight"].shape[1:])
    for row, gradient in together.by_row:
        rows.flatten(0, 1)[row] = gradient
    for lane in range(2):
        own = batch.map(lambda t: t[:1])
        with torch.no_grad():
            assert torch.allclose(
                learner.reading(lane, lane + 1)(own)[:, 0], nats[:, lane], atol=1e-5
            )
        alone = engine._all_gradients(lane, lane + 1, own, read_text(own, a.config))
        found = torch.zeros_like(rows[0])
        for row, gradient in alone.by_row:
            found[row] = gradient
        assert found.any() and torch.allclose(rows[lane], found, atol=1e-6)
        assert torch.allclose(together.by_shared[lane], alone.by_shared[0], atol=1e-6)
