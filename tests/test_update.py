"""What a step updates, by how much, and that the modes agree with each other."""

import pytest
import torch

from k1.engine import Engine
from k1.forward import read_text
from tests.reference import (
    Reference,
    make_ragged,
    next_batch,
    same_bits,
    select,
    shake,
    small_config,
)

ROUTERS = ("mean", "learned", "evidence")
MODES = ("exact", "sparse")
OWN = ("weight", "first", "second", "count")


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mode", MODES)
def test_off_the_path_every_bit_stays(make, router, mode):
    trainer = make(model={"router": router}, update={"mode": mode}, train={"top_k": 4, "batch": 2})
    make_ragged(trainer)
    arena, idle = trainer.arena, 0
    for _ in range(50):
        before = {name: arena[name][0].clone() for name in (*OWN, "evidence", "shared_count")}
        report = trainer.step()
        moved = {trainer.tree.slot_of(i) for i in report.scales}
        assert moved and not report.skipped
        for slot in range(arena.scratch + 1):
            for name in OWN:
                same = same_bits(arena[name][0, slot], before[name][slot])
                assert same == (slot not in moved), (name, slot)
            counts, old = arena["evidence"][0, slot].sum(0), before["evidence"][slot].sum(0)
            gained = not torch.equal(counts, old)
            assert gained == (slot in moved and slot != 0 and router == "evidence")
        on = sorted(moved)
        assert torch.equal(arena["count"][0, on], before["count"][on] + 1)
        assert arena["shared_count"][0] == before["shared_count"] + 1
        idle += len(trainer.tree.blocks) - len(moved)
    assert idle >= 50  # many blocks were off the path, moments and all
    assert not any(arena[name][0, arena.scratch].any() for name in OWN)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mode", MODES)
def test_displacement_is_scaled_against_the_same_block_at_full_scale(make, router, mode):
    """One state, one step, twice: with the scales, and with all of them 1 (a culprit's)."""
    sections = {
        "model": {"router": router, "branching": (2, 2, 2)},
        "train": {"top_k": 3},
    }
    trainer = make(update={"mode": mode}, **sections)
    full = make(update={"mode": mode, "scales": (1.0,), "root_scale": 1.0}, **sections)
    shake(trainer, size=0.05)
    expected = (1.0, 0.15, 0.05, 0.05)
    for _ in range(4):
        trainer.train(4)
        start = trainer.arena.read_lane(0)
        full.arena.write_lane(0, start)
        report, other = trainer.step(), full.step()
        assert report.path == other.path and len(report.path) == 1
        old = start.tensors
        for block, scale in zip(report.path[0][::-1], expected, strict=True):
            slot = trainer.tree.slot_of(block)
            own = trainer.arena["weight"][0, slot] - old["weight"][slot]
            whole = full.arena["weight"][0, slot] - old["weight"][slot]
            assert float(own.abs().mean() / whole.abs().mean()) == pytest.approx(scale, rel=0.01)
            assert float((own - scale * whole).norm() / own.norm()) < 0.01
            assert report.scales[block] == pytest.approx(scale)
        for name in ("first", "second"):  # moments take the whole gradient, whatever the scale
            torch.testing.assert_close(trainer.arena[name], full.arena[name])
        assert same_bits(trainer.arena["shared"][0], full.arena["shared"][0])


