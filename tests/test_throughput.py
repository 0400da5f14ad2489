"""The measurement of environment steps a second: it runs, and its figures mean what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from k1.errors import K1Error
from k1env.setup import set_up
from policies.throughput import TIERS, PlainLoop, Plan, Vector, markdown, measure, sides, table
from tests.phase2_helpers import quick


@pytest.fixture(scope="module")
def plan() -> Plan:
    setup = set_up("tiny", data=None, config=quick(), start=None, device="cpu", instance="train")
    return Plan(
        quick(phase1_steps=0), setup.data, torch.device("cpu"), lanes=(1, 2), processes=1,
        tiers=tuple(TIERS), rounds=1, seconds=1e-3,
    )  # fmt: skip


def test_every_side_and_tier_has_a_figure(plan: Plan) -> None:
    said: list[str] = []
    kept: list[int] = []
    records = measure(plan, said.append, lambda records: kept.append(len(records)))
    assert kept == [4, 7, 10, 13] and len(records) == 13
    several = {"1 lane", "2 lanes", "1 processes"}
    for tier in TIERS:
        own = {r["side"]: r for r in records if r["tier"] == tier}
        assert own.keys() == several | ({"plain loop"} if tier == "no-op" else set())
        first = own["1 lane"]["steps_per_second"]
        for record in own.values():
            assert record["steps_per_second"] > 0 and len(record["rounds"]) == 1
            assert record["times"] == pytest.approx(record["steps_per_second"] / first)
    assert any("learning, round 1 of 1" in line for line in said)
    shown = table(records)
    assert shown.headers == ["", *TIERS]
    assert shown.rows[-1] == ["plain loop", shown.rows[-1][1], "-", "-", "-"]
    result = {"records": records, "rounds": 1, "device": "a CPU", "versions": "some",
              "about": "small", "command": "python x", "peak_bytes": None}  # fmt: skip
    assert "| 2 lanes | " in markdown(result)


def test_a_turn_counts_its_steps(plan: Plan) -> None:
    built = sides(replace(plan, processes=0), lambda line: None)
    pair, loop = built["2 lanes"], built["plain loop"]
    assert isinstance(pair, Vector) and isinstance(loop, PlainLoop)
    before = [env.session.spent for env in pair.venv.vec_env.envs]  # type: ignore[attr-defined]
    assert pair.turn("no-op") == 2
    after = [env.session.spent for env in pair.venv.vec_env.envs]  # type: ignore[attr-defined]
    assert [b - a for a, b in zip(before, after, strict=True)] == [plan.settings.interval] * 2
    assert pair.turn("learning") == 16 and pair.model.num_timesteps == 16
    weights = [p.detach().clone() for p in loop.trainer.parameters]
    assert loop.turn("no-op") == 1 and loop.trainer.steps == plan.settings.interval
    moved = zip(weights, loop.trainer.parameters, strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


def test_what_cannot_be_measured_is_refused(plan: Plan) -> None:
    for change, words in (
        ({"tiers": ("no-op", "thinking")}, "unknown tier 'thinking'"),
        ({"lanes": ()}, "--lanes are 1 or more"),
        ({"rounds": 0}, "are positive"),
    ):
        with pytest.raises(K1Error, match=words):
            replace(plan, **change)  # type: ignore[arg-type]
