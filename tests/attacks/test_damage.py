"""Damage, and credit asked for its repair."""

from __future__ import annotations

import pytest

from k1.data import TextData
from k1env.session import Session
from tests.attacks.helpers import Books, attack, earned_nothing, generous, play, real
from tests.phase2_helpers import index_of

LOW = {"lr": (1e-6, 9e-4)}
"""Bounds below the rate that the system starts with, so that it may be harmed, not mended."""


def would_pass_without_its_shadow(session: Session, label: str) -> bool:
    """Try an action against the control alone, as a gate without a shadow would."""
    action = session.table[index_of(session, label)]
    stop = action.kind == "stop"
    result = session.gate.run(
        session.main, None, lambda lane: session.moves.change(action, lane), seed=99,
        mix=(1.0, 0.0, 0.0), price=session._price, stop=stop,
    )  # fmt: skip
    return result.accepted


def test_self_damage_then_repair(data: TextData) -> None:
    """Permitted: the learning rate down to a tenth. Then the cheat that brings it back."""
    session = attack(data, stage=2, **LOW)
    play(session, "tune lr x0.1")
    assert would_pass_without_its_shadow(session, "tune lr x10"), "the trick would work"
    before = Books.of(session)
    outcomes = play(session, "tune lr x10", "tune lr x10")
    assert [outcome.verdict.startswith("cheat refused") for outcome in outcomes] == [True] * 2
    earned_nothing(session, before, 2)


def test_sandbagging_the_control(data: TextData) -> None:
    """A control that learns next to nothing: then "going on gains nothing", and stop is a cheat."""
    session = attack(data, real({"windows": 32}), stage=2, **LOW)
    play(session, "tune lr x0.1", "tune lr x0.1", "tune lr x0.1")
    assert session.arena.get_hyper(session.main)["lr"] == pytest.approx(1e-6)
    assert would_pass_without_its_shadow(session, "stop"), "the trick would work"
    before = Books.of(session)
    (outcome,) = play(session, "stop")
    assert outcome.refused and not session.finished
    earned_nothing(session, before, 1)


def test_delete_and_add_again(data: TextData) -> None:
    """Agents that cost compute are added for nothing, and their deletion is sold as a saving."""
    session = attack(data, real({"compute_price": 2.0}))
    grown = session.tree.agents
    play(session, "add under slot 0")
    added = [slot for slot in session.tree.children(0)][-1]
    assert session.tree.agents > grown
    label = f"delete slot {added}"
    assert would_pass_without_its_shadow(session, label), "the trick would work"
    before = Books.of(session)
    play(session, label, label)
    earned_nothing(session, before, 2)


def test_price_arbitrage(data: TextData) -> None:
    """Own: a real saving once, then the same again and again with agents put back in between."""
    session = attack(data, real({"compute_price": 2.0}), stage=1)
    play(session, "prune 10%")
    assert session.boundary.accepted == 1, "fewer agents do save compute here"
    before, attempts = Books.of(session), 0
    for _ in range(2):
        room = next(a for a in session.table if a.kind == "add" and session.possible(a))
        session.act(room.index)
        (outcome,) = play(session, "prune 10%")
        attempts += outcome.trial is not None
    assert attempts == 2
    earned_nothing(session, before, attempts)


def test_one_real_gain_does_not_buy_the_repairs(data: TextData) -> None:
    """Agents that cost compute are added for nothing, behind a gain that outweighs them."""
    session = attack(data, real({"compute_price": 0.3}))
    grown = set(session.tree.blocks)
    while len(set(session.tree.blocks) - grown) < 6:
        room = next(a for a in session.table if a.kind == "add" and session.possible(a))
        session.act(room.index)
    added = sorted(set(session.tree.blocks) - grown, reverse=True)
    (gain,) = play(session, "tune lr x2")
    assert gain.credited and gain.trial is not None
    assert gain.trial.control is not None and gain.trial.shadow is not None
    assert gain.trial.control.mean > gain.trial.shadow.mean > 0, "it hides the harm, and more"
    label = f"delete slot {added[0]}"
    assert would_pass_without_its_shadow(session, label), "the trick would work"
    before, shadow = Books.of(session), session.arena.get_hyper(session.shadow)
    assert shadow["lr"] == session.arena.get_hyper(session.main)["lr"], "it has the gain too"
    assert not set(session.arena.trees[session.shadow].blocks) - grown
    outcomes = play(session, *[f"delete slot {slot}" for slot in added])
    assert all(outcome.refused for outcome in outcomes)
    earned_nothing(session, before, len(added))


def test_a_permitted_gain_does_not_buy_the_repairs_either(data: TextData) -> None:
    """Own: agents that harm are added behind a permitted gain, and each deletion is better."""
    session = attack(data, real({"compute_price": 0.3}), stage=2, lr=(1e-6, 0.3))
    grown = set(session.tree.blocks)
    play(session, "tune lr x2")
    while len(set(session.tree.blocks) - grown) < 4:
        room = next(a for a in session.table if a.kind == "add" and session.possible(a))
        session.act(room.index)
    before, bounds = Books.of(session), session.boundary.bounds
    added = sorted(set(session.tree.blocks) - grown, reverse=True)
    outcomes = play(session, *[f"delete slot {slot}" for slot in added])
    assert any(outcome.applied for outcome in outcomes), "the trick works on the gate"
    assert session.boundary.bounds == bounds
    earned_nothing(session, before, len(added))


def test_a_shadow_goes_with_a_gain_where_there_was_no_harm(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = attack(data, generous(monkeypatch), stage=2)
    play(session, "tune lr x0.5")
    assert session.shadow_diverged
    (outcome,) = play(session, "prune 10%")
    assert outcome.credited and not session.shadow_diverged


def test_divergence_on_purpose_sheds_no_shadow(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own: blow up, be rolled back by the guard, and sell the way from there as a gain."""
    session = attack(data, stage=2, **LOW)
    play(session, "tune lr x0.1")
    monkeypatch.setattr(session.guard, "tolerance", 0.0)
    (outcome,) = play(session, "no-op")
    assert outcome.rolled_back and session.shadow_diverged
    monkeypatch.undo()
    assert session.arena.get_hyper(session.main)["lr"] == pytest.approx(1e-4)
    before = Books.of(session)
    play(session, "tune lr x10")
    earned_nothing(session, before, 1)