def test_shared_scale_scales_the_shared_part(make):
    moved = []
    for scale in (1.0, 0.25, 0.0):
        trainer = make(update={"shared_scale": scale, "mode": "exact"}, optimizer={"clip": 0.0})
        before = trainer.arena["shared"].clone()
        report = trainer.step()
        moved.append(float((trainer.arena["shared"] - before).norm()))
        assert int(trainer.arena["shared_count"][0]) == (scale > 0)
        size, shared = trainer.arena.block_layout.total, trainer.arena.shared_layout.total
        numbers = len(report.scales) * size + (shared if scale else 0)
        assert report.updated_fraction == pytest.approx(numbers / (7 * size + shared))
    assert moved[1] == pytest.approx(0.25 * moved[0], rel=0.01) and moved[2] == 0


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
def test_everything_at_scale_one_is_torch_adamw(make, mode, clip):
    trainer = make(
        model={"router": "evidence", "branching": (3, 2)},
        update={"mode": mode, "scales": (1.0,), "root_scale": 1.0, "min_share": 0.0},
        optimizer={"weight_decay": 0.1, "clip": clip},
        train={"top_k": 9, "lr": 3e-3},
    )
    shake(trainer)
    arena, c, blocks = trainer.arena, trainer.config.optimizer, trainer.tree.blocks
    slots = sorted(blocks)
    theirs = [torch.nn.Parameter(arena["weight"][0, slot].clone()) for slot in slots]
    theirs.append(torch.nn.Parameter(arena["shared"][0].clone()))
    adam = torch.optim.AdamW(
        theirs, lr=3e-3, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay
    )
    clipped = 0
    for _ in range(6):
        batch = next_batch(trainer)
        text = read_text(batch, trainer.config)
        if mode == "sparse":  # the same numbers: Adam magnifies rounding where a gradient is tiny
            all_leaves = select(trainer, *range(4, 10))
            done = trainer.engine.path_pass(0, 1, batch, text, all_leaves)
            found = done.gradients()
            rows, shared = dict(zip(done.row.tolist(), found.by_row, strict=True)), found.by_shared
        else:
            _, grads, shared, _ = trainer.engine.gradients(0, 1, batch, text)
            level = {s: (b.level, s - trainer.tree.offset[b.level]) for s, b in blocks.items()}
            rows = {s: grads[at][0, i] for s, (at, i) in level.items()}
        for slot, parameter in zip(slots, theirs, strict=False):
            parameter.grad = rows[slot].clone()
        theirs[-1].grad = shared[0].clone()
        if clip:
            clipped += float(torch.nn.utils.clip_grad_norm_(theirs, clip)) > clip
        adam.step()
        report = trainer.step()
        assert report.agents_updated == 9
        for slot, parameter in zip(slots, theirs, strict=False):
            found = arena["weight"][0, slot]
            torch.testing.assert_close(found, parameter.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(arena["shared"][0], theirs[-1].detach(), rtol=0, atol=1e-6)
        with torch.no_grad():  # one step at a time: rounding must not add up
            for slot, parameter in zip(slots, theirs, strict=False):
                parameter.copy_(arena["weight"][0, slot])
            theirs[-1].copy_(arena["shared"][0])
    assert clipped >= (4 if clip else 0)


def both_gradients(trainer, selection):
    """Full and path gradients of a batch: loss, {slot: row} of the path blocks, shared row."""
    batch = next_batch(trainer)
    text = read_text(batch, trainer.config)
    loss, grads, shared, _ = trainer.engine.gradients(0, 1, batch, text)
    done = trainer.engine.path_pass(0, 1, batch, text, selection)
    found = done.gradients()
    torch.testing.assert_close(found.squares, found.by_row.square().sum(1))
    full, partial = {}, {}
    for slot, row in zip(done.row.tolist(), found.by_row, strict=True):
        if slot == trainer.arena.scratch:
            assert not row.any()
            continue
        level = trainer.tree.blocks[slot].level
        full[slot] = grads[level][0, slot - trainer.tree.offset[level]]
        partial[slot] = row
    return (loss, found.loss), full, partial, (shared[0], found.by_shared[0])


def error(a, b):
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("culprits", [(7,), (3,), (8,), (3, 7), (8, 3, 7)])
def test_path_gradient_is_exact_for_leaves_routers_and_head(make, router, culprits):
    trainer = shake(make_ragged(make(model={"router": router})))
    selection = select(trainer, *culprits)
    losses, full, partial, shared = both_gradients(trainer, selection)
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-6)
    tree, layout = trainer.tree, trainer.arena.block_layout
    assert set(full) == {s for c in culprits for s in tree.path(tree.slot_of(c))}
    for slot in full:
        if tree.is_leaf(slot):
            assert float(full[slot].norm()) > 1e-4
            assert error(partial[slot], full[slot]) < 1e-5
        elif router != "mean" and len(tree.children(slot)) > 1:
            for name in ("router.weight", "router.bias"):
                found, expected = (layout.unpack(g[slot])[name] for g in (partial, full))
                assert float(expected.norm()) > 1e-6
                assert error(found, expected) < 3e-5
    for name in ("norm.weight", "norm.bias", "head"):
        found, expected = (trainer.arena.shared_layout.unpack(g)[name] for g in shared[::-1])
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("router", ROUTERS)
def test_path_gradient_of_everything_is_the_full_gradient(make, router):
    trainer = shake(make_ragged(make(model={"router": router})))
    leaves = [b.id for b in trainer.tree.blocks.values() if trainer.tree.is_leaf(b.slot)]
    _, full, partial, shared = both_gradients(trainer, select(trainer, *leaves))
    assert len(full) == len(trainer.tree.blocks)
    assert all(error(partial[slot], full[slot]) < 3e-5 for slot in full)
    assert error(shared[1], shared[0]) < 3e-5


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("culprits", [(7,), (8, 3)])
def test_partial_gradients_are_those_with_the_branches_beside_constant(make, router, culprits):
    trainer = shake(make_ragged(make(model={"router": router})))
    _, _, partial, shared = both_gradients(trainer, select(trainer, *culprits))
    reference, tree = Reference.of(trainer), trainer.tree
    reference.path = {tree.blocks[slot].id for slot in partial}
    expected = reference.gradients(next_batch(trainer))
    for slot, row in partial.items():
        for name, piece in trainer.arena.block_layout.unpack(row).items():
            own = expected[tree.blocks[slot].id][name].float()
            torch.testing.assert_close(piece, own, rtol=1e-3, atol=1e-5)
    for name, piece in trainer.arena.shared_layout.unpack(shared[1]).items():
        torch.testing.assert_close(piece, expected[-1][name].float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_ancestors_partial_gradient_points_the_same_way_at_the_start(make, router):
    """In a narrow model, that is; `docs/theory.md` has the figures for a wide one."""
    trainer = make(model={"router": router, "branching": (3, 2, 2)}, train={"batch": 8})
    leaf = next(b.id for b in trainer.tree.blocks.values() if b.level == 3)
    losses, full, partial, _ = both_gradients(trainer, select(trainer, leaf))
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-6)
    for slot in full:
        assert float(torch.cosine_similarity(full[slot], partial[slot], dim=0)) > 0.95
    assert error(partial[0], full[0]) > 1e-3  # partial it is


