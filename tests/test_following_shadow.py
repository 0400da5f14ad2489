"""A shadow that is given an accepted change, because the gain outweighs earlier harm."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest

from k1 import edits
from k1.data import TextData
from k1env.gate import Comparison
from k1env.session import Session
from tests.attacks.helpers import attack, generous, play
from tests.phase2_helpers import index_of


@pytest.fixture
def session(data: TextData, monkeypatch: pytest.MonkeyPatch) -> Session:
    """One whose trials all pass, by more over the control than over the shadow."""
    settings, means = generous(monkeypatch), cycle((0.2, 0.1))

    def compare(_: list[float], cheat: list[float], *rest: Any, **more: Any) -> Comparison:
        mean = next(means)
        return Comparison((mean,) * len(cheat), mean, 0.01, 1e-6, True)

    monkeypatch.setattr("k1env.gate.compare", compare)
    made = attack(data, settings)
    play(made, "add under slot 0")
    return made


@pytest.mark.parametrize("salt", ["", "fork/"])
def test_it_goes_on_with_the_batches_of_the_system(session: Session, salt: str) -> None:
    session.salt = salt
    (outcome,) = play(session, "tune lr x0.5")
    assert outcome.trial is not None and outcome.credited and session.shadow_diverged
    for name in ("data_seed", "data_cursor", "step", "mix", "lr"):
        values = session.arena[name]
        assert values[session.main].tolist() == values[session.shadow].tolist(), name
    assert outcome.spent == outcome.trial.lane_steps + session.gate.config.horizon


def test_a_stop_leaves_nothing_to_follow(session: Session) -> None:
    (outcome,) = play(session, "stop")
    assert outcome.trial is not None and outcome.stopped and not session.shadow_diverged
    assert outcome.spent == outcome.trial.lane_steps


def test_another_agent_in_the_same_slot_stays(session: Session) -> None:
    """Or a controller could have its own replacement deleted, and with it the shadow's agent."""
    arena, moves = session.arena, session.moves
    arena.copy_lane(session.main, session.shadow)
    slot = max(s for s in session.tree.blocks if session.tree.is_leaf(s))
    action = session.table[index_of(session, f"delete slot {slot}")]
    parent = session.tree.blocks[slot].parent
    own = session.tree.copy()
    edits.delete_agent(arena, session.main, slot)
    replaced = edits.add_agent(arena, session.main, parent)
    assert replaced == slot
    moves.follow(action, session.shadow, session.tree, 1)
    assert arena.trees[session.shadow].blocks == own.blocks
    moves.follow(action, session.shadow, own, 1)
    assert slot not in arena.trees[session.shadow].blocks


@pytest.mark.parametrize("salt", ["", "fork/"])
def test_after_a_rollback_it_has_no_gain_and_the_systems_batches(
    session: Session, salt: str
) -> None:
    session.salt, session.guard.tolerance = salt, 0.0
    rate = session.arena.get_hyper(session.shadow)["lr"]
    (outcome,) = play(session, "tune lr x0.5")
    assert outcome.applied and outcome.rolled_back and session.shadow_diverged
    assert session.arena.get_hyper(session.shadow)["lr"] == rate
    for name in ("data_seed", "data_cursor", "mix"):
        values = session.arena[name]
        assert values[session.main].tolist() == values[session.shadow].tolist(), name
