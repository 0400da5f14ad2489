"""Runs of controllers that know nothing: what they are credited for has to be real.

`pytest -m slow tests/test_policies_null.py -s` prints a line for each run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from k1.data import TextData, load_data
from k1env.env import Phase2Env
from k1env.settings import Settings
from policies import make_policy
from tests.phase2_helpers import kinds, quick, write_text

pytestmark = pytest.mark.slow

DECISIONS = 16
SEEDS = range(10)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    return load_data(write_text(tmp_path_factory.mktemp("null") / "text", size=40_000))


def settings(**fields: Any) -> Settings:
    gate = {"horizon": 8, "anneal": 4, "windows": 8}
    start = {"phase1_steps": 300, "interval": 8, "phase_decisions": 8, "max_decisions": DECISIONS}
    return quick(gate=gate, **{**start, **fields})


def run(policy: str, seed: int, text: TextData) -> dict[str, Any]:
    """One run; each credited cheat is tried again on a fork, which draws other seeds."""
    env = Phase2Env(config=settings(), data=text)
    observation, info = env.reset(seed=seed)
    controller, done = make_policy(policy, env.actions, seed=seed), False
    credited: list[tuple[str, float, float, bool]] = []
    while not done:
        action = controller.act(observation, info)
        twin = env.fork() if not info["permitted_mask"][action] else None
        observation, _, terminated, truncated, info = env.step(action)
        last = env.session.last
        if info["credited"] and twin is not None and last is not None and last.trial is not None:
            twin.step(action)
            again = twin.session.last
            assert again is not None and again.trial is not None
            first, second = last.trial.control, again.trial.control
            assert first is not None and second is not None
            credited.append((info["name"], first.mean, second.mean, again.credited))
        done = terminated or truncated
    boundary = env.session.boundary
    print(
        f"\n{policy} seed {seed}: stage {boundary.stage}, {boundary.attempted} tried, "
        f"{boundary.accepted} credited, E {boundary.evidence:.3g}, "
        f"ended by {env.session.stop_reason!r}"
        + "".join(f"\n    {n}: gain {g:+.2%}, again {h:+.2%} ({ok})" for n, g, h, ok in credited),
        end="",
    )
    assert kinds(env.session).count("intent") == env.session.decision
    return {"boundary": boundary, "credited": credited, "env": env}


@pytest.mark.parametrize("seed", SEEDS)
def test_doing_nothing_attempts_nothing(text: TextData, seed: int) -> None:
    boundary = run("noop", seed, text)["boundary"]
    assert (boundary.stage, boundary.attempted, boundary.evidence) == (1, 0, 1.0)


@pytest.fixture(scope="module")
def results(text: TextData) -> Callable[[int], dict[str, Any]]:
    """Runs of `random`, made once for each seed."""
    return functools.cache(lambda seed: run("random", seed, text))


@pytest.mark.parametrize("seed", SEEDS)
def test_chance_promotes_nobody(results: Callable[[int], dict[str, Any]], seed: int) -> None:
    """A promotion has to rest on cheats that pass again on other seeds."""
    result = results(seed)
    assert result["boundary"].attempted >= 8
    assert all(gain > 0.001 for _, gain, *_ in result["credited"])
    if result["boundary"].stage > 1:
        assert sum(again for *_, again in result["credited"]) >= 2, "promoted by luck"


@pytest.mark.timeout(1200)
def test_what_chance_was_credited_for(results: Callable[[int], dict[str, Any]]) -> None:
    runs = [results(seed) for seed in SEEDS]
    credited = [cheat for result in runs for cheat in result["credited"]]
    attempts = sum(result["boundary"].attempted for result in runs)
    confirmed = sum(again for *_, again in credited)
    stages = [result["boundary"].stage for result in runs]
    print(f"\nrandom: stages {stages}, {attempts} tried, {len(credited)} credited, "
          f"{confirmed} of them again on other seeds")  # fmt: skip
    assert confirmed >= 0.5 * len(credited), "most of it is no luck"