PLACES = ("head", "embedding", "culprit", "router")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mode", ["dense", *MODES])
def test_a_gradient_that_is_not_finite_changes_nothing_but_counters(make, mode, router, place):
    trainer = make(model={"router": router}, update={"mode": mode})
    trainer.train(3)
    arena = trainer.arena
    healthy = arena.read_lane(0)
    if place in ("head", "embedding"):
        arena.shared_layout.unpack(arena["shared"][0])[place].fill_(torch.nan)
    elif place == "culprit":  # all leaves, one of which will be it
        for slot in trainer.tree.blocks:
            if trainer.tree.is_leaf(slot):
                arena["weight"][0, slot] = torch.inf
    else:
        arena.block_layout.unpack(arena["weight"][0, 0])["router.bias"].fill_(torch.nan)
        if router == "mean":
            return  # the router is frozen and does not matter
    before = arena.read_lane(0).tensors
    report = trainer.step()
    assert report.skipped and report.scales == {}
    after = arena.read_lane(0).tensors
    changed = {name for name in after if not same_bits(after[name], before[name])}
    assert changed == {"step", "skipped", "data_cursor"}
    assert int(after["skipped"]) == 1 and int(after["step"]) == 4 and trainer.steps == 4
    for name in ("weight", "shared"):  # repaired, it goes on
        arena[name][0] = healthy.tensors[name]
    assert not trainer.step().skipped and int(arena["skipped"][0]) == 1


def test_a_skip_in_one_lane_leaves_the_other_alone(make):
    trainer = make(lanes=2)
    trainer.arena.copy_lane(0, 1)
    alone = trainer.fork()
    trainer.arena["shared"][1] = torch.nan
    result = Engine(trainer.arena, trainer.store, lane_chunk=2).step(0, 2)
    alone.step()
    assert result.skipped.tolist() == [False, True]
    torch.testing.assert_close(trainer.arena["weight"][0], alone.arena["weight"][0])
    assert trainer.arena["skipped"].tolist() == [0, 1]


def path_step(trainer, leaf):
    """One update of the path to a leaf at scale 1; returns (displacement, gradient) of the leaf."""
    batch, selection = next_batch(trainer), select(trainer, leaf)
    text, slot = read_text(batch, trainer.config), trainer.tree.slot_of(leaf)
    grad = both_gradients(trainer, selection)[2][slot]
    before = trainer.arena["weight"][0, slot].clone()
    trainer.engine.path_step(0, 1, batch, text, selection)
    return trainer.arena["weight"][0, slot] - before, grad


