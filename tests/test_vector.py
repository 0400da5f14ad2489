"""The vector environment: each lane goes as an environment by itself, in every autoreset mode."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

import k1env
from k1.data import TextData
from k1.errors import K1Error
from k1env.actions import ActionError
from k1env.env import Phase2Env
from k1env.instances import Instance
from k1env.outcome import MemoryLedger
from k1env.vector import Phase2VectorEnv
from tests.phase2_helpers import index_of, kinds, quick
from tests.vector_helpers import same, scripted, varied

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
TURNS = 6


@pytest.fixture(scope="module")
def shared(data: TextData) -> Phase2VectorEnv:
    return Phase2VectorEnv(2, config=quick(max_decisions=3), data=data, device="cpu")


@pytest.fixture
def pair(shared: Phase2VectorEnv) -> Phase2VectorEnv:
    shared.reset(seed=0)
    return shared


# -- each lane as an environment by itself ------------------------------------------------------


def test_every_lane_has_the_trajectory_of_an_environment_by_itself(data: TextData) -> None:
    """Bit for bit, though trials have to wait: there is room for one and a half."""
    settings, ledgers = varied(), [MemoryLedger() for _ in range(3)]
    together = Phase2VectorEnv(
        3, config=settings, data=data, device="cpu", ledgers=ledgers, spare_lanes=9
    )
    alone = [Phase2Env(config=each, data=data, device="cpu") for each in settings]
    batch, _ = together.reset(seed=[3, 1, 4])
    for i, (env, seed) in enumerate(zip(alone, (3, 1, 4), strict=True)):
        observation, _ = env.reset(seed=seed)
        assert same(observation, {name: rows[i] for name, rows in batch.items()})
    for turn in range(TURNS):
        actions = scripted(alone[0], turn)
        results = together.step_each(actions)
        for env, action, result in zip(alone, actions, results, strict=True):
            *step, info = env.step(action)
            end = step[2] or step[3]
            assert end == (result.final is not None)
            if end:
                assert result.final is not None and same(result.final, (step[0], info))
                step[0], info = env.reset()
            found = (result.observation, result.reward, result.terminated, result.truncated)
            assert same(found, tuple(step)) and same(result.info, info)
    for env, ledger, seated in zip(alone, ledgers, together.envs, strict=True):
        assert isinstance(env.ledger, MemoryLedger)
        assert ledger.entries == env.ledger.entries, "state hashes and trials' figures included"
        assert seated.session.summary() == env.session.summary()
    logged = [kind for ledger in ledgers for kind, _ in ledger.entries]
    tried = [d["trial"] for ledger in ledgers for k, d in ledger.entries if k == "outcome"]
    assert logged.count("end") >= 3 and sum(trial is not None for trial in tried) >= 6


def test_every_lane_has_a_world_of_its_own(data: TextData) -> None:
    """Worlds differ in domains, shifts, tree, start and budget; a reset can name others."""
    one = Instance(
        name="one", domains=("gamma", "alpha"), shifts=(2,), branching=(3, 2), lr=3e-3, cooldown=7,
        top_k=2, exploration=0.25, pretrained=True, budget=90, seed=11,
    )  # fmt: skip
    two = replace(one, name="two", domains=("beta",), shifts=(), branching=(2, 2, 2), budget=80)
    together = Phase2VectorEnv(2, config=quick(), data=data, device="cpu", instance=[one, two])
    for first, second in ((one, two), (two, one)):
        alone = [Phase2Env(config=quick(), data=data, instance=i) for i in (first, second)]
        options = None if first is one else {"instance": [first, second]}
        batch, _ = together.reset(seed=[8, 9], options=options)
        for i, env in enumerate(alone):
            observation, _ = env.reset(seed=8 + i)
            assert same(observation, {name: rows[i] for name, rows in batch.items()})
            assert together.envs[i].session.world.instance == (first, second)[i]
        for action in (0, index_of(alone[0], "tune lr x2")):
            for env, result in zip(alone, together.step_each([action] * 2), strict=True):
                assert same((result.observation, result.reward), env.step(action)[:2])


def test_worlds_that_do_not_go_together(data: TextData) -> None:
    sets = [("train", "test/0"), ("default", "train")]
    for worlds, why in zip(sets, ("different texts", "default world"), strict=True):
        with pytest.raises(K1Error, match=why):
            Phase2VectorEnv(2, config=quick(), device="cpu", instance=worlds)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_it_does_what_gymnasium_does_with_single_environments(
    data: TextData, mode: AutoresetMode
) -> None:
    arguments: dict[str, Any] = {
        "config": quick(max_decisions=2, phase_decisions=1),
        "data": data, "device": "cpu",
    }  # fmt: skip
    plain = gym.make_vec(
        k1env.ENV_ID, 2, "sync", vector_kwargs={"autoreset_mode": mode}, **arguments
    )
    native = gym.make_vec(k1env.ENV_ID, 2, autoreset_mode=mode, **arguments)
    assert isinstance(native, Phase2VectorEnv) and native.metadata["autoreset_mode"] is mode
    assert same(plain.reset(seed=7), native.reset(seed=7))
    mask = np.array([False, True])
    for turn in range(5):
        if turn == 1:  # from here on, their episodes end at different steps
            some = [env.reset(options={"reset_mask": mask.copy()}) for env in (plain, native)]
            assert same(*some) and same(some[0][1]["_stage"], mask)
        actions = np.array([turn % 2, 0])
        one, other = plain.step(actions), native.step(actions)
        assert same(one, other)
        ended = one[2] | one[3]
        if mode == AutoresetMode.DISABLED and ended.any():
            some = [env.reset(options={"reset_mask": ended.copy()}) for env in (plain, native)]
            assert same(*some)


def test_it_is_what_make_vec_makes(data: TextData) -> None:
    for mode in (None, "vector_entry_point"):
        env = gym.make_vec(k1env.ENV_ID, 3, mode, config=quick(phase1_steps=0), data=data)
        assert isinstance(env, Phase2VectorEnv) and env.num_envs == 3
        assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        assert env.spec is not None and env.render_mode is None and env.render() is None
        observations, infos = env.reset(seed=0)
        assert env.observation_space.contains(observations)
        assert env.action_space.contains(env.action_space.sample())
        assert env.single_action_space.n == 48 == len(env.actions)
        masks = env.action_masks()
        assert masks.shape == (3, 48) and same(masks, infos["action_mask"])
        assert infos["_action_mask"].all() and infos["_hyper"].all()
        env.close()
        assert env.closed


def test_seeds(pair: Phase2VectorEnv) -> None:
    def seeds() -> list[int]:
        return [env.session.seed for env in pair.envs]

    pair.reset(seed=11)
    assert seeds() == [11, 12] and pair.np_random_seed == (11, 12)
    pair.reset(seed=[5, 2])
    assert seeds() == [5, 2]
    pair.reset()
    drawn = seeds()
    pair.reset(seed=[5, 2])
    pair.reset()
    assert seeds() == drawn and len(set(drawn)) == 2
    assert pair.np_random[0] is pair.envs[0].np_random


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])])
def test_wide_calls_come_to_the_same(data: TextData, device: str) -> None:
    """Products of other widths add up in another order, so not to the last bit."""
    together = Phase2VectorEnv(3, config=varied(), data=data, device=device, wide=True)
    alone = [Phase2Env(config=each, data=data, device=device) for each in varied()]
    together.reset(seed=0)
    for seed, env in enumerate(alone):
        env.reset(seed=seed)
    for turn in range(3):
        actions = scripted(alone[0], turn)
        results = together.step_each(actions)
        for env, action, result in zip(alone, actions, results, strict=True):
            observation, reward, terminated, truncated, info = env.step(action)
            last, its = result.final or (result.observation, result.info)
            assert (result.terminated, result.truncated) == (terminated, truncated)
            assert its["verdict"] == info["verdict"]
            for name, row in observation.items():
                np.testing.assert_allclose(last[name], row, atol=2e-2, err_msg=name)
            assert result.reward == pytest.approx(reward, abs=0.5)
            if terminated or truncated:
                env.reset()


# -- looking at single environments -------------------------------------------------------------


def test_single_environments_can_look_ahead_but_not_back(pair: Phase2VectorEnv) -> None:
    seen = pair.envs[1].peek(1)
    assert same(pair.step_each([0, 1])[1].observation, seen[0])
    fork = pair.envs[0].fork()
    fork.step(0)
    fork.undo()
    with pytest.raises(K1Error, match="nothing to undo"):
        pair.envs[0].undo()


def test_nothing_is_logged_unless_asked_for(pair: Phase2VectorEnv, data: TextData) -> None:
    pair.envs[0].session.trainer.state_hash = lambda: pytest.fail("no hash is needed")
    pair.step([0, 0])
    del pair.envs[0].session.trainer.state_hash
    ledgers = [MemoryLedger()]
    env = Phase2VectorEnv(1, config=quick(), data=data, device="cpu", ledgers=ledgers)
    env.reset(seed=0)
    env.step([0])
    assert kinds(env.envs[0].session) == ["start", "intent", "outcome"]


# -- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[0, 48], [-1, 0], [0, 0.9], np.array([0.0, 1.0])])
def test_an_action_outside_the_table_changes_nothing_anywhere(
    pair: Phase2VectorEnv, bad: Any
) -> None:
    before = [env.session.trainer.state_hash() for env in pair.envs]
    with pytest.raises(ActionError, match="choose 0 to 47"):
        pair.step(bad)
    assert [env.session.trainer.state_hash() for env in pair.envs] == before
    assert [env.session.decision for env in pair.envs] == [0, 0]


def test_mistakes_in_calls(pair: Phase2VectorEnv, data: TextData) -> None:
    with pytest.raises(K1Error, match="3 actions for 2 environments"):
        pair.step([0, 0, 0])
    with pytest.raises(ValueError, match="3 seeds for 2 environments"):
        pair.reset(seed=[1, 2, 3])
    for mask, error, words in (
        ([True, False], TypeError, "must be a boolean numpy array"),
        (np.array([1, 0]), TypeError, "must be a boolean numpy array"),
        (np.array([True]), ValueError, "must have shape"),
        (np.array([False, False]), ValueError, "must be True somewhere"),
    ):
        with pytest.raises(error, match=words):
            pair.reset(options={"reset_mask": mask})
    fresh = Phase2VectorEnv(2, config=quick(max_decisions=1, phase1_steps=0), data=data,
                            device="cpu", autoreset_mode="Disabled")  # fmt: skip
    with pytest.raises(ResetNeeded):
        fresh.step([0, 0])
    with pytest.raises(ResetNeeded, match=r"\[1\] had no reset yet"):
        fresh.reset(options={"reset_mask": np.array([True, False])})
    fresh.reset(seed=0)
    fresh.step([0, 0])
    with pytest.raises(K1Error, match=r"environments \[0, 1\] are over"):
        fresh.step([0, 0])


def test_mistakes_in_the_arguments(data: TextData) -> None:
    def make(num_envs: int = 2, **arguments: Any) -> Phase2VectorEnv:
        return Phase2VectorEnv(num_envs, **{"config": quick(), "data": data, **arguments})

    wide = quick().system.replace(train={"batch": 8})
    for arguments, words in (
        ({"num_envs": 0}, "use 1 or more"),
        ({"render_mode": "ansi"}, "not rendered"),
        ({"config": [quick()] * 3}, "config has 3 entries for 2"),
        ({"ledgers": [MemoryLedger()]}, "ledgers has 1 entries for 2"),
        ({"config": [quick(), quick(system=wide)]}, "have one system"),
        ({"spare_lanes": 5}, "a trial takes up to 6 lanes"),
    ):
        with pytest.raises(K1Error, match=words):
            make(**arguments)


def test_an_error_on_the_way_calls_for_a_reset(
    pair: Phase2VectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pair.envs[0].session.engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", lambda *_: exec("raise RuntimeError('dead')"))
        with pytest.raises(RuntimeError, match="dead"):
            pair.step([0, 0])
    with pytest.raises(ResetNeeded):
        pair.step([0, 0])
    pair.reset(seed=0)
    pair.step([0, 0])


# -- memory -------------------------------------------------------------------------------------


def numbers_held() -> int:
    """How many numbers all tensors in memory have."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum(tensor.numel() for tensor in tensors)


def test_memory_is_flat(data: TextData) -> None:
    settings = quick(phase1_steps=0, max_decisions=2)
    env = Phase2VectorEnv(3, config=settings, data=data, device="cpu")
    env.reset(seed=0)
    held = []
    for turn in range(24):
        env.step([0, 1, scripted(env.envs[0], 1)[0]])
        if turn in (7, 23):
            held.append(numbers_held())
    assert held[1] <= held[0] * 1.01
