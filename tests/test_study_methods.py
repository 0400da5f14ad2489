"""The ways to train that the study compares: each does what its name says."""

from itertools import pairwise

import pytest
import torch

from k1.bench.methods import METHODS, CoordinateEngine, VisitEngine, choose_methods
from k1.engine import Engine
from k1.errors import ConfigError
from k1.forward import read_text
from k1.optimizer import Rows, adamw, clip_factor
from tests.reference import next_batch, same_bits, shake, small_config

BY_NAME = {method.name: method for method in METHODS}
WIDE = {"branching": (3, 2)}
LEAVES = 6
ONE_PATH = {"top_k": 2}


def system(make, name, **sections):
    """A trainer whose engine is the method's."""
    trainer = make(BY_NAME[name].configure(small_config(**sections)))
    return trainer, BY_NAME[name].engine(trainer.arena, trainer.store, 1)


def culprits(trainer, engine, steps):
    return [int(engine.step(0, 1).selection.culprits[0, 0]) for _ in range(steps)]


def test_methods_are_chosen_by_name_and_dense_leads():
    assert [m.name for m in choose_methods("visits,sparse,dense")] == ["dense", "visits", "sparse"]
    assert choose_methods("all") == METHODS
    with pytest.raises(ConfigError, match="unknown method 'thin'"):
        choose_methods("sparse,thin")


def test_round_robin_always_takes_the_leaf_updated_longest_ago(make):
    trainer, engine = system(make, "round-robin", model=WIDE, train=ONE_PATH)
    seen = culprits(trainer, engine, 4 * LEAVES)
    assert len(set(seen[:LEAVES])) == LEAVES
    assert seen == seen[:LEAVES] * 4


def test_random_paths_are_spread_evenly_and_in_no_order(make):
    trainer, engine = system(
        make, "random", model=WIDE, train={"batch": 1, **ONE_PATH}, evidence={"buckets": 2}
    )
    seen = culprits(trainer, engine, 240)
    counts = [seen.count(leaf) for leaf in set(seen)]
    assert len(counts) == LEAVES
    assert sum((count - 40) ** 2 / 40 for count in counts) < 20.5  # chi-square, 5 degrees: 0.999
    after = set(pairwise(seen))
    assert len(after) == LEAVES**2


@pytest.mark.parametrize("name", ["random", "round-robin"])
def test_what_needs_no_attribution_does_none_after_the_first(make, name):
    trainer, engine = system(make, name)
    engine.train(0, 1, 1)
    first = trainer.arena["responsibility"].clone()
    engine.train(0, 1, 9)
    assert first.any() and same_bits(trainer.arena["responsibility"], first)


def test_visit_normalised_responsibility_divides_by_the_root_of_the_updates(make):
    trainer = make(small_config(model=WIDE))
    engines = [kind(trainer.arena, trainer.store, 1) for kind in (Engine, VisitEngine)]
    generator = torch.Generator().manual_seed(0)
    shape = trainer.arena["updates"].shape
    differ = 0
    for _ in range(20):
        measured = torch.rand(shape, generator=generator)
        updates = torch.randint(0, 2, shape, generator=generator) * 99
        trainer.arena["updates"].copy_(updates)
        plain, divided = (engine._select(0, 1, measured) for engine in engines)
        expected = engines[0]._select(0, 1, measured / torch.sqrt(1.0 + updates))
        assert torch.equal(divided.culprits, expected.culprits)
        differ += int(plain.culprits[0, 0] != divided.culprits[0, 0])
    assert differ > 5


def parts_of(arena):
    """Every block's row and the shared row, with their moments."""
    names = ("weight", "first", "second", "count")
    parts = {s: [arena[n][0, s].clone() for n in names] for s in sorted(arena.trees[0].blocks)}
    shared = ("shared", "shared_first", "shared_second", "shared_count")
    return parts | {None: [arena[name][0].clone() for name in shared]}


