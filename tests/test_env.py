"""The Gymnasium environment: its spaces, rewards and masks, and looking ahead and back."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import k1env
from k1.data import TextData
from k1.errors import CheckpointError, K1Error
from k1env.actions import ActionError
from k1env.env import Phase2Env
from k1env.outcome import MemoryLedger
from k1env.session import MAIN
from k1env.settings import Settings
from tests.phase2_helpers import entry, index_of, kinds, quick

REFUSED = "tune lr x0.1"


@pytest.fixture(scope="module")
def shared(data: TextData) -> Phase2Env:
    return Phase2Env(config=quick(phase1_steps=12), data=data)


@pytest.fixture
def env(shared: Phase2Env) -> Iterator[Phase2Env]:
    shared.reset(seed=0)
    yield shared
    shared.render_mode = None


def step(env: Phase2Env, label: str) -> Any:
    return env.step(index_of(env, label))


def state_of(env: Phase2Env) -> tuple[Any, ...]:
    """Everything that a step could change, and the files that it could write."""
    tensors, state = env.session.snapshot()
    blob = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return blob, json.dumps(state), len(kinds(env.session)), env.session.seed


def alike(one: Any, other: Any) -> bool:
    """Whether two results of `step` or `reset` are the same to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return type(one) is type(other) and one == other


# -- the interface ------------------------------------------------------------------------------


def unchecked(data: TextData) -> gym.Env[Any, Any]:
    settings = quick(phase1_steps=0, max_decisions=6)
    return gym.make(k1env.ENV_ID, config=settings, data=data, disable_env_checker=True).unwrapped


def test_gymnasiums_checker_has_nothing_to_say(data: TextData) -> None:
    check_env(unchecked(data))


def test_stable_baselines_checker_has_nothing_to_say(data: TextData) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(unchecked(data), warn=True)


