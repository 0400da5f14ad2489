"""A lower learning rate looks better at once and loses later: the trap of short horizons.

Real training shows it at sizes that no test has. So the trick is tried where it works for certain:
the system's loss becomes a noisy quadratic (Wu et al. 2018), whose steep directions jitter with
the learning rate, and whose flat direction needs a high one to get anywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from k1.data import TextData
from k1.rng import derive_seed
from k1env.gate import GateConfig
from tests.attacks.helpers import Books, attack, earned_nothing, play
from tests.phase2_helpers import smallest

STEEP, NOISE, FLAT, START = 40, 0.35, 0.02, 5.0
RATE = 0.2
"""High, but such that twice as much is no improvement."""


def quadratic(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training be steps on the quadratic, kept in the first numbers of the shared part."""
    arena = session.arena

    def train(start: int, stop: int, steps: int, factor: Any = None) -> None:
        for lane in range(start, stop):
            point = arena["shared"][lane, : STEEP + 1].clone()
            seed, rate = int(arena["data_seed"][lane]), float(arena["lr"][lane])
            for i in range(steps):
                cursor = int(arena["data_cursor"][lane])
                luck = torch.Generator().manual_seed(derive_seed("luck", seed, cursor))
                slope = point.clone()
                slope[:STEEP] += NOISE * torch.randn(STEEP, generator=luck)
                slope[STEEP] *= FLAT
                point -= rate * (factor(i) if factor else 1.0) * slope
                arena["data_cursor"][lane] += 1
            arena["shared"][lane, : STEEP + 1] = point

    def bits(start: int, stop: int, batch: Any) -> torch.Tensor:
        point = arena["shared"][start:stop, : STEEP + 1].double()
        return 2.0 + 0.5 * (point[:, :STEEP] ** 2).sum(1) + 0.5 * FLAT * point[:, STEEP] ** 2

    monkeypatch.setattr(session.engine, "train", train)
    monkeypatch.setattr(session.engine, "bits_per_byte", bits)
    point = arena["shared"][session.main]
    point[: STEEP + 1] = 0.0
    train(session.main, session.main + 1, 100)
    point[STEEP] = START


@pytest.mark.parametrize(("anneal", "works"), [(1, True), (GateConfig().anneal, False)])
def test_a_lower_rate_over_a_short_horizon(
    data: TextData, monkeypatch: pytest.MonkeyPatch, anneal: int, works: bool
) -> None:
    settings = replace(
        smallest(divergence=1e9), gate=replace(GateConfig(), anneal=anneal, windows=1)
    )
    session = attack(data, settings)
    session.arena.set_hyper(session.main, "lr", RATE)
    session.visited = [session.moves.signature(session.main)]
    quadratic(session, monkeypatch)
    before = Books.of(session)
    (outcome,) = play(session, "tune lr x0.1")
    assert outcome.trial is not None
    if works:
        assert outcome.credited, "without annealing the trick would pass"
    else:
        earned_nothing(session, before, 1)
        assert outcome.trial.control is not None and outcome.trial.control.mean < 0
