"""What a controller is told of the compute that is left, and that the documents name all fields."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k1.data import TextData
from k1env import observation as fields
from k1env.env import Phase2Env
from k1env.observation import SYSTEM_FIELDS
from tests.phase2_helpers import index_of, smallest

LEFT, SPENT = SYSTEM_FIELDS.index("log of intervals left"), SYSTEM_FIELDS.index("budget spent")


def system_of(env: Phase2Env) -> np.ndarray:
    row = env.observe()[0]["system"]
    assert row.shape == (len(SYSTEM_FIELDS),)
    return row


@pytest.fixture(scope="module")
def env(data: TextData) -> Phase2Env:
    return Phase2Env(config=smallest(interval=2, budget=11, phase1_steps=0), data=data)


def test_what_is_left_falls_to_nothing(env: Phase2Env) -> None:
    env.reset(seed=0)
    found, ended = [float(system_of(env)[LEFT])], False
    wanted = [math.log1p(11 / 2)]
    while not ended:
        observation, _, terminated, truncated, _ = env.step(index_of(env, "no-op"))
        found.append(float(observation["system"][LEFT]))
        wanted.append(math.log1p(max(0, 11 - env.session.spent) / 2))
        ended = terminated or truncated
    assert env.session.out_of_budget and env.session.spent > 11, "it ends beyond the budget"
    assert found == pytest.approx([w / math.log(10_001) for w in wanted], rel=1e-6)
    assert found[-1] == 0 and all(0 <= value <= 1 for value in found)
    assert all(one > other for one, other in pairwise(found))


@pytest.mark.parametrize("spent", [0, 5])
def test_it_counts_intervals_where_the_share_does_not(data: TextData, spent: int) -> None:
    rows = []
    for scale in (1, 10, 10_000_000):
        env = Phase2Env(
            config=smallest(budget=10 * scale, interval=1, phase1_steps=0, max_decisions=9),
            data=data,
        )
        env.reset(seed=0)
        env.session.spent = spent * scale
        rows.append(system_of(env))
    shares, lefts = [row[SPENT] for row in rows], [float(row[LEFT]) for row in rows]
    assert shares == [spent / 10] * 3, "the same share of the budget"
    assert lefts[0] < lefts[1] < lefts[2] == 1.0, "of more intervals, and 1 at most"


def test_an_interval_counts_for_its_steps(env: Phase2Env) -> None:
    """Twice the budget in intervals that are twice as long is as much."""
    env.reset(seed=0)
    env.session.settings = smallest(interval=2, budget=24)
    one = float(system_of(env)[LEFT])
    env.session.settings = smallest(interval=4, budget=48)
    assert float(system_of(env)[LEFT]) == one > 0


def test_documents_count_the_fields_that_there_are(env: Phase2Env) -> None:
    found: dict[str, Any] = {
        name: space.shape[0]
        for name, space in env.observation_space.spaces.items()  # type: ignore[attr-defined]
    }
    page = (Path(__file__).parent.parent / "docs" / "environment.md").read_text()
    text = Phase2Env.__doc__ or ""
    for name in ("system", "hyper", "boundary"):
        assert f"**`{name}` ({found[name]})**" in page
        assert f"`{name}` ({found[name]})" in text
    slots = found["agents"] // len(fields.AGENT_FIELDS)
    assert found["agents"] == slots * len(fields.AGENT_FIELDS)
    assert f"**`agents` ({len(fields.AGENT_FIELDS)} S)**" in page
    assert f"**`domains` ({len(fields.DOMAIN_FIELDS)} D)**" in page
    start = page.index("**`system`")
    listed = page[start : page.index("\n\n", start)].split(":", 1)[1]
    assert len(re.split(r";\s", listed)) == len(SYSTEM_FIELDS), "one phrase for each"
