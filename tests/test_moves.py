"""Masks of the actions: kept as long as nothing has changed, and never longer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from k1 import edits
from k1.trainer import Trainer
from k1env.actions import ADD, TUNE, Action
from k1env.boundary import Boundary, Request
from k1env.moves import Moves
from tests.phase2_helpers import boundary_at


def computed(moves: Moves, boundary: Boundary) -> tuple[list[int], list[int]]:
    """The masks from what is there now, action by action."""
    possible = [moves.why_impossible(action, boundary) is None for action in moves.table]
    permitted = [
        can and boundary.rule(moves.request(action)).permitted
        for action, can in zip(moves.table, possible, strict=True)
    ]
    return [int(can) for can in possible], [int(may) for may in permitted]


def check(moves: Moves, boundary: Boundary) -> tuple[list[int], list[int]]:
    wanted = computed(Moves(moves.arena, moves.lane), boundary)
    mean = moves.arena["mean_responsibility"][moves.lane].tolist()
    for known in (mean, None):
        found = moves.masks(boundary, known)
        assert tuple(mask.tolist() for mask in found) == wanted
        for mask in found:
            assert mask.dtype == np.int8
            mask[:] = 7  # it is the caller's own
    return wanted


def chosen(moves: Moves, kind: str, rng: np.random.Generator) -> Action:
    alike = [a for a in moves.table if a.kind == kind and not moves_nothing(moves, a)]
    return alike[int(rng.integers(len(alike)))] if alike else moves.table[0]


def moves_nothing(moves: Moves, action: Action) -> bool:
    return moves.why_impossible(action, boundary_at(4)) is not None


@pytest.mark.parametrize("seed", range(4))
def test_masks_follow_every_change(make: Any, seed: int) -> None:
    trainer: Trainer = make(lanes=2)
    arena, rng = trainer.arena, np.random.default_rng(seed)
    arena.reset_lane(1, 5, (3, 1))
    capacity = arena.scratch - 1
    moves, boundary, saved = Moves(arena, 0), boundary_at(1, capacity), arena.read_lane(1)
    met, kinds = set(), ("add", "delete", "prune", "tune")
    for _ in range(70):
        turn = str(
            rng.choice([*kinds, "train", "stage", "widen", "copy", "write", "save", "hyper"])
        )
        if turn in kinds:
            moves.change(chosen(moves, turn, rng), 0)
        elif turn == "train":
            slots = arena["mean_responsibility"].shape[1]
            arena["mean_responsibility"][0] = arena["mean_responsibility"].new_tensor(
                rng.random(slots)
            )
            trainer.engine.train(0, 1, 1)
        elif turn == "stage":
            boundary = boundary_at(int(rng.integers(1, 5)), capacity)
        elif turn == "widen":
            tune = chosen(moves, TUNE, rng)
            boundary.record(True, Request(tune, float(10 ** rng.uniform(-6, 2)), 6), 0)
        elif turn == "copy":
            arena.copy_lane(1, 0)
        elif turn == "write":
            arena.write_lane(0, saved)
        elif turn == "save":
            saved = arena.read_lane(0)
        else:
            arena.set_hyper(0, "top_k", int(rng.integers(1, 9)))
        met.add(repr(check(moves, boundary)))
    assert len(met) > 15


def partly_full(make: Any) -> tuple[Trainer, int, int]:
    """A root of which one child's subtree fits once more and the other's does not."""
    trainer: Trainer = make()
    trainer.add_agent(1)
    large, small = trainer.tree.slot_of(1), trainer.tree.slot_of(2)
    assert not trainer.tree.room_for_copy(large)
    trainer.delete_agent(trainer.tree.blocks[trainer.tree.children(small)[0]].id)
    trainer.add_agent(1)
    assert trainer.tree.room_for_copy(small) and not trainer.tree.room_for_copy(large)
    assert edits.depends_on_split(trainer.tree, 0)
    return trainer, large, small


def test_training_can_change_whether_an_agent_can_be_added(make: Any) -> None:
    trainer, large, small = partly_full(make)
    arena, boundary = trainer.arena, boundary_at(1)
    moves = Moves(arena, 0)
    add = next(a.index for a in moves.table if a.kind == ADD and a.slot == 0)
    found = []
    for most, least in ((small, large), (large, small), (small, large)):
        arena["mean_responsibility"][0, most] = 1e3
        arena["mean_responsibility"][0, least] = 0.0
        trainer.train(1)
        found.append(check(moves, boundary)[0][add])
    assert found == [1, 0, 1]


def test_masks_are_worked_out_once_while_nothing_changes(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Trainer = make()
    moves, boundary = Moves(trainer.arena, 0), boundary_at(2)
    first = moves.masks(boundary)
    assert not any(edits.depends_on_split(trainer.tree, slot) for slot in trainer.tree.blocks)
    trainer.train(2)  # no split depends on which child is the most responsible
    with monkeypatch.context() as patched:
        patched.setattr(moves, "why_impossible", None)
        again = moves.masks(boundary)
        assert all(map(np.array_equal, first, again))
        assert all(a is not b for a, b in zip(first, again, strict=True))
        trainer.add_agent(1)
        with pytest.raises(TypeError):
            moves.masks(boundary)
    check(moves, boundary)
