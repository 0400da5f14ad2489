"""The batched forward pass against the plain reference, causality, targets and documents."""

import math

import pytest
import torch

import k1.forward
import k1.large
from k1.engine import Engine
from k1.forward import Batch, forward, read_text, run_level
from k1.large import run_alone
from k1.mixing import to_children
from k1.trainer import Trainer
from tests.reference import Reference, make_ragged, next_batch, shake, small_config

ROUTERS = ("mean", "learned", "evidence")


def fields(batch):
    return vars(batch).values()


def build(make, router, ragged=True, seed=0):
    trainer = make(model={"router": router}, seed=seed)
    return shake(make_ragged(trainer) if ragged else trainer, seed)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("ragged", [False, True])
def test_logits_and_loss_equal_the_reference(make, router, ragged):
    trainer = build(make, router, ragged)
    batch = next_batch(trainer)
    reference = Reference.of(trainer)
    expected = reference.logits(batch.inputs[0])
    found = trainer.logits(batch.inputs[0])
    assert expected.std() > 0.3  # the weights were shaken enough for this to mean something
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    loss = trainer.engine.gradients(0, 1, batch, read_text(batch, trainer.config))[0]
    assert float(loss) == pytest.approx(reference.value(batch), rel=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("pruned", [0.2, 0.5, 1.0])
def test_pruned_trees_equal_the_reference(make, router, pruned):
    trainer = make(model={"router": router, "branching": (3, 2, 1)})
    trainer.arena["mean_responsibility"][0].copy_(torch.rand(trainer.arena.scratch + 1))
    trainer.prune(pruned)
    shake(trainer)
    batch = next_batch(trainer)
    expected = Reference.of(trainer).logits(batch.inputs[0])
    torch.testing.assert_close(
        trainer.logits(batch.inputs[0]).double(), expected, rtol=1e-4, atol=1e-4
    )
    assert trainer.tree.agents == 15 - int(15 * pruned)


@pytest.mark.parametrize("router", ROUTERS)
def test_ragged_tree_has_leaves_on_three_levels(make, router):
    tree = build(make, router).tree
    levels = {tree.blocks[s].level for s in tree.blocks if tree.is_leaf(s)}
    assert levels == {1, 2, 3}


@pytest.mark.parametrize("router", ROUTERS)
def test_lanes_with_other_trees_give_what_each_gives_alone(make, router):
    alone = [build(make, router, ragged, seed) for seed, ragged in enumerate((False, True, False))]
    alone[2].prune(0.5)
    together = make(model={"router": router}, lanes=3)
    for lane, trainer in enumerate(alone):
        together.arena.write_lane(lane, trainer.arena.read_lane(0))
    engine = Engine(together.arena, together.store, lane_chunk=3)
    batches = [next_batch(trainer) for trainer in alone]
    batch = Batch(*(torch.cat(parts) for parts in zip(*map(fields, batches), strict=True)))
    text = read_text(batch, together.config)
    loss, _, shared, _ = engine.gradients(0, 3, batch, text)
    for lane, (trainer, own) in enumerate(zip(alone, batches, strict=True)):
        expected = trainer.engine.gradients(0, 1, own, read_text(own, trainer.config))
        torch.testing.assert_close(loss[lane], expected[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(shared[lane], expected[2][0], rtol=1e-4, atol=1e-6)
        assert float(loss[lane]) == pytest.approx(Reference.of(trainer).value(own), rel=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_bits_per_byte_is_the_loss_in_bits_of_each_lane(make, router):
    trainer = build(make, router)
    other = make(model={"router": router}, lanes=2)
    other.arena.write_lane(1, trainer.arena.read_lane(0))
    batch = trainer.store.spread("validation", "beta", 6)
    both = other.engine.bits_per_byte(0, 2, batch)
    expected = Reference.of(trainer).value(batch) / math.log(2)
    assert float(both[1]) == pytest.approx(expected, rel=1e-5)  # a byte a token here
    assert float(both[0]) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("router", ROUTERS)
def test_changing_a_token_changes_nothing_before_it(make, router):
    trainer = build(make, router)
    tokens = next_batch(trainer, 2).inputs[0]
    before = trainer.logits(tokens)
    for t in (1, 7, 15):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 97
        after = trainer.logits(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@pytest.mark.parametrize("pool", ["train", "validation"])
def test_target_is_the_next_token_of_the_text(make, data, pool):
    trainer = make()
    held_out = trainer.store.spread("validation", "alpha", 16)
    batch = next_batch(trainer, 16) if pool == "train" else held_out
    for window in range(16):
        domain = data.domains[int(batch.domain[0, window])]
        text = bytes(data.tokens(domain, pool).tolist())
        inputs = bytes(batch.inputs[0, window].tolist())
        where = text.find(inputs)
        assert where >= 0 and inputs[1:] == bytes(batch.targets[0, window, :-1].tolist())
        found = {text[i + 16] for i in range(where, len(text) - 16) if text[i : i + 16] == inputs}
        assert int(batch.targets[0, window, -1]) in found
        starts = data.starts(domain, pool)
        assert batch.starts[0, window].tolist() == starts[where : where + 16].tolist()


def test_loss_pairs_a_position_with_its_own_target(make):
    """A model that knows only the next letter: its loss is near 0 for that, large for others."""
    trainer = make(model={"router": "mean", "embed": 32})
    trainer.arena["weight"][0] = 0  # every block hands its input on
    pieces = trainer.arena.shared_layout.unpack(trainer.arena["shared"][0])
    for name in pieces:
        pieces[name].zero_()
    pieces["norm.weight"].fill_(1.0)
    period = 7  # token i is followed by (i + 1) % period
    for token in range(period):
        pieces["embedding"][token, token] = 1.0
        pieces["head"][token, (token + 1) % period] = 20.0
    text = torch.arange(17) % period
    off = torch.zeros(1, 1, 16, dtype=torch.bool)
    batch = Batch(text[None, None, :-1], text[None, None, 1:], off, off[..., 0].long())
    twice = Batch(batch.inputs, (batch.targets + 1) % period, off, batch.domain)
    loss = [
        float(trainer.engine.gradients(0, 1, b, read_text(b, trainer.config))[0])
        for b in (batch, twice)
    ]
    assert loss[0] < 0.01 and loss[1] > 5


def test_a_document_start_resets_the_evidence(make):
    trainer = build(make, "evidence")
    batch = next_batch(trainer, 2)
    starts = torch.zeros_like(batch.starts)
    starts[0, 0, 9] = True
    batch = Batch(batch.inputs, batch.targets, starts, batch.domain)
    reset = Batch(batch.inputs, batch.targets, torch.zeros_like(starts), batch.domain)
    losses = [
        trainer.engine.gradients(0, 1, b, read_text(b, trainer.config)) for b in (batch, reset)
    ]
    assert float(losses[0][0]) != pytest.approx(float(losses[1][0]), abs=1e-4)
    reference = Reference.of(trainer)
    assert float(losses[0][0]) == pytest.approx(reference.value(batch), rel=1e-5)
    # What is before the boundary no longer matters to the routing after it (nor does the start).
    tokens = batch.inputs.clone()
    tokens[0, 0, :9] = tokens[0, 0, :9].flip(0)
    other = Batch(tokens, batch.targets, starts, batch.domain)
    trainer.arena.block_layout.unpack(trainer.arena["weight"][0, 0])["router.weight"].zero_()
    routes = []
    for b in (batch, other):
        done = trainer.engine.gradients(0, 1, b, read_text(b, trainer.config))[3]
        routes.append(done.share[1][0].view(-1, 2, 16)[:, 0])
    torch.testing.assert_close(routes[0][:, 9:], routes[1][:, 9:], rtol=1e-5, atol=1e-6)
    assert (routes[0][:, :9] - routes[1][:, :9]).abs().max() > 1e-3


def test_bfloat16_is_near_float32(make):
    config = small_config(model={"router": "evidence"})
    trainer = shake(make(config), size=0.05)
    low = make(config.replace(train={"precision": "bfloat16"}))
    low.arena.write_lane(0, trainer.arena.read_lane(0))
    batch = next_batch(trainer)
    text = read_text(batch, config)
    expected, found = (t.engine.gradients(0, 1, batch, text)[0] for t in (trainer, low))
    assert float(found) == pytest.approx(float(expected), rel=0.02)
    assert float(found) != float(expected)


@pytest.mark.parametrize("time", [8, 16])
def test_blocks_that_run_alone_give_what_a_level_gives(make, time):
    trainer = build(make, "evidence")
    arena = trainer.arena
    forest, levels = arena.forest(0, 1), arena.index(0, 1)
    heads, d = arena.config.model.heads, arena.config.model.embed
    above = torch.randn(1, 1, 3 * time, d)
    with torch.no_grad():
        for index in levels:
            rows = forest.rows[:, index.offset : index.offset + index.width].flatten(0, 1)
            pieces = forest.block_layout.unpack(rows)
            found = run_alone(pieces, above, index, time, heads)
            windows = above.unflatten(2, (3, time))
            if index.level:
                windows = to_children(windows, levels[index.level - 1], index)
            wanted = run_level(pieces, windows, arena.config)
            torch.testing.assert_close(found[index.alive], wanted[index.alive])
            above = found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("router", ROUTERS)
def test_frozen_large_blocks_equal_those_with_a_graph(make, router, monkeypatch):
    config = make().config.replace(model={"router": router})
    trainer = Trainer(config, make().data, seed=3, device="cuda")
    batch, arena = next_batch(trainer), trainer.arena
    arena["weight"].add_(torch.randn(arena["weight"].shape).to("cuda") * 0.1)
    forest, text = arena.forest(0, 1), read_text(batch, config)
    state = forest.weights(), forest.router, forest.levels, batch, text, config
    wanted = forward(*state).output  # the graph is of no use, but its code runs
    monkeypatch.setattr(k1.large, "_LARGE_BYTES", 0)
    ran = []
    run = k1.large.run_alone
    monkeypatch.setattr(k1.forward, "run_alone", lambda *args: ran.append(1) or run(*args))
    with torch.no_grad():
        found = forward(*state).output
    assert len(ran) == len(forest.levels)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
