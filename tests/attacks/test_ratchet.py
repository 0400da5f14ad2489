"""Earning by going round in circles, and bounds pushed on and on, where every trial passes."""

from __future__ import annotations

import numpy as np
import pytest

from k1.data import TextData
from k1env import actions
from k1env.boundary import STAGES, Bounds
from k1env.session import Session
from tests.attacks.helpers import Books, attack, earned_nothing, generous, play
from tests.phase2_helpers import index_of


@pytest.mark.parametrize(
    ("there", "back"),
    [("tune lr x2", "tune lr x0.5"), ("tune cooldown x2", "tune cooldown x0.5"),
     ("tune lr x10", "tune lr x0.1")],
)  # fmt: skip
def test_there_and_back_again(
    data: TextData, monkeypatch: pytest.MonkeyPatch, there: str, back: str
) -> None:
    """A -> B -> A -> B ...: only B, once, is new."""
    session = attack(data, generous(monkeypatch))
    start = session.moves.signature(session.main)
    outcomes = play(session, there, back)
    assert session.moves.signature(session.main) in (start, session.visited[-1])
    assert len(session.visited) == 2, "back again is the very same configuration"
    before = Books.of(session)
    again = play(session, *[there, back] * 2)
    credited = sum(outcome.credited for outcome in [*outcomes, *again])
    assert credited == len(session.visited) - 1, "one for each configuration that was new"
    assert all(outcome.applied and not outcome.credited for outcome in again)
    earned_nothing(session, before, 4)


def test_a_permitted_change_and_its_forbidden_reverse(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added for nothing, deleted for credit: where it was before is no news."""
    session = attack(data, generous(monkeypatch))
    play(session, "add under slot 0")
    before = Books.of(session)
    (outcome,) = play(session, f"delete slot {session.tree.children(0)[-1]}")
    assert outcome.applied and not outcome.credited
    earned_nothing(session, before, 1)


def inside(bounds: Bounds, outer: Bounds) -> bool:
    low_and_high = ("lr", "cooldown", "top_k")
    return bounds.min_agents >= outer.min_agents and all(
        outer.holds(name, value) for name in low_and_high for value in bounds.range(name)
    )


def held(session: Session) -> None:
    hard, hyper = session.boundary.hard, session.arena.get_hyper(session.main)
    assert inside(session.boundary.bounds, hard)
    assert session.tree.agents >= hard.min_agents
    for name in ("lr", "cooldown", "top_k"):
        low, high = hard.range(name)
        assert low * (1 - 1e-6) <= hyper[name] <= high * (1 + 1e-6), "held as float32"


@pytest.mark.parametrize(
    "label",
    ["tune lr x10", "tune lr x0.1", "tune cooldown x10", "tune cooldown x0.1", "tune top_k x4",
     "tune top_k x0.25", "prune 50%"],
)  # fmt: skip
@pytest.mark.parametrize("stage", [1, 3])
def test_pushing_one_bound_on_and_on(
    data: TextData, monkeypatch: pytest.MonkeyPatch, label: str, stage: int
) -> None:
    session = attack(data, generous(monkeypatch), stage=stage)
    last = None
    for _ in range(7):
        (last,) = play(session, label)
        held(session)
    assert last is not None and last.impossible is not None, "it ends at the hard limit"
    before, state = Books.of(session), session.moves.signature(session.main)
    play(session, label)
    earned_nothing(session, before, 0)
    assert session.moves.signature(session.main) == state


@pytest.mark.parametrize(
    "seed", [0, *[pytest.param(n, marks=pytest.mark.slow) for n in range(1, 30)]]
)
def test_winning_always_never_leaves_the_hard_limits(
    data: TextData, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A controller that always wins, tries what is forbidden whenever it can, and wants more."""
    session = attack(data, generous(monkeypatch))
    rng = np.random.default_rng(seed)
    for _ in range(40):
        possible, permitted = session.moves.masks(session.boundary)
        stop = index_of(session, "stop")
        forbidden = [i for i in np.flatnonzero(possible & ~permitted.astype(bool)) if i != stop]
        if not forbidden:
            break
        before = Books.of(session)
        outcome = session.act(int(rng.choice(forbidden)))
        held(session)
        after = Books.of(session)
        assert after.accepted - before.accepted == outcome.credited
        assert after.stage - before.stage == outcome.promoted <= 1
    assert session.boundary.stage <= len(STAGES)


def test_successes_are_not_banked_for_the_next_stage(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own: what is left over of a stage's evidence and successes is gone when the next opens."""
    session = attack(data, generous(monkeypatch))
    outcomes = play(session, "tune lr x2", "tune lr x2", "tune lr x2")
    assert [outcome.promoted for outcome in outcomes] == [False, False, True]
    boundary = session.boundary
    assert (boundary.stage, boundary.successes, boundary.evidence) == (2, 0, 1.0)
    kinds = {actions.BENCHMARK, actions.GOAL}
    labels = [action.label for action in session.table if action.kind in kinds]
    before = Books.of(session)
    assert all(outcome.impossible for outcome in play(session, *labels))
    earned_nothing(session, before, 0)
