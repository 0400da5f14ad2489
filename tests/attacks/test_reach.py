"""What a controller can lay its hands on: the gate pool, numbers, arrays, the end, stage 4."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from k1.data import TextData
from k1.errors import K1Error
from k1env.actions import ActionError
from k1env.env import Phase2Env
from k1env.outcome import MemoryLedger
from k1env.session import Session
from k1env.vector import Phase2VectorEnv
from tests.attacks.helpers import Books, attack, earned_nothing, generous, play
from tests.phase2_helpers import boundary_at, index_of, kinds, smallest

BAD: list[Any] = [
    math.nan, math.inf, -math.inf, 0.5, -1, 10**30, None, "0", b"0", [0], {}, np.nan,
    np.float64(1), np.array([0, 1]), np.array(math.inf), complex(0, 1), 1e400, object(),
]  # fmt: skip


def begin(data: TextData, **gate: Any) -> Phase2Env:
    env = Phase2Env(config=smallest(gate), data=data)
    env.reset(seed=0)
    return env


def state_of(env: Phase2Env) -> Any:
    session = env.session
    logged = len(kinds(session)) if isinstance(session.ledger, MemoryLedger) else 0
    return session.trainer.state_hash(), Books.of(session), session.spent, logged


# -- the gate pool -------------------------------------------------------------------------------


def test_memorising_the_gate_pool(data: TextData) -> None:
    """What a controller is shown does not depend on the gate pool, and nothing trains on it."""
    shown = []
    for scramble in (False, True):
        env = begin(data, alpha=1e-12)
        store = env.session.engine.store
        if scramble:
            for domain in range(len(store.domains)):
                first, length = store.extent[1, domain].tolist()
                window = store.tokens[first : first + length]
                window.copy_(window.flip(0))
        seen = [env.observe()]
        for label in ("no-op", "add under slot 0", "tune lr x2", "no-op"):
            observation, reward, _, _, info = env.step(index_of(env, label))
            assert not info["credited"], "whether a cheat passed is all that may differ"
            seen.append((observation, reward, info))
        shown.append((repr(seen), env.session.trainer.state_hash()))
    assert shown[0] == shown[1]


def test_windows_of_the_gate_are_never_met_again(data: TextData) -> None:
    session = attack(data, smallest())
    play(session, *["tune lr x2"] * 8)
    ledger: Any = session.ledger
    trials = [entry["trial"] for kind, entry in ledger.entries if kind == "outcome"]
    windows = [digest for trial in trials for digest in trial["window_digests"]]
    assert len(windows) == len(set(windows)) == 16


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD, ids=[f"{i}-{type(bad).__name__}" for i, bad in enumerate(BAD)])
def test_no_number_but_an_action_is_one(data: TextData, bad: Any, env: Phase2Env) -> None:
    before = state_of(env)
    for reach in (env.step, env.peek):
        with pytest.raises(ActionError) as error:
            reach(bad)
        assert "\n" not in str(error.value)
    assert state_of(env) == before


@pytest.fixture(scope="module")
def env(data: TextData) -> Phase2Env:
    return begin(data)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1, 0.5, "x"])
def test_seeds_that_are_none(env: Phase2Env, bad: Any) -> None:
    before = state_of(env)
    with pytest.raises((gym.error.Error, K1Error, TypeError)):
        env.reset(seed=bad)
    assert state_of(env) == before


def test_one_bad_action_among_many_moves_nobody(data: TextData) -> None:
    envs = Phase2VectorEnv(2, config=smallest(), data=data, device="cpu")
    envs.reset(seed=0)
    before = [state_of(env) for env in envs.envs]
    for bad in (math.nan, math.inf, -1, 0.5):
        with pytest.raises(ActionError):
            envs.step(np.array([0, bad], dtype=object))
    assert [state_of(env) for env in envs.envs] == before


def test_what_was_returned_can_be_written_to_in_vain(data: TextData) -> None:
    """Own: NaN into every array and number that a controller was given."""

    def course(poison: bool) -> Any:
        env = begin(data)
        returned = env.observe()
        for label in ("tune lr x2", "add under slot 0", "no-op"):
            if poison:
                spoil(returned)
                env.action_masks()[:] = 0
                env.permitted_mask()[:] = 1
            observation, reward, *_, info = env.step(index_of(env, label))
            returned = observation, info
        return state_of(env), repr(env.observe()), reward

    assert course(True) == course(False)


def spoil(thing: Any) -> None:
    """Write over everything in arrays, lists and tables."""
    if isinstance(thing, np.ndarray):
        thing[...] = 1 if np.issubdtype(thing.dtype, np.integer) else math.nan
    elif isinstance(thing, dict):
        for key, value in thing.items():
            spoil(value)
            if isinstance(value, int | float | str):
                thing[key] = math.nan
    elif isinstance(thing, list):
        thing[:] = [math.nan] * len(thing)
    elif isinstance(thing, tuple):
        for value in thing:
            spoil(value)


# -- after the end -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 4])
def test_acting_after_the_end(data: TextData, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    env = Phase2Env(config=generous(monkeypatch), data=data)
    env.reset(seed=0)
    env.session.boundary = boundary_at(stage, capacity=env.session.arena.scratch - 1)
    env.step(index_of(env, "stop"))
    assert env.session.finished and kinds(env.session)[-1] == "end"
    before = state_of(env)
    for label in ("no-op", "tune lr x2", "stop", "add under slot 0", "prune 50%"):
        for reach in (env.step, env.peek):
            with pytest.raises(K1Error, match="the episode is over"):
                reach(index_of(env, label))
    assert state_of(env) == before


def test_the_end_taken_back_takes_its_credit_back(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = Phase2Env(config=generous(monkeypatch), data=data)
    env.reset(seed=0)
    before = Books.of(env.session)
    for _ in range(3):
        env.step(index_of(env, "stop"))
        assert env.session.finished and env.session.boundary.accepted == 1
        env.undo()
    earned_nothing(env.session, before, 3)


# -- stage 4 -------------------------------------------------------------------------------------


def test_trivial_benchmarks_and_goals(data: TextData) -> None:
    """Ten of each change no reward, no bound, no credit and no weight."""
    marks = [f"benchmark: {name}" for name in ("newest domain", "worst domain seen")]
    labels = [*marks, "goal: lower the loss by 1 %"] * 3

    def course(*chosen: str) -> tuple[Session, list[float]]:
        session = attack(data, smallest(), stage=4)
        before = Books.of(session)
        outcomes = play(session, *chosen)
        earned_nothing(session, before, 0)
        return session, [outcome.fall for outcome in outcomes]

    plain, rewards = course(*["no-op"] * len(labels))
    own, same = course(*labels)
    assert same == rewards and own.trainer.state_hash() == plain.trainer.state_hash()
    assert own.spent == plain.spent and len(own.autonomy.benchmarks) == 6
    assert not own.finished, "a goal that is reached ends nothing"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_benchmarks_and_goals_before_stage_4(data: TextData, stage: int) -> None:
    session = attack(data, smallest(), stage=stage)
    before = Books.of(session)
    labels = [a.label for a in session.table if a.kind in ("benchmark", "goal")]
    assert all(outcome.impossible for outcome in play(session, *labels))
    assert not session.autonomy.benchmarks and not session.autonomy.goals
    earned_nothing(session, before, 0)