@pytest.mark.parametrize("name", ["bcd-10", "bcd-10-shared", "bcd-10-path"])
def test_block_coordinate_descent_moves_the_active_part_alone(make, name):
    trainer, engine = system(make, name)
    arena, always = trainer.arena, set() if name == "bcd-10" else {None}
    parts = [*arena.trees[0].blocks, *(() if always else (None,))]
    for epoch in range(2):
        taken = []
        for number in range(len(parts)):
            before = parts_of(arena)
            engine.train(0, 1, 10)
            after = parts_of(arena)
            moved = {part for part in before if not same_bits(before[part][0], after[part][0])}
            still = [part for part in before if part not in moved]
            (active,) = moved - always if always else moved
            assert active == engine.turn(0, epoch * len(parts) + number)
            assert int(after[active][3]) == 10  # the count starts anew with the moments
            for part in still:
                assert all(same_bits(*pair) for pair in zip(before[part], after[part], strict=True))
            taken.append(active)
        assert sorted(map(str, taken)) == sorted(map(str, parts))
        if epoch == 0:
            first_order = taken
    assert taken != first_order


def test_lanes_and_seeds_have_orders_of_their_own(make):
    method = BY_NAME["bcd"]
    trainer = make(method.configure(small_config()), lanes=2)
    trainer.arena.reset_lane(1, 5)
    engine = method.engine(trainer.arena, trainer.store, 1)
    orders = [[engine.turn(lane, k) for k in range(16)] for lane in (0, 1)]
    assert orders[0] != orders[1]
    again = method.engine(trainer.arena, trainer.store, 1)
    assert orders == [[again.turn(lane, k) for k in range(16)] for lane in (0, 1)]


@pytest.mark.parametrize("router", ["learned", "evidence"])
@pytest.mark.parametrize("slot_kind", ["root", "inner", "leaf", "shared"])
def test_a_turn_is_adam_with_the_exact_gradient(make, router, slot_kind):
    """Three steps of a turn against Adam on the gradient of a full backward pass."""
    trainer, engine = system(make, "bcd-10", model={"router": router})
    arena = trainer.arena
    shake(trainer, size=0.1)
    wanted = {"root": 0, "inner": 1, "leaf": arena.index(0, 1)[2].offset, "shared": None}[slot_kind]
    number = next(k for k in range(100) if engine.turn(0, k) == wanted)
    engine.first_step[0] = -10 * number
    reference = Engine(arena, trainer.store, 1)
    rate = float(arena["lr"][0])
    for name in ("first", "second", "shared_first", "shared_second"):
        arena[name].fill_(0.5)  # old moments that a turn has to forget
    expected = None
    for _ in range(3):
        batch = next_batch(trainer)
        _, grads, shared, _ = reference.gradients(0, 1, batch, read_text(batch, arena.config))
        grad = shared if wanted is None else torch.cat(grads, 1)[:, rows_of(arena).index(wanted)]
        grad = grad * clip_factor(grad.square().sum(1), arena.config.optimizer.clip)[:, None]
        now = arena["shared"][:1] if wanted is None else arena["weight"][:1, wanted]
        if expected is None:
            zero = torch.zeros_like(now)
            expected = Rows(now.clone(), zero, zero, torch.zeros(1, dtype=torch.int64))
        lr, on = torch.tensor([rate]), torch.tensor([True])
        expected = adamw(expected, grad, lr, on, arena.config.optimizer)
        engine.train(0, 1, 1)
        now = arena["shared"][:1] if wanted is None else arena["weight"][:1, wanted]
        torch.testing.assert_close(now, expected.weight, rtol=1e-4, atol=2e-5)


def rows_of(arena):
    """The slots that `gradients` returns, level by level."""
    return [i.offset + k for i in arena.index(0, 1) for k in range(i.width)]


def test_the_cheap_gradient_leaves_things_out(make):
    """`bcd-10-path` differs from the exact one for an inner block; so the flag does something."""
    moved = []
    for name in ("bcd-10-shared", "bcd-10-path"):
        trainer, engine = system(make, name)
        shake(trainer, size=0.1)
        number = next(k for k in range(100) if engine.turn(0, k) == 1)
        engine.first_step[0] = -10 * number
        engine.train(0, 1, 1)
        moved.append((trainer.arena["first"][0, 1].clone(), engine.path_blocks[0]))
    assert not torch.allclose(moved[0][0], moved[1][0], rtol=1e-3)
    assert [blocks for _, blocks in moved] == [4, 2]  # root, block, two children; root, block


def test_no_text_is_counted_in_block_coordinate_descent(make):
    trainer, engine = system(make, "bcd-10-shared")
    assert isinstance(engine, CoordinateEngine)
    engine.train(0, 1, 20)
    assert not trainer.arena["evidence"].any()
