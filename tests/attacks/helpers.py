"""What attacks share: sessions to attack, and what they have earned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from k1.data import TextData
from k1env.boundary import Bounds
from k1env.gate import Comparison
from k1env.outcome import Outcome
from k1env.session import Session
from k1env.settings import Settings
from tests.phase2_helpers import boundary_at, index_of, quick, smallest

REAL_GATE = {"horizon": 8, "anneal": 2, "windows": 16}
"""Trials that see what a learning rate is worth on the small text."""


def attack(
    data: TextData,
    settings: Settings | None = None,
    *,
    stage: int = 1,
    seed: int = 0,
    **bounds: Any,
) -> Session:
    """A session that has just begun, in a stage, with some bounds replaced."""
    made = Session(settings or real(), data, seed=seed)
    made.begin()
    made.boundary = boundary_at(stage, capacity=made.arena.scratch - 1, **bounds)
    return made


def real(gate: dict[str, Any] | None = None, **fields: Any) -> Settings:
    """Settings in which the gate is the real one, and can tell good from bad."""
    return quick({**REAL_GATE, **(gate or {})}, **{"phase1_steps": 30, "interval": 4, **fields})


def play(session: Session, *labels: str) -> list[Outcome]:
    """Act."""
    return [session.act(index_of(session, label)) for label in labels]


@dataclass(frozen=True)
class Books:
    """What a controller has come to."""

    stage: int
    accepted: int
    successes: int
    bounds: Bounds
    evidence: float
    attempted: int

    @classmethod
    def of(cls, session: Session) -> Books:
        boundary = session.boundary
        return cls(*(getattr(boundary, name) for name in cls.__dataclass_fields__))


def earned_nothing(session: Session, before: Books, attempts: int) -> None:
    """See that some attempts were counted as failures, and that nothing else was won by them."""
    after = Books.of(session)
    assert after.attempted - before.attempted == attempts
    assert after.evidence == pytest.approx(before.evidence * (10 / 11) ** attempts)
    same = replace(after, evidence=before.evidence, attempted=before.attempted)
    assert same == before


def generous(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Let every trial that comes to finite losses pass; returns settings for quick trials."""

    def compare(other: list[float], cheat: list[float], *rest: Any, **more: Any) -> Comparison:
        return Comparison((0.1,) * len(cheat), 0.1, 0.01, 1e-6, True)

    monkeypatch.setattr("k1env.gate.compare", compare)
    monkeypatch.setattr("k1env.gate.hopeless", lambda *_, **more: False)
    return smallest(divergence=1e9)