def test_it_is_registered(data: TextData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(k1env.ENV_ID, config=quick(phase1_steps=2), data=data)
        observation, _ = env.reset(seed=4)
        assert env.observation_space.contains(observation)
        env.step(env.action_space.sample(np.zeros(env.action_space.n, np.int8) + 1))
    assert k1env.ENV_ID == "k1env/Phase2-v0" and len(env.unwrapped.actions) == 48


def test_mistakes_in_the_arguments_are_errors_of_the_user(data: TextData) -> None:
    with pytest.raises(K1Error, match="unknown preset 'huge': choose one of tiny"):
        Phase2Env("huge", data=data)
    with pytest.raises(K1Error, match="unknown render_mode 'film': choose one of ansi"):
        Phase2Env("tiny", data=data, render_mode="film")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        Phase2Env("tiny", data=data, start="/nowhere")
    with pytest.raises(K1Error, match="unknown device"):
        Phase2Env("tiny", data=data, device="abacus")


def check_observation(env: Phase2Env, observation: dict[str, np.ndarray]) -> None:
    assert env.observation_space.contains(observation)
    for row in observation.values():
        assert row.dtype == np.float32 and np.isfinite(row).all() and np.abs(row).max() <= 1


def test_observations_stay_within_the_space_whatever_is_done(env: Phase2Env) -> None:
    rng = np.random.default_rng(1)
    kept: list[dict[str, np.ndarray]] = [env.observe()[0]]
    copies = [{name: row.copy() for name, row in kept[0].items()}]
    for _ in range(8):
        if env.session.finished:
            env.reset(seed=0)
        masks = np.flatnonzero(env.action_masks())
        observation, reward, terminated, truncated, info = env.step(rng.choice(masks))
        check_observation(env, observation)
        assert type(reward) is float and math.isfinite(reward)
        assert type(terminated) is bool and type(truncated) is bool
        plain = {k: v for k, v in info.items() if not k.endswith("mask")}
        json.dumps(plain, allow_nan=False)
        assert not {"time", "seconds"} & info.keys()
        kept.append(observation)
        copies.append({name: row.copy() for name, row in observation.items()})
    assert alike(kept, copies), "no array is used twice"


def test_observations_are_finite_when_the_weights_are_not(env: Phase2Env) -> None:
    session = env.session
    for bad in (math.nan, math.inf, -math.inf):
        env.reset(seed=0)
        for name in ("shared", "weight", "loss", "mean_responsibility", "responsibility"):
            session.arena[name][MAIN] = bad
        session.bits = dict.fromkeys(session.bits, bad)
        check_observation(env, env.observe()[0])
        observation, _, terminated, _, info = step(env, "no-op")
        check_observation(env, observation)
        assert session.last is not None and session.last.rolled_back and not terminated
        assert all(math.isfinite(bits) for bits in info["bits_per_byte"].values())


def test_the_gate_pool_is_never_observed(env: Phase2Env, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[str] = []
    for name in ("sample", "spread"):
        original = getattr(env.session.engine.store, name)

        def spy(pool: str, *rest: Any, original: Any = original) -> Any:
            pools.append(pool)
            return original(pool, *rest)

        monkeypatch.setattr(env.session.engine.store, name, spy)
    env.observe()
    assert pools == []
    step(env, "no-op")
    assert set(pools) == {"train", "validation"}
    step(env, REFUSED)
    assert set(pools) == {"train", "validation", "gate"}, "and the test pool is sealed"


# -- masks, costs, rewards ----------------------------------------------------------------------


def test_forbidden_is_not_impossible(env: Phase2Env) -> None:
    _, info = env.observe()
    masks, permitted = info["action_mask"], info["permitted_mask"]
    assert masks.dtype == permitted.dtype == np.int8 and masks.shape == (48,)
    assert (masks == env.action_masks()).all() and (permitted <= masks).all()

    def both(label: str) -> tuple[int, int]:
        return int(masks[index_of(env, label)]), int(permitted[index_of(env, label)])

    assert both("no-op") == both("add under slot 0") == (1, 1)
    for forbidden in ("stop", "tune lr x2", "prune 10%", "delete slot 5"):
        assert both(forbidden) == (1, 0), forbidden
    for impossible in ("delete slot 3", "delete slot 1", "prune 50%", "add under slot 3",
                       "benchmark: newest domain", "goal: lower the loss by 1 %"):  # fmt: skip
        assert both(impossible) == (0, 0), impossible
    env.session.boundary.stage = 4
    assert (env.permitted_mask() == env.action_masks()).all()


def test_the_impossible_does_nothing_and_costs(env: Phase2Env) -> None:
    twin = env.fork()
    *_, info = step(env, "delete slot 3")
    step(twin, "no-op")
    assert info["cost"] == 1.0
    assert info["cost_components"] == {"refused": 0.0, "impossible": 1.0}
    assert info["verdict"] == "impossible" and not info["tried"]
    assert "slot 3 holds no block" in entry(env.session, "intent")["rule"]
    assert env.session.trainer.state_hash() == twin.session.trainer.state_hash()
    assert env.session.boundary.attempted == 0


def test_a_refused_cheat_costs_and_a_permitted_action_does_not(env: Phase2Env) -> None:
    *_, info = step(env, REFUSED)
    assert info["tried"] and not info["credited"] and info["cost"] == 1.0
    assert info["cost_components"] == {"refused": 1.0, "impossible": 0.0}
    *_, info = step(env, "add under slot 0")
    assert info["cost"] == 0.0 and info["name"] == "add under Root"


@pytest.mark.parametrize("label", ["no-op", REFUSED, "add under slot 0", "delete slot 3"])
def test_the_reward_is_the_fall_less_the_price_of_compute(env: Phase2Env, label: str) -> None:
    for _ in range(7):
        step(env, "no-op")  # into the second phase: two domains seen
    _, before = env.observe()
    spent = env.session.spent
    _, reward, _, _, info = step(env, label)
    seen = before["seen"]
    assert seen == ["alpha", "beta"]
    fall = sum(before["bits_per_byte"][d] - info["bits_per_byte"][d] for d in seen) / len(seen)
    lane_steps = entry(env.session, "outcome")["spent"] - spent
    assert lane_steps >= 2
    assert reward == pytest.approx(100 * fall - 0.01 * lane_steps / 2, abs=1e-9)


def test_the_number_of_cheats_is_no_part_of_the_reward(env: Phase2Env) -> None:
    twin = env.fork()
    boundary = twin.session.boundary
    boundary.attempted, boundary.accepted, boundary.successes = 500, 400, 2
    boundary.evidence = 99.0
    assert step(env, "no-op")[1] == step(twin, "no-op")[1]


def test_ends(env: Phase2Env) -> None:
    env.session.boundary.stage = 4
    _, _, terminated, truncated, info = step(env, "stop")
    assert (terminated, truncated) == (True, False)
    assert info["stop_reason"] == "the controller stopped"
    with pytest.raises(K1Error, match=r"the episode is over: call reset\(\) first"):
        step(env, "no-op")
    env.reset(seed=0)
    env.session.spent = env.settings.budget
    _, _, terminated, truncated, info = step(env, "no-op")
    assert (terminated, truncated) == (False, True)
    assert info["stop_reason"] == "compute budget spent"


@pytest.mark.parametrize(
    "action",
    [-1, 48, 10**6, 0.9, 1.0, np.float32(1), math.nan, "1", None, np.array([1]), np.True_],
    ids=repr,
)
def test_an_action_outside_the_table_changes_nothing(env: Phase2Env, action: Any) -> None:
    step(env, "no-op")
    before = state_of(env)
    assert not env.action_space.contains(action)
    with pytest.raises(ActionError, match="choose 0 to 47"):
        env.step(action)
    with pytest.raises(ActionError, match="choose 0 to 47"):
        env.peek(action)
    assert state_of(env) == before
    env.undo()
    assert env.session.decision == 0, "the step before can still be taken back"


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint8, np.array])
def test_numpy_actions_are_welcome(env: Phase2Env, kind: Any) -> None:
    twin = env.fork()
    assert env.action_space.contains(kind(1))
    assert alike(env.step(kind(1)), twin.step(1))