def test_a_fresh_blocks_first_update_is_no_larger_than_a_culprits(make):
    trainer = make(optimizer={"weight_decay": 0.0, "clip": 0.0, "beta2": 0.999}, train={"lr": 1e-3})
    for _ in range(40):
        path_step(trainer, 3)
    fresh = trainer.add_agent(4)
    slot = trainer.tree.slot_of(fresh)
    assert int(trainer.arena["count"][0, slot]) == 0
    shake(trainer, size=0.05)
    moved, grad = path_step(trainer, fresh)
    clear = grad.abs() > 1e-5
    assert clear.sum() > 500
    # At its own first step, Adam moves by the learning rate, whatever others' counters say.
    torch.testing.assert_close(moved[clear], -1e-3 * grad[clear].sign(), rtol=0.02, atol=1e-6)
    assert float(moved.abs().max()) <= 1.01e-3
    assert trainer.arena["count"][0, [slot, trainer.tree.slot_of(3)]].tolist() == [1, 40]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared_scale", [0.0, 1.0])
def test_clipping_is_by_the_norm_of_what_is_updated(make, mode, shared_scale):
    trainer = make(
        update={"mode": mode, "shared_scale": shared_scale}, optimizer={"clip": 0.01, "beta1": 0.5}
    )
    shake(trainer)
    trainer.step()
    # After a first step the first moment is half of the clipped gradient.
    squares = (2 * trainer.arena["first"][0]).square().sum()
    shared = (2 * trainer.arena["shared_first"][0]).square().sum()
    assert (shared > 0) == (shared_scale > 0)
    assert float((squares + shared).sqrt()) == pytest.approx(0.01, rel=1e-3)


def test_a_short_gradient_is_not_lengthened(make):
    moments = []
    for clip in (0.0, 1e6):
        trainer = make(optimizer={"clip": clip})
        trainer.step()
        moments.append(trainer.arena["shared_first"].clone())
    assert same_bits(*moments) and moments[0].any()


def displacement(make, start, step, lanes=1, **changes):
    """How far the shared part moves in one step from `start`, made at step number `step`."""
    trainer = make(lanes=lanes, **changes)
    for lane in range(lanes):
        trainer.arena.write_lane(lane, start)
        trainer.arena["step"][lane] = step
        trainer.arena.host_step[lane] = step
    return trainer


def test_warmup_rises_linearly(make):
    start = make().arena.read_lane(0)
    lengths = []
    for step in (0, 1, 4, 9, 30):
        config = {"warmup": 10, "weight_decay": 0.0}
        trainer = displacement(make, start, step, optimizer=config, update={"mode": "exact"})
        trainer.step()
        lengths.append(float((trainer.arena["shared"][0] - start.tensors["shared"]).norm()))
    ratios = [length / lengths[-1] for length in lengths]
    assert ratios == pytest.approx([0.1, 0.2, 0.5, 1.0, 1.0], rel=1e-3)


def test_learning_rate_and_its_factor_belong_to_each_lane(make):
    start = make().arena.read_lane(0)
    trainer = displacement(make, start, 1, lanes=4)
    arena = trainer.arena
    arena.set_hyper(1, "lr", 3e-3)
    arena["lr_factor"][2] = 0.5
    arena.set_hyper(3, "lr", 4e-3)
    arena["lr_factor"][3] = 0.25
    Engine(arena, trainer.store, lane_chunk=4).step(0, 4)
    lengths = (arena["shared"] - start.tensors["shared"]).norm(dim=1)
    assert (lengths / lengths[0]).tolist() == pytest.approx([1.0, 3.0, 0.5, 1.0], rel=1e-3)


def test_train_takes_a_learning_rate_factor_for_every_step(make):
    trainer = make(small_config(optimizer={"weight_decay": 0.0}))
    before = trainer.arena["weight"].clone()
    trainer.engine.train(0, 1, 3, factor=lambda i: 0.0)
    assert torch.equal(trainer.arena["weight"], before) and trainer.steps == 3
    trainer.engine.train(0, 1, 2, factor=lambda i: 1.0 - i)
    assert float(trainer.arena["lr_factor"][0]) == 0.0
    assert not torch.equal(trainer.arena["weight"], before)
