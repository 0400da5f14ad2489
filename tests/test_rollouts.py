"""Rollouts without a barrier hold what steps of all environments together would have held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from k1.data import TextData
from k1env.env import Phase2Env
from k1env.sb3 import SB3VecEnv
from k1env.vector import Phase2VectorEnv
from policies.ppo import TrainingEnv, make_model
from policies.reference import Reference
from policies.rollouts import collect
from tests.phase2_helpers import quick
from tests.test_ppo import LABELS, SETTINGS, SIZES, TABLE

STEPS = 8


def started(data: TextData, algorithm: str, paired: bool = False) -> tuple[Any, TrainingEnv]:
    """An algorithm before its first rollout, and its environment; episodes are short."""
    config = quick(phase1_steps=0, max_decisions=3)
    env = TrainingEnv(
        SB3VecEnv(num_envs=3, config=config, data=data, device="cpu", starts=4),
        replace(SETTINGS, n_steps=STEPS, paired=paired),
        TABLE,
    )
    model = make_model(algorithm, env, env.settings, LABELS, SIZES, seed=3, device="cpu")
    if paired:
        env.reference = Reference({n: list(np.linspace(0, n, 9)) for n in range(4)})
    env.vec_env.prepare()
    model._setup_learn(100, None, False)
    return model, env


@pytest.mark.parametrize("algorithm", ["maskable", "plain"])
def test_a_rollout_is_that_of_steps_of_all_together(algorithm: str, data: TextData) -> None:
    model, env = started(data, algorithm, paired=True)
    told: list[int] = []
    collect(model, env, masked=algorithm == "maskable", seed=5, progress=told.append)
    buffer = model.rollout_buffer
    assert buffer.full and sum(told) == STEPS * 3 == model.num_timesteps

    twin, other = started(data, algorithm, paired=True)
    observation = twin._last_obs
    starts, tried = np.ones(3), 0
    for step in range(STEPS):
        for name, array in observation.items():
            assert np.array_equal(array, buffer.observations[name][step])
        if algorithm == "maskable":
            masks = np.stack(other.env_method("action_masks"))
            assert np.array_equal(masks, buffer.action_masks[step])
            assert masks[range(3), buffer.actions[step, :, 0].astype(int)].all()
        assert np.array_equal(buffer.episode_starts[step], starts)
        observation, rewards, starts, infos = other.step(buffer.actions[step, :, 0].astype(int))
        assert np.array_equal(rewards, buffer.rewards[step])
        tried += sum(info["tried"] for info in infos)
    assert tried > 0, "trials are what takes unequally long"
    for name, array in observation.items():
        assert np.array_equal(array, model._last_obs[name])
    assert np.array_equal(starts, model._last_episode_starts)
    assert other.state_dict() == env.state_dict()
    assert (other.episodes, other.counts) == (env.episodes, env.counts)
    assert len(env.episodes) >= 6


@pytest.mark.parametrize("algorithm", ["maskable", "plain"])
def test_values_and_probabilities_are_the_policys(algorithm: str, data: TextData) -> None:
    model, env = started(data, algorithm)
    collect(model, env, masked=algorithm == "maskable", seed=5, progress=lambda made: None)
    buffer, policy = model.rollout_buffer, model.policy
    for step in range(STEPS):
        seen = {name: torch.from_numpy(array[step]) for name, array in buffer.observations.items()}
        actions = torch.from_numpy(buffer.actions[step, :, 0]).long()
        masks = {"action_masks": buffer.action_masks[step]} if algorithm == "maskable" else {}
        values, logs, _ = policy.evaluate_actions(seen, actions, **masks)
        np.testing.assert_allclose(buffer.values[step], values.detach().flatten(), atol=1e-6)
        np.testing.assert_allclose(buffer.log_probs[step], logs.detach(), atol=1e-5)
    last = policy.predict_values({n: torch.from_numpy(a) for n, a in model._last_obs.items()})
    going_on = 1.0 - model._last_episode_starts
    wanted = buffer.rewards[-1] + env.settings.gamma * last.detach().numpy().flatten() * going_on
    np.testing.assert_allclose(buffer.returns[-1], wanted, rtol=1e-5)


def test_draws_follow_the_seed_and_go_on(data: TextData) -> None:
    drawn = []
    for seed in (5, 5, 6):
        model, env = started(data, "maskable")
        rolls = []
        for _ in range(2):
            collect(model, env, masked=True, seed=seed, progress=lambda made: None)
            rolls.append(model.rollout_buffer.actions.tolist())
        drawn.append(rolls)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_environments_go_on_by_themselves(data: TextData, monkeypatch: pytest.MonkeyPatch) -> None:
    """One environment's trial does not hold up the others."""
    envs = Phase2VectorEnv(2, config=quick(phase1_steps=0), data=data, device="cpu")
    trial = next(i for i, label in enumerate(envs.actions) if label == "tune lr x2")
    order: list[int] = []

    def choose(number: int, observation: Any) -> int:
        order.append(number)
        return trial if number == 0 and order.count(0) == 1 else 0

    with pytest.raises(ResetNeeded, match="call reset"):
        envs.play_each(choose, 1)
    envs.reset(seed=0)
    results = envs.play_each(choose, 4)
    assert [len(made) for made in results] == [4, 4] and results[0][0].info["tried"]
    assert order[:4] == [0, 1, 1, 1], "before the trial was over"
    assert isinstance(envs.envs[0], Phase2Env)