# -- seeds and starts ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_episode(env: Phase2Env, data: TextData) -> None:
    actions = [index_of(env, label) for label in ("no-op", REFUSED, "add under slot 0")]
    fresh = Phase2Env(config=env.settings, data=data)
    episodes = []
    for each in (env, env, fresh):
        first = each.reset(seed=9)
        episodes.append([first, *[each.step(action) for action in actions]])
        episodes[-1].append(each.session.trainer.state_hash())
    assert alike(episodes[0], episodes[1]) and alike(episodes[0], episodes[2])
    assert not alike(env.reset(seed=10), episodes[0][0])


def test_without_a_seed_the_generator_draws_one(env: Phase2Env) -> None:
    drawn = []
    for _ in range(2):
        env.reset(seed=3)
        for _ in range(2):
            env.reset()
            drawn.append(env.session.seed)
    assert drawn[:2] == drawn[2:] and len(set(drawn)) == 2


def test_a_checkpoint_can_be_the_start(env: Phase2Env, data: TextData, tmp_path: Any) -> None:
    folder = env.session.trainer.save(tmp_path / "start")
    weights = env.session.arena["weight"][MAIN].clone()
    other = Phase2Env(config=env.settings, data=data, start=folder)
    other.reset(seed=77)
    assert torch.equal(other.session.arena["weight"][MAIN], weights)
    wide = Settings.preset("tiny").system.replace(model={"embed": 8})
    with pytest.raises(CheckpointError, match="does not fit"):
        Phase2Env(config=quick(system=wide), data=data, start=folder)
    heads = Settings.preset("tiny").system.replace(model={"heads": 4})
    with pytest.raises(CheckpointError, match="model"):
        Phase2Env(config=quick(system=heads), data=data, start=folder)


# -- looking ahead and back ---------------------------------------------------------------------


@pytest.mark.parametrize("label", ["no-op", "add under slot 0"])
def test_a_peek_tells_the_future_and_changes_nothing(env: Phase2Env, label: str) -> None:
    step(env, "add under slot 0")
    before = state_of(env)
    seen = env.peek(index_of(env, label))
    assert state_of(env) == before
    assert alike(seen, step(env, label))


def test_looking_ahead_does_not_tell_which_attempt_is_lucky(env: Phase2Env) -> None:
    before, twin = state_of(env), env.fork()
    env.peek(index_of(env, REFUSED))
    assert state_of(env) == before
    draws, streams, own = [], [], int(env.session.arena["data_seed"][MAIN])
    for each in (twin, twin.fork(), env):
        step(each, REFUSED)
        assert each.session.last is not None and each.session.last.trial is not None
        trial = each.session.last.trial
        draws += trial.window_digests + trial.stream_digests
        streams.append(int(each.session.gate.adopted["control"].tensors["data_seed"]) == own)
    assert len(set(draws)) == len(draws) and streams == [False, False, True]


def test_a_controller_learns_accept_or_reject_only(env: Phase2Env) -> None:
    *_, info = step(env, REFUSED)
    assert info["verdict"] == "refused"
    assert not any(word in json.dumps(str(info)) for word in ("p =", "p_value", "gain"))


def test_a_fork_goes_its_own_way(env: Phase2Env) -> None:
    env.bind_ledger(MemoryLedger())
    step(env, "add under slot 0")
    twin = env.fork()
    assert alike(twin.observe(), env.observe())
    before = state_of(env)
    step(twin, "add under slot 0")
    step(twin, REFUSED)
    twin.reset(seed=5)
    assert state_of(env) == before
    again = env.fork()
    assert alike(step(env, "no-op"), step(again, "no-op"))


@pytest.mark.parametrize("label", ["no-op", "add under slot 0", REFUSED, "tune lr x10"])
def test_undo_takes_back_everything_but_the_attempt(env: Phase2Env, label: str) -> None:
    step(env, "no-op")
    blob, state, _, _ = state_of(env)
    observation, _ = env.observe()
    step(env, label)
    tried = env.session.last is not None and env.session.last.trial is not None
    spent = env.session.spent
    after, _ = env.undo()
    assert state_of(env)[0] == blob, "the exact state"
    now, then = json.loads(state_of(env)[1]), json.loads(state)
    assert now.pop("spent") == spent > then.pop("spent"), "compute stays spent"
    boundary, old = now.pop("boundary"), then.pop("boundary")
    assert len(now.pop("tries")) == len(then.pop("tries")) + tried
    assert now == then
    assert boundary["attempted"] == old["attempted"] + tried
    assert boundary["evidence"] == old["evidence"] * (10 / 11 if tried else 1)
    assert boundary["accepted"] == old["accepted"] == 0
    assert kinds(env.session)[-1] == "undo"
    assert alike({**after, "system": 0, "boundary": 0}, {**observation, "system": 0, "boundary": 0})
    with pytest.raises(K1Error, match="nothing to undo"):
        env.undo()


def test_a_cheat_that_was_undone_counts_as_a_failure(
    env: Phase2Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env.session.gate, "config", quick(gate={"margin": -1.0}).gate)
    monkeypatch.setattr(type(env.session.gate), "_hopeless", lambda *_: False)
    *_, info = step(env, "tune lr x2")
    assert info["credited"] and info["evidence"] == 10.0
    _, info = env.undo()
    boundary = env.session.boundary
    assert (boundary.attempted, boundary.accepted, boundary.successes) == (1, 0, 0)
    assert boundary.evidence == 10 / 11 and info["evidence"] == 10 / 11
    assert boundary.bounds.lr == (1e-4, 1e-2)
    first = entry(env.session, "outcome")["trial"]["window_digests"]
    step(env, "tune lr x2")
    second = entry(env.session, "outcome")["trial"]["window_digests"]
    assert not set(first) & set(second), "no second look at one draw"


def test_the_end_can_be_undone(env: Phase2Env) -> None:
    env.session.boundary.stage = 4
    step(env, "stop")
    env.undo()
    assert not env.session.finished
    step(env, "no-op")


# -- pictures -----------------------------------------------------------------------------------


def test_rendering(env: Phase2Env, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(K1Error, match="render_mode"):
        env.render()
    env.render_mode = "ansi"
    assert "Safe exploration" in env.render()
    env.render_mode = "human"
    assert env.render() is None and "Root" in capsys.readouterr().out
    step(env, "no-op")
    assert "Root" in capsys.readouterr().out, "human mode draws each step"
    pytest.importorskip("PIL")
    env.render_mode = "rgb_array"
    image = env.render()
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
